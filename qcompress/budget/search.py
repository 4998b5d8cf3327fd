"""The one search behind every budget: how far a knob may go before what it moves is too much. Imports no torch.

The knob is the logarithm of what is decided: bits a weight for an artifact that is to fill a budget, one over them for
one that is to be as small as gates allow. What it moves is seen as an excess, the logarithm of how many times its bound
something has become: bytes, or harm. It is at most 0 within the bound, and grows with the knob but for jumps and noise.

Each look may cost a whole artifact, so every look counts. As long as all lie on one side of the bound, the line
through the last two leads on. From then on it is false position between the nearest two that enclose the bound, in the
Illinois variant, which does not get stuck at one end (Dowell and Jarratt 1971, BIT 11, 168-174).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ATTEMPTS = 12
"""Looks that a search takes at most."""
AIM = 0.997
"""The share of a budget that an attempt aims at."""
FULL = 0.98
"""The share of a budget that an attempt must use to be the last."""
TOLERANCE = 0.01
"""Between what holds the gates and what breaks one, as a share of the bits a weight: nearer does not count."""
FARTHEST = 4.0
"""By how much bits a weight change at most from one look to the next while all lie on one side."""
STEEPEST = 4.0
"""By how much the growth that two looks tell may differ from the usual one, either way."""

LEAST_RATE, MOST_RATE = 0.01, 32.0
"""Bits a weight between which steps are decided: next to nothing, and all that a weight has."""
MOST_GATED_RATE = 8.0
"""Bits a weight that gates may take at most where they decide steps, as many as the widest widths have."""
FIRST_GATED_RATE = 2.0
"""Bits a weight at which gates are first held."""


@dataclass(frozen=True, order=True)
class Seen:
    """One look: the knob, and the excess that was found there."""

    knob: float
    excess: float

    @property
    def holds(self) -> bool:
        return self.excess <= 0


@dataclass(frozen=True)
class Search:
    """Where a search begins, how far it may go, and when it ends.

    start, low, high  of the knob
    slope             by how much the excess grows with the knob, about
    aim               the excess to come to, at most 0
    enough            an excess between this and 0 ends the search; without it only the tolerance does
    tolerance         between the nearest knobs on either side of the bound
    """

    start: float
    low: float
    high: float
    slope: float = 1.0
    aim: float = 0.0
    enough: float = math.inf
    tolerance: float = math.log1p(TOLERANCE)

    def run(self, look: Callable[[float], float]) -> list[Seen]:
        """All looks in their order, ATTEMPTS at most; `look` gives the excess at a knob."""
        seen: list[Seen] = []
        while len(seen) < ATTEMPTS and (knob := self.next(seen)) is not None:
            seen.append(Seen(knob, look(knob)))
        return seen

    def next(self, seen: Sequence[Seen]) -> float | None:
        """The knob to look at after these looks; None where there is nothing more to find."""
        if not seen:
            return self._within(self.start)
        if any(self.enough <= one.excess <= 0 for one in seen):
            return None
        rising = _rising(seen)
        held, over = [one for one in rising if one.holds], [one for one in rising if not one.holds]
        if held and over:
            return self._between(held[-1], over[0], seen)
        return self._beyond(held[::-1] or over)

    def _between(self, held: Seen, over: Seen, seen: Sequence[Seen]) -> float | None:
        """False position in a bracket, never nearer to its ends than the tolerance; None where it is narrow enough."""
        width = over.knob - held.knob
        if width <= self.tolerance:
            return None
        short, far = self.aim - held.excess, over.excess - self.aim
        # The end that stays for a second look counts half, for a third a quarter.
        staying = 0.5 ** (_looks_on_one_side(seen) - 1)
        if seen[-1].holds:
            far *= staying
        else:
            short *= staying
        share = max(short, 0.0) / (max(short, 0.0) + far)
        edge = min(self.tolerance, width / 2)
        return min(max(held.knob + share * width, held.knob + edge), over.knob - edge)

    def _beyond(self, nearest: Sequence[Seen]) -> float | None:
        """Along the line through the two that are nearest to the bound, all on one side; None at the end of the way."""
        here = nearest[0]
        if here.knob == (self.high if here.holds else self.low):
            return None
        slope = self.slope
        if len(nearest) > 1:
            told = (here.excess - nearest[1].excess) / (here.knob - nearest[1].knob)
            slope = min(max(told, slope / STEEPEST), slope * STEEPEST)
        way = abs(self.aim - here.excess) / slope
        way = min(max(way, self.tolerance), math.log(FARTHEST))
        return self._within(here.knob + way if here.holds else here.knob - way)

    def _within(self, knob: float) -> float:
        return min(max(knob, self.low), self.high)


def _rising(seen: Sequence[Seen]) -> list[Seen]:
    """The looks by their knob, without those that a later look contradicts: a larger knob has the larger excess."""
    kept: list[Seen] = []
    for one in reversed(seen):
        if all((one.knob - other.knob) * (one.excess - other.excess) > 0 for other in kept):
            kept.append(one)
    return sorted(kept)


def _looks_on_one_side(seen: Sequence[Seen]) -> int:
    """How many of the last looks lie on the side of the very last."""
    others = (count for count, one in enumerate(reversed(seen)) if one.holds != seen[-1].holds)
    return next(others, len(seen))
