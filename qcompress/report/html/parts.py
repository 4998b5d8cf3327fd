"""HTML pages are made of figures under their names, and of tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qcompress.report.glossary import FIGURES
from qcompress.report.table import Table
from qcompress.report.words import words


@dataclass(frozen=True)
class Fact:
    """A value under the name of its figure, or under a `title`; `notes` are facts that go with it."""

    term: str
    value: str
    title: str = ""
    notes: tuple[Fact, ...] = ()

    @property
    def name(self) -> str:
        return self.title or FIGURES[self.term].title

    @property
    def definition(self) -> str:
        return FIGURES[self.term].line


def fact(term: str, value: Any, title: str = "", notes: tuple[Fact, ...] = ()) -> Fact:
    """A figure's value in words, with its unit."""
    return Fact(term, words(FIGURES[term], value), title, notes)


def terms_of(facts: Iterable[Fact], tables: Iterable[Table], more: Iterable[str] = ()) -> tuple[Fact, ...]:
    """Each term that these show, once, with its definition as its value: for screens that cannot hover, and paper."""
    shown = [one.term for fact in facts for one in (fact, *fact.notes)]
    heads = [column.term for table in tables for column in table.columns]
    return tuple(Fact(term, FIGURES[term].line) for term in dict.fromkeys([*shown, *heads, *more]))
