"""Kept tensors that are stored entropy coded: fewer bytes, and every reader gets each bit back."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact import unbounded_method
from artifact.educational_decoder import expand
from artifact.examples import (
    damage,
    dense,
    denses,
    gaussian,
    plan_for,
    recipe,
    rewrite,
    rtn,
    rule,
    run,
    save,
    save_folder,
    seal,
    verify,
)
from artifact.test_hostile import refusal
from artifact.unbounded_method import RoundedConfig
from safetensors.torch import load_file
from torch import Tensor

import qcompress
from qcompress.artifact.manifest import unknown_lengths
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.coding import planes
from qcompress.compress.compress import compress
from qcompress.compress.export import export
from qcompress.compress.load import load_state_dict
from qcompress.encode import write_kept
from qcompress.errors import ArtifactError, ResourceError
from qcompress.plan.plan import LEAST_CODED, make_plan
from qcompress.recipe import parse_recipe, recipe_yaml
from qcompress.report.gather import gather_report
from qcompress.types.encoded import Fitted, Kept
from qcompress.types.plan import Keep, Recipe, Rule, TensorInfo
from qcompress.types.run import Options


def patterns(count: int, dtype: torch.dtype) -> Tensor:
    """Any bits at all: numbers of every size, NaN of many payloads, infinities, both zeros."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer(bytearray(random.Random(count).randbytes(count * size)), dtype=dtype)


def network() -> dict[str, Tensor]:
    """Every dtype, shape and kind of value that matters here."""
    nan = torch.full((1500,), float("nan"))
    nan.view(torch.int32)[::3] ^= 0x12345
    return {
        "w": gaussian(6, 8),
        "brain": gaussian(60, 70, dtype=torch.bfloat16) / 50,
        "single": gaussian(40, 41) / 50,
        "half": gaussian(30, 70, dtype=torch.float16) / 50,
        "double": gaussian(700).double(),
        "rounded": gaussian(1200).bfloat16().float(),
        "bits": patterns(2100, torch.bfloat16),
        "wide bits": patterns(1100, torch.float32),
        "nan": nan,
        "zero": torch.full((1100,), -0.0),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.empty(0, 3),
        "small": gaussian(50),
        "count": torch.arange(600),
        "mask": torch.ones(5000, dtype=torch.bool),
    }


CODED = {"brain", "single", "half", "double", "rounded", "bits", "wide bits", "nan", "zero"}


def kept(**options: Any) -> Recipe:
    return replace(recipe(rule("*")), **{"keep_coding": "auto", **options})


def compressed(folder: Path, asked: Recipe, tensors: dict[str, Tensor] | None = None, **options: Any) -> Path:
    source = save(folder / "in.safetensors", network() if tensors is None else tensors)
    run(source, folder / "out.safetensors", asked, force=True, **options)
    return folder / "out.safetensors"


def coded_names(path: Path) -> set[str]:
    return {name for file in read_artifact(path).files for name in file.manifest.coded}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("coding", ["auto", "zstd", "ans"])
