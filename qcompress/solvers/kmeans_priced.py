"""Optimal clustering into many clusters: a price for each cell at which the wanted number of them is the best.

The greatest gain of k cells is concave in k, so that there is such a price, or one at which fewer and more are both the
best; then two optima can be spliced (Aggarwal, Schieber, Tokuyama 1994, "Finding a minimum-weight k-link path in graphs
with the concave Monge property"). For a given price we do not work from left to right, which no long operation can, but
improve whole policies: each atom keeps the start of the cell that ends there, all values follow by pointer doubling,
one sweep betters the starts, until none can be bettered; that is Bellman's equation, whose only solution is the
optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompress.solvers.kmeans_lines import Floats, Ints
from qcompress.solvers.kmeans_sweep import sweep, trace

MOST_PROBES = 100
MOST_SWEEPS = 500
EPSILON = 2.0**-51


@dataclass(frozen=True, slots=True)
class _Policy:
    """The optimum for a price a cell.

    start  intp [lines, n + 1], the start of the cell that ends at each atom
    end    intp [lines], where the last cell ends
    cells  intp [lines], their number
    gain   float64 [lines], without the price
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


def _evaluate(start: Ints, price: Floats, mass: Floats, first: Floats) -> tuple[Floats, Ints]:
    """The value (gain less price) and the number of cells before each atom if cells begin at `start`."""
    lines, width = mass.shape
    weight = mass - np.take_along_axis(mass, start, 1)
    sums = first - np.take_along_axis(first, start, 1)
    value = np.divide(sums * sums, weight, out=np.zeros_like(mass), where=weight > 0) - price[:, None]
    cells = np.ones((lines, width), np.intp)
    value[:, 0], cells[:, 0] = 0.0, 0
    pointer = (start + (np.arange(lines) * width)[:, None]).reshape(-1)
    flat, count = value.reshape(-1), cells.reshape(-1)
    while count[pointer].any():
        flat = flat + flat[pointer]
        count = count + count[pointer]
        pointer = pointer[pointer]
    return flat.reshape(lines, width), count.reshape(lines, width)


def _policy(start: Ints, value: Floats, cells: Ints, price: Floats, free: bool) -> _Policy:
    lines = np.arange(len(start))
    end = value.argmax(1) if free else np.full(len(start), start.shape[1] - 1)
    number = cells[lines, end]
    return _Policy(start, end, number, value[lines, end] + price * number)


def _improve(start: Ints, price: Floats, mass: Floats, first: Floats, free: bool) -> _Policy:
    """The optimal policy for a price [lines], beginning from any; `free` lets the last cell end anywhere."""
    value, cells = _evaluate(start, price, mass, first)
    for _ in range(MOST_SWEEPS):
        best, better = sweep(value, mass, first)
        best -= price[:, None]
        # What rounding alone could better would go round in circles.
        gains = best > value + EPSILON * (np.abs(value) + np.abs(value).max(1, keepdims=True))
        gains[:, 0] = False
        if not gains.any():
            break
        start = np.where(gains, better, start)
        value, cells = _evaluate(start, price, mass, first)
    return _policy(start, value, cells, price, free)


def priced_cuts(mass: Floats, first: Floats, clusters: int, sides: int) -> Ints:
    """Cuts [lines, clusters + 1] of the best `clusters` cells over each group of `sides` lines; 2 sides end freely."""
    lines, width = mass.shape
    free = sides == 2

    def total(values: Ints | Floats) -> Floats:
        summed: Floats = values.reshape(-1, sides).sum(1).astype(np.float64)
        return summed

    # Two optima that need no search: all atoms apart for no price; and for a high one a single cell, or none.
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
    search = _PriceSearch(3 * highest[::sides] / clusters**3, clusters)
    for _ in range(MOST_PROBES):
        fewest, largest = total(few.cells), total(many.cells)
        active = (fewest < clusters) & (largest > clusters) & ~search.tied & (search.price > least)
        if not active.any():
            break
        price = search.propose(fewest, largest, total(many.gain) - total(few.gain))
        policy = _improve(start, np.repeat(price, sides), mass, first, free)
        start, found = policy.start, total(policy.cells)
        search.learn(found, active & ((found <= fewest) | (found >= largest)))
        few = policy.where(np.repeat(active & (fewest < found) & (found <= clusters), sides), few)
        many = policy.where(np.repeat(active & (clusters <= found) & (found < largest), sides), many)
    return _settle(few, many, clusters, sides)


