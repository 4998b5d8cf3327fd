"""Tables of token frequencies that a few small integers describe: the density of each bin of magnitudes.

A density is kept as its negative logarithm in eighths of a bit, each bin's as the difference to the bin before; the two
signs share it. That is some 20 times shorter than the frequencies, and costs less than a thousandth of a bit a code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.ans import Table
from qcompress.coding.tokens import BIN_BITS

PRECISION = 16
"""Frequencies sum to 2**16; part of the format."""

STEEPEST = 255
"""Eighths of a bit by which neighbouring bins may differ; part of the format."""

_MOST = 511
_RARE = 0.3
_EXP2: tuple[int, ...] = tuple(round(2 ** (15 + i / 8)) for i in range(8))

Slopes = NDArray[np.int32]


def fit_slopes(counts: NDArray[np.int64]) -> Slopes:
    """The slopes of the density that makes codes of these counts shortest, int32 [bins - 1].

    counts  int64 [tokens], not all 0
    """
    bins = (int(np.flatnonzero(counts)[-1]) + 1) // 2 + 1
    padded = np.zeros(2 * bins, np.float64)
    padded[1:] = counts[: 2 * bins - 1]
    by_bin = padded.reshape(bins, 2).sum(1)
    # A bin without codes between others still needs a density; zero has no sign to choose.
    density = np.maximum(by_bin, _RARE) * np.exp2(-BIN_BITS[:bins] - (np.arange(bins) > 0))
    eighths = np.rint(-8 * np.log2(density / density[0])).astype(np.int32)
    slopes: Slopes = np.clip(np.diff(eighths, prepend=0)[1:], -STEEPEST, STEEPEST)
    return slopes


def table_from_slopes(slopes: Slopes) -> Table:
    """The table, in integers alone, so that it is the same on every machine. Raises ValueError where it cannot be.

    slopes  int32 [bins - 1]
    """
    eighths = np.cumsum(slopes, dtype=np.int64)
    if np.abs(eighths).max(initial=0) > _MOST:
        raise ValueError("a density is beyond 2**64 times that of zero, or below its inverse")
    weights = [_weight(0, 0)] + [_weight(int(q), int(b)) for q, b in zip(eighths, BIN_BITS[1:], strict=False)]
    total = 2 * sum(weights) - weights[0]
    by_bin = [max(1, weight * 2**PRECISION // total) for weight in weights]
    frequencies = np.repeat(np.array(by_bin, np.int64), 2)[1:]
    # What rounding has left or taken goes to the most frequent token, which has more than that.
    frequencies[frequencies.argmax()] += 2**PRECISION - frequencies.sum()
    codes = np.arange(len(frequencies), dtype=np.uint8)
    return Table(PRECISION if len(codes) > 1 else 0, codes, frequencies if len(codes) > 1 else np.ones(1, np.int64))


def _weight(eighths: int, raw_bits: int) -> int:
    """2**(79 + raw_bits - eighths / 8), the fraction of the power rounded to 16 bits."""
    return _EXP2[-eighths % 8] << 64 + raw_bits - -(-eighths // 8)