def test_every_reader_gives_back_every_bit(coding: str, compact: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", network())
    report = run(source, tmp_path / "out.safetensors", kept(keep_coding=coding), compact=compact)
    verify(tmp_path / "out.safetensors")
    assert coded_names(tmp_path / "out.safetensors") == CODED
    state = load_state_dict(tmp_path / "out.safetensors")
    assert denses(state) == denses(network())
    assert expand(tmp_path / "out.safetensors") == denses(network())
    export(read_artifact(tmp_path / "out.safetensors"), tmp_path / "dense.safetensors", force=True)
    assert denses(load_file(tmp_path / "dense.safetensors")) == denses(network())
    gathered = gather_report(tmp_path / "out.safetensors")
    mine = {layer.name: (layer.bytes, layer.baseline_bytes, layer.dtype, layer.method) for layer in report.layers}
    assert {one.name: (one.bytes, one.baseline_bytes, one.dtype, one.method) for one in gathered.layers} == mine
    assert gathered.size.parts == report.size.parts
    assert report.size.parts.kept == sum(bytes_ for bytes_, *_ in mine.values())
    for name, (stored, own, *_) in mine.items():
        assert stored <= own if name in CODED else stored == own
    assert mine["brain"][0] < 0.75 * mine["brain"][1]
    # Nothing is saved by coding bits that do not repeat: they lie there as they are.
    assert mine["bits"][0] == mine["bits"][1]


def test_modules_and_tied_names_get_them_too(tmp_path: Path) -> None:
    module = torch.nn.Linear(70, 40, dtype=torch.bfloat16)
    tensors = {"weight": gaussian(40, 70, dtype=torch.bfloat16), "bias": gaussian(40, dtype=torch.bfloat16)}
    source = save(tmp_path / "in.safetensors", tensors, {"format": "pt", "tied": "weight"})
    run(source, tmp_path / "out.safetensors", kept())
    qcompress.load_into(module, tmp_path / "out.safetensors", strict=False)
    assert denses(module.state_dict()) == denses(tensors)
    assert dense(load_state_dict(tmp_path / "out.safetensors")["tied"]) == dense(tensors["weight"])


@pytest.mark.parametrize("choice", ["packed", "ans"])
@pytest.mark.parametrize("compact", [False, True])
def test_it_goes_with_weights_that_are_compressed(
    choice: str, compact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With codes of a fixed and of a varying length, a pool of unbounded ones, and half precision."""
    unbounded_method.register(monkeypatch)
    rules = (rule("w", "rtn", bits=3), Rule("p", "rounded", RoundedConfig(), "rule p"), rule("*"))
    tensors = {**network(), "p": gaussian(9, 20), "halved": gaussian(64, 40)}
    asked = replace(recipe(*rules), keep_coding="auto", keep_dtype="f16")
    source = save(tmp_path / "in.safetensors", tensors)
    run(source, tmp_path / "out.safetensors", asked, choice, compact=compact)
    verify(tmp_path / "out.safetensors")
    plain = replace(asked, keep_coding=None)
    run(source, tmp_path / "plain.safetensors", plain, choice, compact=compact)
    state = load_state_dict(tmp_path / "out.safetensors")
    assert denses(state) == denses(load_state_dict(tmp_path / "plain.safetensors"))
    assert denses(state) == expand(tmp_path / "out.safetensors")
    assert dense(state["halved"]) == dense(tensors["halved"].half().float())
    assert "halved" in coded_names(tmp_path / "out.safetensors")
    sizes = [(tmp_path / name).stat().st_size for name in ("out.safetensors", "plain.safetensors")]
    assert sizes[0] < sizes[1]


def test_what_a_method_has_adjusted_is_coded(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path / "in.safetensors", {"w": gaussian(6, 8), "bias": gaussian(1100)}))
    asked = replace(rtn(4, "w"), keep_coding="auto")
    fitted = Fitted({"bias": Kept(torch.arange(1100).float())})
    compress(checkpoint, plan_for(checkpoint, asked), Options(tmp_path / "out.safetensors"), fitted)
    assert coded_names(tmp_path / "out.safetensors") == {"bias"}
    assert torch.equal(load_state_dict(tmp_path / "out.safetensors")["bias"], torch.arange(1100).float())


def test_a_folder_holds_them_in_all_its_files(tmp_path: Path) -> None:
    tensors = network()
    names = sorted(tensors)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": {k: tensors[k] for k in names[n::2]} for n in range(2)}
    run(save_folder(tmp_path / "in", shards), tmp_path / "out", kept())
    verify(tmp_path / "out")
    assert denses(load_state_dict(tmp_path / "out")) == denses(tensors) == expand(tmp_path / "out")
    assert coded_names(tmp_path / "out") == CODED


def test_the_plan_says_what_is_coded_and_bounds_it(tmp_path: Path) -> None:
    text = (
        'version: 1\nkeep_coding: zstd\nrules:\n- {match: "a*", keep: {coding: ans}}\n'
        '- {match: "b*", keep: {}}\n- {match: "*", rtn: {bits: 4}}\n'
    )
    read = parse_recipe(text, "r.yaml")
    assert read.rules[0].config == Keep(coding="ans")
    again = parse_recipe(recipe_yaml(read), "r.yaml")
    assert (again.keep_coding, again.rules[0].config) == ("zstd", Keep(coding="ans"))
    large = LEAST_CODED // 4
    infos = [
        *(TensorInfo("a", (large,), "F32"), TensorInfo("b", (large,), "F32"), TensorInfo("b.small", (99,), "F32")),
        *(TensorInfo("b.int", (large,), "I32"), TensorInfo("w", (64, 64), "F32"), TensorInfo("norm", (large,), "F32")),
    ]
    plan = make_plan(read, infos, {}, {})
    assert [decision.coding for decision in plan.decisions] == ["ans", "zstd", None, None, None, "zstd"]
    assert plan.decisions[1].reason.endswith("; entropy coded")
    assert not plan.decisions[2].reason.endswith("; entropy coded")


class Killed(Exception):
    pass


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_a_killed_run_goes_on_behind_the_last_tensor(
    survivors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {**network(), "v": gaussian(9, 9)}
    source = save(tmp_path / "in.safetensors", tensors)
    asked = replace(recipe(rule("[vw]", "rtn", bits=3), rule("*")), keep_coding="auto")
    run(source, tmp_path / "whole.safetensors", asked, "ans")
    calls: list[str] = []
    limit = survivors
    write = write_kept.encode_values

    def encode(raw: Any, dtype: str, choice: Any) -> Any:
        if len(calls) == limit:
            raise Killed
        calls.append(dtype)
        return write(raw, dtype, choice)

    monkeypatch.setattr(write_kept, "encode_values", encode)
    with pytest.raises(Killed):
        run(source, tmp_path / "out.safetensors", asked, "ans", resume=True)
    calls.clear()
    limit = 99
    run(source, tmp_path / "out.safetensors", asked, "ans", resume=True)
    assert len(calls) == len(CODED) - survivors
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_they_are_written_and_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of either way sees more than a block, and what does not fit the memory is refused."""
    monkeypatch.setattr(planes, "BLOCK_VALUES", 1 << 12)
    monkeypatch.setattr(write_kept, "BLOCK_VALUES", 1 << 12)
    tensors = {"w": gaussian(123, 345, dtype=torch.bfloat16)}
    told: list[int] = []
    source = save(tmp_path / "in.safetensors", tensors)
    run(source, tmp_path / "out.safetensors", kept(), progress=lambda _, done: told.append(done))
    assert sum(told) == tensors["w"].nbytes
    assert len(told) == -(-123 * 345 // (1 << 12))
    (file,) = read_artifact(tmp_path / "out.safetensors").files
    pieces = [len(piece) for piece in file.kept_pieces("w")]
    assert max(pieces) == 2 << 12
    assert sum(pieces) == tensors["w"].nbytes
    with pytest.raises(ResourceError, match=r"'w'.*--max-memory 1000"):
        run(source, tmp_path / "out.safetensors", kept(), force=True, max_memory=1000)
    (narrow,) = read_artifact(tmp_path / "out.safetensors", 1000).files
    with pytest.raises(ResourceError, match=r"'w'.*memory"):
        list(narrow.kept_pieces("w"))


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    path = compressed(tmp_path, kept())
    damage(path, "brain.qc.codes")
    with pytest.raises(ArtifactError, match=r"'brain'.*its checksum does not hold"):
        load_state_dict(path)
    with pytest.raises(ArtifactError, match=r"'brain'.*its checksum does not hold"):
        verify(path)
    (file,) = read_artifact(path).files
    assert dense(file.kept_tensor("single")) == dense(network()["single"])


def test_codes_that_do_not_decode_are_refused_under_right_checksums(tmp_path: Path) -> None:
    path = compressed(tmp_path, kept())

    def change(header: Any, manifest: Any, data: bytearray) -> None:
        data[header["brain.qc.codes"]["data_offsets"][0]] = 9
        seal(header, manifest, bytes(data), "brain")

    with pytest.raises(ArtifactError, match=r"'brain'.*unknown coding"):
        verify(rewrite(path, change))


def _stored(manifest: Any, _header: Any) -> None:
    manifest["coded"]["F32"]["small"] = [50]


def _empty(manifest: Any, _header: Any) -> None:
    manifest["coded"]["F32"]["single"] = [0, 41]


def _integers(manifest: Any, _header: Any) -> None:
    manifest["coded"]["I32"] = manifest["coded"].pop("F32")


def _large(manifest: Any, _header: Any) -> None:
    manifest["coded"]["F32"]["zero"] = [2**40]


def _short(manifest: Any, _header: Any) -> None:
    manifest["coded"]["F32"]["wide bits"] = [1099]


def _words(_manifest: Any, header: Any) -> None:
    codes = header["single.qc.codes"]
    header["single.qc.codes"] = {**codes, "dtype": "I8"}


def _gone(manifest: Any, _header: Any) -> None:
    del manifest["coded"]["F32"]["single"]
    del manifest["numbers"]["crc32"]["single"]


def _compressed(manifest: Any, _header: Any) -> None:
    manifest["coded"]["F32"]["w"] = [6, 8]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_stored, "numbers"),
        (_empty, "'single' is coded and has no values"),
        (_integers, "under a dtype or name that cannot be"),
        (_large, "'zero' declares"),
        (_short, "'wide bits' declares"),
        (_words, "'single.qc.codes' is not a list of bytes"),
        (_gone, "'single.qc.codes' has no entry"),
        (_compressed, "stands beside its codes"),
    ],
)
def test_manifests_that_lie_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    path = compressed(tmp_path, replace(recipe(rule("w", "rtn", bits=3), rule("*")), keep_coding="auto"))
    rewrite(path, lambda header, manifest, _data: change(manifest, header))
    assert words in refusal(path)


def test_a_compact_file_counts_their_lengths(tmp_path: Path) -> None:
    path = compressed(tmp_path, kept(), compact=True)
    (file,) = read_artifact(path).files
    assert unknown_lengths(file.manifest) == sorted(f"{name}.qc.codes" for name in CODED)
    assert np.all([file.kept_bytes(name) <= file.original(name).n_bytes for name in CODED])
