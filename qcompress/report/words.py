"""Figures in words: sizes, shares and decibels as every renderer prints them. Imports no torch."""

from __future__ import annotations

import math

from qcompress.types import Shape

NOT_MEASURED = "-"


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


def decibel_words(sqnr_db: float | None) -> str:
    """An SQNR with one decimal; exact where there is no error, nan where it is not a number."""
    if sqnr_db is None:
        return NOT_MEASURED
    return "exact" if sqnr_db == math.inf else f"{sqnr_db:.1f}"


def number_words(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits."""
    return NOT_MEASURED if value is None else f"{value:.{digits}g}"


def bits_words(value: float | None) -> str:
    """Bits per weight with three decimals: the third is what a scale per channel costs."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def width_words(bits: int | None, bits_per_weight: float | None, method: str) -> str:
    """The bits of a code; of codes without a bound what a weight has taken."""
    if bits is None and method != "kept" and bits_per_weight is not None:
        return f"{bits_per_weight:.2f}"
    return NOT_MEASURED if bits is None else str(bits)


def share_words(share: float | None) -> str:
    """A share in per cent."""
    return NOT_MEASURED if share is None else f"{100 * share:.3g}%"


def shape_words(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def name_words(name: str) -> str:
    """A name on one line: what a terminal would obey instead of print is escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def count_words(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
