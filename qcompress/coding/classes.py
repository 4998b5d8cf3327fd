"""Scale classes: codes of like magnitude share a table. The class of a code follows from levels of its row and column.

A level is a mean magnitude in quarter octaves; a class is half an octave wide. The levels are side information, so that
coder and decoder find the same classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.tokens import Codes

CLASSES = 32
"""Class c holds mean magnitudes of about 2**((c - 8) / 2), the outer ones all beyond; part of the format."""

CONTEXTS = 3 * CLASSES
"""Tables of a file at most: for codes without a trellis, and for codes in even and in odd states of one."""

_LOWEST, _HIGHEST = -32, 124
Contexts = NDArray[np.uint8]
Levels32 = NDArray[np.int32]


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


def measure_levels(codes: Codes, taps: int) -> Levels:
    """The levels of every row, channel and tap.

    codes  int32 [rows, columns], not empty
    taps   columns of one input channel
    """
    rows, columns = codes.shape
    magnitudes = np.abs(codes)
    row_sums = magnitudes.sum(1, dtype=np.float64)
    column_sums = magnitudes.sum(0, dtype=np.float64).reshape(-1, taps)
    base = int(_quarter_octaves(row_sums.sum() / (rows * columns)))
    by_row = np.maximum(_quarter_octaves(row_sums / columns), _LOWEST)
    expected = float(np.exp2(by_row / 4).sum())
    by_channel = _quarter_octaves(column_sums.sum(1) / (expected * taps))
    by_tap = _quarter_octaves(column_sums.sum(0) / (expected * np.exp2(by_channel / 4).sum()))
    return Levels(base, by_row - base, by_channel, by_tap)


def _quarter_octaves(means: NDArray[np.float64] | float) -> Levels32:
    """4 * log2 of each, rounded and clipped."""
    levels = np.rint(4 * np.log2(np.maximum(means, 2.0 ** (_LOWEST / 4))))
    return np.asarray(np.minimum(levels, _HIGHEST), np.int32)


def class_matrix(levels: Levels, rows: int, columns: int) -> Contexts:
    """The class of every code, uint8 [rows, columns], maybe a view of fewer."""
    down = np.zeros(rows, np.int32) if levels.rows is None else levels.rows
    along = np.zeros(columns, np.int32)
    if levels.channels is not None and levels.taps is not None:
        along = (levels.channels[:, None] + levels.taps).reshape(-1)
    if levels.channels is None and levels.rows is None:
        return np.broadcast_to(_class_of(np.int32(levels.base)), (rows, columns))
    low, high = int(down.min() + along.min()), int(down.max() + along.max())
    lookup = _class_of(levels.base + np.arange(low, high + 1, dtype=np.int64))
    return np.asarray(lookup[(down - low)[:, None] + along])


def _class_of(levels: NDArray[np.int64] | np.int32) -> Contexts:
    return np.asarray(np.clip((levels + 1 >> 1) + 8, 0, CLASSES - 1), np.uint8)
