"""The cells of least squared error on lines are found by dynamic programming, one long operation a step.

A cell of atoms i to j gains (sum of weight * x)**2 / weight over having its centroid at the origin, and the least
squared error is the greatest sum of gains. The gain obeys Monge's inequality: gain(a, c) + gain(b, d) >=
gain(a, d) + gain(b, c) for a <= b <= c <= d, so the best start of a cell never moves left when its end moves right
(Wu 1991, "Optimal quantization by matrix searching"; Groenlund et al. 2017, arXiv 1701.07204), and the greatest gain
of k cells is concave in k.

kmeans.py calls `optimal_start`, which makes atoms of the points of lines.py. Few clusters take a pass over all atoms
for each cluster (`_layers`); many take a Lagrange multiplier lambda on their number (`_cuts_by_lambda`). As the gain is
concave, there is a lambda at which the wanted number is best, or one at which fewer and more both are; then two optima
can be spliced (Aggarwal, Schieber, Tokuyama 1994, "Finding a minimum-weight k-link path in graphs with the
concave Monge property"). For a given lambda we do not work from left to right, which no long operation can, but improve
whole policies: each atom keeps the start of the cell that ends there, all values follow by pointer doubling, one pass
betters the starts, until none can be bettered; that is Bellman's equation, whose only solution is the optimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.clustering.lines import ROUNDING, Floats, Ints, Lines, bin_slack, edges, search

LAYERS_UP_TO = 128
MOST_PROBES = 100
MOST_PASSES = 500
EPSILON = 2.0**-51


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
        found = np.take_along_axis(cuts, _best_cuts(mass, first, clusters), 1)
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
    chosen, number = _best_sides(mass, first, clusters)
    on_left = np.take_along_axis(left, chosen[:, 0], 1)
    on_right = np.take_along_axis(right, chosen[:, 1], 1)
    # Each side begins with as many empty cells as the other has cells: together one cut too many for each.
    every = np.sort(np.concatenate([on_left, on_right], 1), axis=1)
    found = np.take_along_axis(every, (clusters - 1 - number)[:, None] + np.arange(clusters + 1), 1)
    centroids = lines.means(found, lines.at(found[:, :-1]))
    np.put_along_axis(centroids, number[:, None], 0.0, 1)
    return centroids, found


def _best_cuts(mass: Floats, first: Floats, clusters: int) -> Ints:
    """[lines, clusters + 1], ascending from 0 to n: the cells of least squared error, some empty where atoms are few.

    mass   float64 [lines, n + 1], the weight of the atoms before
    first  float64 [lines, n + 1], the sum of weight * x of the atoms before; the origin is best near the mean
    """
    mass, first = np.ascontiguousarray(mass), np.ascontiguousarray(first)
    if clusters <= LAYERS_UP_TO:
        starts = _layers(mass, first, clusters)[-1]
        return _trace(starts, np.full(len(mass), mass.shape[1] - 1), clusters)
    return _cuts_by_lambda(mass, first, clusters, sides=1)


def _best_sides(mass: Floats, first: Floats, clusters: int) -> tuple[Ints, Ints]:
    """Cells on both sides of a centroid that stays at the origin: their cuts, and their number on the left [lines].

    mass, first  float64 [lines, 2, n + 1]: each side from its far end towards the origin, the sign of x not mattering
    cuts         [lines, 2, clusters]: cells a side, the first of them empty; what is after the last belongs to zero
    """
    lines, _, width = mass.shape
    mass, first = mass.reshape(-1, width), first.reshape(-1, width)
    if clusters - 1 > LAYERS_UP_TO:
        cuts = _cuts_by_lambda(mass, first, clusters - 1, sides=2).reshape(lines, 2, clusters)
        return cuts, np.count_nonzero(np.diff(cuts[:, 0]), axis=1)
    most, ends, starts = _layers(mass, first, clusters - 1)
    each = most.reshape(clusters, lines, 2)
    left = (each[:, :, 0] + each[::-1, :, 1]).argmax(0)
    cells = np.stack([left, clusters - 1 - left], 1).reshape(-1)
    end = ends[cells, np.arange(len(mass))]
    cuts = np.zeros((len(mass), clusters), np.intp)
    cuts[:, -1] = end
    for step in range(clusters - 1):
        layer = np.maximum(cells - step, 0)
        cuts[:, -2 - step] = starts[layer, np.arange(len(mass)), cuts[:, -1 - step]]
    return cuts.reshape(lines, 2, clusters), left


def _layers(mass: Floats, first: Floats, clusters: int) -> tuple[Floats, Ints, NDArray[np.int32]]:
    """Of at most k cells: the most they gain if they end anywhere, where they then end, where the last starts if not.

    float64 and intp [clusters + 1, lines]; int32 [clusters + 1, lines, n + 1], for each atom that may end the last cell
    """
    most, ends = np.zeros((clusters + 1, len(mass))), np.zeros((clusters + 1, len(mass)), np.intp)
    starts = np.zeros((clusters + 1, *mass.shape), np.int32)
    gains = np.zeros_like(mass)
    for k in range(1, clusters + 1):
        if k == 1:
            gains = np.divide(first * first, mass, out=np.zeros_like(mass), where=mass > 0)
        else:
            gains, starts[k] = _best_starts(gains, mass, first)
        most[k], ends[k] = gains.max(1), gains.argmax(1)
    return most, ends, starts


def _trace(starts: NDArray[Any], end: Ints, clusters: int) -> Ints:
    """The cuts [lines, clusters + 1] that lead to `end`; `starts` [clusters + 1, lines, n + 1], [1, ...] for all k."""
    cuts = np.zeros((len(end), clusters + 1), np.intp)
    cuts[:, clusters] = end
    lines = np.arange(len(end))
    for k in range(clusters, 0, -1):
        cuts[:, k - 1] = starts[k % len(starts), lines, cuts[:, k]]
    return cuts


def _best_starts(value: Floats, mass: Floats, first: Floats) -> tuple[Floats, Ints]:
    """For each end j > 0 the greatest value[i] + gain(i, j) over i < j, and the leftmost such i; both [lines, n + 1].

    Ends are solved by halving strides: the best starts of the two neighbours that are already solved enclose those of
    the end between, so each stride looks at every start about once, as one array over all lines. Cells without weight
    are left out: the same without them gains as much.
    """
    lines, width = value.shape
    best, start = np.zeros((lines, width)), np.zeros((lines, width), np.intp)
    base = (np.arange(lines) * width)[:, None]
    flat_value, flat_mass, flat_first = value.reshape(-1), mass.reshape(-1), first.reshape(-1)
    stride = 1 << (width - 1).bit_length() - 1
    while stride:
        ends = np.arange(stride, width, 2 * stride)
        low = start[:, ends - stride]
        high = start[:, np.minimum(ends + stride, width - 1)]
        counts = np.concatenate([low[:, 1:], np.full((lines, 1), width)], 1) - low
        runs = (low + base).reshape(-1)
        spread = _spread(runs, counts.reshape(-1), value.size)
        end_first, end_mass = first[:, ends].reshape(-1), mass[:, ends].reshape(-1)
        gain, weight = spread(end_first), spread(end_mass)
        gain -= flat_first
        weight -= flat_mass
        top, where = _greatest(gain, weight, flat_value, runs, spread)
        # The next run, if there is one, begins at `high`, which may be the best start of both.
        last = (high + base).reshape(-1)
        gain, weight = end_first - flat_first[last], end_mass - flat_mass[last]
        gain = np.divide(gain * gain, weight, out=np.full_like(gain, -np.inf), where=weight > 0) + flat_value[last]
        empty = counts.reshape(-1) == 0
        better = (gain > top) | empty
        best[:, ends] = np.where(better, gain, top).reshape(low.shape)
        start[:, ends] = np.where(better, last, where).reshape(low.shape) - base
        stride //= 2
    nothing = mass <= 0
    best[nothing], start[nothing] = 0.0, 0
    return best, start


def _spread(runs: Ints, counts: Ints, size: int) -> Callable[[Floats], Floats]:
    """A function that repeats the value of each run over all of it."""
    if 8 * len(runs) < size:
        return lambda values: np.repeat(values, counts)
    owners = np.bincount(runs, minlength=size).cumsum() - 1
    return lambda values: values[owners]


def _greatest(
    gain: Floats, weight: Floats, value: Floats, runs: Ints, spread: Callable[[Floats], Floats]
) -> tuple[Floats, Ints]:
    """The greatest gain**2 / weight + value of each run, and where it first is; what has no weight does not count."""
    gain *= gain
    outside = weight <= 0
    np.copyto(weight, 1.0, where=outside)
    gain /= weight
    gain += value
    np.copyto(gain, -np.inf, where=outside)
    top = np.maximum.reduceat(gain, runs)
    hits = np.flatnonzero(gain == spread(top))
    return top, hits[np.minimum(np.searchsorted(hits, runs), len(hits) - 1)]


def _cuts_by_lambda(mass: Floats, first: Floats, clusters: int, sides: int) -> Ints:
    """Cuts [lines, clusters + 1] of the best `clusters` cells over each group of `sides` lines; 2 sides end freely."""
    lines, width = mass.shape
    free = sides == 2

    def total(values: Ints | Floats) -> Floats:
        summed: Floats = values.reshape(-1, sides).sum(1).astype(np.float64)
        return summed

    # Two optima that need no search: all atoms apart where lambda is 0; where it is high a single cell, or none.
    before = np.where(np.diff(mass, axis=1, prepend=-1.0) > 0, np.arange(width) - 1, 0).clip(0)
    apart, single = np.maximum.accumulate(before, axis=1), np.zeros_like(before)
    nothing = np.zeros(lines)
    many = _policy(apart, *_evaluate(apart, nothing, mass, first), nothing, free)
    highest = np.repeat(2 * total(many.gain) + 1e-300, sides)
    few = _policy(single, *_evaluate(single, highest, mass, first), highest, free)
    step = max(1, (width - 1) * sides // clusters)
    start = np.broadcast_to((np.arange(width) - 1).clip(0) // step * step, mass.shape)
    # What gains less than this is lost in rounding.
    least = EPSILON * total(many.gain)
    search = _LambdaSearch(3 * highest[::sides] / clusters**3, clusters)
    for _ in range(MOST_PROBES):
        fewest, largest = total(few.cells), total(many.cells)
        active = (fewest < clusters) & (largest > clusters) & ~search.tied & (search.lam > least)
        if not active.any():
            break
        lam = search.propose(fewest, largest, total(many.gain) - total(few.gain))
        policy = _improve(start, np.repeat(lam, sides), mass, first, free)
        start, found = policy.start, total(policy.cells)
        search.learn(found, active & ((found <= fewest) | (found >= largest)))
        few = policy.where(np.repeat(active & (fewest < found) & (found <= clusters), sides), few)
        many = policy.where(np.repeat(active & (clusters <= found) & (found < largest), sides), many)
    return _settle(few, many, clusters, sides)


@dataclass(frozen=True, slots=True)
class _Policy:
    """The optimum for one lambda.

    start  intp [lines, n + 1], the start of the cell that ends at each atom
    end    intp [lines], where the last cell ends
    cells  intp [lines], their number
    gain   float64 [lines], without what lambda takes
    """

    start: Ints
    end: Ints
    cells: Ints
    gain: Floats

    def where(self, lines: Ints, other: _Policy) -> _Policy:
        """This policy for the lines that are true, `other` for the rest."""
        choose = np.where
        return _Policy(
            choose(lines[:, None], self.start, other.start),
            choose(lines, self.end, other.end),
            choose(lines, self.cells, other.cells),
            choose(lines, self.gain, other.gain),
        )


def _evaluate(start: Ints, lam: Floats, mass: Floats, first: Floats) -> tuple[Floats, Ints]:
    """The value (gain less lambda) and the number of cells before each atom if cells begin at `start`."""
    lines, width = mass.shape
    weight = mass - np.take_along_axis(mass, start, 1)
    sums = first - np.take_along_axis(first, start, 1)
    value = np.divide(sums * sums, weight, out=np.zeros_like(mass), where=weight > 0) - lam[:, None]
    cells = np.ones((lines, width), np.intp)
    value[:, 0], cells[:, 0] = 0.0, 0
    pointer = (start + (np.arange(lines) * width)[:, None]).reshape(-1)
    flat, count = value.reshape(-1), cells.reshape(-1)
    while count[pointer].any():
        flat = flat + flat[pointer]
        count = count + count[pointer]
        pointer = pointer[pointer]
    return flat.reshape(lines, width), count.reshape(lines, width)


def _policy(start: Ints, value: Floats, cells: Ints, lam: Floats, free: bool) -> _Policy:
    lines = np.arange(len(start))
    end = value.argmax(1) if free else np.full(len(start), start.shape[1] - 1)
    number = cells[lines, end]
    return _Policy(start, end, number, value[lines, end] + lam * number)


def _improve(start: Ints, lam: Floats, mass: Floats, first: Floats, free: bool) -> _Policy:
    """The optimal policy for a lambda [lines], beginning from any; `free` lets the last cell end anywhere."""
    value, cells = _evaluate(start, lam, mass, first)
    for _ in range(MOST_PASSES):
        best, better = _best_starts(value, mass, first)
        best -= lam[:, None]
        # What rounding alone could better would go round in circles.
        gains = best > value + EPSILON * (np.abs(value) + np.abs(value).max(1, keepdims=True))
        gains[:, 0] = False
        if not gains.any():
            break
        start = np.where(gains, better, start)
        value, cells = _evaluate(start, lam, mass, first)
    return _policy(start, value, cells, lam, free)


class _LambdaSearch:
    """Where to look next for the lambda [groups] at which the best number of cells is the wanted one."""

    def __init__(self, lam: Floats, clusters: int) -> None:
        self.clusters = clusters
        self.lam = lam
        self.low, self.high = np.zeros_like(lam), np.full_like(lam, np.inf)
        self.secant = self.tied = np.zeros(lam.shape, np.bool_)
        self.slope = np.full_like(lam, 3.0)
        self.last: tuple[Floats, Floats] | None = None

    def propose(self, fewest: Floats, largest: Floats, gained: Floats) -> Floats:
        """The next lambdas, given the numbers of cells on either side of the wanted one and the gain between."""
        # Nearby, the lambda at which both are worth the same, where an optimum between them shows or all are tied.
        self.secant = (largest <= 1.25 * fewest) | (self.high <= 1.25 * self.low)
        self.lam = np.where(self.secant, gained / np.maximum(largest - fewest, 1), self.lam)
        return self.lam

    def learn(self, found: Floats, outside: NDArray[np.bool_]) -> None:
        """Take in the numbers of cells that the lambdas gave; `outside` the known two, or one of them again."""
        self.tied = self.tied | self.secant & outside
        self.low = np.where(found >= self.clusters, np.maximum(self.low, self.lam), self.low)
        self.high = np.where(found <= self.clusters, np.minimum(self.high, self.lam), self.high)
        found = np.maximum(found, 0.5)
        if self.last is not None:
            lam, number = self.last
            fall = np.log(number / found)
            rise = np.log(np.maximum(self.lam, 1e-300) / np.maximum(lam, 1e-300))
            steep = np.divide(rise, fall, out=self.slope.copy(), where=fall != 0)
            self.slope = steep.clip(1.0, 12.0)
        self.last = self.lam, found
        # The error of k cells falls about as k**-2, so lambda as k**-3; then as the last two tell.
        guess = self.lam * (found / self.clusters) ** self.slope
        low = np.where(self.low > 0, self.low, self.lam / 2**20)
        middle = np.sqrt(low * np.where(self.high < np.inf, self.high, low * 2**20))
        self.lam = np.where((self.low < guess) & (guess < self.high), guess, middle)


def _settle(few: _Policy, many: _Policy, clusters: int, sides: int) -> Ints:
    """The cuts of just `clusters` cells a group, spliced of two optima for one lambda where neither has that number."""
    low, high = few.cells.reshape(-1, sides), many.cells.reshape(-1, sides)
    wanted = high.copy()
    over = high.sum(1) > clusters
    wanted[over, 0] = (clusters - low[over, 1:].sum(1)).clip(low[over, 0], high[over, 0])
    if sides == 2:
        wanted[over, 1] = clusters - wanted[over, 0]
    flat = wanted.reshape(-1)
    cuts = _trace(few.start[None], few.end, clusters)
    for line in np.flatnonzero(flat != few.cells).tolist():
        some, more = (
            _trace(policy.start[None, line : line + 1], policy.end[line : line + 1], int(policy.cells[line]))[0]
            for policy in (few, many)
        )
        # Where the last cell ends freely, what follows is one more cell.
        last = [few.start.shape[1]] if sides == 2 else []
        joined = _splice(np.append(some, last), np.append(more, last), flat[line] + len(last))
        cuts[line] = 0
        cuts[line, clusters - flat[line] :] = joined[: flat[line] + 1]
    return cuts


def _splice(few: Ints, many: Ints, cells: int) -> Ints:
    """The cuts of `cells` cells, from those of fewer and of more that are optimal for one lambda: then so is this.

    It follows `many` up to a cell that lies within one of `few`, and `few` after that: by Monge's inequality the two
    paths that are crossed there are together worth as much as before.
    """
    skip = cells - (len(few) - 1)
    if skip in (0, len(many) - len(few)):
        return few if skip == 0 else many
    turn = int(np.argmax(many[skip + 1 : skip + len(few)] <= few[1:]))
    return np.concatenate([many[: turn + skip + 1], few[turn + 1 :]]).astype(np.intp)
