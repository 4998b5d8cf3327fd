"""The search: it ends, stays where it may, comes to the bound from either side, and is not led astray by jumps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompress.budget.search import AIM, ATTEMPTS, FARTHEST, FULL, STEEPEST, TOLERANCE, Search, Seen

LOW, HIGH = math.log(0.01), math.log(32)
NARROW = math.log1p(TOLERANCE)


def filling(start: float) -> Search:
    """As a size is filled from the rate `start` on."""
    return Search(math.log(start), LOW, HIGH, aim=math.log(AIM), enough=math.log(FULL), tolerance=-math.log(AIM))


def held(seen: Sequence[Seen]) -> Seen | None:
    return max((one for one in seen if one.holds), default=None)


def bracket(seen: Sequence[Seen]) -> float:
    """From the largest knob that holds to the smallest that does not."""
    return min(one.knob for one in seen if not one.holds) - max(one.knob for one in seen if one.holds)


POWERS = st.floats(0.4, 2.0)
ROOTS = st.floats(0.1, 8.0)
STARTS = st.floats(0.1, 8.0)


@given(STARTS, ROOTS, POWERS)
def test_a_law_of_powers_is_filled_in_a_few_looks(start: float, root: float, power: float) -> None:
    seen = filling(start).run(lambda knob: power * (knob - math.log(root)))
    found = held(seen)
    assert found is not None
    assert FULL <= math.exp(found.excess) <= 1
    far = abs(math.log(start / root)) / math.log(FARTHEST)
    assert len(seen) <= 3 + math.ceil(far)
    assert seen[-1] == found


@given(STARTS, ROOTS, st.floats(0.0, 0.5), st.floats(0.5, 1.0))
def test_what_does_not_shrink_with_the_rate_is_made_up_for(
    start: float, root: float, floor: float, power: float
) -> None:
    """A part of the bytes is the same at any rate, as side information is."""
    seen = filling(start).run(lambda knob: math.log(floor + (1 - floor) * math.exp(power * (knob - math.log(root)))))
    found = held(seen)
    assert found is not None
    assert FULL <= math.exp(found.excess) <= 1
    assert len(seen) <= 8


@given(ROOTS, st.floats(0.001, 0.02))
def test_a_jump_across_the_bound_leaves_the_best_beneath_it(root: float, jump: float) -> None:
    """Bits that jump where tables change: no rate fills more than what lies beneath the jump."""

    def look(knob: float) -> float:
        excess = knob - math.log(root)
        return excess + (jump if excess > -jump / 2 else 0.0)

    seen = filling(root).run(look)
    found = held(seen)
    assert found is not None
    assert found.excess >= min(math.log(FULL), -jump / 2 - 2 * NARROW)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_where_all_is_on_one_side_the_search_ends_at_the_end_of_the_way(sign: float) -> None:
    search = Search(0.0, LOW, HIGH)
    seen = search.run(lambda _: sign)
    assert seen[-1].knob == (HIGH if sign < 0 else LOW)
    assert len(seen) < ATTEMPTS


@given(st.floats(LOW, HIGH), st.floats(LOW, HIGH))
def test_where_signs_alone_are_known_two_looks_halve_what_is_left(start: float, root: float) -> None:
    """What is known of a gate may be no more than whether it holds."""
    seen = Search(start, LOW, HIGH).run(lambda knob: 1.0 if knob > root else -1.0)
    first = next((index for index, one in enumerate(seen) if one.holds != seen[0].holds), None)
    if first is None:
        assert seen[-1].knob in (LOW, HIGH)
        return
    widths = [bracket(seen[: count + 1]) for count in range(first, len(seen))]
    assert widths[0] <= math.log(FARTHEST) + 1e-9
    assert all(after <= 0.5 * before for before, after in zip(widths, widths[2:], strict=False))
    assert widths[-1] <= NARROW or len(seen) == ATTEMPTS


@given(STARTS, ROOTS, st.floats(0.3, 3.0), st.floats(-0.3, 0.3))
def test_smooth_gates_are_enclosed_with_fewer_looks_than_by_halves(
    start: float, root: float, slope: float, bend: float
) -> None:
    """The usual slope is wrong by up to threefold, and the curve bent."""

    def look(knob: float) -> float:
        off = knob - math.log(root)
        return slope * off * (1 + bend * math.tanh(off))

    seen = Search(math.log(start), LOW, HIGH).run(look)
    far = abs(math.log(start / root)) / math.log(FARTHEST)
    assert bracket(seen) <= NARROW + 1e-9
    assert len(seen) <= 7 + math.ceil(far)


def noisy(shifts: Sequence[float], root: float) -> Callable[[float], float]:
    """Excesses that come with errors, as accuracies of few samples do."""
    looks = iter(shifts)
    return lambda knob: knob - root + next(looks)


@given(
    st.lists(st.floats(-1.5, 1.5), min_size=ATTEMPTS, max_size=ATTEMPTS),
    st.floats(LOW, HIGH),
    st.floats(LOW - 1, HIGH + 1),
)
def test_noise_never_leads_beyond_the_limits_or_to_the_same_place_twice(
    shifts: list[float], start: float, root: float
) -> None:
    seen = Search(start, LOW, HIGH).run(noisy(shifts, root))
    knobs = [one.knob for one in seen]
    assert len(set(knobs)) == len(knobs) <= ATTEMPTS
    assert all(LOW <= knob <= HIGH for knob in knobs)


def test_a_later_look_counts_more_than_one_that_it_contradicts() -> None:
    """More bits that took less: the first look is left out, and the way goes on from the second."""
    search = filling(1.0)
    assert search.next([Seen(0.0, 0.1), Seen(0.2, -0.1)]) == pytest.approx(0.2 + math.log(AIM) + 0.1)
    # Between two that rise, false position; the line goes through the aim, not through the bound.
    found = search.next([Seen(0.0, -0.1), Seen(0.2, 0.1)])
    assert found == pytest.approx(0.1 + math.log(AIM))


def test_an_end_that_stays_counts_half() -> None:
    """The Illinois variant: 0.2 held twice, so that what is over counts half."""
    seen = [Seen(1.0, 0.6), Seen(0.0, -0.2), Seen(0.2, -0.1)]
    assert Search(0.0, LOW, HIGH).next(seen) == pytest.approx(0.2 + 0.8 * 0.1 / (0.1 + 0.6 / 2))


def test_the_way_along_a_line_is_bounded() -> None:
    search = Search(0.0, LOW, HIGH, slope=1.0)
    assert search.next([Seen(0.0, -1e9)]) == pytest.approx(math.log(FARTHEST))
    assert search.next([Seen(0.0, -1.0), Seen(0.1, -0.9999)]) == pytest.approx(0.1 + math.log(FARTHEST))
    assert search.next([Seen(0.0, -1.0), Seen(0.001, -0.1)]) == pytest.approx(0.001 + 0.1 / STEEPEST)
