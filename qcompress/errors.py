"""What a user can do wrong, or run out of, and the exit code that says so.

    QcompressError
    ├── UsageError        2   the command line itself
    ├── InputError        3   anything read, and an output that is in the way
    │   ├── CheckpointError      a checkpoint that is missing, damaged or not a safetensors file
    │   ├── RecipeError          a recipe's text, or a rule that a tensor cannot follow
    │   ├── ArtifactError        an artifact that is damaged or foreign
    │   ├── ReportError          a report file that is damaged, foreign or newer
    │   ├── BudgetError          a budget that cannot be met
    │   ├── ModelError           a model that cannot be built, traced or run
    │   ├── TrainingError        training that cannot go on, or whose saved state does not fit
    │   ├── DataError            data that is missing, damaged or does not fit the model
    │   ├── OutputError          an output that exists, or that is its own input
    │   ├── UnmeasuredError      a gate on something that was not measured
    │   └── Refusals             several of these at once
    ├── GateFailed        4   a gate that did not hold; artifact and report are written all the same
    └── ResourceError     5   disk, folder, memory or device

Anything else that escapes is a bug and exits with 1. Every error says where, what, and how to mend it, on one line.
"""

from collections.abc import Sequence


class QcompressError(Exception):
    """An error with its place, its cause and its mend; `str()` is one line, of Refusals one for each."""

    exit_code = 1

    def __init__(self, where: str, what: str, mend: str) -> None:
        super().__init__(where, what, mend)
        self.where = where
        self.what = what
        self.mend = mend

    def __str__(self) -> str:
        return " ".join(f"{self.where}: {self.what}; {self.mend}".split())

    def lines(self) -> list[str]:
        """One line for each thing that is wrong."""
        return [str(self)]


class UsageError(QcompressError):
    exit_code = 2


class InputError(QcompressError):
    exit_code = 3


class CheckpointError(InputError):
    pass


class RecipeError(InputError):
    pass


class ArtifactError(InputError):
    pass


class ReportError(InputError):
    pass


class BudgetError(InputError):
    pass


class ModelError(InputError):
    pass


class TrainingError(InputError):
    pass


class DataError(InputError):
    pass


class OutputError(InputError):
    pass


class UnmeasuredError(InputError):
    pass


class Refusals(InputError):
    """Every reason at once, so that one run shows all there is to mend."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        first = errors[0]
        super().__init__(first.where, first.what, first.mend)
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
    exit_code = 4


class ResourceError(QcompressError):
    exit_code = 5
