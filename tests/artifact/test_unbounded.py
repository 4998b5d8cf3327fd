"""Unbounded codes in an artifact: what was chosen comes back from any coding, and as the second decoder reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifact import unbounded_method
from artifact.educational_decoder import expand
from artifact.examples import denses, gaussian, recipe, rtn, rule, run, save, save_folder, verify
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.coding.grids import steps
from qcompress.coding.unbounded.lengths import coded_bits
from qcompress.compress.export import export
from qcompress.compress.load import load_state_dict
from qcompress.report.gather import gather_report
from qcompress.types.encoded import Unbounded
from qcompress.types.plan import Recipe


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    unbounded_method.register(monkeypatch)


def unbounded(match: str = "*", **options: Any) -> Recipe:
    return recipe(rule(match, "rounded", **options))


def network(seed: int = 0) -> dict[str, Tensor]:
    """Shapes of all sorts, one row much larger than the others."""
    weights = {
        "conv.weight": gaussian(6, 4, 3, 3, seed=seed),
        "depthwise.weight": gaussian(8, 1, 3, 3, seed=seed + 1),
        "linear.weight": gaussian(10, 12, seed=seed + 2, dtype=torch.float16),
        "bias": gaussian(7, seed=seed + 3),
    }
    weights["linear.weight"][3] *= 300
    return weights


CHOICES = ["ans", "zstd", "packed", "auto"]


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_both_decoders_read_what_was_chosen(choice: str, trellis: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", network())
    for step in (0.03, 0.5, 4.0):
        run(source, tmp_path / "out.safetensors", unbounded("*.weight", step=step, trellis=trellis), choice, force=True)
        verify(tmp_path / "out.safetensors")
        decoded = load_state_dict(tmp_path / "out.safetensors")
        assert denses(decoded) == expand(tmp_path / "out.safetensors")
        if trellis:
            continue
        file = read_artifact(tmp_path / "out.safetensors").files[0]
        for name in file.manifest.tensors:
            encoded, weight = file.read_encoded(name), network()[name].float()
            assert isinstance(encoded, Unbounded)
            error = (decoded[name].float() - weight).flatten(1).abs()
            # Half a step, and what a float16 weight loses by itself.
            assert (error <= steps(encoded) * 0.5001 + 2.0**-10 * weight.flatten(1).abs()).all()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.slow
def test_large_and_small_tensors_share_a_file_with_grids(choice: str, tmp_path: Path) -> None:
    tensors = {"a": gaussian(600, 500), "b": gaussian(9, 40, seed=1), "c": gaussian(9, 8, seed=2), "k": gaussian(3)}
    source = save(tmp_path / "in.safetensors", tensors)
    asked = recipe(rule("c", "rtn", bits=3), rule("k"), rule("*", "rounded", step=0.7))
    report = run(source, tmp_path / "out.safetensors", asked, choice)
    verify(tmp_path / "out.safetensors")
    assert denses(load_state_dict(tmp_path / "out.safetensors")) == expand(tmp_path / "out.safetensors")
    assert report.size.parts.total == (tmp_path / "out.safetensors").stat().st_size
    gathered = gather_report(tmp_path / "out.safetensors", read_checkpoint(source))
    assert gathered.size.parts == report.size.parts
    own = {layer.name: layer for layer in report.layers}
    for layer in gathered.layers:
        mine = own[layer.name]
        assert (layer.bytes, layer.side_information_bytes) == (mine.bytes, mine.side_information_bytes)
        if layer.figures is not None and mine.figures is not None:
            assert layer.figures.levels_used == mine.figures.levels_used
            assert layer.figures.entropy == mine.figures.entropy
            assert layer.figures.relative_error == pytest.approx(mine.figures.relative_error)


@pytest.mark.parametrize("trellis", [False, True])
def test_the_length_that_a_search_is_told_is_what_is_written(trellis: bool, tmp_path: Path) -> None:
    tensors = {"a": gaussian(600, 500), "b": gaussian(90, 400, seed=1), "c": gaussian(64, 576, seed=2)}
    source = save(tmp_path / "in.safetensors", tensors)
    for step in (0.1, 0.5, 1.5):
        report = run(source, tmp_path / "out.safetensors", unbounded(step=step, trellis=trellis), "ans", force=True)
        file = read_artifact(tmp_path / "out.safetensors").files[0]
        unbounded_tensors = [file.read_encoded(name) for name in file.manifest.tensors]
        told = coded_bits([one for one in unbounded_tensors if isinstance(one, Unbounded)]) / 8
        written = report.size.parts.codes + report.size.parts.side_information
        assert abs(told - written) <= 0.001 * written + 16


@pytest.mark.parametrize("axis", [0, 1, (0, 1), (2, 0)])
def test_any_channel_axis(axis: int | tuple[int, ...], tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": gaussian(5, 6, 7)})
    run(source, tmp_path / "out.safetensors", unbounded(step=0.05, axis=axis), "ans")
    decoded = load_state_dict(tmp_path / "out.safetensors")
    assert denses(decoded) == expand(tmp_path / "out.safetensors")
    assert (decoded["w"] - gaussian(5, 6, 7)).abs().max() < 0.05


def test_the_same_bytes_from_one_thread_and_from_three_and_after_a_break(tmp_path: Path) -> None:
    tensors = {f"w{index}": gaussian(300 + index, 900 if index % 3 == 0 else 30, seed=index) for index in range(7)}
    source = save(tmp_path / "in.safetensors", tensors)
    run(source, tmp_path / "one.safetensors", unbounded(), "auto")
    run(source, tmp_path / "three.safetensors", unbounded(), "auto", threads=3)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "three.safetensors").read_bytes()
    seen: list[str] = []

    def stop_late(name: str, _: int) -> None:
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "again.safetensors", unbounded(), "auto", resume=True, progress=stop_late)
    run(source, tmp_path / "again.safetensors", unbounded(), "auto", resume=True)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_a_folder_has_a_pool_a_file_and_ties_are_kept(tmp_path: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": {"embed_tokens.weight": gaussian(40, 8), "norm.weight": gaussian(8)},
        "model-00002-of-00002.safetensors": {"lm_head.weight": gaussian(40, 8), "proj.weight": gaussian(30, 8, seed=1)},
    }
    source = save_folder(tmp_path / "in", shards, {"tie_word_embeddings": True})
    run(source, tmp_path / "out", unbounded("*_*.weight"), "ans")
    verify(tmp_path / "out")
    assert denses(load_state_dict(tmp_path / "out")) == expand(tmp_path / "out")


def test_the_dense_export_holds_the_decoded_weights(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", network())
    run(source, tmp_path / "out.safetensors", unbounded("*.weight", trellis=True), "ans")
    export(read_artifact(tmp_path / "out.safetensors"), tmp_path / "dense.safetensors", force=False)
    from safetensors.torch import load_file

    assert denses(load_file(tmp_path / "dense.safetensors")) == denses(load_state_dict(tmp_path / "out.safetensors"))


def test_no_room_is_left_in_the_header_of_a_small_file(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", network())
    run(source, tmp_path / "out.safetensors", unbounded("*.weight"), "ans")
    raw = (tmp_path / "out.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size]
    assert size % 8 == 0
    assert len(header) - len(header.rstrip(b" ")) < 8
    # A file without unbounded codes keeps its room: nothing is moved for it.
    run(source, tmp_path / "grid.safetensors", rtn(4, "*.weight"), "ans")
    verify(tmp_path / "grid.safetensors")


def test_a_tensor_of_zeros_and_a_single_weight(tmp_path: Path) -> None:
    tensors = {"zeros": torch.zeros(12, 9), "one": torch.full((1, 1), -3.0), "huge": gaussian(4, 6) * 2.0**120}
    source = save(tmp_path / "in.safetensors", tensors)
    for choice in CHOICES:
        run(source, tmp_path / "out.safetensors", unbounded(step=0.5), choice, force=True)
        decoded = load_state_dict(tmp_path / "out.safetensors")
        assert denses(decoded) == expand(tmp_path / "out.safetensors")
        assert not decoded["zeros"].any()
        assert torch.isfinite(decoded["huge"]).all()
