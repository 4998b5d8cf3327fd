"""Budgets are met by search here: for the step that fills a size, and for the smallest size that holds the gates."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qcompress.budget.weight_costs import SAMPLED_WEIGHTS
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.checkpoint.outputs import refuse_own_input
from qcompress.checkpoint.staging import refuse_existing, reporting_resources, staged_output
from qcompress.errors import BudgetError
from qcompress.plan.allocate import (
    LEAST_BPW,
    Costs,
    Limit,
    allocate,
    bpw_bounds,
    budget_place,
    coded_weights,
    decides_steps,
    has_steps,
    limit_of,
    with_bpw,
)
from qcompress.report.document import Report
from qcompress.report.gates import check_gates
from qcompress.solvers.unbounded import root_mean_square
from qcompress.types.config import CodingChoice
from qcompress.types.plan import Decision, Gates, Plan
from qcompress.types.run import Options, Say

Make = Callable[[Plan, Options], Report]
"""Writes the artifact of a plan and gives its report."""

FULL = 0.98
"""The share of the budget that an attempt must use to be the last."""
AIM = 0.997
"""The share of the budget that an attempt aims at."""
ATTEMPTS = 8
FARTHEST = 4.0
"""By how much the step grows at most from one attempt to the next, where those before tell by how much."""
STEP_OF_RATE = 0.75
"""By how much the logarithm of all steps changes a bit a weight, about: ln 2 where rates are high."""

LOG_STEPS = (-110.0, 130.0)
"""Logarithms of steps between which the first is searched: wide enough for weights of any size that float32 has."""
BISECTIONS = 27
TOLERANCE = 0.01
"""Of the budget, as a share: how near to the smallest the search goes."""


def make_at_rate(checkpoint: Checkpoint, make: Make, say: Say = lambda _: None) -> Make:
    """`make`, but for plans whose budget decides steps: those are made until one takes at most the budget, and nearly.

    raises  BudgetError where no attempt stays within the budget
    """

    def made(plan: Plan, options: Options) -> Report:
        if not decides_steps(plan):
            return make(plan, options)
        refuse_own_input(checkpoint.path, options.output)
        refuse_existing(options.output, options.force, checkpoint.is_folder)
        limit = limit_of(checkpoint, plan, options.choice)
        with staged_output(options.output, force=options.force, folder=checkpoint.is_folder) as staged:
            drafts = staged.parent / "attempts"
            drafts.mkdir()
            report, draft = _Search(checkpoint, make, plan, options, limit, drafts, say).run()
            if checkpoint.is_folder:
                staged.rmdir()
            draft.rename(staged)
        return report

    return made


@dataclass(frozen=True)
class _Search:
    """Attempts at one budget, each in a folder of its own."""

    checkpoint: Checkpoint
    make: Make
    plan: Plan
    options: Options
    limit: Limit
    drafts: Path
    say: Say

    def run(self) -> tuple[Report, Path]:
        """The report and the place of the best attempt. Raises BudgetError."""
        limit, weights = self.limit, coded_weights(self.plan)
        recipe, data = self.plan.recipe, self.plan.recipe.data
        live = recipe.model is not None and data is not None and data.calibration is not None
        bits = AIM * (limit.bits - limit.other_bits)
        # With data the method itself chooses steps for a rate.
        step = None if live else first_step(self.checkpoint, self.plan, bits)
        best: tuple[float, Report, Path] | None = None
        least = math.inf
        tried: dict[float, float] = {}
        for attempt in range(ATTEMPTS):
            report, draft = self._attempt(attempt, bits / weights, step)
            spent = bits_spent(limit, report)
            least = min(least, spent)
            self.say(f"{spent / 8:,.0f} of {limit.bits / 8:,.0f} bytes")
            worse = draft
            if spent <= limit.bits and (best is None or spent > best[0]):
                worse = draft if best is None else best[2]
                best = (spent, report, draft)
            if best is None or worse != best[2]:
                # A checkpoint of any size has room for two attempts, not for all.
                shutil.rmtree(worse.parent)
            if best is not None and best[0] >= FULL * limit.bits:
                break
            change = AIM * limit.bits - spent
            bits = max(bits + change, LEAST_BPW * weights / 2)
            if step is not None:
                tried[step] = spent - limit.other_bits
                target = step * math.exp(-STEP_OF_RATE * change / weights)
                step = next_step(tried, limit.bits - limit.other_bits, target)
        if best is None:
            raise self._refusal(least)
        return best[1], best[2]

    def _refusal(self, least: float) -> BudgetError:
        """The error of a budget that no attempt kept, the smallest of which took `least` bits."""
        budget, weights = self.limit.bits, coded_weights(self.plan)
        words, enough = f"{budget / 8:,.0f} bytes", f"{least / 8:.0f}"
        if not self.limit.whole:
            words, enough = f"{budget / weights:g} bits per weight", f"{math.ceil(1000 * least / weights) / 1000:g}"
        what = f"{words} are too few: the smallest of {ATTEMPTS} attempts took {least / 8:,.0f} bytes"
        return BudgetError(budget_place(self.plan), what, f"ask for at least {enough}, or compress more tensors")

    def _attempt(self, number: int, rate: float, step: float | None) -> tuple[Report, Path]:
        folder = self.drafts / str(number)
        folder.mkdir()
        draft = folder / self.options.output.name
        plan = self.plan if step is None else _with_step(self.plan, step)
        options = replace(self.options, output=draft, force=False, resume=False, rate=rate)
        return self.make(plan, options), draft


def bits_spent(limit: Limit, report: Report) -> float:
    """The bits that an artifact takes of a budget."""
    size = report.size
    return size.artifact_bytes * 8.0 if limit.whole else 8.0 * (size.parts.codes + size.parts.side_information)


def next_step(tried: Mapping[float, float], limit: float, target: float) -> float:
    """The step to try after those that spent so many bits: the target, or from the fourth on between the nearest two.

    Bits jump with the tables that codes share, so that targets alone may go to and fro. Where rates are low a target
    falls short: while all have spent too much, the step goes as far as the last two say, in logarithms, and at most
    FARTHEST times.
    """
    if len(tried) > 1 and min(tried.values()) > limit:
        (before, spent_before), (last, spent_last) = [*tried.items()][-2:]
        if last > before and spent_last < spent_before:
            slope = math.log(last / before) / math.log(spent_before / spent_last)
            return max(target, last * math.exp(min(slope * math.log(spent_last / (AIM * limit)), math.log(FARTHEST))))
    over = max((step for step, spent in tried.items() if spent > limit), default=math.inf)
    held = min((step for step, spent in tried.items() if spent <= limit), default=0.0)
    return math.sqrt(over * held) if len(tried) > 2 and over < held else target


def _with_step(plan: Plan, step: float) -> Plan:
    decisions = (replace(d, config=d.config.changed(step=step)) if has_steps(d) else d for d in plan.decisions)
    return replace(plan, decisions=tuple(decisions))


def first_step(checkpoint: Checkpoint, plan: Plan, bits: float) -> float:
    """The step under which all weights, rounded to nearest, have an entropy of `bits`: a start for the search.

    From a sample of each tensor's weights.
    """
    decisions = [decision for decision in plan.decisions if has_steps(decision)]
    samples = [_sample(checkpoint, decision) for decision in decisions]
    weights = [decision.tensor.numel for decision in decisions]

    def rate_at(log: float) -> float:
        rates = (entropy((sample.double() / math.exp(log)).round()) for sample in samples)
        return sum(rate * count for rate, count in zip(rates, weights, strict=True))

    low, high = LOG_STEPS
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rate_at(middle) > bits else (low, middle)
    return math.exp(high)


def _sample(checkpoint: Checkpoint, decision: Decision) -> torch.Tensor:
    """Weights of one tensor in units of the square root of their deviation, float32."""
    tensor = decision.tensor
    flat = tensor_view(checkpoint.shard_of(tensor.name), tensor).reshape(-1)
    taken = flat[:: max(1, flat.numel() // SAMPLED_WEIGHTS)].float()
    deviation = root_mean_square(taken)
    return taken / deviation**0.5 if deviation > 0 else torch.zeros_like(taken)


def entropy(codes: torch.Tensor) -> float:
    """Bits a code of integers of any size: of their order-0 distribution."""
    _, counts = torch.unique(codes, return_counts=True)
    shares = counts.double() / codes.numel()
    return float(-(shares * shares.log2()).sum())


def spend(
    checkpoint: Checkpoint,
    plan: Plan,
    options: Options,
    costs: Costs,
    make: Make,
    say: Say = lambda _: None,
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
        raise BudgetError(
            budget_place(plan), "there is no gate for the smallest artifact to hold", "add --max-drop top1=0.005"
        )


def _of_quality(gates: Gates) -> Gates:
    """The gates that a smaller artifact may break."""
    return replace(gates, max_size=None, max_bpw=None)


def smallest(
    checkpoint: Checkpoint,
    plan: Plan,
    choice: CodingChoice,
    costs: Costs,
    probe: Callable[[Plan], Report],
    say: Say = lambda _: None,
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
        widths = tuple(d.config.bits for d in candidate.decisions if d.compresses and not has_steps(d))
        key = widths or (bpw,)
        if key not in tried:
            report = probe(candidate)
            tried[key] = all(gate.passed for gate in check_gates(_of_quality(candidate.recipe.gates), report))
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
