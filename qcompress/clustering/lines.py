"""Numbers are sorted here with their running sums, so that whatever concerns a run of them costs two look-ups.

A cell is a run of points that share a centroid; cells are told by their cuts, indices into the sorted points. kmeans.py
makes Lines of weights, optimal.py cuts the `edges` of their bins into the best cells, and `lloyd` here goes on from any
centroids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.coding.rows import row_slices, spans

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Points = NDArray[np.floating[Any]]

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

MOST_BINS = 2**16
PIECE = 2**16
ROUNDING = 2.0**-46
"""The share of the sum of squares that float64 sums of differences of running sums may get wrong."""
MOST_ITERATIONS = 300


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of n points each.

    points  float32 or float64 [lines, n], ascending, finite
    mass    float64 [lines, n + 1]: the weight of all points before; None where each point weighs 1
    first   float64 [lines, n + 1]: the sum of weight * (point - origin) before
    origin  float64 [lines, 1]: the middle point
    """

    points: Points
    mass: Floats | None
    first: Floats
    origin: Floats

    @property
    def size(self) -> int:
        return int(self.points.shape[1])

    def take(self, line: int) -> Lines:
        """One of the lines."""
        one = slice(line, line + 1)
        mass = None if self.mass is None else self.mass[one]
        return Lines(self.points[one], mass, self.first[one], self.origin[one])

    def at(self, index: Ints) -> Floats:
        """float64, the points at each index [lines, any], of those outside the first or last."""
        return np.take_along_axis(self.points, index.clip(0, self.size - 1), 1).astype(np.float64)

    def mass_at(self, index: Ints) -> Floats:
        """float64, the weight before each index [lines, any]."""
        return index.astype(np.float64) if self.mass is None else np.take_along_axis(self.mass, index, 1)

    def first_at(self, index: Ints, origin: Floats) -> Floats:
        """float64, the sum of weight * (point - origin) before each index [lines, any]."""
        return np.take_along_axis(self.first, index, 1) + (self.origin - origin) * self.mass_at(index)

    def cuts(self, centroids: Points) -> Ints:
        """[lines, clusters + 1]: where the points change to the next of the ascending centroids, a tie to the lower."""
        inner = search(self.points, midpoints(centroids, self.points.dtype), right=True)
        first = np.zeros((len(inner), 1), np.intp)
        return np.concatenate([first, inner, first + self.size], 1)

    def means(self, cuts: Ints, empty: Floats) -> Floats:
        """float64 [lines, clusters]: the mean of each cell, `empty` for those without weight."""
        mass = np.diff(self.mass_at(cuts), axis=1)
        first = np.diff(np.take_along_axis(self.first, cuts, 1), axis=1)
        found = np.divide(first, mass, out=empty.copy(), where=mass > 0) + self.origin
        # Running sums are rounded, which must not carry a mean out of its cell.
        low, high = self.at(cuts[:, :-1]), self.at(cuts[:, 1:] - 1)
        means: Floats = np.where(mass > 0, np.clip(found, low, np.maximum(low, high)), empty)
        return means

    def error(self, cuts: Ints, centroids: Points) -> Floats:
        """float64 [lines]: the sum of weight * (point - centroid of its cell)**2."""
        error = np.zeros(len(cuts))
        exact = centroids.astype(np.float64).reshape(-1)
        for span in row_slices(self.size, len(cuts), PIECE):
            counts = np.diff(cuts.clip(span.start, span.stop), axis=1)
            offset = self.points[:, span] - np.repeat(exact, counts.reshape(-1)).reshape(len(cuts), -1)
            weighted = offset
            if self.mass is not None:
                weighted = offset * np.diff(self.mass[:, span.start : span.stop + 1], axis=1)
            error += np.einsum("ij,ij->i", offset, weighted)
        return error


def lines_from_rows(rows: Points, weights: Points | None) -> Lines:
    """One line a row; rows and weights float32 or float64 [lines, n], weights not negative.

    A row whose weights are all zero counts as unweighted. Raises ValueError where a value is not finite.
    """
    if weights is None:
        points = np.sort(rows, axis=1)
        return _lines(points, None)
    order = _order(rows)
    sorted_weights = np.take_along_axis(weights, order, 1).astype(np.float64)
    sorted_weights[~sorted_weights.any(1)] = 1.0
    return _lines(np.take_along_axis(rows, order, 1), sorted_weights)


def line_from_values(values: Tensor, weights: Tensor | None) -> Lines:
    """The one line of all values, with equal values merged where at most MOST_BINS differ.

    Values of 16 bits are counted by bit pattern, of which there are no more, and never sorted.
    """
    if values.dtype in SIXTEEN_BITS:
        line = _histogram(values, weights)
    else:
        flat = values.reshape(1, -1).numpy()
        line = lines_from_rows(flat, None if weights is None else weights.reshape(1, -1).numpy())
    points = line.points[0]
    last = np.append(points[1:] != points[:-1], True)
    if np.count_nonzero(last) > MOST_BINS:
        return line
    ends = np.flatnonzero(last)[None]
    cuts = np.append(np.zeros((1, 1), np.intp), ends + 1, axis=1)
    first = np.take_along_axis(line.first, cuts, 1)
    return Lines(points[ends], line.mass_at(cuts), first, line.origin)


