"""Tables of text are made here, their columns of figures; renderers and pages only lay them out. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcompress.report.glossary import FIGURES


@dataclass(frozen=True)
class Column:
    """right: numbers. spare: how soon a narrow table drops it; 0: never. term: the figure that it shows.

    bars   what a page draws below the texts, in per cent, one a row, "" for none
    marks  what a page says of the cells: better, worse, front
    """

    title: str
    right: bool = True
    spare: int = 0
    term: str = ""
    bars: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Cells by row; `dim` are the rows of kept tensors, `total` the last line.

    links  the place on a page that the first cell of each row leads to, "" for none
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    dim: frozenset[int] = frozenset()
    total: tuple[str, ...] | None = None
    links: tuple[str, ...] = ()

    def without(self, column: int) -> Table:
        def cut(cells: tuple[str, ...]) -> tuple[str, ...]:
            return cells[:column] + cells[column + 1 :]

        return replace(
            self,
            columns=self.columns[:column] + self.columns[column + 1 :],
            rows=tuple(map(cut, self.rows)),
            total=cut(self.total) if self.total else None,
        )

    def widths(self) -> list[int]:
        lines = [tuple(column.title for column in self.columns), *self.rows, *([self.total] if self.total else [])]
        return [max(map(len, cells)) for cells in zip(*lines, strict=True)]

    def fitted(self, width: int, gap: int) -> Table:
        """Without the columns that matter least, until `width` holds it or only those without `spare` are left."""
        table = self
        while sum(table.widths()) + gap * len(table.columns) > width:
            last = max(range(len(table.columns)), key=lambda index: table.columns[index].spare)
            if not table.columns[last].spare:
                break
            table = table.without(last)
        return table


@dataclass(frozen=True)
class View:
    """A title, (label, text) lines above the tables, and lines below them."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def column(term: str, title: str = "", bars: Sequence[str] = (), marks: Sequence[str] = ()) -> Column:
    """The column of a figure, under its own title or another."""
    row = FIGURES[term]
    right = row.form not in ("text", "shape")
    return Column(title or row.column, right, row.spare, term, tuple(bars), tuple(marks))


def percent(share: float | None) -> str:
    """A share as the length of a bar: "" where there is none, and never beyond the whole."""
    if share is None:
        return ""
    return f"{round(100 * min(1.0, max(0.0, 0.0 if math.isnan(share) else share)), 1):g}"


def bar(value: float | None, most: float) -> str:
    """The length of a bar by the largest of all; "" where there is nothing to draw."""
    return percent(value / most) if value is not None and most else ""


def bars(values: Sequence[float | None]) -> list[str]:
    """Bars by the largest finite value."""
    most = max((value for value in values if value is not None and math.isfinite(value)), default=0.0)
    return [bar(value, most) for value in values]
