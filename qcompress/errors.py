"""Everything that a user can do wrong, or run out of, has an error here, and the exit code that says so.

    QcompressError
    ├── UsageError        2
    │   └── UsageErrors   several of them
    ├── InputError        3
    │   ├── CheckpointError
    │   ├── RecipeError
    │   ├── ArtifactError
    │   ├── ReportError
    │   ├── BudgetError
    │   ├── ModelError
    │   ├── TrainingError
    │   ├── DataError
    │   ├── OutputError
    │   ├── UnmeasuredError
    │   └── Refusals      several InputErrors
    ├── GateFailed        4
    │   └── GatesFailed   several of them
    ├── ResourceError     5
    └── OtherRankFailed   the code of the rank that failed, which has said why

Anything else that escapes is a bug and exits with 1. Every error says where, what, and a hint, on one line. Of many
errors each cause is one line, which counts them and names the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST_PART = 600
"""Characters of a place, a cause or a hint that are shown; of longer ones the middle is left out."""
MOST_CAUSES = 100
MOST_PLACES = 3
"""Further places of one cause that its line names."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The tensor, or another of many alike, that an error is about: equal causes of several become one line."""

    name: str
    shape: tuple[int, ...] | None = None
    kind: str = "tensor"

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}" if self.shape is None else f"{self.name} {list(self.shape)}"


class QcompressError(Exception):
    """An error with its place, its cause and a hint; `str()` is one line, of Refusals one for each cause.

    subject  what it is about, named between place and cause
    cause    what the subject has in common with others, where `what` tells figures that are its own
    """

    exit_code = 1

    def __init__(
        self, where: str, what: str, hint: str, subject: Subject | None = None, cause: str | None = None
    ) -> None:
        super().__init__(where, what, hint, subject, cause)
        self.where = where
        self.what = what
        self.hint = hint
        self.subject = subject
        self.cause = what if cause is None else cause

    def __str__(self) -> str:
        return _line(self.where, self.subject, self.what, self.hint)

    def lines(self) -> list[str]:
        """One line for each cause of what is wrong."""
        return [str(self)]


def printable(text: str) -> str:
    """A text on one line: what a terminal would obey instead of print is escaped."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def shorten(text: str, longest: int = LONGEST_PART) -> str:
    """A text on one line that is safe to print, the middle left out where it is longer."""
    text = printable(" ".join(text.split()))
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def _line(where: str, subject: object, what: str, hint: str) -> str:
    about = () if subject is None else (shorten(str(subject)),)
    return ": ".join((shorten(where), *about, f"{shorten(what)}; {shorten(hint)}"))


def group_lines(errors: Iterable[QcompressError]) -> list[str]:
    """One line for each cause, in the order of the first errors that have it.

    Errors about several subjects at one place are counted, and the first is named; of an error that several places
    have, some of the other places are named.
    """
    causes: dict[tuple[object, ...], list[QcompressError]] = {}
    for error in errors:
        about = error.subject and (error.where, error.subject.kind)
        causes.setdefault((about, error.cause, error.hint), []).append(error)
    found = [_grouped(alike) for alike in causes.values()]
    more = len(found) - MOST_CAUSES
    return found if more <= 0 else [*found[:MOST_CAUSES], f"{more} more causes are not shown; mend these first"]


def _grouped(alike: Sequence[QcompressError]) -> str:
    first = alike[0]
    if first.subject is None:
        others = list(dict.fromkeys(error.where for error in alike if error.where != first.where))
        more = len(others) - MOST_PLACES
        shown = ", ".join(others[:MOST_PLACES]) + (f" and {more} more" if more > 0 else "")
        return _line(f"{first.where} (also {shown})" if others else first.where, None, first.what, first.hint)
    subjects = list(dict.fromkeys(error.subject for error in alike if error.subject is not None))
    if len(subjects) == 1:
        return str(first)
    shapes = {subject.shape for subject in subjects}
    counted = f"{len(subjects)} {first.subject.kind}s"
    if None in shapes:
        about = f"{counted}, first {first.subject.name!r}"
    elif len(shapes) > 1:
        about = f"{counted}, first {first.subject}"
    else:
        about = f"{counted} of shape {list(first.subject.shape or ())}, first {first.subject.name}"
    return _line(first.where, about, first.cause, first.hint)


class UsageError(QcompressError):
    """The command line itself is wrong."""

    exit_code = 2


class InputError(QcompressError):
    """Something that was read is wrong, or an output is in the way."""

    exit_code = 3


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or not a safetensors file."""


class RecipeError(InputError):
    """A recipe's text is wrong, or a tensor cannot follow one of its rules."""


class ArtifactError(InputError):
    """An artifact is damaged or foreign."""


class ReportError(InputError):
    """A report file is damaged, foreign or newer."""


class BudgetError(InputError):
    """A budget cannot be met."""


class ModelError(InputError):
    """A model cannot be built, traced or run."""


class TrainingError(InputError):
    """Training cannot go on, or its saved state does not fit."""


class DataError(InputError):
    """Data are missing, damaged or do not fit the model."""


class OutputError(InputError):
    """An output exists, or is its own input."""


class UnmeasuredError(InputError):
    """A gate is on something that was not measured."""


class GateFailed(QcompressError):
    """A gate did not hold; artifact and report are written all the same."""

    exit_code = 4


class _Several(QcompressError):
    """Errors of one exit code, so that one run shows all that is wrong; `str()` has a line for each cause."""

    def __init__(self, errors: Sequence[QcompressError]) -> None:
        first = errors[0]
        super().__init__(first.where, first.what, first.hint, first.subject, first.cause)
        self.errors: tuple[QcompressError, ...] = tuple(
            one for error in errors for one in (error.errors if isinstance(error, _Several) else (error,))
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        return group_lines(self.errors)


class Refusals(_Several, InputError):
    """Several inputs are wrong, or one in several ways."""


class GatesFailed(_Several, GateFailed):
    """Several gates did not hold, or one for several artifacts."""


class UsageErrors(_Several, UsageError):
    """Several things are wrong with a command line, or are missing for it."""


def raise_all(errors: Sequence[QcompressError]) -> None:
    """Raise the one error, or all of them at once, each told once; return where there is none.

    What is wrong with an input counts for more than what is missing for it.
    """
    different: dict[str, QcompressError] = {}
    for error in errors:
        different.setdefault(str(error), error)
    if len(different) == 1:
        raise errors[0]
    if different:
        for kind, several in ((GateFailed, GatesFailed), (InputError, Refusals), (UsageError, UsageErrors)):
            if any(isinstance(error, kind) for error in different.values()):
                raise several([*different.values()])
        raise errors[0]


class ResourceError(QcompressError):
    """Disk, folder, memory or device do not suffice."""

    exit_code = 5


class OtherRankFailed(QcompressError):
    """Another process of this run has failed, and said why: this one ends with the same exit code and says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("torchrun", "another process of this run has failed", "see what it says")
        self.exit_code = exit_code

    def lines(self) -> list[str]:
        return []
