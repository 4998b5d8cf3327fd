"""Words of a user: sizes in bytes, what an unknown name may have meant, and how words stand in an error."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qcompress.errors import printable

LONGEST_WORD = 60
MOST_LISTED = 16

UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip

SIZE_PATTERN = r"^ *[0-9]{1,15}(\.[0-9]{1,15})? *([KMGTkmgt]?[Bb]|[KMGTkmgt][Ii][Bb])? *$"
"""A size in bytes as text; also the schema's pattern."""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, or None where none is near; case, `-` and `_` count for nothing."""
    import difflib

    folded: dict[str, str] = {}
    for candidate in candidates:
        folded.setdefault(_fold(candidate), candidate)
    # difflib takes quadratic time, and a word of this length is near no name.
    found = difflib.get_close_matches(_fold(word), folded, n=1, cutoff=0.6) if len(word) <= 300 else []
    return folded[found[0]] if found else None


def suggest(word: str, candidates: Iterable[str]) -> str:
    """The hint for an unknown word: "did you mean `x`?", or the list of what is valid."""
    known = list(candidates)
    close = nearest(word, known)
    return f"did you mean {quoted(close)}?" if close is not None else f"valid here: {listed(known)}"


def listed(words: Iterable[str]) -> str:
    """Words for an error, at most sixteen: "`a`, `b`, `c`"."""
    known = list(words)
    more = f" and {len(known) - MOST_LISTED} more" if len(known) > MOST_LISTED else ""
    return ", ".join(quoted(word) for word in known[:MOST_LISTED]) + more


def quoted(word: str) -> str:
    """A user's word in backticks, as `plain` shows it."""
    return f"`{plain(word)}`"


def plain(word: str, longest: int = LONGEST_WORD) -> str:
    """A user's word, shortened, with whatever could disturb a terminal or break the line escaped."""
    short = word if len(word) <= longest else word[: longest - 3] + "..."
    return printable(short)


def shown(value: object) -> str:
    """A value as an error shows it."""
    match value:
        case None:
            return "`null`"
        case bool():
            return f"`{str(value).lower()}`"
        case str():
            return quoted(value)
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return repr(value)


def _fold(word: str) -> str:
    return word.casefold().replace("-", "_")


def parse_size(text: str) -> int:
    """Bytes, rounded down, from "2000000", "2MB" (powers of 1000) or "1.5MiB" (powers of 1024), in either case.

    Raises ValueError, its text fit for the user, where `text` is no size or less than a byte.
    """
    if not re.fullmatch(SIZE_PATTERN, text):
        raise ValueError(f"{quoted(text)} is not a size; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    number = text.strip().rstrip("KMGTIBkmgtib ")
    unit = text.strip()[len(number) :].strip().lower()
    whole, _, decimals = number.partition(".")
    n_bytes: int = int(whole + decimals) * UNITS[unit] // 10 ** len(decimals)
    if n_bytes < 1:
        raise ValueError(f"{quoted(text)} is less than one byte; give a larger size")
    return n_bytes
