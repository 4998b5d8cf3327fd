"""SVG coordinates mean what the figures say: columns, zones and ticks lie where the values are."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qcompress.report.compare import TradeOff, TradePoint
from qcompress.report.document import BINS, LayerFigures
from qcompress.report.html.charts import (
    AFTER,
    BEFORE,
    BOTTOM,
    LEFT,
    RIGHT,
    SCATTER,
    STRIP,
    TOP,
    histogram,
    nice_ticks,
    scatter,
    widths,
)

counts_of_bins = st.lists(st.integers(0, 10**6), min_size=BINS, max_size=BINS).filter(any)
HEIGHT = BEFORE + STRIP + AFTER


def columns_of(path: str) -> tuple[float, list[float]]:
    """The base line of an area of columns of width 1, and the y of each column."""
    base, runs = re.fullmatch(r"M0 (\d+)((?:V-?\d+h\d+)*)V\1z", path).groups()  # type: ignore[union-attr]
    columns = [float(y) for y, count in re.findall(r"V(-?\d+)h(\d+)", runs) for _ in range(int(count))]
    return float(base), columns


def figures(before: list[int], after: list[int], **more: object) -> LayerFigures:
    return LayerFigures(
        histogram_before=tuple(before),
        histogram_after=tuple(after),
        **{"range": (-2.0, 6.0), **more},  # type: ignore[arg-type]
    )


@given(counts_of_bins, counts_of_bins)
def test_a_column_for_each_bin_taller_for_more_and_seen_wherever_there_is_any(
    before: list[int], after: list[int]
) -> None:
    drawn = histogram(figures(before, after))
    assert drawn is not None
    for counts, path, line, edge, sign in (
        (before, drawn.before, BEFORE, 0, -1),
        (after, drawn.after, BEFORE + STRIP, HEIGHT, 1),
    ):
        base, columns = columns_of(path)
        assert base == line
        assert len(columns) == BINS
        heights = [sign * (y - base) for y in columns]
        assert [height > 0 for height in heights] == [count > 0 for count in counts]
        assert base + sign * heights[counts.index(max(counts))] == edge
        assert max(heights) <= abs(edge - line)
        ranked = sorted(zip(counts, heights, strict=True))
        assert [height for _, height in ranked] == sorted(heights)
        # The area goes by the square root, so that the few are seen beside the many.
        for count, height in zip(counts, heights, strict=True):
            if height > 1:
                assert height == pytest.approx(abs(edge - line) * math.sqrt(count / max(counts)), abs=0.501)


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_the_outlier_zones_cover_what_lies_beyond_the_fences(low: float, high: float) -> None:
    assume(low <= high)
    drawn = histogram(figures([1] * BINS, [1] * BINS, fences=(low, high)))
    assert drawn is not None
    spans = []
    for start, end in re.findall(rf"M(\d+) 0H([\d.]+)V{HEIGHT}H\1z", drawn.outliers):
        spans.append(sorted((float(start), float(end))))
    assert "".join(re.findall(rf"M\d+ 0H[\d.]+V{HEIGHT}H\d+z", drawn.outliers)) == drawn.outliers
    for value in (-1.95, -1, 0.3, 2, 5.95):
        place = (value + 2) / 8 * BINS
        near = min(abs(value - low), abs(value - high)) < 0.01
        assert near or any(a <= place <= b for a, b in spans) == (value < low or value > high)


@given(st.lists(st.floats(-4, 8), max_size=16))
def test_a_tick_for_each_level_within_the_range(levels: list[float]) -> None:
    drawn = histogram(figures([1] * BINS, [1] * BINS, levels=tuple(levels)))
    assert drawn is not None
    ticks = [float(x) for x in re.findall(rf"M([\d.]+) {BEFORE}v{STRIP}", drawn.levels)]
    inside = [(level + 2) / 8 * BINS for level in levels if -2 <= level <= 6]
    assert ticks == pytest.approx(inside, abs=0.0501)


def test_a_constant_tensor_has_columns_but_neither_zones_nor_ticks() -> None:
    one_bin = [0] * (BINS - 1) + [5]
    drawn = histogram(figures(one_bin, one_bin, range=(3.0, 3.0), fences=(3.0, 3.0), levels=(3.0, 4.0)))
    assert drawn is not None
    assert (drawn.outliers, drawn.levels) == ("", "")
    assert histogram(LayerFigures(relative_error=0.1)) is None


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=50))
def test_the_entropy_stays_within_the_width(shares: list[tuple[int, float]]) -> None:
    layers = [(bits, bits * share) for bits, share in shares]
    drawn = widths(layers)
    assert drawn is not None
    assert (drawn.columns, drawn.most) == (len(layers), max(bits for bits, _ in layers))
    base, outer = columns_of(drawn.widths)
    _, inner = columns_of(drawn.entropies)
    for (bits, entropy), top, below in zip(layers, outer, inner, strict=True):
        assert base - top == pytest.approx(base * bits / drawn.most, abs=0.501)
        assert base - below == pytest.approx(base * entropy / drawn.most, abs=0.501)
    assert widths([]) is None


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_evenly_apart_and_inside(low: float, length: float, steps: int) -> None:
    high = low + length
    assume(high - low > 1e-9 * max(abs(low), abs(high)))
    ticks = nice_ticks(low, high, steps)
    assert 1 <= len(ticks) <= steps + 1
    room = 1e-6 * (high - low)
    assert all(low - room <= tick <= high + room for tick in ticks)
    gaps = [b - a for a, b in pairwise(ticks)]
    if gaps:
        step = gaps[0]
        assert gaps == pytest.approx([step] * len(gaps), rel=1e-5)
        leading = float(f"{step:.3e}".split("e")[0])
        assert leading in (1.0, 2.0, 2.5, 5.0)
        # One more step would not fit on either side.
        assert ticks[0] - step < low + room
        assert ticks[-1] + step > high - room


def trade_off(points: list[tuple[int, float]], higher: bool, front: set[int]) -> TradeOff:
    return TradeOff(
        metric="top1",
        higher_is_better=higher,
        points=tuple(
            TradePoint(
                label=str(i), artifact_bytes=size, value=value, interval=(value - 1, value + 2), pareto_front=i in front
            )
            for i, (size, value) in enumerate(points)
        ),
    )


@pytest.mark.parametrize("higher", [True, False])
@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 100)), min_size=1, max_size=8))
def test_right_is_larger_and_up_is_better(higher: bool, points: list[tuple[int, float]]) -> None:
    drawn = scatter(trade_off(points, higher, {0}), {str(i): "name" for i in range(len(points))})
    x, y = [float(dot.x) for dot in drawn.dots], [float(dot.y) for dot in drawn.dots]
    for dot in drawn.dots:
        assert LEFT <= float(dot.x) <= SCATTER[0] - RIGHT
        assert all(TOP <= float(end) <= SCATTER[1] - BOTTOM for end in (dot.y, dot.low, dot.high))
        assert (float(dot.low) - float(dot.y)) * (float(dot.high) - float(dot.y)) <= 0
    for i, (size, value) in enumerate(points):
        for j, (other_size, other_value) in enumerate(points):
            assert size <= other_size or x[i] >= x[j]
            assert value <= other_value or (y[i] <= y[j] if higher else y[i] >= y[j])
    assert drawn.front == f"M{drawn.dots[0].x} {drawn.dots[0].y}"


def test_the_front_is_a_staircase_from_the_smallest_on() -> None:
    drawn = scatter(trade_off([(300, 3.0), (100, 1.0), (200, 2.0)], True, {0, 1, 2}), dict.fromkeys("012", "n"))
    c, a, b = drawn.dots
    assert drawn.front == f"M{a.x} {a.y}H{b.x}V{b.y}H{c.x}V{c.y}"
