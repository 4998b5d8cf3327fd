"""Figures of the codebooks of one tensor: what their entries are worth. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.report.document import BINS

PIECE = 2**20


def codebook_figures(codes: NDArray[Any], values: NDArray[np.float32]) -> dict[str, Any]:
    """The figures of LayerFigures that tell of codebooks.

    codes   integers [vectors, columns], the rows of each table together
    values  float32 [tables, entries, dim], what the entries decode to
    """
    tables, entries, dim = values.shape
    figures = {**_entry_figures(values), "dead": int(np.count_nonzero(_uses(codes, tables, entries) == 0))}
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


def _uses(codes: NDArray[Any], tables: int, entries: int) -> NDArray[np.int64]:
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
