"""Claims of papers: which figures are held against which, and the verdict that follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ledger import Ledger
from tables import figure_of

Verdict = Literal["shows", "shows in part", "does not show", "not run yet"]
WORDS = (
    *("shows", "shows in part", "does not show", "not run yet"),
    *("built", "differs", "not testable here", "not found"),
)
"""What a row of the page ends in: what figures say, and what stands in it by hand."""
EQUAL = 0.01
"""Within one point accuracies are equal here: a 95 % interval on 5,000 images is about as wide."""
TOLD = 4
"""Comparisons whose figures are told one by one."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """Rows of one setting, a seed each, and their figure; less that of other rows of the same seeds, if any: a gain."""

    rows: tuple[str, ...]
    figure: str = "top1"
    less: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.less) in (0, len(self.rows))

    def figures(self, ledger: Ledger) -> list[float | None]:
        """Of each seed; None where a row was not run as it is defined now."""

        def one(name: str) -> float | None:
            return figure_of(ledger.lines[name], self.figure) if ledger.status(name) == "current" else None

        first = [one(name) for name in self.rows]
        if not self.less:
            return first
        second = [one(name) for name in self.less]
        return [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a claim is about, and what it is held against, seed by seed; the title is of the setting that they share."""

    title: str
    ours: Side
    base: Side

    @property
    def rows(self) -> tuple[str, ...]:
        return (*self.ours.rows, *self.ours.less, *self.base.rows, *self.base.less)

    def pairs(self, ledger: Ledger) -> list[tuple[float, float]]:
        """The figures of each seed of which both sides were run."""
        found = zip(self.ours.figures(ledger), self.base.figures(ledger), strict=True)
        return [(ours, base) for ours, base in found if ours is not None and base is not None]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says of figures, as something that figures of rows bear out or not.

    wanted   `above`: in every seed, and in the mean by more than `within`; `equal`: in the mean within it; `not below`:
             in the mean by no more than it
    within   in units of the figure
    paired   else seeds mean nothing to each other, and the means alone are compared
    share    of the comparisons that must be as wanted
    floor    figures that are all below it are chance, and compared with nothing
    """

    name: str
    comparisons: tuple[Comparison, ...]
    wanted: Literal["above", "equal", "not below"] = "above"
    within: float = EQUAL
    paired: bool = True
    share: float = 1.0
    floor: float = 0.0

    @property
    def rows(self) -> Iterator[str]:
        return (name for one in self.comparisons for name in one.rows)

    def holds(self, pairs: Sequence[tuple[float, float]]) -> bool:
        differences = [ours - base for ours, base in pairs]
        mean = statistics.mean(differences)
        match self.wanted:
            case "above":
                return mean > self.within and (not self.paired or min(differences) > 0)
            case "equal":
                return abs(mean) <= self.within
            case "not below":
                return mean >= -self.within


@dataclass(frozen=True)
class Outcome:
    """What rows say of a claim: comparisons that were run and are not all chance, those among them that are as wanted,
    and how many are left to run.
    """

    claim: Claim
    found: tuple[tuple[Comparison, tuple[tuple[float, float], ...]], ...]
    held: int
    chance: int
    left: int

    @property
    def verdict(self) -> Verdict:
        if not self.found:
            return "does not show" if self.chance and not self.left else "not run yet"
        if self.held >= self.claim.share * len(self.found):
            return "shows"
        return "shows in part" if self.held else "does not show"

    @property
    def text(self) -> str:
        """The verdict as the page has it, with the number of comparisons that it stands on."""
        told = [f"{self.held} of {len(self.found)}"] if self.found else []
        told += [f"{self.chance} at chance level"] if self.chance else []
        told += [f"{self.left} to run"] if self.left and (self.found or self.chance) else []
        return f"**{self.verdict}**" + (f" ({', '.join(told)})" if told else "")

    @property
    def measured(self) -> str:
        """Means of what was run, ours after what it is held against; of many comparisons how far apart they are."""
        if len(self.found) > TOLD:
            apart = [statistics.mean(ours - base for ours, base in pairs) for _, pairs in self.found]
            least, most = min(apart), max(apart)
            return f"{least:+.3f} to {most:+.3f}, median {statistics.median(apart):+.3f}"
        return "; ".join(f"{one.title} {told(pairs)}" for one, pairs in self.found) or "-"


def told(pairs: Sequence[tuple[float, float]]) -> str:
    """The means of both sides, what it is held against first."""
    ours, base = (statistics.mean(side) for side in zip(*pairs, strict=True))
    form = ".1f" if max(ours, base) > 1.5 else ".3f"
    return f"{base:{form}} → {ours:{form}}"


def outcome(claim: Claim, ledger: Ledger) -> Outcome:
    found, chance, left = [], 0, 0
    for one in claim.comparisons:
        pairs = tuple(one.pairs(ledger))
        if not pairs:
            left += 1
        elif max(figure for pair in pairs for figure in pair) < claim.floor:
            chance += 1
        else:
            found.append((one, pairs))
    held = sum(claim.holds(pairs) for _, pairs in found)
    return Outcome(claim, tuple(found), held, chance, left)