class _PriceSearch:
    """Where to look next for the prices [groups] at which the best number of cells is the wanted one."""

    def __init__(self, price: Floats, clusters: int) -> None:
        self.clusters = clusters
        self.price = price
        self.low, self.high = np.zeros_like(price), np.full_like(price, np.inf)
        self.secant = self.tied = np.zeros(price.shape, np.bool_)
        self.slope = np.full_like(price, 3.0)
        self.last: tuple[Floats, Floats] | None = None

    def propose(self, fewest: Floats, largest: Floats, gained: Floats) -> Floats:
        """The next prices, given the numbers of cells on either side of the wanted one and the gain between the two."""
        # Nearby, the price at which both are worth the same, where an optimum between them shows or all are tied.
        self.secant = (largest <= 1.25 * fewest) | (self.high <= 1.25 * self.low)
        self.price = np.where(self.secant, gained / np.maximum(largest - fewest, 1), self.price)
        return self.price

    def learn(self, found: Floats, outside: NDArray[np.bool_]) -> None:
        """Take in the numbers of cells that the prices gave; `outside` the known two, or one of them again."""
        self.tied = self.tied | self.secant & outside
        self.low = np.where(found >= self.clusters, np.maximum(self.low, self.price), self.low)
        self.high = np.where(found <= self.clusters, np.minimum(self.high, self.price), self.high)
        found = np.maximum(found, 0.5)
        if self.last is not None:
            price, number = self.last
            fall = np.log(number / found)
            rise = np.log(np.maximum(self.price, 1e-300) / np.maximum(price, 1e-300))
            steep = np.divide(rise, fall, out=self.slope.copy(), where=fall != 0)
            self.slope = steep.clip(1.0, 12.0)
        self.last = self.price, found
        # The error of k cells falls about as k**-2, so the price as k**-3; then as the last two prices tell.
        guess = self.price * (found / self.clusters) ** self.slope
        low = np.where(self.low > 0, self.low, self.price / 2**20)
        middle = np.sqrt(low * np.where(self.high < np.inf, self.high, low * 2**20))
        self.price = np.where((self.low < guess) & (guess < self.high), guess, middle)


def _settle(few: _Policy, many: _Policy, clusters: int, sides: int) -> Ints:
    """The cuts of just `clusters` cells a group, spliced of two optima for one price where neither has that number."""
    low, high = few.cells.reshape(-1, sides), many.cells.reshape(-1, sides)
    wanted = high.copy()
    over = high.sum(1) > clusters
    wanted[over, 0] = (clusters - low[over, 1:].sum(1)).clip(low[over, 0], high[over, 0])
    if sides == 2:
        wanted[over, 1] = clusters - wanted[over, 0]
    flat = wanted.reshape(-1)
    cuts = trace(few.start[None], few.end, clusters)
    for line in np.flatnonzero(flat != few.cells).tolist():
        some, more = (
            trace(policy.start[None, line : line + 1], policy.end[line : line + 1], int(policy.cells[line]))[0]
            for policy in (few, many)
        )
        # Where the last cell ends freely, what follows is one more cell.
        last = [few.start.shape[1]] if sides == 2 else []
        joined = _splice(np.append(some, last), np.append(more, last), flat[line] + len(last))
        cuts[line] = 0
        cuts[line, clusters - flat[line] :] = joined[: flat[line] + 1]
    return cuts


def _splice(few: Ints, many: Ints, cells: int) -> Ints:
    """The cuts of `cells` cells, from those of fewer and of more that are optimal for one price: then so is this.

    It follows `many` up to a cell that lies within one of `few`, and `few` after that: by Monge's inequality the two
    paths that are crossed there are together worth as much as before.
    """
    skip = cells - (len(few) - 1)
    if skip in (0, len(many) - len(few)):
        return few if skip == 0 else many
    turn = int(np.argmax(many[skip + 1 : skip + len(few)] <= few[1:]))
    return np.concatenate([many[: turn + skip + 1], few[turn + 1 :]]).astype(np.intp)
