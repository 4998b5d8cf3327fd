"""Budgets of methods without widths, in bits: what they allow, known before any weight is read. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace

from qcompress.artifact.layout import POOL_NAME
from qcompress.checkpoint import Checkpoint
from qcompress.coding.payload import CodingChoice
from qcompress.encoded import ActivationGrid
from qcompress.errors import BudgetError
from qcompress.registry import METHODS
from qcompress.report.document import Report
from qcompress.shards import make_shards
from qcompress.types import Decision, Plan

LEAST_BPW = 0.1
"""Bits a weight below which nothing is promised: zeros cost something too."""


def is_unbounded(plan: Plan) -> bool:
    """Whether a budget of the plan decides steps, not widths."""
    return plan.recipe.budget is not None and any(has_steps(decision) for decision in plan.decisions)


def has_steps(decision: Decision) -> bool:
    """Whether a tensor's method has steps of any size in place of widths."""
    return decision.compresses and METHODS[decision.method or ""].live is not None


@dataclass(frozen=True)
class Limit:
    """A budget in bits: of codes and side information, or of all files, whose other parts take `other_bits`."""

    bits: float
    other_bits: float
    whole: bool

    def spent(self, report: Report) -> float:
        """What an artifact takes of it."""
        size = report.size
        return size.artifact_bytes * 8.0 if self.whole else 8.0 * (size.parts.codes + size.parts.side_information)


def most_bytes(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> int:
    """The most that the artifact may take under the plan's budget, in bits a weight or in bytes, which decides steps.

    raises  BudgetError where the budget is less than next to nothing takes
    """
    limit = limit_of(checkpoint, plan, choice)
    if limit.whole:
        return int(limit.bits // 8)
    other = _other_bytes(checkpoint, plan, choice) + len(checkpoint.shards) * _most_header_growth(plan)
    return other + int(limit.bits // 8)


def _most_header_growth(plan: Plan) -> int:
    """The most bytes by which a header grows once a live model's methods are done: by what is named in it."""
    if plan.recipe.model is None:
        return 0
    found: dict[str, object] = {"adjusted": [d.tensor.name for d in plan.decisions if not d.compresses]}
    if plan.recipe.activations is not None:
        grid = asdict(ActivationGrid(8, 1.2345678901234567e-100, 255))
        found["activations"] = {d.tensor.name: grid for d in plan.decisions if d.compresses}
    # JSON in JSON, and padding.
    return len(json.dumps(json.dumps(found, ensure_ascii=False), ensure_ascii=False).encode()) + 8


def limit_of(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> Limit:
    """Raises BudgetError where the budget is less than next to nothing takes."""
    budget = plan.recipe.budget
    assert budget is not None
    weights = coded_weights(plan)
    where = plan.recipe.places.get("budget", "budget")
    if budget.bpw is not None:
        if budget.bpw < LEAST_BPW:
            what = f"{budget.bpw:g} bits per weight are too few"
            raise BudgetError(where, what, f"ask for at least {LEAST_BPW}")
        return Limit(budget.bpw * weights, 0.0, whole=False)
    assert budget.size is not None
    other = _other_bytes(checkpoint, plan, choice)
    rest = math.ceil(LEAST_BPW * weights / 8)
    if budget.size < other + rest:
        # The header holds the budget: a larger number may be longer.
        larger = replace(plan.recipe, budget=replace(budget, size=other + rest))
        least = _other_bytes(checkpoint, replace(plan, recipe=larger), choice) + rest
        what = (
            f"{budget.size:,} bytes are too few: what is kept, names and next to nothing for the codes take {least:,}"
        )
        raise BudgetError(where, what, f"ask for at least {least}, compress more tensors, or keep them as f16")
    return Limit(budget.size * 8.0, other * 8.0, whole=True)


def _other_bytes(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> int:
    """The bytes of all files but for codes and side information, at most."""
    compressed = {decision.tensor.name for decision in plan.decisions if decision.compresses}
    layouts = [shard.layout for shard in make_shards(checkpoint, plan, choice)]
    # Of the slots only those of kept tensors are known; what several compressed ones share belongs to none.
    codes = sum(slot.n_bytes for one in layouts for slot in one.slots if slot.tensor in {POOL_NAME, *compressed})
    return sum(one.file_bytes for one in layouts) - codes


def coded_weights(plan: Plan) -> int:
    """The weights that the plan compresses."""
    return sum(decision.tensor.numel for decision in plan.decisions if decision.compresses)
