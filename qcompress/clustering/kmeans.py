"""Numbers are clustered here: the codebook of least squared error of a tensor, of each of its rows, or of several.

`cluster_scalars` and `cluster_rows` sort numbers (lines.py), start from the optimum (optimal.py) or from centroids that
are drawn here, and end with Lloyd's iterations (lines.py); `ScalarCounts` gathers the numbers of several tensors first.
clustering.codebooks calls these for weights, encode for codebooks that tensors share; vectors are kmeans_vectors.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.clustering.lines import (
    MOST_BINS,
    PIECE,
    SIXTEEN_BITS,
    Floats,
    Lines,
    Points,
    edges,
    line_from_values,
    lines_from_rows,
    lloyd,
    midpoints,
    search,
)
from qcompress.clustering.optimal import optimal_start
from qcompress.coding.rows import spans, tiles

OtherStart: TypeAlias = Literal["linear", "density", "random", "k-means++"]
Start: TypeAlias = Literal["optimal", OtherStart]

MOST_CLUSTERS = 2**15
ROW_BINS = 2**10
ROW_ATOMS = 2**16
ROW_VALUES = 2**20
BIN_BITS = 20
"""Leading bits of a float32 that name its bin: sign, exponent, 11 of the significand; 16-bit floats have no more."""
COUNTED_AT_ONCE = 2**21
SHORT_VECTOR = 4
"""Up to so many terms torch adds one after another."""


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
    for down, across in tiles(*rows.shape, PIECE // 2):
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


class ScalarCounts:
    """Weight and weighted sum of the numbers in each of 2**20 bins, which lie as densely as floats do: a bin is one
    part in 2**11 wide.

    Of bfloat16 and float16 each distinct value has a bin of its own, so that their codebook is the optimum; of wider
    floats a bin counts as its mean.
    """

    def __init__(self) -> None:
        self._mass = np.zeros(2**BIN_BITS)
        self._sums = np.zeros(2**BIN_BITS)

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Count values, float of any shape, on the CPU, finite; weights alike, not negative, all zero counts as one."""
        flat = values.detach().reshape(-1)
        each = None if weights is None or not weights.any() else weights.reshape(-1).double().numpy()
        if flat.dtype in SIXTEEN_BITS:
            self._add_patterns(flat, each)
            return
        for span in spans(len(flat), COUNTED_AT_ONCE):
            self._add(flat[span].float().numpy(), None if each is None else each[span])

    def _add_patterns(self, flat: Tensor, each: NDArray[np.float64] | None) -> None:
        patterns = flat.contiguous().view(torch.int16).numpy().view(np.uint16)
        mass = np.zeros(2**16)
        for span in spans(len(patterns), COUNTED_AT_ONCE):
            mass += np.bincount(patterns[span], None if each is None else each[span], minlength=2**16)
        seen = np.flatnonzero(mass)
        points = torch.from_numpy(seen.astype(np.uint16).view(np.int16)).view(flat.dtype).float().numpy()
        self._add(points, mass[seen])

    def _add(self, points: NDArray[np.float32], mass: NDArray[np.float64] | None) -> None:
        # Adding zero makes -0 the same bin as +0.
        bins = (points + np.float32(0)).view(np.uint32) >> np.uint32(32 - BIN_BITS)
        sums = points.astype(np.float64) if mass is None else points * mass
        self._mass += np.bincount(bins, mass, minlength=2**BIN_BITS)
        self._sums += np.bincount(bins, sums, minlength=2**BIN_BITS)

    def cluster(self, clusters: int, start: Start, zero: bool, generator: torch.Generator) -> Clustering:
        """The codebook of all that was counted, as `cluster_scalars` finds it; error and bound are of the means."""
        used = np.flatnonzero(self._mass)
        means = (self._sums[used] / self._mass[used]).astype(np.float32)
        mass = torch.from_numpy(self._mass[used])
        return cluster_scalars(torch.from_numpy(means), clusters, mass, start=start, zero=zero, generator=generator)


