"""The smallest artifact that holds the gates: a search over budgets, each tried by an artifact of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qcompress.allocate import Costs, allocate, bpw_bounds, read_costs, refuse_infeasible, with_bpw
from qcompress.artifact.staging import refuse_existing, refuse_own_input, reporting_resources
from qcompress.checkpoint import Checkpoint
from qcompress.coding.payload import CodingChoice
from qcompress.compress import compress
from qcompress.errors import BudgetError
from qcompress.options import Options
from qcompress.rate import make_at_rate
from qcompress.report.document import Report
from qcompress.report.gates import check_gates
from qcompress.sensitivity import weight_costs
from qcompress.types import Gates, Plan

TOLERANCE = 0.01
"""Of the budget, as a share: how near to the smallest the search goes."""


def compress_within(
    checkpoint: Checkpoint, plan: Plan, options: Options, sensitivity: Path | None, say: Callable[[str], None]
) -> Report:
    """The report of the artifact of a plan with a budget, from weights alone, or with what was measured in a file.

    raises  BudgetError for a budget that is too small, and what `compress` and `read_costs` raise
    """
    refuse_own_input(checkpoint.path, options.output)
    refuse_existing(options.output, options.force, checkpoint.is_folder)
    refuse_gateless(plan)
    refuse_infeasible(checkpoint, plan, options.choice)
    if sensitivity is not None:
        costs = read_costs(checkpoint, plan, sensitivity)
    else:
        costs = weight_costs(checkpoint, plan, options.threads)
    return spend(checkpoint, plan, options, costs, lambda closed, where: compress(checkpoint, closed, where), say)


def spend(
    checkpoint: Checkpoint,
    plan: Plan,
    options: Options,
    costs: Costs,
    make: Callable[[Plan, Options], Report],
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """The report of the artifact that `make` writes once the plan's budget is spent; of a plan without one, just that.

    raises  BudgetError for a budget that is too small, and what `make` raises
    """
    budget = plan.recipe.budget
    make = make_at_rate(checkpoint, make, say)
    if budget is None or budget.minimize is None:
        return make(allocate(checkpoint, plan, options.choice, costs), options)
    folder = options.output.parent
    with reporting_resources(folder), TemporaryDirectory(prefix=f".{options.output.name}.", dir=folder) as drafts:
        draft = replace(options, output=Path(drafts) / options.output.name, force=True, resume=False, progress=None)
        found = smallest(checkpoint, plan, options.choice, costs, lambda candidate: make(candidate, draft), say)
    return make(found, options)


def refuse_gateless(plan: Plan) -> None:
    """Raise BudgetError where there is no gate that a smaller artifact could break."""
    budget = plan.recipe.budget
    if budget is not None and budget.minimize is not None and _of_quality(plan.recipe.gates) == Gates():
        where = plan.recipe.places.get("budget", "budget")
        raise BudgetError(where, "there is no gate for the smallest artifact to hold", "add --max-drop top1=0.005")


def _of_quality(gates: Gates) -> Gates:
    """The gates that a smaller artifact may break."""
    return replace(gates, max_size=None, max_bpw=None)


def smallest(
    checkpoint: Checkpoint,
    plan: Plan,
    choice: CodingChoice,
    costs: Costs,
    probe: Callable[[Plan], Report],
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The plan of the smallest budget in bits per weight, to TOLERANCE, whose artifact holds all gates of the recipe.

    By bisection: it takes for granted that a larger budget never breaks a gate that a smaller one holds. Where even the
    widest widths break one, the plan is that of the widest.

    probe  makes an artifact by a plan and returns its report
    """
    refuse_gateless(plan)
    tried: dict[tuple[float | None, ...], bool] = {}

    def at(bpw: float) -> Plan:
        return allocate(checkpoint, with_bpw(plan, bpw), choice, costs)

    def holds(candidate: Plan, bpw: float) -> bool:
        # Budgets that lead to the same widths are one; without widths each is one for itself.
        key = tuple(getattr(d.config, "bits", None) for d in candidate.decisions if d.compresses)
        key = key if any(key) else (bpw,)
        if key not in tried:
            report = probe(candidate)
            results = check_gates(_of_quality(candidate.recipe.gates), report)
            tried[key] = all(gate.passed for gate in results)
            say(f"{bpw:g} bits per weight: {'holds' if tried[key] else 'breaks a gate'}")
        return tried[key]

    low, high = bpw_bounds(plan, choice)
    best = at(high)
    if not holds(best, high):
        return best
    while high - low > TOLERANCE * high:
        middle = round((low + high) / 2, 4)
        candidate = at(middle)
        if holds(candidate, middle):
            best, high = candidate, middle
        else:
            low = middle
    return best
