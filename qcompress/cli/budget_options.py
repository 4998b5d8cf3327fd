"""Budgets on the command line: what the compressed weights may take."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli.options import parse_size_flag
from qcompress.cli.panels import BUDGET
from qcompress.errors import UsageError

if TYPE_CHECKING:
    from qcompress.recipe import BudgetFlag


class Minimize(StrEnum):
    size = "size"


Bpw = Annotated[
    float | None,
    typer.Option(
        "--bpw",
        metavar="X",
        help="Use X bits per compressed weight on average, side information counted. Each tensor gets its own width, "
        "with rd its own step.",
        rich_help_panel=BUDGET,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        metavar="SIZE",
        help="Make an artifact of at most SIZE bytes in all, as 1.2MB.",
        rich_help_panel=BUDGET,
    ),
]
MinimizeOption = Annotated[
    Minimize | None,
    typer.Option(
        "--minimize",
        help="Find the smallest artifact that stays within the gates: --max-drop top1=0.005 with a recipe that has "
        "model, data and task, --min-sqnr 12 without.",
        rich_help_panel=BUDGET,
    ),
]


def make_budget_flag(bpw: float | None, target_size: str | None, minimize: Minimize | None) -> BudgetFlag | None:
    """The one budget that was given, or None. Raises UsageError for two, and for one that no file can have."""
    from qcompress.recipe import BudgetFlag

    found = []
    if bpw is not None:
        found.append(BudgetFlag(f"--bpw {bpw}", "bpw", bpw))
        if not 0 < bpw < float("inf"):
            raise UsageError(f"--bpw {bpw}", "is no number of bits", "give one above 0, as 2.5")
    if target_size is not None:
        found.append(BudgetFlag(f"--target-size {target_size}", "size", target_size))
        parse_size_flag("--target-size", target_size, "1.2MB")
    if minimize is not None:
        found.append(BudgetFlag(f"--minimize {minimize.value}", "minimize", minimize.value))
    if len(found) > 1:
        raise UsageError(" ".join(flag.text for flag in found), "are several budgets", "keep one of them")
    return found[0] if found else None


def budget_suffix(flag: BudgetFlag) -> str:
    """What a budget adds to the output's name: "2.0bpw", "1.2MB", "smallest"."""
    if flag.key == "bpw":
        return f"{flag.value}bpw"
    if flag.key == "minimize":
        return "smallest"
    size = "".join(str(flag.value).split())
    return f"{size}B" if size[-1].isdigit() else size
