"""Codes are packed into dense bits and back, least significant bit first, every row padded to a whole byte.

1 bit    codes 1 0 1 1 0 0 0 0 | 1   ->  0d 01
4 bits   codes 1 2 | 3               ->  21 03
3 bits   codes 1 2 3                 ->  d1 00      (1 + 2 * 8 + 3 * 64 = 0xd1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.rows import spans, tiles

Bytes: TypeAlias = NDArray[np.uint8]
Codes: TypeAlias = NDArray[Any]
"""uint8, or 16-bit integers where codes have more than 8 bits."""

BLOCK_CODES = 1 << 18
"""Codes worked on at once: the few words of scratch that they need stay in a core's cache. A multiple of 8, so that
every piece of a row begins on a byte."""

# Words of 8 // bits codes, one a byte: the product brings all of them, side by side, into the topmost byte.
_GATHER: Mapping[int, tuple[str, int]] = {1: ("<u8", 0x0102040810204080), 2: ("<u4", 0x01041040), 4: ("<u2", 0x0110)}

_EIGHT_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").view("<u8")[:, 0]
"""Of each byte its eight bits, one a byte of a word."""


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-columns * bits // 8)


def byte_span(columns: slice, bits: int) -> slice:
    """The bytes of a packed row that hold these columns; `columns.start` is a multiple of 8."""
    return slice(columns.start * bits // 8, row_bytes(columns.stop, bits))


def pack(codes: Codes, bits: int) -> Bytes:
    """The codes as dense bits: uint8 [rows, row_bytes(columns, bits)], padding bits zero.

    codes  [rows, columns] in [0, 2**bits), of any strides: uint8 for 1 to 8 bits, 16-bit integers for 9 to 16

    Raises ValueError where a code needs more bits.
    """
    _check_bits(bits)
    if bits > 8:
        return _pack_wide(codes, bits)
    rows, columns = codes.shape
    packed = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    source, target = codes, packed
    if columns * bits % 8 == 0 and codes.flags.c_contiguous:
        source, target = codes.reshape(1, -1), packed.reshape(1, -1)
    group = _group(bits)
    for row_span, column_span in _cache_tiles(*source.shape):
        piece = source[row_span, column_span]
        if piece.max() >> bits:
            raise ValueError(f"a code of {piece.max()} needs more than {bits} bits")
        padded = _copy_rows(piece, _round_up(piece.shape[1], group))
        into = target[row_span, byte_span(column_span, bits)]
        width = padded.shape[1] * bits // 8
        if into.flags.c_contiguous and width == into.shape[1]:
            _gather(padded.reshape(-1), bits, into.reshape(-1))
        else:
            gathered = np.empty((len(into), width), np.uint8)
            _gather(padded.reshape(-1), bits, gathered.reshape(-1))
            _assign_rows(into, gathered[:, : into.shape[1]])
    return packed


def unpack(packed: Bytes, bits: int, columns: int) -> Codes:
    """The inverse of `pack`: codes [rows, columns] in [0, 2**bits), contiguous. Padding bits are not looked at.

    Codes are uint8, above 8 bits uint16.

    packed  uint8 [rows, row_bytes(columns, bits)], of any strides

    Raises ValueError where a row's bytes are not those of `columns` codes.
    """
    _check_packed(packed, bits, columns)
    if bits > 8:
        return _unpack_wide(packed, bits, columns)
    codes = np.empty((len(packed), columns), np.uint8)
    source, target = packed, codes
    if columns * bits % 8 == 0 and packed.flags.c_contiguous:
        source, target = packed.reshape(1, -1), codes.reshape(1, -1)
    group = _group(bits)
    for row_span, column_span in _cache_tiles(*target.shape):
        into = target[row_span, column_span]
        width = _round_up(into.shape[1], group)
        padded = _copy_rows(source[row_span, byte_span(column_span, bits)], width * bits // 8)
        if into.flags.c_contiguous and width == into.shape[1]:
            _spread(padded.reshape(-1), bits, into.reshape(-1))
        else:
            spread = np.empty((len(into), width), np.uint8)
            _spread(padded.reshape(-1), bits, spread.reshape(-1))
            _assign_rows(into, spread[:, : into.shape[1]])
    return codes


def count_codes(packed: Bytes, bits: int, columns: int) -> NDArray[np.int64]:
    """How often each code occurs: int64 [2**bits], of a packed matrix whose padding bits are zero.

    Codes that lie side by side are counted as one symbol; a code's count is then the sum of that histogram's marginals.

    Raises ValueError where a row's bytes are not those of `columns` codes.
    """
    _check_packed(packed, bits, columns)
    rows = len(packed)
    if bits > 8:
        counts = np.zeros(1 << bits, np.int64)
        for row_span, column_span in _cache_tiles(rows, columns):
            width = column_span.stop - column_span.start
            codes = _unpack_wide(packed[row_span, byte_span(column_span, bits)], bits, width)
            counts += np.bincount(codes.reshape(-1), minlength=1 << bits)
        return counts
    if 8 % bits == 0:
        symbol_bits = 8
        histogram = _count_bytes(np.ascontiguousarray(packed).reshape(-1))
        padding = rows * (packed.shape[1] * 8 // bits - columns)
    else:
        symbol_bits = bits * (4 if bits == 3 else 2)
        histogram = np.zeros(1 << symbol_bits, np.int64)
        padding = 0
        for row_span, column_span in _cache_tiles(rows, columns):
            width = _round_up(column_span.stop - column_span.start, 8)
            padded = _copy_rows(packed[row_span, byte_span(column_span, bits)], width * bits // 8)
            words = np.empty(padded.size // bits, "<u8")
            _read_groups(padded.reshape(-1), bits, words)
            lane = 8 * symbol_bits // bits
            _part_lanes(words, bits, lane)
            histogram += np.bincount(words.view(f"<u{lane // 8}"), minlength=len(histogram))
            padding += len(padded) * (width - (column_span.stop - column_span.start))
    counts = np.zeros(1 << bits, np.int64)
    for place in range(0, symbol_bits, bits):
        counts += histogram.reshape(-1, 1 << bits, 1 << place).sum(axis=(0, 2))
    counts[0] -= padding
    return counts


def _pack_wide(codes: Codes, bits: int) -> Bytes:
    """`pack` for codes that take more than a byte: bit by bit."""
    rows, columns = codes.shape
    packed = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    for row_span, column_span in _cache_tiles(rows, columns):
        piece = np.ascontiguousarray(codes[row_span, column_span]).astype("<u2")
        if int(piece.max()) >> bits:
            raise ValueError(f"a code of {piece.max()} needs more than {bits} bits")
        places = np.unpackbits(piece.view(np.uint8).reshape(*piece.shape, 2), axis=2, bitorder="little")[:, :, :bits]
        dense = np.packbits(places.reshape(len(piece), -1), axis=1, bitorder="little")
        packed[row_span, byte_span(column_span, bits)] = dense
    return packed


def _unpack_wide(packed: Bytes, bits: int, columns: int) -> NDArray[np.uint16]:
    codes = np.empty((len(packed), columns), "<u2")
    for row_span, column_span in _cache_tiles(len(packed), columns):
        into = codes[row_span, column_span]
        dense = np.ascontiguousarray(packed[row_span, byte_span(column_span, bits)])
        places = np.zeros((*into.shape, 16), np.uint8)
        flat = np.unpackbits(dense, axis=1, bitorder="little", count=into.shape[1] * bits)
        places[:, :, :bits] = flat.reshape(*into.shape, bits)
        into[:] = np.packbits(places, axis=2, bitorder="little").view("<u2")[:, :, 0]
    return codes


def _count_bytes(flat: Bytes) -> NDArray[np.int64]:
    """How often each byte occurs: int64 [256]; two at once where the larger table pays."""
    histogram = np.zeros(256, np.int64)
    if flat.size >= 4 * BLOCK_CODES:
        pairs = np.zeros(1 << 16, np.int64)
        words = flat[: flat.size // 2 * 2].view(np.uint16)
        for span in spans(words.size, BLOCK_CODES):
            pairs += np.bincount(words[span], minlength=1 << 16)
        square = pairs.reshape(256, 256)
        histogram += square.sum(axis=0) + square.sum(axis=1)
        flat = flat[words.size * 2 :]
    for span in spans(flat.size, BLOCK_CODES):
        histogram += np.bincount(flat[span], minlength=256)
    return histogram


def _gather(codes: Bytes, bits: int, into: Bytes) -> None:
    """Whole groups of codes [n] to their bytes [n * bits / 8]."""
    if bits == 8:
        into[:] = codes
        return
    if bits in _GATHER:
        dtype, factor = _GATHER[bits]
        words = codes.view(dtype) * np.array(factor, dtype)
        words >>= np.array(8 * words.itemsize - 8, dtype)
        np.copyto(into, words, casting="unsafe")
        return
    words = codes.view("<u8").copy()
    upper = np.empty_like(words)
    for lane in (8, 16, 32):
        np.bitwise_and(words, words.dtype.type(_upper_mask(bits, lane, 64) << lane - bits * lane // 8), out=upper)
        words ^= upper
        upper >>= words.dtype.type(lane - bits * lane // 8)
        words |= upper
    columns = words.view(np.uint8).reshape(-1, 8)
    rows = into.reshape(-1, bits)
    for byte in range(bits):
        rows[:, byte] = columns[:, byte]


def _spread(packed: Bytes, bits: int, into: Bytes) -> None:
    """The inverse of `_gather`."""
    if bits == 8:
        into[:] = packed
    elif bits == 1:
        # With an output, every mode but "raise" spares `take` a buffer; a byte is always a valid index.
        np.take(_EIGHT_BITS, packed, out=into.view("<u8"), mode="clip")
    elif bits in _GATHER:
        words = into.view(_GATHER[bits][0])
        words[:] = packed
        _part_lanes(words, bits, 8)
    else:
        words = into.view("<u8")
        _read_groups(packed, bits, words)
        _part_lanes(words, bits, 8)


def _part_lanes(words: NDArray[Any], bits: int, narrowest: int) -> None:
    """Part the dense codes of every word, in place, into lanes of ever fewer codes, down to `narrowest` bits."""
    lane = 4 * words.itemsize
    upper = np.empty_like(words)
    while lane >= narrowest:
        np.bitwise_and(words, words.dtype.type(_upper_mask(bits, lane, 8 * words.itemsize)), out=upper)
        # Take the upper codes away and add them again, shifted, in one product.
        upper *= words.dtype.type((1 << lane - bits * lane // 8) - 1)
        words += upper
        lane //= 2


def _read_groups(packed: Bytes, bits: int, words: NDArray[np.uint64]) -> None:
    """Groups of `bits` bytes, eight codes each, to the low bits of a word each."""
    slack = np.zeros(packed.size + 8, np.uint8)
    slack[: packed.size] = packed
    overlapping = np.ndarray(words.shape, "<u8", slack, strides=(bits,))
    np.bitwise_and(overlapping, np.uint64((1 << 8 * bits) - 1), out=words)


def _upper_mask(bits: int, lane: int, word: int) -> int:
    """In every double lane of a word of `word` bits, the codes of its upper lane where they follow the lower one's."""
    dense = bits * lane // 8
    return sum(((1 << dense) - 1) << start + dense for start in range(0, word, 2 * lane))


