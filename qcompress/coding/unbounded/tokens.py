"""Unbounded codes become tokens of one byte here, with raw bits for what a token leaves open and a class for its table.

A magnitude below 16 is a bin of its own; above, every octave has four bins. Token 0 is zero, tokens 2b - 1 and 2b are
the positive and the negative codes of bin b. Codes of like magnitude share a table: the scale class of a code follows
from levels of its row and column. A level is a mean magnitude in quarter octaves; a class is half an octave wide. The
levels are side information, so that coder and decoder find the same classes. artifact/SPEC.md, "Tokens".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint8]
Codes = NDArray[Any]
"""Integers of 8, 16 or 32 bits."""
Contexts = NDArray[np.uint8]
Levels32 = NDArray[np.int32]

LARGEST_CODE = 2**31 - 1
CLASSES = 32
"""Class c holds mean magnitudes of about 2**((c - 8) / 2), the outer ones all beyond; part of the format."""
CONTEXTS = 3 * CLASSES
"""Tables of a file at most: for codes without a trellis, and for codes in even and in odd states of one."""
_LOWEST, _HIGHEST = -32, 124
_EXACT = 16
_BINS = _EXACT + 4 * 27
_LOOKUP = 1 << 12

BIN_BITS: NDArray[np.int64] = np.array([0 if b < _EXACT else (b - _EXACT) // 4 + 2 for b in range(_BINS)])
"""Raw bits of each bin's magnitudes; a bin holds 2**bits of them."""

