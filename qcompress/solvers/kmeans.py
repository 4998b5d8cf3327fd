"""Clustering of numbers: the codebook of least squared error, for a whole tensor or for each row of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.solvers.blocks import spans
from qcompress.solvers.kmeans_lines import (
    MOST_BINS,
    PIECE,
    Floats,
    Lines,
    Points,
    line_from_values,
    lines_from_rows,
    midpoints,
)
from qcompress.solvers.kmeans_starts import Start, lloyd, optimal_start, other_start

__all__ = ["Clustering", "Start", "assign_scalars", "cluster_rows", "cluster_scalars", "recentre"]

MOST_CLUSTERS = 2**15
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
ROW_BINS = 2**10
ROW_ATOMS = 2**16
ROW_VALUES = 2**20


@dataclass(frozen=True, slots=True)
class Clustering:
    """Values as centroids and the number of each one's centroid.

    centroids  [clusters], [rows, clusters] for rows, [clusters, dim] for vectors; float32, for float64 values float64;
               ascending, vectors by their first coordinate
    codes      uint8 up to 256 clusters, else int16
    error      float64 [] or [rows]: the sum of weight * squared distance to these centroids
    bound      float64, shaped like error: no centroids have an error below error - bound
    """

    centroids: Tensor
    codes: Tensor
    error: Tensor
    bound: Tensor


def cluster_scalars(
    values: Tensor,
    clusters: int,
    weights: Tensor | None = None,
    *,
    start: Start = "optimal",
    zero: bool = False,
    generator: torch.Generator | None = None,
    bins: int | None = None,
) -> Clustering:
    """One codebook for all values; fewer centroids than `clusters` where fewer values differ.

    values     float, any shape, finite, on the CPU
    clusters   1 to 2**15
    weights    float, shaped like values, not negative: what a squared error counts; all zero counts as all one
    start      "optimal" is the global optimum where at most 2**16 values differ, as with all 16-bit ones, and otherwise
               within `bound` of it: the optimum over 2**16 bins, then Lloyd's iterations over all values; of any other
               start only a local optimum is found, and `bound` is the error
    zero       one centroid is exactly 0
    generator  for random and k-means++; a new one with seed 0 where absent
    bins       where more than 2**16 values differ, at most so many instead: the bound is wider, the time shorter

    Raises ValueError for no values, values that are not finite and negative weights.
    """
    _check(values, clusters, weights)
    line = line_from_values(values.detach(), None if weights is None else torch.from_numpy(_array(weights)))
    generator = generator or torch.Generator().manual_seed(0)
    most = MOST_BINS if bins is None or line.size <= MOST_BINS else min(bins, MOST_BINS)
    centroids, least = _centroids(line, clusters, start, zero, generator, most)
    kept = _used(line, _stored(centroids, values.dtype), zero)
    error, bound = _errors(line, kept[None], least)
    found = torch.from_numpy(kept)
    return Clustering(found, assign_scalars(values, found), error[0], bound[0])


def cluster_rows(
    rows: Tensor,
    clusters: int,
    weights: Tensor | None = None,
    *,
    start: Start = "optimal",
    zero: bool = False,
    generator: torch.Generator | None = None,
) -> Clustering:
    """A codebook for each row, as `cluster_scalars` would find it, with 2**10 bins for longer rows.

    rows     float [rows, length]; weights alike
    returns  centroids [rows, clusters]: where fewer values differ, the last centroid is repeated and has no codes
    """
    _check(rows, clusters, weights)
    if rows.ndim != 2:
        raise ValueError(f"rows of {rows.ndim} dimensions")
    bins = max(ROW_BINS, 4 * clusters)
    step = max(1, min(ROW_ATOMS // min(rows.shape[1], bins), ROW_VALUES // rows.shape[1]))
    generator = generator or torch.Generator().manual_seed(0)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for span in spans(len(rows), step):
        lines = lines_from_rows(_array(rows[span]), None if weights is None else _array(weights[span]))
        centroids, least = _centroids(lines, clusters, start, zero, generator, bins)
        kept = _stored(centroids, rows.dtype)
        idle = (np.diff(lines.cuts(kept), axis=1) == 0).any(1) | (np.diff(kept, axis=1) == 0).any(1)
        for line in np.flatnonzero(idle).tolist():
            used = _used(lines.take(line), kept[line], zero)
            kept[line] = np.pad(used, (0, clusters - len(used)), mode="edge")
        parts.append((torch.from_numpy(kept), *_errors(lines, kept, least)))
    found, error, bound = (torch.cat(part) for part in zip(*parts, strict=True))
    return Clustering(found, assign_scalars(rows, found), error, bound)


def assign_scalars(values: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest centroid, a tie to the lower: uint8 up to 256 centroids, else int16; values' shape.

    values     float, any shape; [rows, ...] where centroids are [rows, clusters]
    centroids  float, ascending, [clusters] or [rows, clusters]; copies of the last are never chosen
    """
    if centroids.ndim == 1 and values.dtype in SIXTEEN_BITS and values.numel() > 2**16:
        patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(values.dtype)
        table = assign_scalars(patterns, centroids).numpy()
        index = values.detach().reshape(-1).view(torch.int16).numpy().view(np.uint16)
        found = np.empty(index.shape, table.dtype)
        for span in spans(len(index), PIECE):
            # Every index lies in the table: wrapping only saves looking.
            np.take(table, index[span], out=found[span], mode="wrap")
        return torch.from_numpy(found).reshape(values.shape)
    lines = 1 if centroids.ndim == 1 else len(centroids)
    rows = _array(values).reshape(lines, values.numel() // max(lines, 1))
    limits = midpoints(_array(centroids).reshape(lines, -1), rows.dtype)
    found = np.empty(rows.shape, np.uint8 if centroids.shape[-1] <= 256 else np.int16)
    height = max(1, PIECE // 2 // max(rows.shape[1], 1))
    for down in spans(lines, height):
        for across in spans(rows.shape[1], PIECE // 2):
            found[down, across] = _ranks(np.ascontiguousarray(rows[down, across]), limits[down])
    return torch.from_numpy(found).reshape(values.shape)


def _ranks(rows: Points, limits: Points) -> NDArray[Any]:
    """How many of its row's ascending limits each number is above."""
    if limits.shape[1] > 255:
        found: NDArray[Any] = torch.searchsorted(torch.from_numpy(limits), torch.from_numpy(rows)).numpy()
        return found
    ranks, above = np.zeros(rows.shape, np.uint8), np.empty(rows.shape, np.bool_)
    for limit in limits.T:
        np.greater(rows, limit[:, None], out=above)
        ranks += above.view(np.uint8)
    return ranks


def recentre(values: Tensor, codes: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weighted mean of the values of each code, shaped like centroids and of their dtype; as it was where none is.

    values, codes, weights  one shape; [rows, ...] where centroids are [rows, clusters], as in `assign_scalars`
    """
    lines, clusters = (1, len(centroids)) if centroids.ndim == 1 else centroids.shape
    index = codes.reshape(lines, -1).numpy() + (np.arange(lines) * clusters)[:, None]
    flat, values_ = index.reshape(-1), values.detach().reshape(-1)
    mass, first = np.zeros(lines * clusters), np.zeros(lines * clusters)
    for span in spans(len(flat), 4 * PIECE):
        part = values_[span].double().numpy()
        weight = None if weights is None else weights.detach().reshape(-1)[span].double().numpy()
        mass += np.bincount(flat[span], weight, minlength=len(mass))
        first += np.bincount(flat[span], part if weight is None else part * weight, minlength=len(mass))
    old = centroids.detach().reshape(-1).double().numpy()
    means = np.divide(first, mass, out=old.copy(), where=mass > 0)
    return torch.from_numpy(means).reshape(centroids.shape).to(centroids.dtype)


def _check(values: Tensor, clusters: int, weights: Tensor | None) -> None:
    if not values.numel():
        raise ValueError("no values to cluster")
    if not 1 <= clusters <= MOST_CLUSTERS:
        raise ValueError(f"{clusters} clusters, not 1 to {MOST_CLUSTERS}")
    if weights is not None:
        if weights.shape != values.shape:
            raise ValueError(f"weights {tuple(weights.shape)} for values {tuple(values.shape)}")
        if not (weights.min() >= 0 and weights.max() < torch.inf):
            raise ValueError("weights that are negative or not finite")


def _array(values: Tensor) -> Points:
    """float32 or, of float64, float64."""
    array: Points = values.detach().to(torch.promote_types(values.dtype, torch.float32)).contiguous().numpy()
    return array


def _stored(centroids: Floats, dtype: torch.dtype) -> Points:
    """Centroids as they are given back: float32, for float64 values float64."""
    return centroids if dtype == torch.float64 else centroids.astype(np.float32)


def _centroids(
    lines: Lines, clusters: int, start: Start, zero: bool, generator: torch.Generator, bins: int
) -> tuple[Floats, Floats]:
    """Ascending centroids [lines, clusters] and what the least error is at least."""
    if start == "optimal":
        centroids, least = optimal_start(lines, clusters, zero, bins)
    else:
        centroids, least = other_start(lines, clusters, start, generator), np.zeros(len(lines.points))
        if zero:
            np.put_along_axis(centroids, np.abs(centroids).argmin(1)[:, None], 0.0, 1)
            centroids.sort(axis=1)
    return lloyd(lines, centroids, zero), least


def _used(line: Lines, centroids: Points, zero: bool) -> Points:
    """Those of one line's centroids that any point is nearest to, and 0 if `zero`."""
    kept = np.unique(centroids)
    counts = np.diff(line.cuts(kept[None]), axis=1)[0]
    used: Points = kept[(counts > 0) | (zero & (kept == 0))]
    return used


def _errors(lines: Lines, centroids: Points, least: Floats) -> tuple[Tensor, Tensor]:
    """The error and the most by which another is less, float64 [lines]."""
    error = lines.error(lines.cuts(centroids), centroids)
    return torch.from_numpy(error), torch.from_numpy((error - least).clip(0, None))
