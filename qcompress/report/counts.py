"""Codes are counted here: levels used, entropy, and how a codebook's entries are used. Imports no torch."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.payload import entropy_bits
from qcompress.report.document import BINS, LayerFigures

Counts: TypeAlias = NDArray[np.int64]
"""How often each code occurs."""

WIDE = 1 << 20
"""Codes that span fewer values than this are counted by value, others by sorting them."""

PIECE = 1 << 20
"""Codes of codebooks that are counted at a time."""


def count_values(codes: NDArray[np.int32]) -> Counts:
    """How often each code that occurs does, int64, by ascending code; codes of any size."""
    if not codes.size:
        return np.zeros(0, np.int64)
    low, high = int(codes.min()), int(codes.max())
    if high - low < WIDE:
        counts = np.bincount(codes.reshape(-1) - low)
        return counts[counts > 0]
    return np.unique(codes, return_counts=True)[1].astype(np.int64)


class ValueCounter:
    """Counts codes of any size, piece by piece."""

    def __init__(self) -> None:
        self._values = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        """How often each code that occurs does, by ascending code."""

    def add(self, codes: NDArray[Any]) -> None:
        """Count some more, of any integers."""
        if not codes.size:
            return
        low = int(codes.min())
        if int(codes.max()) - low < WIDE:
            every = np.bincount(codes.reshape(-1).astype(np.int64) - low)
            places = np.flatnonzero(every)
            values, counts = places + low, every[places]
        else:
            values, counts = np.unique(codes, return_counts=True)
        together = np.concatenate([self._values, values])
        self._values, places = np.unique(together, return_inverse=True)
        counts = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self._values), np.int64)
        np.add.at(self.counts, places, counts)


def measure_counts(*blocks: Counts | None) -> LayerFigures:
    """levels_used and entropy, in bits a code, of the codes of all blocks; None where one is not known.

    blocks  int64 [2**bits] each: how often each code occurs
    """
    known = [counts for counts in blocks if counts is not None]
    if len(known) < len(blocks) or not known:
        return LayerFigures()
    total = np.sum(known, axis=0)
    return LayerFigures(levels_used=int(np.count_nonzero(total)), entropy=entropy_bits(total))


def codebook_figures(codes: NDArray[Any], values: NDArray[np.float32]) -> dict[str, Any]:
    """The figures of LayerFigures that tell of codebooks.

    codes   integers [vectors, columns], the rows of each table together
    values  float32 [tables, entries, dim], what the entries decode to
    """
    tables, entries, _ = values.shape
    return used_codebook_figures(entry_uses(codes, tables, entries), values)


def used_codebook_figures(uses: Counts, values: NDArray[np.float32]) -> dict[str, Any]:
    """The same, given how often each entry of each table is named, as `entry_uses` tells."""
    entries, dim = values.shape[1:]
    figures = {**_entry_figures(values), "dead": int(np.count_nonzero(uses == 0))}
    if dim == 1 and entries <= BINS:
        levels = np.sort(values[:, :, 0].astype(np.float64), axis=1).mean(0)
        figures["levels"] = tuple(levels.tolist()) if np.isfinite(levels).all() else None
    return figures


def stored_codebook_figures(values: NDArray[np.float32], levels_used: int | None) -> dict[str, Any]:
    """Those that are known without codes; with one table the dead entries too, from the number of codes that occur."""
    figures = _entry_figures(values)
    if levels_used is not None and len(values) == 1:
        figures["dead"] = values.shape[1] - levels_used
    return figures


def _entry_figures(values: NDArray[np.float32]) -> dict[str, Any]:
    tables, entries, _ = values.shape
    different = sum(len(np.unique(table, axis=0)) for table in values)
    return {"entries": entries, "duplicates": tables * entries - different}


def entry_uses(codes: NDArray[Any], tables: int, entries: int) -> Counts:
    """How often each entry of each table is named, int64 [tables * entries]."""
    rows = codes.reshape(tables, -1)
    uses = np.zeros(tables * entries, np.int64)
    step = max(1, PIECE // max(rows.shape[1], 1))
    for start in range(0, tables, step):
        part = rows[start : start + step]
        first = start * entries
        for left in range(0, part.shape[1], PIECE):
            places = part[:, left : left + PIECE] + (np.arange(len(part)) * entries)[:, None]
            found = np.bincount(places.reshape(-1), minlength=len(part) * entries)
            uses[first : first + len(found)] += found
    return uses