def other_start(lines: Lines, clusters: int, start: OtherStart, generator: torch.Generator) -> Floats:
    """Ascending centroids, float64 [lines, clusters] (Han et al. 2016, arXiv 1510.00149, section 3.2).

    linear     equal steps from the least to the greatest point, both included
    density    the points below which (j + 1/2) / clusters of the weight lies
    random     points drawn by weight without replacement
    k-means++  points drawn by weight * squared distance to the nearest drawn before (Arthur, Vassilvitskii 2007); above
               MOST_BINS points, means of bins
    """
    match start:
        case "linear":
            share = np.linspace(0, 1, clusters)
            low, high = lines.points[:, :1].astype(np.float64), lines.points[:, -1:].astype(np.float64)
            return low * (1 - share) + high * share
        case "density":
            share = (np.arange(clusters) + 0.5) / clusters * np.ones_like(lines.origin)
            if lines.mass is None:
                return lines.at((share * lines.size).astype(np.intp))
            return lines.at(search(lines.mass, lines.mass[:, -1:] * share, right=True) - 1)
        case "random":
            return _random(lines, clusters, generator)
        case "k-means++":
            cuts = edges(lines, MOST_BINS)
            points = torch.from_numpy(lines.means(cuts, lines.at(cuts[:, :-1])))
            mass = torch.from_numpy(np.diff(lines.mass_at(cuts), axis=1))
            return plus_plus(points.unsqueeze(2), mass, clusters, generator).squeeze(2).sort().values.numpy()
        case _:
            assert_never(start)


def _random(lines: Lines, clusters: int, generator: torch.Generator) -> Floats:
    # The least of exponential times over weights: drawing by weight without replacement.
    times = torch.empty(lines.points.shape, dtype=torch.float64).exponential_(generator=generator)
    if lines.mass is not None:
        times /= torch.from_numpy(np.diff(lines.mass, axis=1))
    chosen = times.topk(min(clusters, lines.size), largest=False).indices.sort().values.numpy()
    missing = clusters - chosen.shape[1]
    return np.pad(lines.at(chosen), ((0, 0), (0, missing)), mode="edge")


def plus_plus(points: Tensor, mass: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Points of every set, drawn by weight * squared distance to the nearest drawn before: k-means++.

    points   float64 [sets, n, dim]
    mass     float64 [sets, n], not negative
    returns  float64 [sets, clusters, dim], in the order in which they were drawn
    """
    distance, by_axis = torch.ones_like(mass), points.movedim(2, 0).contiguous()
    chosen = points.new_empty(len(points), clusters, points.shape[2])
    for k in range(clusters):
        share = torch.rand(len(points), 1, dtype=torch.float64, generator=generator)
        sums = (mass * distance).cumsum(1)
        # Where all distances are 0 any point will do.
        drawn = torch.searchsorted(sums, sums[:, -1:] * share, right=True).clamp_(max=points.shape[1] - 1)
        chosen[:, k : k + 1] = points.gather(1, drawn.unsqueeze(2).expand(-1, -1, points.shape[2]))
        nearer = _squared_distance(points, by_axis, chosen[:, k])
        distance = nearer if k == 0 else torch.minimum(distance, nearer)
    return chosen


def _squared_distance(points: Tensor, by_axis: Tensor, centre: Tensor) -> Tensor:
    """Of points [sets, n, dim], which are also given as [dim, sets, n], from a centre [sets, dim] of each set."""
    if len(by_axis) > SHORT_VECTOR:
        return (points - centre.unsqueeze(1)).square_().sum(2)
    # Sums of so few terms are the same in whole passes over all points, which take a third of the time.
    total = (by_axis[0] - centre[:, :1]).square_()
    for axis in range(1, len(by_axis)):
        total += (by_axis[axis] - centre[:, axis : axis + 1]).square_()
    return total
