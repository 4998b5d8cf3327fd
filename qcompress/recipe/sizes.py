"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from qcompress.recipe.hints import quoted

UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip

SIZE_PATTERN = r"^ *[0-9]{1,15}(\.[0-9]{1,15})? *([KMGTkmgt]?[Bb]|[KMGTkmgt][Ii][Bb])? *$"
"""What a size looks like; also the schema's pattern."""


def parse_size(text: str) -> int:
    """Bytes, rounded down, from "2000000", "2MB" (powers of 1000) or "1.5MiB" (powers of 1024), in either case.

    Raises ValueError, its text fit for the user, where `text` is no size or less than a byte.
    """
    if not re.fullmatch(SIZE_PATTERN, text):
        raise ValueError(f"{quoted(text)} is not a size; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    number = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(number) :].strip().lower()
    n_bytes = int(Fraction(number) * UNITS[unit])
    if n_bytes < 1:
        raise ValueError(f"{quoted(text)} is less than one byte; give a larger size")
    return n_bytes
