"""Figures that codes alone tell. Imports no torch."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.payload import entropy_bits
from qcompress.report.document import LayerFigures

Counts: TypeAlias = NDArray[np.int64]


def measure_counts(*blocks: Counts | None) -> LayerFigures:
    """levels_used and entropy, in bits a code, of the codes of all blocks; None where one is not known.

    blocks  int64 [2**bits] each: how often each code occurs
    """
    known = [counts for counts in blocks if counts is not None]
    if len(known) < len(blocks) or not known:
        return LayerFigures()
    total = np.sum(known, axis=0)
    return LayerFigures(levels_used=int(np.count_nonzero(total)), entropy=entropy_bits(total))
