"""Plan x what each width costs x budget -> Plan with every width decided. Imports no torch.

Each tensor's cost falls and its bytes grow with its width. At the least total cost within a budget all tensors have
about the same slope, cost saved a byte: so widths grow along the lower convex hull of each tensor's points, steepest
first (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). What is left of the
budget goes to the best widths that still fit.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qcompress.artifact.layout import make_slots
from qcompress.checkpoint import Checkpoint
from qcompress.coding.payload import CodingChoice
from qcompress.errors import BudgetError
from qcompress.shards import planned_files
from qcompress.types import Budget, Decision, Plan

LINKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Modules that other tools store or run as one, so that their widths must be equal, wherever all of them are there."""

Costs = Mapping[str, Mapping[int, float]]
"""Tensor -> width -> what this width of this tensor alone costs; of any unit, the same for all."""


@dataclass(frozen=True)
class Unit:
    """Tensors that get one width: size_bytes of codes and side information, and cost, at each width ascending."""

    decisions: tuple[Decision, ...]
    size_bytes: Mapping[int, int]
    cost: Mapping[int, float]

    @property
    def narrowest(self) -> int:
        return min(self.size_bytes)


@dataclass(frozen=True)
class Choice:
    """The width of a unit, and the slope at which it was reached: cost saved a byte, 0 at the narrowest."""

    bits: int
    slope: float


def is_open(plan: Plan) -> bool:
    """Whether a budget has yet to choose widths."""
    return any(decision.is_open for decision in plan.decisions)


def make_units(plan: Plan, choice: CodingChoice, costs: Costs | None = None) -> list[Unit]:
    """The open decisions, those of linked tensors together; costs are 0 where there are none yet.

    raises  BudgetError where linked tensors have no width in common
    """
    units = []
    for decisions in _linked([decision for decision in plan.decisions if decision.is_open]):
        widths = set.intersection(*(set(decision.config.configs) for decision in decisions))
        if not widths:
            names = ", ".join(decision.tensor.name for decision in decisions)
            raise BudgetError(
                _where(plan), f"{names} belong together and have no width in common", "give them the same options"
            )
        sizes = {bits: sum(_size_bytes(d, bits, choice) for d in decisions) for bits in sorted(widths)}
        cost = {bits: sum(costs[d.tensor.name][bits] for d in decisions) if costs else 0.0 for bits in sizes}
        units.append(Unit(tuple(decisions), sizes, cost))
    return units


