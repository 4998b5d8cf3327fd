"""Tables of the pages: each cell names the rows whose lines it shows, and how."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ledger import FOLDER, Ledger, Line, look_up

Mark = Literal["old", "changed"]

MARKS: Mapping[Mark, tuple[str, str]] = {
    "old": ("†", "older, without hash and commit: not run again"),
    "changed": ("‡", "run before its command or recipe was changed"),
}
"""What stands behind a figure that is not of a row as it is defined now, and what it means."""


@dataclass(frozen=True)
class Cell:
    """What lines say together; `text` is given those of different runs, in the order of `rows`."""

    rows: tuple[str, ...]
    text: Callable[[list[Line]], str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """name     in the pages, and in benchmarks/rows/old.jsonl
    columns  titles; where one ends with ":" its column is set to the right
    lines    key -> the first cells, as they are, and those that rows fill; the key is unique in the table
    """

    name: str
    columns: tuple[str, ...]
    lines: Mapping[str, Sequence[str | Cell]]

    @property
    def rows(self) -> Iterator[str]:
        return (name for line in self.lines.values() for cell in line if isinstance(cell, Cell) for name in cell.rows)


def figure_of(line: Line, figure: str) -> float:
    """A figure; of a nested one, its keys joined by "|". Raises TypeError where none stands there."""
    return float(look_up(line.figures, figure.split("|")))


def show(value: float, form: str) -> str:
    return format(value, form)


def spread(values: Sequence[float], form: str) -> str:
    """The mean, with the standard deviation of several."""
    mean = show(statistics.mean(values), form)
    return f"{mean} ± {show(statistics.stdev(values), form)}" if len(values) > 1 else mean


def mean(figure: str, form: str = ".4f") -> Callable[[list[Line]], str]:
    return lambda lines: spread([figure_of(line, figure) for line in lines], form)


def plain_mean(figure: str, form: str) -> Callable[[list[Line]], str]:
    """The mean without a spread, of what differs little."""
    return lambda lines: show(statistics.mean(figure_of(line, figure) for line in lines), form)


def cpu(lines: list[Line]) -> str:
    """Processor seconds of the first command; those behind it measure."""
    return show(statistics.mean(line.cpu_seconds[0] for line in lines), ".0f")


def with_seconds(figure: str, form: str = ".4f") -> Callable[[list[Line]], str]:
    """The figure, and in brackets the processor seconds of its run."""
    return lambda lines: f"{mean(figure, form)(lines)} ({cpu(lines)} s)"


def different_runs(lines: Sequence[Line]) -> list[Line]:
    """Of lines that wrote the same weights and have the same figures the first: they are one run, and no spread."""
    found: dict[tuple[object, ...], Line] = {}
    for line in lines:
        found.setdefault((line.weights_sha256 or line.row, json.dumps(line.figures, sort_keys=True)), line)
    return list(found.values())


@dataclass(frozen=True)
class Shown:
    """A cell as the page has it: text without mark, mark, and the lines that it is of."""

    text: str
    mark: Mark | None
    lines: tuple[Line, ...] = ()

    @property
    def marked(self) -> str:
        return f"{self.text} {MARKS[self.mark][0]}" if self.mark else self.text


class Pages:
    """What the rows and the older figures say in the cells of tables."""

    def __init__(self, ledger: Ledger, old: Mapping[tuple[str, str, str], tuple[str, Mark]] | None = None) -> None:
        self.ledger = ledger
        self.old = read_old(ledger.folder / "old.jsonl") if old is None else old

    def cell(self, table: Table, key: str, column: int) -> Shown:
        cell = table.lines[key][column]
        if isinstance(cell, str):
            return Shown(cell, None)
        lines = [self.ledger.lines[name] for name in cell.rows if name in self.ledger.lines]
        if lines and self._is_whole(cell, lines):
            changed = any(self.ledger.status(line.row) == "changed" for line in lines)
            return Shown(cell.text(different_runs(lines)), "changed" if changed else None, tuple(lines))
        text, mark = self.old.get((table.name, key, title(table.columns[column])), ("-", None))
        return Shown(text, mark)

    def _is_whole(self, cell: Cell, lines: Sequence[Line]) -> bool:
        """Whether what was run is enough for the cell: of each kind one of the rows that differ by their seed alone."""
        kinds = {name.partition("/seed")[0] for name in cell.rows}
        return kinds == {line.row.partition("/seed")[0] for line in lines}

    def render(self, table: Table) -> str:
        """The table in Markdown, and under it what its marks mean and which commits its figures are of."""
        shown = {key: [self.cell(table, key, i) for i in range(len(table.columns))] for key in table.lines}
        figures = [one for line in shown.values() for one in line if one.mark or one.lines]
        marks = {one.mark for one in figures}
        single = marks.pop() if len(marks) == 1 else None
        heads = " | ".join(title(column) for column in table.columns)
        rules = "|".join("---:" if column.endswith(":") else "---" for column in table.columns)
        lines = [f"| {heads} |", f"|{rules}|"]
        lines += [
            "| " + " | ".join(one.text if single else one.marked for one in line) + " |" for line in shown.values()
        ]
        notes = " ".join(self._notes({one.mark for one in figures}, single, figures))
        wrapped = textwrap.wrap(notes, 120, break_long_words=False, break_on_hyphens=False)
        return "\n".join([*lines, "", *wrapped]).rstrip()

    def _notes(self, marks: set[Mark | None], single: Mark | None, figures: Sequence[Shown]) -> Iterator[str]:
        if single:
            yield f"*The whole table is {MARKS[single][1]}.*"
            return
        told = [f"{MARKS[mark][0]} {MARKS[mark][1]}" for mark in MARKS if mark in marks]
        lines = [line for one in figures for line in one.lines]
        if lines:
            commits = sorted({line.commit for line in lines})
            groups = sorted({line.row.partition("/")[0] for line in lines})
            files = ", ".join(f"[{name}.jsonl](../benchmarks/rows/{name}.jsonl)" for name in groups)
            told.insert(0, f"Rows in {files}, of commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}")
        if told:
            yield "; ".join(told) + "."


def title(column: str) -> str:
    return column.rstrip(":")


def read_old(path: Path = FOLDER / "old.jsonl") -> dict[tuple[str, str, str], tuple[str, Mark]]:
    """Table, line and column -> text and mark of figures whose rows have not been run."""
    if not path.is_file():
        return {}
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return {(one["table"], one["line"], one["column"]): (one["text"], one["mark"]) for one in lines}


def prune_old(ledger: Ledger, tables: Mapping[str, Table]) -> int:
    """Drop the older figures of cells whose rows have been run; how many went."""
    path = ledger.folder / "old.jsonl"
    if not path.is_file():
        return 0
    pages, texts = Pages(ledger, {}), path.read_text(encoding="utf-8").splitlines()
    kept = []
    for text in texts:
        one = json.loads(text)
        table = tables[one["table"]]
        column = [title(column) for column in table.columns].index(one["column"])
        if not pages.cell(table, one["line"], column).lines:
            kept.append(text)
    path.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")
    return len(texts) - len(kept)