def _histogram(values: Tensor, weights: Tensor | None) -> Lines:
    """The line of the bit patterns that occur, in the order of what they stand for."""
    patterns = values.reshape(-1).view(torch.int16).numpy().view(np.uint16)
    negative = np.arange(0xFFFF, 0x7FFF, -1)
    order = np.concatenate([negative, np.arange(0x8000)])
    seen = np.zeros(MOST_BINS, np.int64)
    summed = np.zeros(MOST_BINS)
    flat = None if weights is None else weights.reshape(-1).numpy()
    for span in spans(len(patterns), 4 * PIECE):
        seen += np.bincount(patterns[span], minlength=MOST_BINS)
        if flat is not None:
            summed += np.bincount(patterns[span], flat[span], minlength=MOST_BINS)
    present = order[seen[order] > 0]
    mass = summed if summed.any() else seen.astype(np.float64)
    points = torch.from_numpy(present.astype(np.uint16).view(np.int16)).view(values.dtype).float().numpy()
    return _lines(points[None], mass[present][None])


def _order(rows: Points) -> Ints:
    """The stable ascending order of each row; float32 is sorted with its index in one 64-bit key, many times faster."""
    if rows.dtype != np.float32:
        return np.argsort(rows, axis=1, kind="stable")
    # Adding zero makes -0 the same key as +0.
    bits = (rows + np.float32(0)).view(np.uint32)
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys = ascending.astype(np.uint64) << np.uint64(32) | np.arange(rows.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)


def _lines(points: Points, weights: Floats | None) -> Lines:
    if not np.isfinite(points[:, [0, -1]]).all():
        raise ValueError("only finite values can be clustered")
    lines, size = points.shape
    origin = points[:, size // 2 : size // 2 + 1].astype(np.float64)
    first = np.zeros((lines, size + 1))
    # Seen from the middle: sums of numbers that are large against their differences would tell nothing of these.
    np.subtract(points, origin, out=first[:, 1:])
    mass = None
    if weights is not None:
        mass = np.zeros((lines, size + 1))
        np.cumsum(weights, axis=1, out=mass[:, 1:])
        first[:, 1:] *= weights
    np.cumsum(first, axis=1, out=first)
    return Lines(points, mass, first, origin)


def midpoints(centroids: Points, dtype: np.dtype[Any]) -> Points:
    """The limits between ascending centroids [..., clusters], of `dtype` [..., clusters - 1].

    A point lies above the true midpoint just when it is greater than the limit, which is rounded down. Copies of the
    last centroid, which fill rows up, lie beyond infinity.
    """
    halves = centroids.astype(np.float64) / 2
    exact = np.where(halves[..., :-1] >= halves[..., -1:], np.inf, halves[..., :-1] + halves[..., 1:])
    limits = exact.astype(dtype)
    rounded: Points = np.where(limits > exact, np.nextafter(limits, dtype.type(-np.inf)), limits)
    return rounded


def search(rows: NDArray[Any], wanted: NDArray[Any], *, right: bool = False) -> Ints:
    """How many of each ascending row are below (`right`: at most) each wanted number: [lines, any], of one dtype."""
    if len(rows) == 1:
        alone: Ints = np.searchsorted(rows[0], wanted[0], side="right" if right else "left")
        return alone[None]
    found = torch.searchsorted(torch.from_numpy(rows), torch.from_numpy(np.ascontiguousarray(wanted)), right=right)
    index: Ints = found.numpy()
    return index


def edges(lines: Lines, bins: int) -> Ints:
    """[lines, at most bins + 1]: ascending cuts into bins, some empty; equal points share a bin.

    Where there are no more points than bins, each point is its own. Else a quarter of the cuts is at equal steps of
    weight and of width, and the rest divides what lies between so that weight * width is about the same for all, which
    makes its maximum, and so `bin_slack`, least.
    """
    if lines.size <= bins:
        new = np.ones((len(lines.points), lines.size + 1), np.bool_)
        new[:, 1:-1] = lines.points[:, 1:] != lines.points[:, :-1]
        return np.maximum.accumulate(np.where(new, np.arange(lines.size + 1), 0), axis=1)
    share = np.linspace(0, 1, bins // 8 + 1)[1:-1]
    low, high = lines.at(np.zeros((len(lines.points), 1), np.intp)), lines.at(np.full((1, 1), lines.size))
    widths = _below(lines, low + (high - low) * share)
    if lines.mass is None:
        weights = np.broadcast_to((share * lines.size).astype(np.intp), widths.shape)
    else:
        weights = search(lines.mass, lines.mass[:, -1:] * share)
    coarse = _tidy(lines, weights, widths)
    left, right = lines.at(coarse[:, :-1]), lines.at(coarse[:, 1:] - 1)
    area = np.diff(lines.mass_at(coarse), axis=1) * (right - left).clip(0, None)
    sums = np.sqrt(area).cumsum(1)
    wanted = sums[:, -1:] * np.linspace(0, 1, bins - coarse.shape[1] + 1)
    bin_ = search(sums, wanted).clip(0, sums.shape[1] - 1)
    within = np.sqrt(np.take_along_axis(area, bin_, 1))
    rest = np.take_along_axis(sums, bin_, 1) - wanted
    back = np.divide(rest, within, out=np.zeros_like(rest), where=within > 0)
    ends, starts = np.take_along_axis(right, bin_, 1), np.take_along_axis(left, bin_, 1)
    return _tidy(lines, coarse[:, 1:-1], _below(lines, ends - back * (ends - starts)))


def _below(lines: Lines, limits: Floats) -> Ints:
    return search(lines.points, limits.astype(lines.points.dtype))


def _tidy(lines: Lines, first: Ints, second: Ints) -> Ints:
    """Both sets of cuts in order, moved to where runs of equal points begin, with those at 0 and n."""
    inner = np.sort(np.concatenate([first, second], 1), axis=1)
    inner = search(lines.points, np.take_along_axis(lines.points, inner.clip(0, lines.size - 1), 1))
    return np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, lines.size)))


