"""SPEC.md's own examples, read by the decoder that was written from it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import qcompress
from artifact.educational_decoder import decode_ans, pack
from qcompress.artifact.entry import CODINGS, COMMON_FIELDS, FORM_FIELDS, FORMS, GRIDS, PARTS
from qcompress.artifact.manifest import FORMAT
from qcompress.artifact.parse_manifest import LIMITS, OPTIONAL, REQUIRED
from qcompress.coding.frames import MOST_RATIO, MOST_SEALED
from qcompress.coding.payload import MAX_EXPANSION, decode_payload
from qcompress.coding.tables import GIVEN_BITS, given_values
from qcompress.types.config import TableName
from qcompress.types.plan import DTYPE_BITS

SPEC = (Path(qcompress.__file__).parent / "artifact" / "SPEC.md").read_text(encoding="utf-8")


def test_the_examples_of_packed_rows_hold() -> None:
    examples = re.findall(r"bits (\d), codes ([\d |]+?)  .*-> +((?:[0-9a-f]{2} ?)+)", SPEC)
    assert len(examples) == 2
    for bits, codes, packed in examples:
        rows = [[int(code) for code in row.split()] for row in codes.split("|")]
        width = max(len(row) for row in rows)
        matrix = np.array([row + [0] * (width - len(row)) for row in rows], np.uint8)
        assert pack(matrix, int(bits)) == bytes.fromhex(packed)


def test_the_example_of_ans_holds() -> None:
    found = re.search(r"bits 4, rows 2, columns 7\n    codes +([\d |]+)\n    payload +([0-9a-f |]+)\n", SPEC)
    assert found is not None
    codes = np.array([[int(code) for code in row.split()] for row in found[1].split("|")], np.uint8)
    payload = bytes.fromhex(found[2].replace("|", ""))
    assert np.array_equal(decode_ans(payload, 2, 7), codes)
    assert bytes(decode_payload(payload, "ans", 4, 2, 7)) == pack(codes, 4)


def test_every_word_and_limit_of_the_format_is_in_the_spec() -> None:
    fields = {*COMMON_FIELDS, *(field for fields in FORM_FIELDS.values() for field in fields)}
    words = {*REQUIRED, *OPTIONAL, *FORMS, *GRIDS, *CODINGS, *LIMITS, *fields, *PARTS, *GIVEN_BITS}
    missing = {word for word in words if f"`{word}`" not in SPEC and f"`.{word}`" not in SPEC}
    assert not missing
    assert all(dtype in SPEC for dtype in DTYPE_BITS)
    assert f"format {FORMAT}" in SPEC
    low, high = LIMITS["exponent"]
    assert f"signed, {low} to {high}: scale" in SPEC
    assert f"at most {MOST_SEALED} and at most {MOST_RATIO} times" in SPEC
    assert f"more than {MAX_EXPANSION} weights for each byte" in SPEC


@pytest.mark.parametrize("name", GIVEN_BITS)
def test_the_spec_gives_the_values_of_every_table(name: TableName) -> None:
    """As numbers where it lists them; the bytes that are floats are torch's."""
    values = given_values(name)
    assert len(values) == 2 ** GIVEN_BITS[name]
    if name in ("e4m3", "e5m2"):
        dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
        expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
        assert np.array_equal(values[np.isfinite(expected)], expected[np.isfinite(expected)])
        assert np.array_equal(np.isfinite(values), np.isfinite(expected))
        return
    found = re.search(rf"\n    {name} +((?:-?[0-9.]+\s+){{15}}-?[0-9.]+)", SPEC)
    assert found is not None
    assert np.array_equal(values, np.array([float(text) for text in found[1].split()], np.float32))
