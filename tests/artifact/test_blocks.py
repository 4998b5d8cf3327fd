"""Tensors that are read block by block are those that are read at once, wherever the blocks are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from artifact import unbounded_method
from artifact.examples import cut_into, denses, gaussian, recipe, run, save, verify
from artifact.golden_cases import CASES, write_case
from artifact.test_hostile import refusal
from artifact.unbounded_method import RoundedConfig
from qcompress.artifact.reader import read_artifact
from qcompress.coding.grids import decode
from qcompress.coding.rows import cut, weight_from_rows
from qcompress.compress.export import export
from qcompress.compress.load import load_state_dict
from qcompress.report.gather import gather_report
from qcompress.types.plan import Rule


@pytest.mark.parametrize("codes", [8, 24, 64])
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_weight_in_order(name: str, codes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every form and coding: rows longer than a block too, with groups, codebooks and chunks that begin within."""
    # A row that drives a trellis is never cut.
    codes = max(codes, 40) if name == "unbounded-trellis" else codes
    cut_into(codes, monkeypatch)
    path = write_case(name, tmp_path, lambda _: None)
    verify(path)
    state = load_state_dict(path)
    for file in read_artifact(path).files:
        for tensor in map(file.tensor, file.manifest.tensors):
            entry = tensor.entry
            whole = torch.full((entry.rows, entry.columns), torch.nan, dtype=state[tensor.name].dtype)
            blocks, place = 0, 0
            for rows, columns, encoded in tensor.blocks():
                assert whole[rows, columns].isnan().all()
                assert whole[rows, columns].numel() <= max(codes * entry.dim, entry.dim)
                if tensor.in_order:
                    assert rows.start * entry.columns + columns.start == place
                    place += whole[rows, columns].numel()
                whole[rows, columns] = decode(encoded)
                blocks += 1
            assert blocks >= entry.numel / (codes * entry.dim)
            expected = decode(file.read_encoded(tensor.name))
            assert denses({"w": weight_from_rows(whole, entry.shape, entry.axis)}) == denses({"w": expected})
            assert denses({"w": state[tensor.name]}) == denses({"w": expected})


@pytest.mark.parametrize("name", CASES)
def test_blocks_change_nothing_that_readers_give(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if CASES[name].choice in ("ans", "auto"):
        cut_into(40 if name == "unbounded-trellis" else 16, monkeypatch)
    path = write_case(name, tmp_path, lambda _: None)
    state, report = denses(load_state_dict(path)), gather_report(path)
    export(read_artifact(path), tmp_path / "one.safetensors", force=False)
    if CASES[name].choice in ("packed", "zstd"):
        cut_into(16, monkeypatch)
    assert denses(load_state_dict(path)) == state
    assert gather_report(path) == report
    export(read_artifact(path), tmp_path / "two.safetensors", force=False)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("choice", ["packed", "zstd"])
def test_rows_that_drive_a_trellis_and_are_longer_than_a_chunk_are_refused(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbounded_method.register(monkeypatch)
    rounded = Rule("w", "rounded", RoundedConfig(trellis=True), "rule w")
    source = save(tmp_path / "m.safetensors", {"w": gaussian(4, 72)})
    run(source, tmp_path / "a.safetensors", recipe(rounded), choice)
    verify(tmp_path / "a.safetensors")
    cut_into(64, monkeypatch)
    assert "tensor 'w': rows of more than 64 codes cannot drive a trellis" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("unit", [1, 3, 10])
def test_cuts_lie_at_units_and_cover_the_span(unit: int) -> None:
    for start in range(25):
        for stop in range(start + 1, 26):
            parts = list(cut(slice(start, stop), unit))
            assert [place for part in parts for place in range(part.start, part.stop)] == list(range(start, stop))
            assert all(part.start % unit == 0 for part in parts[1:])
            # A part is whole units, or lies within one.
            assert all(
                (part.start % unit == 0 and part.stop % unit == 0) or part.start // unit == (part.stop - 1) // unit
                for part in parts
            )
