"""Artifacts of every format version decode for ever, and today's writer still writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from artifact.educational_decoder import expand
from artifact.examples import denses, verify
from artifact.golden_cases import CASES, GOLDEN, as_text, write_case
from qcompress.artifact.entry import FORMS, GRIDS, STORED_VALUES
from qcompress.coding.tables import GIVEN_BITS
from qcompress.compress.load import load_state_dict

NAMES = sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem != "bytes")
ZSTD = (1, 5, 7)
"""The version of zstd that wrote the golden files: another may choose other bytes for the same content."""


def golden(name: str) -> Path:
    path = GOLDEN / f"{name}.safetensors"
    return path if path.exists() else GOLDEN / name


def files(path: Path) -> dict[str, bytes]:
    found = [*path.iterdir()] if path.is_dir() else [path]
    return {one.name: one.read_bytes() for one in found}


def test_every_case_has_its_file() -> None:
    assert set(NAMES) == {*CASES, "folder"}
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} | {"folder"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_golden_artifacts_decode_to_what_they_always_did(name: str) -> None:
    verify(golden(name))
    expected = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    decoded = denses(load_state_dict(golden(name)))
    assert {tensor: as_text(dense) for tensor, dense in decoded.items()} == expected
    assert decoded == expand(golden(name))


@pytest.mark.parametrize("name", NAMES)
def test_todays_writer_writes_the_golden_artifacts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "zstd" in name and zstandard.ZSTD_VERSION != ZSTD:
        pytest.skip("another version of zstd")
    path = write_case(name, tmp_path, lambda version: monkeypatch.setattr("qcompress.plan.files.VERSION", version))
    assert files(path) == files(golden(name))


def test_the_golden_files_are_of_every_grid_coding_and_width() -> None:
    entries = [
        entry for name in NAMES for file in verify(golden(name)).files for entry in file.manifest.tensors.values()
    ]
    assert {entry.form for entry in entries} == set(FORMS)
    assert {entry.grid for entry in entries} == {None, *GRIDS}
    assert {entry.values for entry in entries} == {"", *STORED_VALUES.values(), *GIVEN_BITS}
    assert any(entry.row_exponents for entry in entries)
    assert any(entry.group_size and entry.columns % entry.group_size for entry in entries)
    assert {entry.coding for entry in entries} == {"packed", "zstd", "ans"}
    assert {entry.bits for entry in entries} == {0, *range(1, 9), 10}
    assert {entry.dtype for entry in entries} == {"F64", "F32", "F16", "BF16"}