def _copy_rows(rows: Bytes, width: int) -> Bytes:
    """The rows contiguous and filled up with zeros to `width` columns; the same memory where they are so already."""
    if rows.shape[1] == width and rows.flags.c_contiguous:
        return rows
    copy = np.empty((len(rows), width), np.uint8)
    _assign_rows(copy[:, : rows.shape[1]], rows)
    copy[:, rows.shape[1] :] = 0
    return copy


def _assign_rows(into: Bytes, rows: Bytes) -> None:
    """into[:] = rows, a row at once: rows are often so short that numpy's loop over their bytes would dominate."""
    if rows.strides[1] == 1 == into.strides[1]:
        row = f"V{rows.shape[1]}"
        into.view(row)[:] = rows.view(row)
    else:
        into[:] = rows


def _cache_tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Tiles whose codes, rows padded to whole groups of eight, stay within a small multiple of BLOCK_CODES."""
    return tiles(rows, columns, BLOCK_CODES if columns >= 8 else BLOCK_CODES // 8)


def _group(bits: int) -> int:
    """The codes that fill whole bytes and that one word holds."""
    return 8 // bits if 8 % bits == 0 else 8


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"codes have 1 to 16 bits, not {bits}")


def _check_packed(packed: Bytes, bits: int, columns: int) -> None:
    _check_bits(bits)
    if packed.shape[1] != row_bytes(columns, bits):
        raise ValueError(
            f"a row of {columns} codes of {bits} bits has {row_bytes(columns, bits)} bytes, not {packed.shape[1]}"
        )
