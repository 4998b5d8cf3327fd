"""Budgets on the command line, in place of the recipe's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompress.cli import options as opt
from qcompress.errors import UsageError

if TYPE_CHECKING:
    from qcompress.recipe import BudgetFlag


def make_budget_flag(bpw: float | None, target_size: str | None, minimize: opt.Minimize | None) -> BudgetFlag | None:
    """The one budget that was given, or None. Raises UsageError for two, and for one that no file can have."""
    from qcompress.recipe import BudgetFlag, parse_size

    found = []
    if bpw is not None:
        found.append(BudgetFlag(f"--bpw {bpw}", "bpw", bpw))
        if not 0 < bpw < float("inf"):
            raise UsageError(f"--bpw {bpw}", "is no number of bits", "give one above 0, as 2.5")
    if target_size is not None:
        found.append(BudgetFlag(f"--target-size {target_size}", "size", target_size))
        try:
            parse_size(target_size)
        except ValueError as error:
            raise UsageError(f"--target-size {target_size}", str(error), "write it like 1.2MB or 4GiB") from None
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
