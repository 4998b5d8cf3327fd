"""HTML pages are made of these: figures under their names, and tables whose cells may hold bars. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qcompress.report.glossary import GLOSSARY


class Named:
    """A thing that the glossary's `term` defines; a `title` stands in place of the glossary's."""

    term: str
    title: str

    @property
    def name(self) -> str:
        return self.title or GLOSSARY[self.term].title

    @property
    def definition(self) -> str:
        return GLOSSARY[self.term].line


@dataclass(frozen=True)
class Figure(Named):
    """A value under its name; `notes` are figures that go with it."""

    term: str
    value: str
    title: str = ""
    notes: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Head(Named):
    """A column; `right` holds numbers, `spare` is left out on a narrow screen."""

    term: str
    title: str = ""
    right: bool = True
    spare: bool = False

    @property
    def kind(self) -> str:
        """The classes of its cells."""
        return " ".join(letter for letter, is_so in (("n", self.right), ("s", self.spare)) if is_so)


@dataclass(frozen=True)
class Cell:
    """A text over a bar of `bar` per cent, "" for none; `mark` says more about it: worse, better, failed."""

    text: str
    bar: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """`link` is the place on the page that the first cell leads to; dim: a kept tensor."""

    cells: tuple[Cell, ...]
    link: str = ""
    dim: bool = False


@dataclass(frozen=True)
class Grid:
    """A table: its columns, its rows, and the cells of a last line that sums them up."""

    heads: tuple[Head, ...]
    rows: tuple[Row, ...]
    total: tuple[str, ...] = ()

    def without(self, term: str) -> Grid:
        """All but the column of a term."""
        kept = [index for index, head in enumerate(self.heads) if head.term != term]
        rows = tuple(replace(row, cells=tuple(row.cells[index] for index in kept)) for row in self.rows)
        return Grid(tuple(self.heads[i] for i in kept), rows, tuple(self.total[i] for i in kept if self.total))


def percent(share: float | None) -> str:
    """A share as the length of a bar: "" where there is none, and never beyond the whole."""
    if share is None:
        return ""
    return f"{round(100 * min(1.0, max(0.0, 0.0 if math.isnan(share) else share)), 1):g}"


def bar(value: float | None, most: float) -> str:
    """The length of a bar by the largest of all; "" where there is nothing to draw."""
    return percent(value / most) if value is not None and most else ""


def terms_of(figures: Iterable[Figure], heads: Sequence[Head], more: Iterable[str] = ()) -> tuple[Figure, ...]:
    """Each term that these show, once, with its definition as its value: for screens that cannot hover, and paper."""
    shown = [one.term for figure in figures for one in (figure, *figure.notes)]
    return tuple(
        Figure(term, GLOSSARY[term].line) for term in dict.fromkeys([*shown, *(head.term for head in heads), *more])
    )
