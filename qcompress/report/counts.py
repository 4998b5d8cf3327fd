"""Figures that codes alone tell. Imports no torch."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.payload import entropy_bits
from qcompress.report.document import LayerFigures

Counts: TypeAlias = NDArray[np.int64]

_WIDE = 1 << 20


def count_values(codes: NDArray[np.int32]) -> Counts:
    """How often each code that occurs does, int64, by ascending code; codes of any size."""
    if not codes.size:
        return np.zeros(0, np.int64)
    low, high = int(codes.min()), int(codes.max())
    if high - low < _WIDE:
        counts = np.bincount(codes.reshape(-1) - low)
        return counts[counts > 0]
    return np.unique(codes, return_counts=True)[1].astype(np.int64)


def measure_counts(*blocks: Counts | None) -> LayerFigures:
    """levels_used and entropy, in bits a code, of the codes of all blocks; None where one is not known.

    blocks  int64 [2**bits] each: how often each code occurs
    """
    known = [counts for counts in blocks if counts is not None]
    if len(known) < len(blocks) or not known:
        return LayerFigures()
    total = np.sum(known, axis=0)
    return LayerFigures(levels_used=int(np.count_nonzero(total)), entropy=entropy_bits(total))
