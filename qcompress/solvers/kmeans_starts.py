"""Where the centroids of numbers begin, and Lloyd's iterations on sorted lines."""

from __future__ import annotations

from typing import Literal, TypeAlias, assert_never

import numpy as np
import torch

from qcompress.solvers.kmeans_lines import (
    MOST_BINS,
    ROUNDING,
    Floats,
    Ints,
    Lines,
    bin_slack,
    edges,
    search,
)
from qcompress.solvers.kmeans_optimal import optimal_cuts, optimal_sides

Start: TypeAlias = Literal["optimal", "linear", "density", "random", "k-means++"]

MOST_ITERATIONS = 300


def optimal_start(lines: Lines, clusters: int, zero: bool, bins: int) -> tuple[Floats, Floats]:
    """The centroids [lines, clusters] that are optimal if bins stay whole, and the least error of any, float64 [lines].

    Where a line has no more points than `bins`, both are the optimum itself. `zero` pins one centroid at 0.
    """
    cuts = edges(lines, bins)
    origin = np.zeros_like(lines.origin) if zero else lines.origin
    mass, first = lines.mass_at(cuts), lines.first_at(cuts, origin)
    if zero:
        centroids, found = _sides(lines, cuts, clusters)
    else:
        found = np.take_along_axis(cuts, optimal_cuts(mass, first, clusters), 1)
        centroids = lines.means(found, lines.at(found[:, :-1]))
    rounding = ROUNDING * _gains(mass, first)
    return centroids, (lines.error(found, centroids) - bin_slack(lines, cuts, zero) - rounding).clip(0, None)


def _gains(mass: Floats, first: Floats) -> Floats:
    """float64 [lines]: what all atoms apart gain, whose last places the optimum's gain cannot tell."""
    weight, sums = np.diff(mass, axis=1), np.diff(first, axis=1)
    gains: Floats = np.divide(sums * sums, weight, out=np.zeros_like(sums), where=weight > 0).sum(1)
    return gains


def _sides(lines: Lines, cuts: Ints, clusters: int) -> tuple[Floats, Ints]:
    """Centroids and cuts [lines, clusters + 1] with one centroid at 0, each side of it clustered towards it."""
    below = search(lines.points, np.zeros((len(cuts), 1), lines.points.dtype))
    above = search(lines.points, np.zeros((len(cuts), 1), lines.points.dtype), right=True)
    left, right = np.minimum(cuts, below), np.maximum(cuts, above)[:, ::-1]
    none = np.zeros_like(lines.origin)

    def both(of_left: Floats, of_right: Floats) -> Floats:
        return np.stack([of_left, of_right[:, :1] - of_right], 1)

    mass = both(lines.mass_at(left), lines.mass_at(right))
    first = both(lines.first_at(left, none), lines.first_at(right, none))
    chosen, number = optimal_sides(mass, first, clusters)
    on_left = np.take_along_axis(left, chosen[:, 0], 1)
    on_right = np.take_along_axis(right, chosen[:, 1], 1)
    # Each side begins with as many empty cells as the other has cells: together one cut too many for each.
    every = np.sort(np.concatenate([on_left, on_right], 1), axis=1)
    found = np.take_along_axis(every, (clusters - 1 - number)[:, None] + np.arange(clusters + 1), 1)
    centroids = lines.means(found, lines.at(found[:, :-1]))
    np.put_along_axis(centroids, number[:, None], 0.0, 1)
    return centroids, found


def other_start(
    lines: Lines, clusters: int, start: Literal["linear", "density", "random", "k-means++"], generator: torch.Generator
) -> Floats:
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
            share = (np.arange(clusters) + 0.5) / clusters
            return _points_at(lines, share * np.ones_like(lines.origin))
        case "random":
            return _random(lines, clusters, generator)
        case "k-means++":
            return _spread(lines, clusters, generator)
        case _:
            assert_never(start)


def _points_at(lines: Lines, share: Floats) -> Floats:
    """The points below which a share [lines, any] in [0, 1) of the weight lies."""
    if lines.mass is None:
        return lines.at((share * lines.size).astype(np.intp))
    return lines.at(search(lines.mass, lines.mass[:, -1:] * share, right=True) - 1)


def _random(lines: Lines, clusters: int, generator: torch.Generator) -> Floats:
    # The least of exponential times over weights: drawing by weight without replacement.
    times = torch.empty(lines.points.shape, dtype=torch.float64).exponential_(generator=generator)
    if lines.mass is not None:
        times /= torch.from_numpy(np.diff(lines.mass, axis=1))
    chosen = times.topk(min(clusters, lines.size), largest=False).indices.sort().values.numpy()
    missing = clusters - chosen.shape[1]
    return np.pad(lines.at(chosen), ((0, 0), (0, missing)), mode="edge")


def _spread(lines: Lines, clusters: int, generator: torch.Generator) -> Floats:
    cuts = edges(lines, MOST_BINS)
    mass = torch.from_numpy(np.diff(lines.mass_at(cuts), axis=1))
    points = torch.from_numpy(lines.means(cuts, lines.at(cuts[:, :-1])))
    distance = torch.ones_like(points)
    chosen = torch.empty(len(points), clusters, dtype=torch.float64)
    for k in range(clusters):
        share = torch.rand(len(points), 1, dtype=torch.float64, generator=generator)
        sums = (mass * distance).cumsum(1)
        # Where all distances are 0 any point will do.
        drawn = torch.searchsorted(sums, sums[:, -1:] * share, right=True).clamp_(max=points.shape[1] - 1)
        chosen[:, k : k + 1] = points.gather(1, drawn)
        nearer = (points - chosen[:, k : k + 1]).square_()
        distance = nearer if k == 0 else torch.minimum(distance, nearer)
    return chosen.sort().values.numpy()


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
