"""A budget is spent on the bit widths of a plan, by what each width costs; the plan comes back closed. No torch."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from qcompress.artifact.layout import make_slots
from qcompress.artifact.manifest import POOL_NAME
from qcompress.checkpoint.checkpoint import Checkpoint
from qcompress.errors import BudgetError, InputError, raise_all
from qcompress.plan.files import make_shards, planned_files
from qcompress.plan.knapsack import Curve, choose, raised, slope, sum_bytes
from qcompress.plan.sensitivity import LayerCosts, grid_words, read_sensitivity, refuse_foreign
from qcompress.plan.siblings import linked_names
from qcompress.registry import METHODS
from qcompress.types.config import CodingChoice
from qcompress.types.encoded import ActivationGrid
from qcompress.types.plan import Budget, Decision, Plan

LEAST_BPW = 0.1
"""Bits a weight below which nothing is promised: zeros cost something too."""

LEFT = 0.01
"""The share of a budget that is left as it is."""


def budget_place(plan: Plan) -> str:
    """How errors name a plan's budget: "recipe.yaml:3: budget"."""
    return plan.recipe.place("budget")


def coded_weights(plan: Plan) -> int:
    """The weights that the plan compresses."""
    return sum(decision.tensor.numel for decision in plan.decisions if decision.compresses)


def decides_steps(plan: Plan) -> bool:
    """Whether a budget of the plan decides steps, not widths."""
    return plan.recipe.budget is not None and any(has_steps(decision) for decision in plan.decisions)


def has_steps(decision: Decision) -> bool:
    """Whether a tensor's codes have a step of any size in place of a width."""
    return decision.compresses and METHODS[decision.method or ""].rates and decision.config.form == "unbounded"


@dataclass(frozen=True)
class Limit:
    """A budget in bits: of codes and side information, or of all files, whose other parts take `other_bits`."""

    bits: float
    other_bits: float
    whole: bool


def limits_steps(plan: Plan) -> bool:
    """Whether a budget of the plan says how much the codes of steps may take, as gates do not."""
    return decides_steps(plan) and plan.recipe.budget is not None and plan.recipe.budget.minimize is None