def refuse_infeasible(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> None:
    """Raise BudgetError where even the narrowest widths take more than the budget."""
    budget = plan.recipe.budget
    if budget is None or budget.minimize is not None or not is_open(plan):
        return
    least = _taken_bytes(checkpoint, narrowest(plan, choice), choice, budget)
    if least <= _limit_bytes(plan, budget):
        return
    if budget.bpw is not None:
        bpw = least * 8 / _weights(plan)
        what = f"{budget.bpw:g} bits per weight are too few: codes and grids take {bpw:.4f} at the narrowest widths"
        raise BudgetError(_where(plan), what, f"ask for at least {math.ceil(bpw * 1000) / 1000:g}")
    what = f"{budget.size:,} bytes are too few: the artifact takes {least:,} at the narrowest widths"
    raise BudgetError(_where(plan), what, f"ask for at least {least}, or compress more tensors")


def allocate(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice, costs: Costs, why: str) -> Plan:
    """The plan with every width decided: the least total cost that the budget allows, never more than the budget.

    The bytes are those of packed codes; entropy coding makes the artifact smaller still.

    why     how the costs were found, for the plan's reasons
    raises  BudgetError where the narrowest widths take more than the budget
    """
    budget = plan.recipe.budget
    if budget is None or not is_open(plan):
        return plan
    refuse_infeasible(checkpoint, plan, choice)
    units = make_units(plan, choice, costs)
    limit = _limit_bytes(plan, budget)
    narrow = [Choice(unit.narrowest, 0.0) for unit in units]
    # What is no code and no grid: nothing for bpw; for a whole file kept tensors, and a header that the widths change.
    fixed = _taken_bytes(checkpoint, close(plan, units, narrow), choice, budget) - _sum_bytes(units, narrow)
    best = narrow
    while True:
        found = choose(units, limit - fixed)
        over = _taken_bytes(checkpoint, close(plan, units, found), choice, budget) - limit
        if over <= 0:
            best = found
            break
        if found == narrow:
            break
        fixed += over
    return close(plan, units, best, f"{_budget_words(budget)}, {why}")


def narrowest(plan: Plan, choice: CodingChoice) -> Plan:
    """The plan with every open width at its narrowest."""
    units = make_units(plan, choice)
    return close(plan, units, [Choice(unit.narrowest, 0.0) for unit in units])


def choose(units: Sequence[Unit], most_bytes: int) -> list[Choice]:
    """A width for each unit, so that their bytes sum to at most `most_bytes` and their costs to about the least.

    Along the lower convex hulls the choice is optimal for the bytes that it takes; what is left then goes to any width
    that still fits, steepest first. The narrowest widths are taken whatever they need.
    """
    chosen = [Choice(unit.narrowest, 0.0) for unit in units]
    left = most_bytes - _sum_bytes(units, chosen)
    steps = [(-slope, index, bits) for index, unit in enumerate(units) for bits, slope in hull_steps(unit)]
    stopped: set[int] = set()
    for negative, index, bits in sorted(steps):
        needed = units[index].size_bytes[bits] - units[index].size_bytes[chosen[index].bits]
        if index in stopped or needed > left:
            # Steps of a hull come in order: after one that does not fit, the next would jump over it.
            stopped.add(index)
            continue
        left -= needed
        chosen[index] = Choice(bits, -negative)
    return _filled(units, chosen, left)


def hull_steps(unit: Unit) -> list[tuple[int, float]]:
    """(width, slope of cost saved a byte on the way to it) along the lower convex hull, slopes falling, above 0."""
    hull: list[int] = []
    for bits in sorted(unit.size_bytes, key=lambda bits: (unit.size_bytes[bits], unit.cost[bits])):
        if hull and unit.cost[bits] >= unit.cost[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(unit, hull[-1], bits) >= _slope(unit, hull[-2], hull[-1]):
            hull.pop()
        hull.append(bits)
    return [(after, _slope(unit, before, after)) for before, after in itertools.pairwise(hull)]


def _slope(unit: Unit, before: int, after: int) -> float:
    """Cost saved a byte from one width to a wider one, infinite where that takes no byte more."""
    saved, grown = unit.cost[before] - unit.cost[after], unit.size_bytes[after] - unit.size_bytes[before]
    return saved / grown if grown else math.inf


def _filled(units: Sequence[Unit], chosen: Sequence[Choice], left: int) -> list[Choice]:
    """The choice with what is left of the budget spent on whatever still fits and saves the most cost a byte."""
    filled = list(chosen)

    def best_step(index: int) -> tuple[float, int, int] | None:
        unit, now = units[index], filled[index].bits
        steps = [
            (-_slope(unit, now, bits), index, bits)
            for bits, size in unit.size_bytes.items()
            if bits > now and size - unit.size_bytes[now] <= left and unit.cost[bits] < unit.cost[now]
        ]
        return min(steps, default=None)

    waiting = [step for index in range(len(units)) if (step := best_step(index)) is not None]
    heapq.heapify(waiting)
    while waiting:
        negative, index, bits = heapq.heappop(waiting)
        needed = units[index].size_bytes[bits] - units[index].size_bytes[filled[index].bits]
        if needed <= left:
            left -= needed
            filled[index] = Choice(bits, -negative)
        again = best_step(index)
        if again is not None:
            heapq.heappush(waiting, again)
    return filled


def close(plan: Plan, units: Sequence[Unit], chosen: Sequence[Choice], why: str = "") -> Plan:
    """The plan with the chosen widths, and the reason for each behind its rule's."""
    closed = {}
    for unit, one in zip(units, chosen, strict=True):
        for decision in unit.decisions:
            reason = f"{decision.reason}; {one.bits} bits: {why}" if why else decision.reason
            if why and one.slope:
                reason += f", slope {one.slope:.1e} a byte"
            if why and len(unit.decisions) > 1:
                reason += f", equal in {len(unit.decisions)} linked tensors"
            config = decision.config.at(one.bits)
            closed[decision.tensor.name] = replace(decision, config=config, reason=reason)
    return replace(plan, decisions=tuple(closed.get(d.tensor.name, d) for d in plan.decisions))


def _linked(decisions: Sequence[Decision]) -> list[list[Decision]]:
    """The decisions in groups that get one width, in the order of their first."""
    by_name = {decision.tensor.name: decision for decision in decisions}
    group_of: dict[str, list[Decision]] = {}
    for decision in decisions:
        name = decision.tensor.name
        if name in group_of:
            continue
        partners = [by_name[partner] for partner in _partners(name, by_name)]
        for partner in partners:
            group_of[partner.tensor.name] = partners
    return list({id(group): group for group in group_of.values()}.values())


def _partners(name: str, known: Mapping[str, Decision]) -> list[str]:
    """The names that get the same width as `name`, itself included, in the order of the links."""
    parts = name.split(".")
    for links in LINKED:
        for place, part in enumerate(parts):
            if part in links:
                names = [".".join([*parts[:place], link, *parts[place + 1 :]]) for link in links]
                if all(partner in known for partner in names):
                    return names
    return [name]


def _size_bytes(decision: Decision, bits: int, choice: CodingChoice) -> int:
    """Bytes of a decision's codes and grids at a width; with entropy coding the most that they can be."""
    return sum(slot.n_bytes for slot in make_slots(replace(decision, config=decision.config.at(bits)), choice))


def _sum_bytes(units: Sequence[Unit], chosen: Sequence[Choice]) -> int:
    return sum(unit.size_bytes[one.bits] for unit, one in zip(units, chosen, strict=True))


def _taken_bytes(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice, budget: Budget) -> int:
    """What a closed plan takes of the budget: its compressed tensors, or all its files, for bpw and size."""
    if budget.bpw is not None:
        compressed = [d for d in plan.decisions if d.compresses]
        return sum(slot.n_bytes for d in compressed for slot in make_slots(d, choice))
    return sum(planned_files(checkpoint, plan, choice).values())


def _limit_bytes(plan: Plan, budget: Budget) -> int:
    if budget.bpw is not None:
        return math.floor(budget.bpw * _weights(plan) / 8)
    assert budget.size is not None
    return budget.size


def _weights(plan: Plan) -> int:
    return sum(decision.tensor.numel for decision in plan.decisions if decision.compresses)


def _where(plan: Plan) -> str:
    return plan.recipe.places.get("budget", "budget")


def _budget_words(budget: Budget) -> str:
    return f"budget {budget.bpw:g} bpw" if budget.bpw is not None else f"budget {budget.size:,} bytes"
