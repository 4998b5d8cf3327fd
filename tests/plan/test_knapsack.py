"""Widths within a budget: against every combination, against the hull's bound, and never beyond the budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.plan import knapsack
from qcompress.plan.knapsack import Curve, choose, hull_steps, raised, sum_bytes


def cost_of(units: Sequence[Curve], chosen: Sequence[int]) -> float:
    return sum(unit.cost[bits] for unit, bits in zip(units, chosen, strict=True))


def best_by_trying(units: Sequence[Curve], most: int) -> float:
    combinations = itertools.product(*(unit.size_bytes for unit in units))
    return min(cost_of(units, chosen) for chosen in combinations if sum_bytes(units, chosen) <= most)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Bytes that grow with the width; costs of any kind, now and then not even falling."""
    widths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True).map(sorted))
    sizes = list(itertools.accumulate(draw(st.integers(1, 300)) for _ in widths))
    costs = [draw(st.floats(0, 100)) for _ in widths]
    return Curve(dict(zip(widths, sizes, strict=True)), dict(zip(widths, costs, strict=True)))


@given(st.lists(curves(), min_size=1, max_size=5), st.integers(0, 2000))
@settings(max_examples=150)
def test_few_units_get_the_least_cost_of_all(units: list[Curve], spare: int) -> None:
    most = sum_bytes(units, [unit.narrowest for unit in units]) + spare
    chosen = choose(units, most)
    assert sum_bytes(units, chosen) <= most
    # With fewer spare bytes than buckets nothing is rounded.
    assert cost_of(units, chosen) == pytest.approx(best_by_trying(units, most))


def falling(sizes: Sequence[int], scale: float) -> Curve:
    """A tensor whose cost falls to a quarter with each bit."""
    weights = sizes[0]
    return Curve({bits: bits * weights for bits in range(1, 9)}, {bits: scale / 4**bits for bits in range(1, 9)})


@given(
    st.lists(st.tuples(st.integers(1, 100_000), st.floats(1e-3, 1e3)), min_size=1, max_size=40),
    st.floats(0.0, 1.0),
    st.booleans(),
)
@settings(max_examples=60)
def test_budgets_hold_and_the_hull_bounds_the_cost(
    tensors: list[tuple[int, float]], share: float, by_table: bool
) -> None:
    units = [falling([size], scale) for size, scale in tensors]
    narrow = sum_bytes(units, [1] * len(units))
    most = narrow + int(share * 7 * narrow)
    limit = knapsack.MOST_BY_TABLE
    try:
        knapsack.MOST_BY_TABLE = limit if by_table else 0
        chosen = choose(units, most)
    finally:
        knapsack.MOST_BY_TABLE = limit
    assert sum_bytes(units, chosen) <= most
    left = most - sum_bytes(units, chosen)
    for unit, bits in zip(units, chosen, strict=True):
        assert bits == 8 or unit.size_bytes[bits + 1] - unit.size_bytes[bits] > left
    # Fractions of steps allowed, the hulls give the least cost of all: no choice is below it, and this one at most
    # one step above.
    relaxed, last = relaxed_cost(units, most - narrow)
    assert relaxed * (1 - 1e-9) <= cost_of(units, chosen) <= (relaxed + last) * (1 + 1e-9) + 1e-12


def relaxed_cost(units: Sequence[Curve], spare: int) -> tuple[float, float]:
    """The cost along the hulls where the last step may be taken in part, and what that step saves in all."""
    cost = sum(unit.cost[unit.narrowest] for unit in units)
    steps = []
    for unit in units:
        widths = [unit.narrowest, *(bits for bits, _ in hull_steps(unit))]
        for before, after in itertools.pairwise(widths):
            grown = unit.size_bytes[after] - unit.size_bytes[before]
            steps.append((unit.cost[before] - unit.cost[after], grown))
    for saved, grown in sorted(steps, key=lambda step: -step[0] / step[1]):
        if grown > spare:
            return cost - saved * spare / grown, saved
        cost, spare = cost - saved, spare - grown
    return cost, 0.0


@given(curves())
def test_slopes_of_a_hull_fall_and_stay_above_zero(curve: Curve) -> None:
    slopes = [slope for _, slope in hull_steps(curve)]
    assert all(slope > 0 for slope in slopes)
    assert slopes == sorted(slopes, reverse=True)


def test_no_room_leaves_the_narrowest() -> None:
    units = [falling([10], 1.0), falling([20], 5.0)]
    assert choose(units, 0) == [1, 1]
    assert choose(units, 30) == [1, 1]
    assert choose(units, 10**9) == [8, 8]


def test_a_wider_width_that_costs_more_is_not_taken() -> None:
    unit = Curve({2: 10, 3: 15, 4: 20}, {2: 1.0, 3: 0.1, 4: 0.4})
    assert choose([unit], 1000) == [3]


def test_tensors_of_the_same_kind_get_about_the_same_slope() -> None:
    """The smaller a tensor of equal cost, the wider: a quarter of the weights is worth one bit more."""
    units = [falling([size], 1.0) for size in (64_000, 16_000, 4_000, 1_000)]
    chosen = choose(units, 2 * 64_000 + 3 * 16_000 + 4 * 4_000 + 5 * 1_000)
    assert chosen == [2, 3, 4, 5]
    assert math.isclose(cost_of(units, chosen), sum(1.0 / 4**bits for bits in (2, 3, 4, 5)))


def step(size: int, saved: float) -> Curve:
    return Curve({1: 1, 2: 1 + size}, {1: saved, 2: 0.0})


def test_the_steepest_step_is_left_where_two_others_are_worth_more() -> None:
    assert choose([step(6, 7.0), step(5, 5.0), step(5, 5.0)], 3 + 10) == [1, 2, 2]


def test_bytes_rounded_to_parts_of_the_budget_are_rounded_up() -> None:
    """Steps of 500.5 parts: rounded down, one more of them would seem to fit."""
    spare = 2 * knapsack.BUCKETS + 2
    units = [step(1001, 1.0)] * 200
    assert choose(units, 200 + spare).count(2) == spare // 1001


@given(st.lists(curves(), min_size=1, max_size=5), st.integers(0, 600), st.integers(0, 100))
@settings(max_examples=100)
def test_what_is_left_is_spent_on_the_smallest_steps(units: list[Curve], left: int, enough: int) -> None:
    """Whatever the costs say: it ends with little left, or where not even the smallest step fits."""
    narrow = [unit.narrowest for unit in units]
    found = raised(units, narrow, left, enough)
    spent = sum_bytes(units, found) - sum_bytes(units, narrow)
    steps = [
        min(size for width, size in unit.size_bytes.items() if width > bits) - unit.size_bytes[bits]
        for unit, bits in zip(units, found, strict=True)
        if bits < max(unit.size_bytes) and any(unit.cost.values())
    ]
    assert 0 <= spent <= left
    assert left - spent <= enough or not steps or min(steps) > left - spent


def test_what_costs_nothing_at_any_width_is_not_raised() -> None:
    constant = Curve({1: 1, 2: 2}, {1: 0.0, 2: 0.0})
    assert raised([constant, step(1, 1.0)], [1, 1], left=10, enough=0) == [1, 2]
