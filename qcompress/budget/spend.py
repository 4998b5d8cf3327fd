"""A budget is spent by one search over bits a weight: a size is filled, or the smallest that holds the gates found."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from qcompress.budget.search import (
    AIM,
    FIRST_GATED_RATE,
    FULL,
    LEAST_RATE,
    MOST_GATED_RATE,
    MOST_RATE,
    Search,
)
from qcompress.budget.steps import RoundedWeights
from qcompress.checkpoint.checkpoint import Checkpoint
from qcompress.checkpoint.outputs import refuse_own_input
from qcompress.checkpoint.staging import refuse_existing, staged_output
from qcompress.errors import BudgetError
from qcompress.plan.allocate import (
    Costs,
    Limit,
    allocate,
    allocate_about,
    bpw_bounds,
    budget_place,
    coded_weights,
    decides_steps,
    has_steps,
    limit_of,
    narrowest,
    raise_smallest,
)
from qcompress.registry import METHODS
from qcompress.report.document import GateResult, Report
from qcompress.report.gates import check_gates
from qcompress.types.plan import Gates, Plan
from qcompress.types.run import Options, Say

HARM_A_BIT = math.log(4)
"""By how much the logarithm of the harm falls with a bit a weight, about."""
UNTOLD = math.log(16)
"""The excess of a harm that has no logarithm: none at all, or not a number."""
LEAST_EXCESS = 1e-9
"""Of a gate that is broken by next to nothing."""

TOP_UPS = 3
"""Attempts at most that spend on single tensors what the best widths leave of a budget."""

Make: TypeAlias = Callable[[Plan, Options], Report]
"""Writes the artifact of a plan and gives its report."""
Measure: TypeAlias = Callable[[Report, Path], Report]
"""Gives the report of the artifact at a path with what it does to the task."""


@dataclass(frozen=True)
class Workshop:
    """How artifacts are made and measured, whom to tell, and what a live model tells of its batch norms.

    behind   weight -> the running variance of the batch norm behind it; None: as names tell
    resumes  whether attempts go on from what those of a killed run have left beside the output
    """

    make: Make
    measure: Measure = lambda report, _: report
    say: Say = lambda _: None
    behind: Mapping[str, str] | None = None
    resumes: bool = False


def spend(checkpoint: Checkpoint, plan: Plan, options: Options, costs: Costs, shop: Workshop) -> Report:
    """The report of the artifact that is made once the plan's budget is spent.

    Widths of packed codes under a budget in bits or bytes are known before anything is made, for a plan tells what
    they take. All else is tried: each attempt is an artifact beside the output, and the best of them becomes it.
    Training is too much for attempts at a size: its widths are those of packed codes.

    raises  BudgetError for a budget that is too small, and what making and measuring raise
    """
    budget = plan.recipe.budget
    assert budget is not None
    if budget.minimize is None and (options.choice == "packed" or _trains(plan)) and not decides_steps(plan):
        return shop.measure(shop.make(allocate(checkpoint, plan, options.choice, costs), options), options.output)
    refuse_own_input(checkpoint.path, options.output)
    if options.world.is_first:
        refuse_existing(options.output, options.force, checkpoint.is_folder)
    force, folder, world = options.force, checkpoint.is_folder, options.world
    with staged_output(options.output, force=force, folder=folder, resume=shop.resumes, world=world) as staged:
        drafts = Drafts(staged.parent / "attempts", options, shop)
        if shop.resumes:
            # Artifacts are made anew, from what their making has left.
            shutil.rmtree(drafts.folder, ignore_errors=True)
        dial = make_dial(checkpoint, plan, options, costs, shop)
        if budget.minimize is None:
            limit = limit_of(checkpoint, narrowest(plan, options.choice), options.choice)
            best = _fill(drafts, dial, plan, limit)
        else:
            best = _minimize(drafts, dial, plan)
        if world.is_first:
            if folder:
                shutil.rmtree(staged)
            best.path.rename(staged)
    return best.report if best.is_measured else shop.measure(best.report, options.output)


@dataclass(frozen=True)
class Draft:
    """One attempt: its report, and where it lies."""

    report: Report
    path: Path
    is_measured: bool


@dataclass
class Drafts:
    """The artifacts of a search, each in a folder of its own. Only the best is kept: the disk has room for two."""

    folder: Path
    options: Options
    shop: Workshop
    best: Draft | None = None
    _rank: tuple[float, ...] = ()
    _count: int = 0

    def make(self, plan: Plan, rate: float, *, measured: bool) -> Draft:
        """The next attempt. It is to be ranked before another is made."""
        folder = self.folder / str(self._count)
        if self.options.world.is_first:
            folder.mkdir(parents=True)
        self._count += 1
        path = folder / self.options.output.name
        options = replace(self.options, output=path, force=False, resume=False, rate=rate)
        report = self.shop.make(plan, options)
        return Draft(self.shop.measure(report, path) if measured else report, path, measured)

    def rank(self, draft: Draft, *rank: float) -> None:
        """Keep the draft where it ranks higher than the best so far, else remove it."""
        worse: Draft | None = draft
        if self.best is None or rank > self._rank:
            worse, self.best, self._rank = self.best, draft, rank
        if worse is not None and self.options.world.is_first:
            shutil.rmtree(worse.path.parent)


@dataclass(frozen=True)
class Dial:
    """What turns bits a weight into a plan, for the kind of thing that the plan's budget decides.

    plan_for  gives the plan for so many bits a weight
    least     bits a weight of the first plan that there is
    most      and of the last
    wider     gives a closed plan with some widths raised, for so many bytes that are left of a limit in bytes
    """

    plan_for: Callable[[float], Plan]
    least: float
    most: float
    wider: Callable[[Plan, int, int], Plan] = lambda closed, *_: closed


def make_dial(checkpoint: Checkpoint, plan: Plan, options: Options, costs: Costs, shop: Workshop) -> Dial:
    """Widths are those that so many bits allow, as far as costs foretell what they take.

    Steps of weights alone are those under which rounding them has so many bits of entropy; with calibration data the
    method chooses its own, told the rate.
    """
    if not decides_steps(plan):
        least, most = bpw_bounds(plan, options.choice, costs)

        def wider(closed: Plan, left: int, limit: int) -> Plan:
            return raise_smallest(plan, closed, options.choice, costs, left, limit)

        return Dial(lambda rate: allocate_about(plan, options.choice, costs, rate), least, most, wider)
    budget, data = plan.recipe.budget, plan.recipe.data
    most = MOST_RATE if budget is not None and budget.minimize is None else MOST_GATED_RATE
    if plan.recipe.model is not None and data is not None and data.calibration is not None:
        return Dial(lambda _: plan, LEAST_RATE, most)
    rounded = RoundedWeights.of(checkpoint, plan, shop.behind)
    return Dial(lambda rate: rounded.plan_for(plan, rate), LEAST_RATE, most)


def _trains(plan: Plan) -> bool:
    return any(d.compresses and METHODS[d.method or ""].needs == "training" for d in plan.decisions)


def _attempt_key(plan: Plan, rate: float) -> tuple[float | None, ...]:
    """What attempts differ by: rates that lead to the same widths are one attempt; of steps each is one for itself."""
    widths = tuple(d.config.bits for d in plan.decisions if d.compresses and not has_steps(d))
    return (*widths, rate) if any(map(has_steps, plan.decisions)) else widths


def _fill(drafts: Drafts, dial: Dial, plan: Plan, limit: Limit) -> Draft:
    """The attempt at most bits a weight within what the budget allows. Raises BudgetError where all use more."""
    weights, room = coded_weights(plan), limit.bits - limit.other_bits
    plans: dict[Path, Plan] = {}
    known: dict[tuple[float | None, ...], float] = {}

    def excess(bits: float) -> float:
        return math.log(max(bits - limit.other_bits, 1.0) / room)

    def look(knob: float) -> float:
        rate = math.exp(knob)
        candidate = dial.plan_for(rate)
        key = _attempt_key(candidate, rate)
        if key not in known:
            draft = drafts.make(candidate, rate, measured=False)
            known[key] = spent = bits_spent(limit, draft.report)
            drafts.shop.say(f"{spent / 8:,.0f} of {limit.bits / 8:,.0f} bytes")
            # Where tables change, finer steps may take less: what was asked for ranks, not what it took.
            plans[draft.path] = candidate
            drafts.rank(draft, spent <= limit.bits, rate)
        return excess(known[key])

    aim = excess(AIM * limit.bits)
    Search(
        math.log(room / weights) + aim,
        math.log(dial.least),
        math.log(dial.most),
        aim=aim,
        enough=excess(FULL * limit.bits),
        tolerance=-math.log(AIM),
    ).run(look)
    assert drafts.best is not None
    if (least := min(known.values())) > limit.bits:
        raise _refusal(plan, limit, least)
    return drafts.best if decides_steps(plan) else _topped_up(drafts, dial, limit, plans)


def _topped_up(drafts: Drafts, dial: Dial, limit: Limit, plans: dict[Path, Plan]) -> Draft:
    """The best attempt once what it leaves of the budget is spent on single tensors; `plans` has the plan of each."""
    assert drafts.best is not None
    for place in range(TOP_UPS):
        closed, spent = plans[drafts.best.path], bits_spent(limit, drafts.best.report)
        wider = dial.wider(closed, int((limit.bits - spent) // 8), int(limit.bits // 8))
        if _attempt_key(wider, 0.0) == _attempt_key(closed, 0.0):
            break
        draft = drafts.make(wider, dial.most, measured=False)
        spent = bits_spent(limit, draft.report)
        drafts.shop.say(f"{spent / 8:,.0f} of {limit.bits / 8:,.0f} bytes")
        plans[draft.path] = wider
        drafts.rank(draft, spent <= limit.bits, math.inf, place)
    return drafts.best


def _refusal(plan: Plan, limit: Limit, least: float) -> BudgetError:
    """The error of a budget that no attempt kept, the smallest of which took `least` bits."""
    weights = coded_weights(plan)
    words, enough = f"{limit.bits / 8:,.0f} bytes", f"{least / 8:.0f}"
    if not limit.whole:
        words, enough = f"{limit.bits / weights:g} bits per weight", f"{math.ceil(1000 * least / weights) / 1000:g}"
    what = f"{words} are too few: the smallest attempt took {least / 8:,.0f} bytes"
    return BudgetError(budget_place(plan), what, f"ask for at least {enough}, or compress more tensors")


def bits_spent(limit: Limit, report: Report) -> float:
    """The bits that an artifact takes of a budget."""
    size = report.size
    return size.artifact_bytes * 8.0 if limit.whole else 8.0 * (size.parts.codes + size.parts.side_information)


def _minimize(drafts: Drafts, dial: Dial, plan: Plan) -> Draft:
    """The smallest attempt that holds all gates; where even the most bits break one, the largest.

    It takes for granted that more bits never break a gate that fewer hold.
    """
    gates = _of_quality(plan.recipe.gates)
    measured = bool(gates.min_metric or gates.max_drop)
    known: dict[tuple[float | None, ...], float] = {}

    def look(knob: float) -> float:
        rate = math.exp(-knob)
        candidate = dial.plan_for(rate)
        key = _attempt_key(candidate, rate)
        if key not in known:
            draft = drafts.make(candidate, rate, measured=measured)
            report = draft.report
            known[key] = excess = harm_of(check_gates(gates, report), report)
            words = "holds" if excess <= 0 else "breaks a gate"
            drafts.shop.say(f"{round(report.size.bits_per_weight or 0, 4):g} bits per weight: {words}")
            drafts.rank(draft, excess <= 0, -report.size.artifact_bytes if excess <= 0 else report.size.artifact_bytes)
        return known[key]

    first = min(max(FIRST_GATED_RATE, dial.least), dial.most)
    Search(-math.log(first), -math.log(dial.most), -math.log(dial.least), slope=HARM_A_BIT * first).run(look)
    assert drafts.best is not None
    return drafts.best


def harm_of(results: tuple[GateResult, ...], report: Report) -> float:
    """The logarithm of how many times the harm that gates allow was done, of the gate that is the worst for it.

    At most 0 where all hold, above 0 where one breaks.
    """
    return max(_excess(result, report) for result in results)


def _excess(result: GateResult, report: Report) -> float:
    done = _log_harm(result, report)
    return max(min(done, 0.0), -UNTOLD) if result.passed else max(done, LEAST_EXCESS)


def _log_harm(result: GateResult, report: Report) -> float:
    """Of one gate, be it on decibels, on a drop, or on a metric, which drops from the baseline's."""
    kind, _, metric = result.name.partition(" ")
    value, limit = result.value, result.limit
    if value is None or not math.isfinite(value):
        return -UNTOLD if result.passed else UNTOLD
    if kind == "min-sqnr":
        return (limit - value) * math.log(10) / 10
    if kind == "min-metric":
        baseline = report.measured[metric].baseline or 0.0
        value, limit = baseline - value, baseline - limit
    if value > 0 and limit > 0:
        return math.log(value / limit)
    return -UNTOLD if result.passed else UNTOLD


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
