"""Values become text here, each by the form that its figure has. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qcompress.types.figures import Figure, Form

if TYPE_CHECKING:
    from qcompress.report.document import AccuracyFigures
    from qcompress.types.config import Shape

NOT_MEASURED = "-"


def words(row: Figure, value: Any) -> str:
    """A value of a figure as text, with its unit."""
    text = cell(row, value)
    return f"{text} {row.unit}" if row.form in ("decibels", "seconds") and text[-1].isdigit() else text


def cell(row: Figure, value: Any) -> str:
    """A value of a figure as it stands below a title that names the unit."""
    return NOT_MEASURED if value is None else FORMS[row.form](value)


def size_words(n_bytes: int) -> str:
    """A size with three significant digits in powers of 1000: 812 B, 1.21 MB."""
    value, unit = float(n_bytes), "B"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{n_bytes} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def signed_size(change: int | None) -> str:
    if change is None:
        return NOT_MEASURED
    return f"{'+' if change > 0 else '-' if change < 0 else ''}{size_words(abs(change))}"


def number_words(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits."""
    return NOT_MEASURED if value is None else f"{value:.{digits}g}"


def bits_words(value: float | None) -> str:
    """Bits per weight with three decimals: the third is what a scale per channel costs."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def shape_words(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def count_words(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def interval_words(interval: tuple[float, float] | None) -> str:
    return f" (95 %: {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""


def drop_words(item: AccuracyFigures) -> str:
    return number_words(item.drop, 4) + interval_words(item.interval)


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


FORMS: Mapping[Form, Callable[[Any], str]] = {
    "text": str,
    "shape": shape_words,
    "count": lambda value: f"{value:,}" if isinstance(value, int) else f"{value:.2f}",
    "bytes": size_words,
    "number": number_words,
    "metric": lambda value: number_words(value, 4),
    "bits": bits_words,
    "share": lambda value: f"{100 * value:.3g}%",
    "decibels": _decibels,
    "times": lambda value: f"{value:.2f}x",
    "seconds": number_words,
    "flag": lambda value: "yes" if value else NOT_MEASURED,
}
"""What is not measured has no form: see `cell`."""
