"""SPEC.md's own examples, read by the decoder that was written from it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import qcompress
from artifact.educational_decoder import decode_ans, pack
from qcompress.artifact.manifest import CODINGS, FORMAT, GRIDS, LIMITS, OPTIONAL, REQUIRED
from qcompress.artifact.parts import MAX_EXPANSION
from qcompress.coding.payload import decode_payload
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
    words = {*REQUIRED, *OPTIONAL, *GRIDS, *CODINGS, *LIMITS, "codes", "scale", "offset", "shape", "dtype", "axis"}
    missing = {word for word in words if f"`{word}`" not in SPEC and f".{word}`" not in SPEC}
    assert not missing
    assert all(dtype in SPEC for dtype in DTYPE_BITS)
    assert f"format {FORMAT}" in SPEC
    low, high = LIMITS["exponent"]
    assert f"| {low} to {high}:" in SPEC
    assert MAX_EXPANSION == 2**18