def most_bytes(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> int:
    """The most that the artifact may take under the plan's budget, in bits a weight or in bytes, which decides steps.

    raises  BudgetError where the budget is less than next to nothing takes
    """
    limit = limit_of(checkpoint, plan, choice)
    if limit.whole:
        return int(limit.bits // 8)
    other = other_bytes(checkpoint, plan, choice) + len(checkpoint.shards) * _most_header_growth(plan)
    return other + int(limit.bits // 8)


def _most_header_growth(plan: Plan) -> int:
    """The most bytes by which a header grows by what is named in it once a live model's methods are done."""
    if plan.recipe.model is None:
        return 0
    found: dict[str, object] = {"adjusted": [d.tensor.name for d in plan.decisions if not d.compresses]}
    if plan.recipe.activations is not None:
        grid = asdict(ActivationGrid(8, 1.2345678901234567e-100, 255))
        found["activations"] = {d.tensor.name: grid for d in plan.decisions if d.compresses}
    return len(json.dumps(found, ensure_ascii=False).encode())


def limit_of(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> Limit:
    """The plan's budget in bits. Raises BudgetError where it is less than next to nothing takes."""
    budget = plan.recipe.budget
    assert budget is not None
    weights = coded_weights(plan)
    if budget.bpw is not None:
        if budget.bpw < LEAST_BPW:
            what = f"{budget.bpw:g} bits per weight are too few"
            raise BudgetError(budget_place(plan), what, f"ask for at least {LEAST_BPW}")
        return Limit(budget.bpw * weights, 0.0, whole=False)
    assert budget.size is not None
    other = other_bytes(checkpoint, plan, choice)
    rest = math.ceil(LEAST_BPW * weights / 8)
    if budget.size < other + rest:
        least = _least_size(plan, other + rest, lambda asked: other_bytes(checkpoint, asked, choice) + rest)
        what = (
            f"{budget.size:,} bytes are too few: what is kept, names and next to nothing for the codes take {least:,}"
        )
        raise BudgetError(
            budget_place(plan), what, f"ask for at least {least}, compress more tensors, or keep them as f16"
        )
    return Limit(budget.size * 8.0, other * 8.0, whole=True)


def other_bytes(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> int:
    """The bytes of all files but for codes and side information, at most."""
    compressed = {decision.tensor.name for decision in plan.decisions if decision.compresses}
    layouts = [shard.layout for shard in make_shards(checkpoint, plan, choice)]
    # Of the slots only those of kept tensors are known; what several compressed ones share belongs to none.
    codes = sum(slot.n_bytes for one in layouts for slot in one.slots if slot.tensor in {POOL_NAME, *compressed})
    return sum(one.file_bytes for one in layouts) - codes


@dataclass(frozen=True)
class Costs:
    """The cost of each width of each open tensor alone, in any unit that is the same for all.

    of        tensor -> width -> cost; widths that are not there are not chosen
    why       how it was found, for the plan's reasons
    measured  whether on a live model, so that the report can say it
    coded     tensor -> width -> bytes that codes and grids take about, entropy coded
    """

    of: Mapping[str, Mapping[int, float]]
    why: str
    measured: bool = False
    coded: Mapping[str, Mapping[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit(Curve):
    """Tensors that get one width."""

    decisions: tuple[Decision, ...]


def read_costs(checkpoint: Checkpoint, plan: Plan, path: Path) -> Costs:
    """The divergences that were measured on this checkpoint, from a file of sensitivities.

    raises  ReportError where the file is damaged or of another checkpoint; BudgetError (Refusals where several) for
            open tensors that it does not cover, or covers with another grid
    """
    found = read_sensitivity(path)
    refuse_foreign(found, path, checkpoint)
    by_name = {layer.name: layer for layer in found.layers}
    errors: list[InputError] = []
    of: dict[str, dict[int, float]] = {}
    for decision in (decision for decision in plan.decisions if decision.is_open):
        name, layer = decision.tensor.name, by_name.get(decision.tensor.name)
        because = _uncovered(decision, layer)
        if layer is None or because is not None:
            errors.append(BudgetError(f"{path}: {name}", because or "", "measure again with the rules of this run"))
        else:
            of[name] = {cost.bits: cost.divergence for cost in layer.widths}
    raise_all(errors)
    return Costs(of, f"measured in {path.name}", measured=True)


def _uncovered(decision: Decision, layer: LayerCosts | None) -> str | None:
    """Why what was measured of a layer does not tell what a decision costs, or None."""
    if layer is None or layer.shape != decision.tensor.shape:
        return "was not measured"
    if layer.grid != grid_words(decision):
        return f"was measured with a grid of {layer.grid}, and is to get {grid_words(decision)}"
    if not {cost.bits for cost in layer.widths} & decision.widths.configs.keys():
        return "was measured at no width that its method has"
    return None


def is_open(plan: Plan) -> bool:
    """Whether a budget has yet to choose widths."""
    return any(decision.is_open for decision in plan.decisions)


def make_units(plan: Plan, choice: CodingChoice, costs: Costs | None = None, *, about: bool = False) -> list[Unit]:
    """The open decisions, those of linked tensors together; costs are 0 where there are none yet.

    about   sizes are what codes take about once they are coded, where the costs tell; else the most that they can take
    raises  BudgetError where linked tensors have no width in common
    """
    coded = costs.coded if costs and about and choice != "packed" else {}

    def size_bytes(decision: Decision, bits: int) -> int:
        known = coded.get(decision.tensor.name)
        return known[bits] if known else _size_bytes(decision, bits, choice)

    units = []
    for decisions in _linked([decision for decision in plan.decisions if decision.is_open]):
        known = (costs.of[d.tensor.name].keys() & d.widths.configs if costs else d.widths.configs for d in decisions)
        widths = set.intersection(*map(set, known))
        if not widths:
            names = ", ".join(decision.tensor.name for decision in decisions)
            what = f"{names} belong together and have no width in common"
            raise BudgetError(budget_place(plan), what, "give them the same options")
        sizes = {bits: sum(size_bytes(d, bits) for d in decisions) for bits in sorted(widths)}
        cost = {bits: sum(costs.of[d.tensor.name][bits] for d in decisions) if costs else 0.0 for bits in sizes}
        units.append(Unit(sizes, cost, tuple(decisions)))
    return units


def refuse_infeasible(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> None:
    """Raise BudgetError where even the narrowest widths take more than the budget, or steps would fill more than bits.

    Steps fill whatever a budget allows, and a weight has no more in it than its dtype.
    """
    budget = plan.recipe.budget
    if budget is None or budget.minimize is not None:
        return
    if budget.bpw is not None and decides_steps(plan):
        whole = 8 * sum(d.tensor.n_bytes for d in plan.decisions if d.compresses) / coded_weights(plan)
        if budget.bpw >= whole:
            what = f"{budget.bpw:g} bits per weight are too many: the weights have {whole:.4g} as they are"
            raise BudgetError(budget_place(plan), what, "ask for fewer, or keep those weights")
    if not is_open(plan):
        return
    _refuse_less(checkpoint, narrowest(plan, choice), choice, budget)


def _refuse_less(checkpoint: Checkpoint, narrow: Plan, choice: CodingChoice, budget: Budget) -> None:
    """Raise BudgetError where a plan at its narrowest widths takes more than the budget."""
    plan, least = narrow, _taken_bytes(checkpoint, narrow, choice, budget)
    if least <= _limit_bytes(plan, budget):
        return
    if budget.size is not None:
        least = _least_size(plan, least, lambda asked: _taken_bytes(checkpoint, asked, choice, budget))
    if budget.bpw is not None:
        bpw = least * 8 / coded_weights(plan)
        what = f"{budget.bpw:g} bits per weight are too few: codes and grids take {bpw:.4f} at the narrowest widths"
        raise BudgetError(budget_place(plan), what, f"ask for at least {math.ceil(bpw * 1000) / 1000:g}")
    what = f"{budget.size:,} bytes are too few: the artifact takes {least:,} at the narrowest widths"
    raise BudgetError(budget_place(plan), what, f"ask for at least {least}, or compress more tensors")


def _least_size(plan: Plan, size: int, taken: Callable[[Plan], int]) -> int:
    """The least budget in bytes that a plan keeps, from about `size` on; its manifest names that budget."""

    own = plan.recipe.budget or Budget()

    def fits(size: int) -> bool:
        return taken(replace(plan, recipe=replace(plan.recipe, budget=replace(own, size=size)))) <= size

    while not fits(size):
        size += 1
    while fits(size - 1):
        size -= 1
    return size


def allocate(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice, costs: Costs) -> Plan:
    """The plan with every width decided: the least total cost that the budget allows, never more than the budget.

    The bytes are the most that codes can take: entropy coding makes the artifact smaller still.

    raises  BudgetError where the narrowest widths take more than the budget
    """
    budget = plan.recipe.budget
    if budget is None or not is_open(plan):
        return plan
    units = make_units(plan, choice, costs)
    limit = _limit_bytes(plan, budget)
    narrow = [unit.narrowest for unit in units]
    _refuse_less(checkpoint, close(plan, units, narrow), choice, budget)
    # What is no code and no grid: nothing for bpw; for a whole file kept tensors, and a header that the widths change.
    fixed = _taken_bytes(checkpoint, close(plan, units, narrow), choice, budget) - sum_bytes(units, narrow)
    while True:
        found = choose(units, limit - fixed)
        over = _taken_bytes(checkpoint, close(plan, units, found), choice, budget) - limit
        if over <= 0 or found == narrow:
            break
        fixed += over
    closed = close(plan, units, found, f"{_budget_words(budget)}, {costs.why}", costs)
    more = raise_smallest(plan, closed, choice, costs, -over, limit)
    return more if _taken_bytes(checkpoint, more, choice, budget) <= limit else closed


def raise_smallest(plan: Plan, closed: Plan, choice: CodingChoice, costs: Costs, left: int, limit: int) -> Plan:
    """The plan with single tensors a bit wider than in `closed`, the smallest first, so that LEFT of the limit is left.

    plan    with the widths that `closed` has decided still open
    left    bytes that are not spent, of `limit`; one more bit is taken to need as many as when it is packed
    """
    if left <= LEFT * limit:
        return closed
    assert plan.recipe.budget is not None
    units = make_units(plan, choice, costs)
    packed = make_units(plan, "packed", costs)
    now = {decision.tensor.name: decision.config.bits or 0 for decision in closed.decisions}
    chosen = [now[unit.decisions[0].tensor.name] for unit in units]
    found = raised(packed, chosen, left, math.ceil(LEFT * limit))
    return close(plan, units, found, f"{_budget_words(plan.recipe.budget)}, {costs.why}", costs)


def _budget_words(budget: Budget) -> str:
    if budget.bpw is not None:
        return f"budget {budget.bpw:g} bpw"
    return "the smallest that holds the gates" if budget.size is None else f"budget {budget.size:,} bytes"


def allocate_about(plan: Plan, choice: CodingChoice, costs: Costs, bpw: float) -> Plan:
    """The plan with every width decided: the least total cost of so many bits a weight, as far as costs foretell them.

    What codes take is seen once they are made: it may be more or less.
    """
    budget = plan.recipe.budget
    assert budget is not None
    units = make_units(plan, choice, costs, about=True)
    found = choose(units, math.floor(bpw * coded_weights(plan) / 8))
    return close(plan, units, found, f"{_budget_words(budget)}, {costs.why}", costs)


def bpw_bounds(plan: Plan, choice: CodingChoice, costs: Costs | None = None) -> tuple[float, float]:
    """Bits per weight of the narrowest and of the widest widths, each rounded up; with costs, as far as they foretell.

    Of costs' widths alone, where there are costs.
    """
    units = make_units(plan, choice, costs, about=True)
    low, high = (8 * sum(end(unit.size_bytes.values()) for unit in units) / coded_weights(plan) for end in (min, max))
    return math.ceil(low * 1e4) / 1e4, math.ceil(high * 1e4) / 1e4


def with_bpw(plan: Plan, bpw: float) -> Plan:
    """The plan under a budget of bits per weight, in place of its own."""
    own = plan.recipe.budget or Budget()
    budget = replace(own, bpw=bpw, size=None, minimize=None)
    return replace(plan, recipe=replace(plan.recipe, budget=budget))


def narrowest(plan: Plan, choice: CodingChoice) -> Plan:
    """The plan with every open width at its narrowest."""
    units = make_units(plan, choice)
    return close(plan, units, [unit.narrowest for unit in units])


def close(plan: Plan, units: Sequence[Unit], chosen: Sequence[int], why: str = "", costs: Costs | None = None) -> Plan:
    """The plan with the chosen widths, the reason for each behind its rule's, and what it alone costs if measured."""
    closed = {}
    for unit, bits in zip(units, chosen, strict=True):
        words = f"; {bits} bits: {why}{_slope_words(unit, bits)}" if why else ""
        for decision in unit.decisions:
            name, config = decision.tensor.name, decision.widths.at(bits)
            cost = costs.of[name][bits] if costs and costs.measured else None
            closed[name] = replace(decision, config=config, reason=decision.reason + words, sensitivity=cost)
    return replace(plan, decisions=tuple(closed.get(d.tensor.name, d) for d in plan.decisions))


def _slope_words(unit: Unit, bits: int) -> str:
    """The cost a KB that the last step to a width saved and that the next would; and whether others share the width."""
    widths = list(unit.size_bytes)
    place = widths.index(bits)
    words = ""
    if place:
        words += f", last bit saved {1000 * slope(unit, widths[place - 1], bits):.1e} a KB"
    if place + 1 < len(widths):
        words += f", next would {1000 * slope(unit, bits, widths[place + 1]):.1e}"
    return words + (f"; equal in {len(unit.decisions)} linked tensors" if len(unit.decisions) > 1 else "")


def _linked(decisions: Sequence[Decision]) -> list[list[Decision]]:
    """The decisions in groups that get one width, in the order of their first: links, and the parts of a stack."""
    by_name = {decision.tensor.name: decision for decision in decisions}
    stacks: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.stack is not None:
            stacks.setdefault(decision.stack, []).append(decision)
    group_of: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.tensor.name in group_of:
            continue
        group: list[Decision] = []
        waiting = deque([decision])
        while waiting:
            one = waiting.popleft()
            if one.tensor.name not in group_of:
                group_of[one.tensor.name] = group
                group.append(one)
                waiting += [by_name[partner] for partner in linked_names(one.tensor.name, by_name)]
                waiting += stacks.pop(one.stack or "", ())
    return list({id(group): group for group in group_of.values()}.values())


def _size_bytes(decision: Decision, bits: int, choice: CodingChoice) -> int:
    """Bytes of a decision's codes and grids at a width; with entropy coding the most that they can be."""
    return sum(slot.n_bytes for slot in make_slots(replace(decision, config=decision.widths.at(bits)), choice))


def _taken_bytes(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice, budget: Budget) -> int:
    """The bytes that a closed plan takes of the budget: for bpw its compressed tensors, for size all its files."""
    if budget.bpw is not None:
        compressed = [d for d in plan.decisions if d.compresses]
        return sum(slot.n_bytes for d in compressed for slot in make_slots(d, choice))
    return sum(planned_files(checkpoint, plan, choice).values())


def _limit_bytes(plan: Plan, budget: Budget) -> int:
    if budget.bpw is not None:
        return math.floor(budget.bpw * coded_weights(plan) / 8)
    assert budget.size is not None
    return budget.size