def bin_slack(lines: Lines, cuts: Ints, zero: bool) -> Floats:
    """float64 [lines]: how much splitting bins can gain over the best clustering that keeps each of them whole.

    Let c be the optimal centroids and t their midpoints. Giving all of a bin to one centroid instead of the nearest
    adds, for a t within it, 2 * (gap of c at t) * min(sum of t - x on the left, sum of x - t on the right), if the
    centroid is chosen where these two sums cross; either is at most weight * width / 4. The gaps sum to no more than
    the range.
    """
    if cuts.shape[1] == lines.size + 1:
        return np.zeros(len(cuts))
    mass = np.diff(lines.mass_at(cuts), axis=1)
    left, right = lines.at(cuts[:, :-1]), lines.at(cuts[:, 1:] - 1)
    low, high = lines.points[:, 0].astype(np.float64), lines.points[:, -1].astype(np.float64)
    reach = np.maximum(high, 0) - np.minimum(low, 0) if zero else high - low
    slack: Floats = reach / 2 * np.where(mass > 0, mass * (right - left), 0.0).max(1)
    return slack


def lloyd(lines: Lines, centroids: Floats, zero: bool, iterations: int = MOST_ITERATIONS) -> Floats:
    """Ascending centroids [lines, clusters], each the mean of the points nearest to it; the error never grows.

    A centroid without weight takes half of the cell of the greatest weight * width**2, where that is not 0. With
    `zero`, the centroid that is 0 stays there.
    """
    cuts = lines.cuts(centroids)
    for _ in range(iterations):
        moved = np.sort(_recentre(lines, cuts, centroids, zero), axis=1)
        follow = lines.cuts(moved)
        if np.array_equal(moved, centroids):
            break
        centroids, cuts = moved, follow
    return centroids


def _recentre(lines: Lines, cuts: Ints, centroids: Floats, zero: bool) -> Floats:
    """The means of the cells, empty cells put where they lessen the error; not sorted."""
    means = lines.means(cuts, centroids)
    pinned = np.zeros(means.shape, bool)
    if zero:
        np.put_along_axis(pinned, (centroids == 0).argmax(1)[:, None], True, 1)
        means[pinned] = 0.0
    mass = np.diff(lines.mass_at(cuts), axis=1)
    empty = (mass <= 0) & ~pinned
    if not empty.any():
        return means
    width = lines.at(cuts[:, 1:] - 1) - lines.at(cuts[:, :-1])
    worth = mass * np.where(pinned, np.maximum(lines.at(cuts[:, 1:] - 1), -lines.at(cuts[:, :-1])), width) ** 2
    donors = np.argsort(-worth, axis=1, kind="stable")
    for line in np.flatnonzero(empty.any(1)).tolist():
        for cell, donor in zip(np.flatnonzero(empty[line]), donors[line], strict=False):
            if worth[line, donor] <= 0:
                break
            halves = _halves(lines, line, cuts[line, donor : donor + 2], means[line, donor])
            if pinned[line, donor]:
                means[line, cell] = halves[np.abs(halves).argmax()]
            else:
                means[line, [donor, cell]] = halves
    return means


def _halves(lines: Lines, line: int, cut: Ints, mean: float) -> Floats:
    """The means of the points of one cell up to its mean and of those above."""
    points = lines.points[line, cut[0] : cut[1]]
    middle = cut[0] + np.searchsorted(points, points.dtype.type(mean), side="right").clip(1, len(points) - 1)
    ends = np.array([cut[0], middle, cut[1]])
    mass = ends.astype(np.float64) if lines.mass is None else lines.mass[line, ends]
    halves = np.diff(mass)
    found = np.diff(lines.first[line, ends])
    origin = lines.origin[line, 0]
    means: Floats = np.divide(found, halves, out=np.full(2, mean - origin), where=halves > 0) + origin
    return means
