"""Each of many tensors gets a bit width, at the least cost that a budget of bytes allows. Imports no torch.

Each tensor's cost falls and its bytes grow with its width. At the least total cost within a budget all tensors have
about the same slope, cost saved a byte: so the widths of many tensors grow along the lower convex hulls, steepest first
(Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). Where the tensors are few, one
step may be a large part of the budget, and dynamic programming finds the least cost of all.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BUCKETS = 1 << 16
MOST_BY_TABLE = 256
"""Units that are solved by dynamic programming at most; with more of them each step is small beside the budget."""


@dataclass(frozen=True)
class Curve:
    """The bytes and the cost of what takes one width, at each width, ascending."""

    size_bytes: Mapping[int, int]
    cost: Mapping[int, float]

    @property
    def narrowest(self) -> int:
        return min(self.size_bytes)


def sum_bytes(units: Sequence[Curve], chosen: Sequence[int]) -> int:
    return sum(unit.size_bytes[bits] for unit, bits in zip(units, chosen, strict=True))


def choose(units: Sequence[Curve], most_bytes: int) -> list[int]:
    """A width for each unit, so that their bytes sum to at most `most_bytes` and their costs to the least.

    The narrowest widths are taken whatever they need. Along the lower convex hulls the choice is optimal for the bytes
    that it takes; few units are solved by dynamic programming too, whose bytes are rounded up to a part in BUCKETS of
    what there is to spend, and the better of both is taken. What is left goes to any width that still fits, steepest
    first.
    """
    narrow = [unit.narrowest for unit in units]
    spare = most_bytes - sum_bytes(units, narrow)
    if spare <= 0:
        return narrow
    found = [_along_hulls(units, spare)]
    if len(units) <= MOST_BY_TABLE:
        found.append(_by_table(units, spare))
    filled = [_filled(units, chosen, most_bytes - sum_bytes(units, chosen)) for chosen in found]
    return min(filled, key=lambda chosen: sum(unit.cost[bits] for unit, bits in zip(units, chosen, strict=True)))


def _by_table(units: Sequence[Curve], spare: int) -> list[int]:
    """The least total cost for at most `spare` bytes beyond the narrowest widths, by dynamic programming."""
    most = sum(max(unit.size_bytes.values()) - unit.size_bytes[unit.narrowest] for unit in units)
    if most <= spare:
        return [min(unit.cost, key=lambda bits: (unit.cost[bits], unit.size_bytes[bits])) for unit in units]
    bucket = max(1.0, spare / BUCKETS)
    room = int(spare / bucket)
    # best[s]: the least cost of the units so far for s buckets; taken[i][s]: which width of unit i that uses.
    best = np.zeros(room + 1)
    taken = np.zeros((len(units), room + 1), np.uint8)
    for index, unit in enumerate(units):
        base = unit.size_bytes[unit.narrowest]
        so_far, best = best, np.full(room + 1, np.inf)
        for place, (bits, size) in enumerate(unit.size_bytes.items()):
            needed = math.ceil((size - base) / bucket)
            if needed > room:
                continue
            tried = so_far[: room + 1 - needed] + unit.cost[bits]
            better = tried < best[needed:]
            best[needed:][better] = tried[better]
            taken[index, needed:][better] = place
    chosen: list[int] = []
    left = room
    for index in range(len(units) - 1, -1, -1):
        unit = units[index]
        bits = list(unit.size_bytes)[taken[index, left]]
        left -= math.ceil((unit.size_bytes[bits] - unit.size_bytes[unit.narrowest]) / bucket)
        chosen.append(bits)
    return chosen[::-1]


def _along_hulls(units: Sequence[Curve], left: int) -> list[int]:
    """Widths along the lower convex hulls, steepest step first, for at most `left` bytes beyond the narrowest."""
    chosen = [unit.narrowest for unit in units]
    steps = [(-slope, index, bits) for index, unit in enumerate(units) for bits, slope in hull_steps(unit)]
    stopped: set[int] = set()
    for _, index, bits in sorted(steps):
        needed = units[index].size_bytes[bits] - units[index].size_bytes[chosen[index]]
        if index in stopped or needed > left:
            # Steps of a hull come in order: after one that does not fit, the next would jump over it.
            stopped.add(index)
            continue
        left -= needed
        chosen[index] = bits
    return chosen


def hull_steps(unit: Curve) -> list[tuple[int, float]]:
    """(width, slope of cost saved a byte on the way to it) along the lower convex hull, slopes falling, above 0."""
    hull: list[int] = []
    for bits in sorted(unit.size_bytes, key=lambda bits: (unit.size_bytes[bits], unit.cost[bits])):
        if hull and unit.cost[bits] >= unit.cost[hull[-1]]:
            continue
        while len(hull) > 1 and slope(unit, hull[-1], bits) >= slope(unit, hull[-2], hull[-1]):
            hull.pop()
        hull.append(bits)
    return [(after, slope(unit, before, after)) for before, after in itertools.pairwise(hull)]


def slope(unit: Curve, before: int, after: int) -> float:
    """Cost saved a byte from one width to a wider one, infinite where that takes no byte more."""
    saved, grown = unit.cost[before] - unit.cost[after], unit.size_bytes[after] - unit.size_bytes[before]
    return saved / grown if grown else math.inf


def _filled(units: Sequence[Curve], chosen: Sequence[int], left: int) -> list[int]:
    """The choice with what is left of the budget spent on whatever still fits and saves the most cost a byte."""
    filled = list(chosen)

    def best_step(index: int) -> tuple[float, int, int] | None:
        unit, now = units[index], filled[index]
        steps = [
            (-slope(unit, now, bits), index, bits)
            for bits, size in unit.size_bytes.items()
            if bits > now and size - unit.size_bytes[now] <= left and unit.cost[bits] < unit.cost[now]
        ]
        return min(steps, default=None)

    waiting = [step for index in range(len(units)) if (step := best_step(index)) is not None]
    heapq.heapify(waiting)
    while waiting:
        _, index, bits = heapq.heappop(waiting)
        needed = units[index].size_bytes[bits] - units[index].size_bytes[filled[index]]
        if needed <= left:
            left -= needed
            filled[index] = bits
        again = best_step(index)
        if again is not None:
            heapq.heappush(waiting, again)
    return filled


def raised(units: Sequence[Curve], chosen: Sequence[int], left: int, enough: int) -> list[int]:
    """The choice with the width of single units raised, the smallest step first, until `enough` is left or none fits.

    Whatever it costs: for what is left where no width that fits was known to save anything. What costs nothing at any
    width, as one value all over does, is left as it is.
    """
    found = list(chosen)
    waiting = [step for index in range(len(units)) if (step := _next_step(units, found, index)) is not None]
    heapq.heapify(waiting)
    while waiting and left > enough and waiting[0][0] <= left:
        needed, index, bits = heapq.heappop(waiting)
        left -= needed
        found[index] = bits
        again = _next_step(units, found, index)
        if again is not None:
            heapq.heappush(waiting, again)
    return found


def _next_step(units: Sequence[Curve], chosen: Sequence[int], index: int) -> tuple[int, int, int] | None:
    """(bytes, index, width) of a unit's next width, None at the widest and where no width costs anything."""
    sizes, now = units[index].size_bytes, chosen[index]
    if not any(units[index].cost.values()):
        return None
    bits = min((width for width in sizes if width > now), default=None)
    return None if bits is None else (sizes[bits] - sizes[now], index, bits)
