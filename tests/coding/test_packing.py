"""Dense bits: bytes written by hand, a slow reference on Python's integers, and round trips of every shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.coding.packing import BLOCK_CODES, byte_span, count_codes, pack, row_bytes, unpack

WIDTHS = (*range(1, 10), 12, 16)
LONG = [(1, BLOCK_CODES + 5), (2, BLOCK_CODES + 8), (BLOCK_CODES // 9 + 3, 9), (BLOCK_CODES + 1, 1), (3, BLOCK_CODES)]


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=code_dtype(bits))


def code_dtype(bits: int) -> type[np.generic]:
    return np.uint8 if bits <= 8 else np.uint16


def bit_string_row(codes: np.ndarray, bits: int) -> bytes:
    """The row as one integer whose bits [bits * i, bits * (i + 1)) are code i, in little-endian bytes."""
    value = sum(int(code) << bits * index for index, code in enumerate(codes))
    return value.to_bytes(-(-len(codes) * bits // 8), "little")


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(1, 16))
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(0, 70))
    return random_codes(rows, columns, bits, draw(st.integers(0, 2**32 - 1))), bits


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 0, 1], "0d01"),
        (1, [0, 0, 0, 0, 0, 0, 0, 1], "80"),
        (2, [1, 2, 3], "39"),
        (2, [0, 0, 0, 3, 1], "c001"),
        (3, [1, 2, 3], "d100"),
        (3, [0, 0, 7], "c001"),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], "d1581f"),
        (4, [1, 2, 3], "2103"),
        (5, [1, 31], "e103"),
        (5, [0, 0, 0, 0, 0, 0, 0, 31], "00000000f8"),
        (6, [1, 63, 0, 63], "c10ffc"),
        (7, [1, 127], "813f"),
        (7, [0, 0, 0, 0, 0, 0, 0, 127], "000000000000fe"),
        (8, [0, 255, 16], "00ff10"),
        (9, [1, 511], "01fe03"),
        (12, [1, 4095, 2], "01f0ff0200"),
        (16, [1, 65535], "0100ffff"),
    ],
)
def test_bytes_written_by_hand(bits: int, codes: list[int], expected: str) -> None:
    matrix = np.array([codes, codes], code_dtype(bits))
    packed = pack(matrix, bits)
    assert packed.tobytes().hex() == expected * 2
    assert np.array_equal(unpack(packed, bits, len(codes)), matrix)


@given(code_matrices())
@settings(deadline=None, max_examples=300)
def test_agrees_with_bit_strings(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(codes), row_bytes(codes.shape[1], bits))
    assert [row.tobytes() for row in packed] == [bit_string_row(row, bits) for row in codes]
    assert np.array_equal(unpack(packed, bits, codes.shape[1]), codes)
    assert np.array_equal(count_codes(packed, bits, codes.shape[1]), np.bincount(codes.ravel(), minlength=1 << bits))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", LONG)
def test_more_than_one_block(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    packed = pack(codes, bits)
    # numpy's own bits, one a byte: slow, and made by other code.
    octets = codes.reshape(-1, 1).view(np.uint8)
    planes = np.unpackbits(octets, axis=1, count=bits, bitorder="little").reshape(shape[0], -1)
    assert np.array_equal(packed, np.packbits(planes, axis=1, bitorder="little"))
    assert np.array_equal(unpack(packed, bits, shape[1]), codes)
    assert np.array_equal(count_codes(packed, bits, shape[1]), np.bincount(codes.ravel(), minlength=1 << bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_counts_of_many_bytes(bits: int) -> None:
    codes = random_codes(1, (4 * BLOCK_CODES + 3) * 8 // bits, bits)
    packed = pack(codes, bits)
    assert np.array_equal(count_codes(packed, bits, codes.shape[1]), np.bincount(codes[0], minlength=1 << bits))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [13, 16])
def test_any_strides_and_read_only(bits: int, columns: int) -> None:
    codes = random_codes(9, columns, bits)
    expected = pack(codes, bits)
    wide = np.zeros((18, 3 * columns), code_dtype(bits))
    wide[::2, 1::3] = codes
    reversed_rows = np.ascontiguousarray(codes[::-1])[::-1]
    for view in (np.asfortranarray(codes), wide[::2, 1::3], reversed_rows):
        view.flags.writeable = False
        before = view.copy()
        assert np.array_equal(pack(view, bits), expected)
        assert np.array_equal(view, before)
    for view in (np.asfortranarray(expected), np.repeat(expected, 2, axis=1)[:, ::2], expected[::-1][::-1]):
        view.flags.writeable = False
        assert np.array_equal(unpack(view, bits, columns), codes)
        assert np.array_equal(count_codes(view, bits, columns), np.bincount(codes.ravel(), minlength=1 << bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_padding_is_ignored_by_unpack(bits: int) -> None:
    codes = random_codes(5, 3, bits)
    packed = pack(codes, bits)
    used = 3 * bits % 8
    if used:
        packed[:, -1] |= 0xFF << used & 0xFF
    assert np.array_equal(unpack(packed, bits, 3), codes)


@pytest.mark.parametrize("bits", [*range(1, 8), 9, 12, 15])
@pytest.mark.parametrize("columns", [8, 11])
def test_a_code_out_of_range_is_refused(bits: int, columns: int) -> None:
    codes = np.zeros((3, columns), code_dtype(bits))
    codes[2, columns - 1] = 1 << bits
    with pytest.raises(ValueError, match=f"a code of {1 << bits} needs more than {bits} bits"):
        pack(codes, bits)


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_widths_out_of_range_are_refused(bits: int) -> None:
    for call in (lambda: pack(np.zeros((1, 8), np.uint8), bits), lambda: unpack(np.zeros((1, 8), np.uint8), bits, 8)):
        with pytest.raises(ValueError, match="1 to 16 bits"):
            call()


def test_rows_of_the_wrong_length_are_refused() -> None:
    for read in (unpack, count_codes):
        with pytest.raises(ValueError, match="has 2 bytes, not 3"):
            read(np.zeros((4, 3), np.uint8), 3, 5)


@given(code_matrices())
@settings(deadline=None, max_examples=50)
def test_byte_span_cuts_where_codes_start(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    packed = pack(codes, bits)
    for start in range(0, codes.shape[1], 8):
        span = slice(start, min(start + 8, codes.shape[1]))
        assert np.array_equal(packed[:, byte_span(span, bits)], pack(codes[:, span], bits))
