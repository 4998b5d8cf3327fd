"""Everything that a user can do wrong, or run out of, has an error here, and the exit code that says so.

    QcompressError
    ├── UsageError        2
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
    │   └── Refusals
    ├── GateFailed        4
    └── ResourceError     5

Anything else that escapes is a bug and exits with 1. Every error says where, what, and a hint, on one line.
"""

from collections.abc import Sequence


class QcompressError(Exception):
    """An error with its place, its cause and a hint; `str()` is one line, of Refusals one for each."""

    exit_code = 1

    def __init__(self, where: str, what: str, hint: str) -> None:
        super().__init__(where, what, hint)
        self.where = where
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return " ".join(f"{self.where}: {self.what}; {self.hint}".split())

    def lines(self) -> list[str]:
        """One line for each thing that is wrong."""
        return [str(self)]


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


class Refusals(InputError):
    """Every reason at once, so that one run shows everything at once."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        first = errors[0]
        super().__init__(first.where, first.what, first.hint)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        return [line for error in self.errors for line in error.lines()]


def raise_all(errors: Sequence[InputError]) -> None:
    """Raise the one error, or all of them as Refusals; return where there is none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Refusals(errors)


class GateFailed(QcompressError):
    """A gate did not hold; artifact and report are written all the same."""

    exit_code = 4


class ResourceError(QcompressError):
    """Disk, folder, memory or device do not suffice."""

    exit_code = 5