BIN_START: NDArray[np.int64] = np.array(
    [b if b < _EXACT else (4 + (b - _EXACT) % 4) << (b - _EXACT) // 4 + 2 for b in range(_BINS)]
)
"""The smallest magnitude of each bin."""

TOKENS = 2 * _BINS - 1
"""How many tokens there are: a code of magnitude LARGEST_CODE still has one."""

_TOKEN_BIN = (np.arange(TOKENS) + 1) // 2
TOKEN_BITS: NDArray[np.int64] = BIN_BITS[_TOKEN_BIN]
"""Raw bits of each token."""

TOKEN_START: NDArray[np.int32] = (BIN_START[_TOKEN_BIN] * np.where(np.arange(TOKENS) % 2, 1, -1)).astype(np.int32)
"""The code of least magnitude of each token."""

TOKEN_PARITY: NDArray[np.uint8] = (BIN_START[_TOKEN_BIN] & 1).astype(np.uint8)
"""The parity of each token's code, where no raw bit is to come: that of an open token is its lowest raw bit."""

FIRST_OPEN = 2 * _EXACT - 1
"""The lowest token that leaves raw bits open."""


def _bins(magnitudes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(BIN_START, magnitudes, "right") - 1


_SMALL = np.arange(-_LOOKUP, _LOOKUP + 1)
_SMALL_TOKENS: Tokens = (2 * _bins(np.abs(_SMALL)) - (_SMALL > 0)).astype(np.uint8)
_BYTE_TOKENS: Tokens = _SMALL_TOKENS[np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64) + _LOOKUP]
"""Of int8 codes, by their bits."""


def tokens_from_codes(codes: Codes) -> Tokens:
    """The token of each code, uint8, in the shape of the codes. Raises ValueError for a code of -2**31."""
    if codes.dtype == np.int8:
        return _BYTE_TOKENS.take(codes.view(np.uint8), mode="clip")
    flat = codes.reshape(-1)
    if not flat.size:
        return np.zeros(codes.shape, np.uint8)
    low, high = int(flat.min()), int(flat.max())
    if low < -LARGEST_CODE:
        raise ValueError(f"the code {low} is beyond {LARGEST_CODE}")
    if max(-low, high) <= _LOOKUP:
        return _SMALL_TOKENS.take(codes + _LOOKUP, mode="clip")
    wide = codes.astype(np.int64)
    tokens: Tokens = (2 * _bins(np.abs(wide)) - (wide > 0)).astype(np.uint8)
    return tokens


def narrowed(codes: Codes) -> Codes:
    """The codes in the narrowest of int8, int16 and int32 that holds them and their magnitudes."""
    largest = max(-int(codes.min(initial=0)), int(codes.max(initial=0)))
    return codes.astype(np.int8 if largest < 2**7 else np.int16 if largest < 2**15 else np.int32)


def raw_bits(codes: Codes, tokens: Tokens) -> NDArray[np.uint8]:
    """The raw bits of the codes in their order, packed: lowest bit first, each code's own lowest first."""
    return np.packbits(open_bits(codes, tokens), bitorder="little")


def open_bits(codes: Codes, tokens: Tokens) -> NDArray[np.uint8]:
    """The same, one bit a byte."""
    counts, offsets = _open(codes, tokens)
    bits = np.zeros(int(counts.sum()), np.uint8)
    ends = np.cumsum(counts)
    for bit in range(int(counts.max(initial=0))):
        has = counts > bit
        bits[(ends - counts)[has] + bit] = offsets[has] >> bit & 1
    return bits


def _open(codes: Codes, tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Raw bits and their value, of the codes that have any."""
    flat, kinds = codes.reshape(-1), tokens.reshape(-1)
    places = np.flatnonzero(kinds >= FIRST_OPEN)
    kinds = kinds[places]
    return TOKEN_BITS[kinds], np.abs(flat[places].astype(np.int64)) - np.abs(TOKEN_START[kinds].astype(np.int64))


def codes_from_tokens(tokens: Tokens, raw: memoryview) -> tuple[Codes, memoryview]:
    """The codes of tokens, and what is left of the raw bytes behind theirs.

    tokens  uint8, any shape
    raw     begins as `raw_bits` packs them
    raises  ValueError where a token is unknown, or the raw bits are too few or not filled up with zeros
    """
    total = count_raw_bits(tokens)
    n_bytes = -(-total // 8)
    if len(raw) < n_bytes:
        raise ValueError(f"{len(raw)} bytes of raw bits, and the tokens need {n_bytes}")
    bits = np.unpackbits(np.frombuffer(raw[:n_bytes], np.uint8), bitorder="little")
    if bits[total:].any():
        raise ValueError("the bits that fill up the raw bits are not zero")
    return codes_from_bits(tokens, bits[:total]), raw[n_bytes:]


def count_raw_bits(tokens: Tokens) -> int:
    """The raw bits that tokens of any shape leave open. Raises ValueError where one is unknown."""
    largest = int(tokens.max(initial=0))
    if largest >= TOKENS:
        raise ValueError(f"a token is not below {TOKENS}")
    if largest < FIRST_OPEN:
        return 0
    flat = tokens.reshape(-1)
    return int(TOKEN_BITS[flat[flat >= FIRST_OPEN]].sum())


def codes_from_bits(tokens: Tokens, bits: NDArray[np.uint8]) -> Codes:
    """The codes of tokens, known ones of any shape, and of the raw bits that they leave open, one a byte."""
    codes = TOKEN_START.take(tokens, mode="clip")
    if not bits.size:
        return codes
    flat = codes.reshape(-1)
    places = np.flatnonzero(tokens.reshape(-1) >= FIRST_OPEN)
    counts = TOKEN_BITS[tokens.reshape(-1)[places]]
    starts = np.cumsum(counts) - counts
    offsets = np.zeros(len(places), np.int32)
    for bit in range(int(counts.max(initial=0))):
        has = counts > bit
        offsets[has] |= bits[starts[has] + bit].astype(np.int32) << bit
    flat[places] += np.where(flat[places] > 0, offsets, -offsets)
    return codes


@dataclass(frozen=True)
class Levels:
    """The magnitudes of one matrix of codes, in quarter octaves of the mean |code|.

    base      of the matrix
    rows      int32 [rows], to be added to the base; None: all 0
    channels  int32 [columns / taps] and
    taps      int32 [taps], both to be added too; both or none
    """

    base: int
    rows: Levels32 | None = None
    channels: Levels32 | None = None
    taps: Levels32 | None = None


def measure_levels(pieces: Iterable[Codes], shape: tuple[int, int], taps: int) -> Levels:
    """The levels of every row, channel and tap.

    pieces  all rows of the codes, not empty, some at a time
    shape   rows and columns
    taps    columns of one input channel
    """
    rows, columns = shape
    by_rows, column_totals = [], np.zeros(columns, np.float64)
    for codes in pieces:
        magnitudes = np.abs(codes)
        # Sums of bytes fit 32 bits, which is faster, and those of any others float64.
        kind = np.int32 if codes.itemsize == 1 and max(codes.shape) < 1 << 24 else np.float64
        by_rows.append(magnitudes.sum(1, dtype=kind))
        column_totals += magnitudes.sum(0, dtype=kind)
    row_sums = np.concatenate(by_rows).astype(np.float64)
    column_sums = column_totals.reshape(-1, taps)
    base = int(_quarter_octaves(row_sums.sum() / (rows * columns)))
    by_row = row_levels(row_sums, columns)
    expected = float(np.exp2(by_row / 4).sum())
    by_channel = _quarter_octaves(column_sums.sum(1) / (expected * taps))
    by_tap = _quarter_octaves(column_sums.sum(0) / (expected * np.exp2(by_channel / 4).sum()))
    return Levels(base, by_row - base, by_channel, by_tap)


def row_levels(row_sums: NDArray[np.float64], columns: int) -> Levels32:
    """The levels of rows of so many codes, with that of the matrix still in them, from their sums of |code|."""
    return np.maximum(_quarter_octaves(row_sums / columns), _LOWEST)


def _quarter_octaves(means: NDArray[np.float64] | float) -> Levels32:
    """4 * log2 of each, rounded and clipped."""
    levels = np.rint(4 * np.log2(np.maximum(means, 2.0 ** (_LOWEST / 4))))
    return np.asarray(np.minimum(levels, _HIGHEST), np.int32)


class Classes:
    """The class of every code of a matrix [rows, columns], worked out for the pieces that are asked for."""

    def __init__(self, levels: Levels, rows: int, columns: int) -> None:
        self.shape = (rows, columns)
        self._flat = levels.channels is None and levels.rows is None
        self._base = _class_of(np.int32(levels.base))
        self._down = np.zeros(1, np.int32) if levels.rows is None else levels.rows
        self._along = np.zeros(1, np.int32)
        if levels.channels is not None and levels.taps is not None:
            self._along = (levels.channels[:, None] + levels.taps).reshape(-1)
        self._low = int(self._down.min(initial=0) + self._along.min(initial=0))
        high = int(self._down.max(initial=0) + self._along.max(initial=0))
        self._lookup = _class_of(levels.base + np.arange(self._low, high + 1, dtype=np.int64))

    def __getitem__(self, span: tuple[slice, slice]) -> Contexts:
        """Those of some rows and columns, uint8 [rows, columns], maybe a view of fewer."""
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(span, self.shape, strict=True))
        if self._flat:
            return np.broadcast_to(self._base, shape)
        down = self._down[span[0]] if len(self._down) > 1 else self._down
        along = self._along[span[1]] if len(self._along) > 1 else self._along
        return np.broadcast_to(self._lookup[(down - self._low)[:, None] + along], shape)


class Kinds:
    """The kinds of codes of a matrix [rows, columns]: codes of one kind have a row and a column of the same levels."""

    def __init__(self, levels: Levels, rows: int, columns: int) -> None:
        down = np.zeros(rows, np.int32) if levels.rows is None else levels.rows
        along = np.zeros(columns, np.int32)
        if levels.channels is not None and levels.taps is not None:
            along = (levels.channels[:, None] + levels.taps).reshape(-1)
        self._down, by_row = np.unique(down, return_inverse=True)
        self._along, self._by_column = np.unique(along, return_inverse=True)
        self._by_row = by_row * len(self._along)
        self.count = len(self._down) * len(self._along)

    def of_rows(self, rows: slice, unit: int) -> NDArray[np.int64]:
        """The kind of every code of some rows, int64 [rows, columns], times `unit`."""
        return (self._by_row[rows] * unit)[:, None] + self._by_column * unit

    def classes(self, levels: Levels) -> NDArray[np.int64]:
        """The class of each kind, int64 [kinds], under these levels or under them without some of their parts."""
        down = np.zeros_like(self._down) if levels.rows is None else self._down
        along = np.zeros_like(self._along) if levels.channels is None else self._along
        return _class_of((levels.base + down)[:, None].astype(np.int64) + along).reshape(-1).astype(np.int64)


def classes_of_rows(levels: Levels, codes: NDArray[np.float32]) -> Contexts:
    """The classes of codes [rows, columns], whole numbers, of some rows of a matrix, whose rows have other levels.

    Where the levels have none of rows, neither have these.
    """
    rows, columns = codes.shape
    if levels.rows is not None:
        own = row_levels(np.abs(codes).sum(1, dtype=np.float64), columns)
        levels = replace(levels, rows=own - levels.base)
    return class_matrix(levels, rows, columns)


def class_matrix(levels: Levels, rows: int, columns: int) -> Contexts:
    """The class of every code, uint8 [rows, columns], maybe a view of fewer."""
    return Classes(levels, rows, columns)[:, :]


def _class_of(levels: NDArray[np.int64] | np.int32) -> Contexts:
    return np.asarray(np.clip((levels + 1 >> 1) + 8, 0, CLASSES - 1), np.uint8)
