"""Codes become ggml's blocks of 32 weights: which type holds a grid exactly, and its bytes row by row.

Q4_0, Q5_0, Q8_0  d * q, q an integer of 4, 5 or 8 bits with a sign
Q4_1, Q5_1        d * q + m, q of 4 or 5 bits without one
IQ4_NL            d * v[q], v the sixteen given integers

d and m are float16, two bytes in front of a block. Nibbles of weights j and j + 16 share byte j; fifth bits come before
them. Source: ggml's block_q4_0 to block_iq4_nl and their dequantize_row functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.artifact.entry import Entry
from qcompress.exporters.gguf_file import BLOCK, TYPES, GgufType
from qcompress.exporters.sources import Source

SIGNED = (("Q4_0", 8), ("Q5_0", 16), ("Q8_0", 128))
"""Types without an offset, and minus the least integer that each holds."""
HIGH_BITS = ("Q5_0", "Q5_1")
OFFSETS = ("Q4_1", "Q5_1")


def find_type(entry: Entry) -> GgufType | None:
    """The smallest type that holds all weights of a grid exactly, whatever its codes; None where none does."""
    top = 2**entry.bits - 1
    if entry.form == "table":
        return TYPES["IQ4_NL"] if entry.given == "iq4_nl" else None
    if entry.form != "affine":
        return None
    if entry.grid == "offset":
        return TYPES["Q4_1"] if entry.bits <= 4 else TYPES["Q5_1"] if entry.bits == 5 else None
    # Codes less their zero point, which may be any code; of a grid around a half twice that.
    low, high = (-top, top) if entry.grid in ("zero-point", "mid-rise") else (-(2 ** (entry.bits - 1)), top // 2)
    return next((TYPES[name] for name, least in SIGNED if -least <= low and high < least), None)


@dataclass(frozen=True)
class Blocks:
    """The codes of a weight [rows, columns] as rows of blocks.

    columns  of the blocks: those of the weight, filled up with zeros to a multiple of 32
    """

    source: Source
    type: GgufType
    columns: int

    @property
    def row_bytes(self) -> int:
        return self.columns // BLOCK * self.type.block_bytes

    def inexact(self) -> float:
        """By how much float16 changes a scale or an offset at most, relative to it; blocks of zeros need none.

        raises  ArtifactError where the tensor is damaged
        """
        grid = self.source.grid
        if not (_change(grid.scale / np.float32(self._times)) or (grid.offset is not None and _change(grid.offset))):
            return 0.0
        return max((max(_change(d), 0.0 if m is None else _change(m)) for _, d, m in self._integers()), default=0.0)

    def rows(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes of some rows at a time, uint8 [rows, row_bytes]. Raises ArtifactError."""
        for codes, d, m in self._integers():
            yield encode_blocks(self.type, codes, d, m)

    def zero_rows(self, count: int) -> NDArray[np.uint8]:
        """So many rows of zeros."""
        d = np.zeros((count, self.columns // BLOCK), np.float32)
        codes = np.zeros((count, self.columns // BLOCK, BLOCK), np.int16)
        return encode_blocks(self.type, codes, d, d if self.type.name in OFFSETS else None)

    @property
    def _times(self) -> int:
        """What the scale is divided by: a grid around a half has integers that are twice its codes."""
        entry = self.source.entry
        return 2 if entry is not None and entry.form == "affine" and entry.grid == "mid-rise" else 1

    def _integers(self) -> Iterator[tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32] | None]]:
        """Of some rows the integers [rows, blocks, 32], with scale and perhaps offset of each block, float32."""
        source, grid = self.source, self.source.grid
        blocks = self.columns // BLOCK
        spread = source.group // BLOCK if source.group < self.columns else blocks
        zero, scale = grid.zero * self._times, grid.scale / np.float32(self._times)

        def of_blocks(values: NDArray[Any], rows: slice) -> NDArray[Any]:
            return np.repeat(values[rows], max(spread, 1), axis=1)[:, :blocks]

        for rows, codes in source.code_rows():
            integers = np.zeros((len(codes), self.columns), np.int16)
            zeros = np.repeat(of_blocks(zero, rows), BLOCK, axis=1)[:, : codes.shape[1]].astype(np.int16)
            integers[:, : codes.shape[1]] = codes.astype(np.int16) * self._times - zeros
            found = integers.reshape(len(codes), blocks, BLOCK)
            d = of_blocks(scale, rows)
            if self.type.name != "IQ4_NL":
                d = np.where((found == 0).all(2), np.float32(0), d)
            yield found, d, None if grid.offset is None else of_blocks(grid.offset, rows)


def encode_blocks(
    kind: GgufType, integers: NDArray[np.int16], d: NDArray[np.float32], m: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """The bytes of blocks, uint8 [rows, blocks * bytes].

    integers  [rows, blocks, 32], in the type's range
    d, m      [rows, blocks], rounded to float16 here
    """
    least = dict(SIGNED).get(kind.name, 0)
    halves = [_half_bytes(d)] + ([] if m is None else [_half_bytes(m)])
    if kind.name == "Q8_0":
        data = [integers.astype(np.int8).view(np.uint8)]
    else:
        codes = (integers + least).astype(np.uint8)
        high = [np.packbits(codes >> 4, axis=2, bitorder="little")] if kind.name in HIGH_BITS else []
        low = codes & 15
        data = [*high, (low[:, :, :16] | low[:, :, 16:] << 4).astype(np.uint8)]
    found = np.concatenate([*halves, *data], axis=2)
    assert found.shape[2] == kind.block_bytes
    return found.reshape(len(found), -1)


def _half_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values.astype("<f2")[:, :, None]).view(np.uint8)


def _change(values: NDArray[np.float32]) -> float:
    """The largest relative change when values are rounded to float16; infinite where one is too large for it."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        change = np.abs(values.astype(np.float16).astype(np.float32) / values - 1)
    return float(np.where(values == 0, 0, change).max(initial=0.0))
