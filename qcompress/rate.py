"""Budgets of methods without widths: the steps of all their grids move together until the artifact takes what it may.

Each attempt is a whole artifact where the output is staged; the first that holds the budget and uses it becomes it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qcompress.artifact.staging import refuse_existing, refuse_own_input, staged_output
from qcompress.checkpoint import Checkpoint, tensor_view
from qcompress.errors import BudgetError
from qcompress.limit import LEAST_BPW, Limit, coded_weights, has_steps, is_unbounded, limit_of
from qcompress.options import Options
from qcompress.report.document import Report
from qcompress.solvers.lattice_grid import root_mean_square
from qcompress.types import Decision, Plan

Make = Callable[[Plan, Options], Report]
"""Writes the artifact of a plan and gives its report."""

FULL = 0.98
"""The share of the budget that an attempt must use to be the last."""
AIM = 0.997
ATTEMPTS = 8
FARTHEST = 4.0
"""By how much the step grows at most from one attempt to the next, where those before tell by how much."""
STEP_OF_RATE = 0.75
"""By how much the logarithm of all steps changes a bit a weight, about: ln 2 where rates are high."""
SAMPLED_WEIGHTS = 1 << 16


def make_at_rate(checkpoint: Checkpoint, make: Make, say: Callable[[str], None] = lambda _: None) -> Make:
    """`make`, but for plans whose budget decides steps: those are made until one takes at most the budget, and nearly.

    raises  BudgetError where no attempt stays within the budget
    """

    def made(plan: Plan, options: Options) -> Report:
        if not is_unbounded(plan):
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
    say: Callable[[str], None]

    def run(self) -> tuple[Report, Path]:
        """The report and the place of the best attempt. Raises BudgetError."""
        limit, weights = self.limit, coded_weights(self.plan)
        bits = AIM * (limit.bits - limit.other_bits)
        step = None if self._is_live else first_step(self.checkpoint, self.plan, bits)
        best: tuple[float, Report, Path] | None = None
        least = math.inf
        tried: dict[float, float] = {}
        for attempt in range(ATTEMPTS):
            report, draft = self._attempt(attempt, bits / weights, step)
            spent = limit.spent(report)
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
                wish = step * math.exp(-STEP_OF_RATE * change / weights)
                step = next_step(tried, limit.bits - limit.other_bits, wish)
        if best is None:
            raise self._refusal(least)
        return best[1], best[2]

    def _refusal(self, least: float) -> BudgetError:
        """Of a budget in whose place no attempt took less than so many bits."""
        where, budget, weights = (
            self.plan.recipe.places.get("budget", "budget"),
            self.limit.bits,
            coded_weights(self.plan),
        )
        words, enough = f"{budget / 8:,.0f} bytes", f"{least / 8:.0f}"
        if not self.limit.whole:
            words, enough = f"{budget / weights:g} bits per weight", f"{math.ceil(1000 * least / weights) / 1000:g}"
        what = f"{words} are too few: the smallest of {ATTEMPTS} attempts took {least / 8:,.0f} bytes"
        return BudgetError(where, what, f"ask for at least {enough}, or compress more tensors")

    @property
    def _is_live(self) -> bool:
        return self.plan.recipe.model is not None and _has_calibration(self.plan)

    def _attempt(self, number: int, rate: float, step: float | None) -> tuple[Report, Path]:
        folder = self.drafts / str(number)
        folder.mkdir()
        draft = folder / self.options.output.name
        plan = self.plan if step is None else _with_step(self.plan, step)
        options = replace(self.options, output=draft, force=False, resume=False, rate=rate)
        return self.make(plan, options), draft


def next_step(tried: Mapping[float, float], limit: float, wish: float) -> float:
    """The step to try after those that spent so many bits: the wish, or from the fourth on between the nearest two.

    Bits jump with the tables that codes share, so that wishes alone may go to and fro. Where rates are low a wish falls
    short: while all have spent too much, it goes as far as the last two say, in logarithms, and at most FARTHEST times.
    """
    if len(tried) > 1 and min(tried.values()) > limit:
        (before, spent_before), (last, spent_last) = [*tried.items()][-2:]
        if last > before and spent_last < spent_before:
            slope = math.log(last / before) / math.log(spent_before / spent_last)
            return max(wish, last * math.exp(min(slope * math.log(spent_last / (AIM * limit)), math.log(FARTHEST))))
    over = max((step for step, spent in tried.items() if spent > limit), default=math.inf)
    held = min((step for step, spent in tried.items() if spent <= limit), default=0.0)
    return math.sqrt(over * held) if len(tried) > 2 and over < held else wish


def _has_calibration(plan: Plan) -> bool:
    data = plan.recipe.data
    return data is not None and data.calibration is not None


def _with_step(plan: Plan, step: float) -> Plan:
    def stepped(decision: Decision) -> Decision:
        if not has_steps(decision):
            return decision
        return replace(decision, config=replace(decision.config, step=step))

    return replace(plan, decisions=tuple(stepped(decision) for decision in plan.decisions))


def first_step(checkpoint: Checkpoint, plan: Plan, bits: float) -> float:
    """The step under which all weights, rounded to nearest, have an entropy of `bits`: a start for the search.

    From a sample of each tensor's weights.
    """
    samples = [_sample(checkpoint, d) for d in plan.decisions if has_steps(d)]
    weights = [d.tensor.numel for d in plan.decisions if has_steps(d)]

    def rate_at(log: float) -> float:
        rates = (entropy((sample.double() / math.exp(log)).round()) for sample in samples)
        return sum(rate * count for rate, count in zip(rates, weights, strict=True))

    # Wide enough for weights of any size that float32 has.
    low, high = -110.0, 130.0
    for _ in range(27):
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
