"""A figure is one row: a field of a frozen dataclass, and beside it all that people are told of it. No torch.

    kurtosis: float | None = field(default=None, metadata=figure("kurtosis", "number", "fourth central moment ..."))

The JSON Schema, the glossary, CSV, tables and pages are made from these rows; report.glossary gathers them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from annotated_types import Ge

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Count: TypeAlias = Annotated[int, Ge(0)]
Positive: TypeAlias = Annotated[int, Ge(1)]
NotNegative: TypeAlias = Annotated[float, Ge(0)]

Form: TypeAlias = Literal[
    "", "text", "shape", "count", "bytes", "number", "metric", "bits", "share", "decibels", "times", "seconds", "flag"
]
"""How a value is written, see report.words; "" is of what is no single value: a list, or figures of its own."""

UNITS: Mapping[Form, str] = {"bytes": "bytes", "bits": "bits", "decibels": "dB", "seconds": "s"}
"""Of a form, where the row does not say otherwise."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What people are told of a figure.

    title    its name as people read it; `short` stands for it above a column
    line     its definition in one line
    formula  how it is computed, and what null means, where the line leaves that open
    spare    how soon a narrow table drops its column; 0: never
    other    further names that people look for
    """

    title: str
    form: Form
    line: str
    formula: str = ""
    unit: str = ""
    short: str = ""
    spare: int = 0
    other: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        """What stands above its column."""
        return self.short or self.title


def figure(
    title: str,
    form: Form,
    line: str,
    formula: str = "",
    *,
    unit: str = "",
    short: str = "",
    spare: int = 0,
    other: tuple[str, ...] = (),
) -> Mapping[str, object]:
    """The metadata of a dataclass's field that is this figure; pydantic takes title and description from them."""
    row = Figure(title, form, line, formula, unit or UNITS.get(form, ""), short, spare, other)
    named = f"{line} ({row.unit})" if row.unit and row.unit not in line else line
    return {"figure": row, "title": title, "description": named}


def figures_of(noun: type[DataclassInstance]) -> dict[str, Figure]:
    """Name -> row of the fields of a dataclass that have one, in their order."""
    return {one.name: one.metadata["figure"] for one in fields(noun) if "figure" in one.metadata}
