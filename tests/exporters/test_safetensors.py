"""The dense export is the checkpoint that the artifact stands for, as any other tool would read it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.educational_decoder import expand
from artifact.examples import (
    cut_into,
    damage,
    denses,
    gaussian,
    make_artifact,
    recipe,
    rewrite,
    rtn,
    rule,
    run,
    save,
    save_folder,
    seal,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_model
from torch import nn

from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.export import export
from qcompress.compress.load import load_state_dict
from qcompress.errors import ArtifactError, OutputError, ResourceError

TENSORS = {
    "a": gaussian(12, 8),
    "b": gaussian(6, 4, 2, seed=1, dtype=torch.float16),
    "c": gaussian(16, 8, seed=2, dtype=torch.bfloat16),
    "d": gaussian(8, 4, seed=3, dtype=torch.float64),
    "vector": gaussian(16, seed=4),
    "scalar": torch.tensor(2.5),
    "kept": torch.arange(5),
    "none": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
}
RULES = (
    rule("a", "rtn", bits=3, axis=1),
    rule("b", "mse", bits=2, axis=(0, 2)),
    rule("c", "squant", bits=4, group_size=4),
    rule("vector", "rtn", bits=8),
    rule("scalar", "rtn", bits=8),
    rule("*", "rtn", bits=2, granularity="tensor"),
)


@pytest.mark.parametrize("block", [8, 24, 1 << 18])
@pytest.mark.parametrize("choice", ["packed", "auto"])
def test_the_export_holds_what_loading_gives(
    choice: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if choice == "packed":
        cut_into(block, monkeypatch)
    source = save(tmp_path / "m.safetensors", TENSORS, {"note": "any text", "format": "pt"})
    run(source, tmp_path / "a.safetensors", recipe(*RULES), choice)
    n_bytes = export(read_artifact(tmp_path / "a.safetensors"), tmp_path / "d.safetensors", force=False).n_bytes
    assert n_bytes == (tmp_path / "d.safetensors").stat().st_size
    found = load_file(tmp_path / "d.safetensors")
    assert denses(found) == denses(load_state_dict(tmp_path / "a.safetensors")) == expand(tmp_path / "a.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in TENSORS.items()
    }
    with safe_open(tmp_path / "d.safetensors", "pt") as library:
        assert library.metadata() == {"note": "any text", "format": "pt"}


def test_of_kept_tensors_alone_the_export_is_the_checkpoint_in_as_many_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", TENSORS, {"format": "pt"})
    run(source, tmp_path / "a.safetensors", recipe(rule("*")))
    export(read_artifact(tmp_path / "a.safetensors"), tmp_path / "d.safetensors", force=False)
    assert denses(load_file(tmp_path / "d.safetensors")) == denses(TENSORS)
    assert (tmp_path / "d.safetensors").stat().st_size == source.stat().st_size


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight


def test_a_name_that_metadata_ties_stays_in_the_metadata(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(Tied(), str(tmp_path / "m.safetensors"))
    run(tmp_path / "m.safetensors", tmp_path / "a.safetensors", rtn(4))
    export(read_artifact(tmp_path / "a.safetensors"), tmp_path / "d.safetensors", force=False)
    before, after = read_checkpoint(tmp_path / "m.safetensors"), read_checkpoint(tmp_path / "d.safetensors")
    assert after.tied == before.tied
    assert after.tensors == before.tensors


def test_a_name_that_the_metadata_of_another_shard_ties_gets_no_data(tmp_path: Path) -> None:
    source = save_folder(
        tmp_path / "in", {"a.safetensors": {"w": gaussian(4, 8)}, "b.safetensors": {"v": gaussian(4, 8)}}
    )
    save(source / "a.safetensors", {"w": gaussian(4, 8)}, {"format": "pt", "alias": "v"})
    run(source, tmp_path / "out", rtn(4))
    export(read_artifact(tmp_path / "out"), tmp_path / "dense", force=False)
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "dense")
    assert (after.tied, after.tensors) == (before.tied, before.tensors) == ({"alias": "v"}, before.tensors)


def test_a_vector_and_a_scalar_are_exported_whatever_their_axis(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"scalar": torch.tensor(2.5), "vector": gaussian(5)})
    run(source, tmp_path / "a.safetensors", recipe(rule("scalar", "rtn", bits=8), rule("vector", "rtn", bits=8)))

    def other_axes(header: Any, manifest: Any, data: bytearray) -> None:
        for name, own in manifest["tensors"].items():
            own["axis"] = [1]
            seal(header, manifest, data, name)

    artifact = rewrite(tmp_path / "a.safetensors", other_axes)
    export(read_artifact(artifact), tmp_path / "d.safetensors", force=False)
    assert denses(load_file(tmp_path / "d.safetensors")) == denses(load_state_dict(artifact)) == expand(artifact)


def test_a_copy_that_the_checkpoint_stored_is_stored_again_in_its_own_shard(tmp_path: Path) -> None:
    a, b = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    embedding = gaussian(16, 8)
    shards = {a: {"embed_tokens.weight": embedding, "w": gaussian(4, 8)}, b: {"lm_head.weight": embedding.clone()}}
    source = save_folder(tmp_path / "in", shards, {"tie_word_embeddings": True})
    run(source, tmp_path / "out", rtn(4))
    n_bytes = export(read_artifact(tmp_path / "out"), tmp_path / "dense", force=False).n_bytes
    assert n_bytes == sum(path.stat().st_size for path in (tmp_path / "dense").iterdir())
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "dense")
    assert [(s.path.name, set(s.tensors)) for s in after.shards] == [
        (s.path.name, set(s.tensors)) for s in before.shards
    ]
    assert after.tied == before.tied
    dense = {name: tensor for shard in (a, b) for name, tensor in load_file(tmp_path / "dense" / shard).items()}
    assert denses(dense) == expand(tmp_path / "out")


def test_exporting_twice_gives_equal_bytes_and_never_the_artifact_itself(tmp_path: Path) -> None:
    path = make_artifact(tmp_path)
    artifact = read_artifact(path)
    for name in ("d", "e"):
        export(artifact, tmp_path / f"{name}.safetensors", force=False)
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        export(artifact, tmp_path / "d.safetensors", force=False)
    (tmp_path / "link.safetensors").symlink_to(path)
    for output in (path, tmp_path / "link.safetensors", tmp_path):
        with pytest.raises(OutputError, match="is the input itself"):
            export(artifact, output, force=True)
    assert path.is_file()


def test_a_damaged_tensor_leaves_nothing(tmp_path: Path) -> None:
    path = make_artifact(tmp_path)
    damage(path, "w.qc.codes")
    names = {one.name for one in tmp_path.iterdir()}
    with pytest.raises(ArtifactError, match="tensor 'w'"):
        export(read_artifact(path), tmp_path / "d.safetensors", force=False)
    assert {one.name for one in tmp_path.iterdir()} == names


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_artifact(tmp_path)
    names = {one.name for one in tmp_path.iterdir()}

    def pwrite(*_: Any) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResourceError, match="free some space"):
        export(read_artifact(path), tmp_path / "d.safetensors", force=False)
    assert {one.name for one in tmp_path.iterdir()} == names


def test_a_stored_copy_that_the_metadata_names_too_is_stored_again(tmp_path: Path) -> None:
    weight = gaussian(8, 6)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    source = tmp_path / "in"
    source.mkdir()
    save(
        source / "model.safetensors",
        dict.fromkeys(names, weight.clone()) | {names[1]: weight.clone()},
        {"format": "pt", names[1]: names[0]},
    )
    (source / "config.json").write_text('{"tie_word_embeddings": true}')
    run(source, tmp_path / "small", rtn(4))
    export(read_artifact(tmp_path / "small"), tmp_path / "dense", force=False)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(dense) == set(names)
    assert torch.equal(dense[names[0]], dense[names[1]])
