"""What the user may have meant, and how a user's word is shown in an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_WORD = 60
MOST_LISTED = 16


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, or None where none is near; case, `-` and `_` count for nothing."""
    folded: dict[str, str] = {}
    for candidate in candidates:
        folded.setdefault(_fold(candidate), candidate)
    # difflib takes quadratic time, and a word of this length is near no name.
    found = difflib.get_close_matches(_fold(word), folded, n=1, cutoff=0.6) if len(word) <= 300 else []
    return folded[found[0]] if found else None


def suggest(word: str, candidates: Iterable[str]) -> str:
    """The mend of an unknown word: "did you mean `x`?", or the list of what is valid."""
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
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def _fold(word: str) -> str:
    return word.casefold().replace("-", "_")
