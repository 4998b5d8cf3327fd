"""Figures become the coordinates of inline SVG here. Imports no torch and no numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from qcompress.report.compare import WORST, TradeOff
from qcompress.report.document import BINS, LayerFigures
from qcompress.report.glossary import FIGURES
from qcompress.report.words import number_words, size_words

BEFORE, STRIP, AFTER = 32, 5, 27
"""Heights in a histogram: the weights stand on a strip with the grid's levels, the decoded values hang below it."""


@dataclass(frozen=True)
class Histogram:
    """SVG paths in a box of BINS by BEFORE + STRIP + AFTER; "" where there is nothing to draw.

    Areas follow the square root of the counts, each histogram by its own highest bin, and no bin that holds anything
    vanishes: a few outliers would else not be seen.
    """

    before: str
    after: str
    outliers: str
    levels: str


def histogram(figures: LayerFigures) -> Histogram | None:
    """The histograms of one tensor, its outlier zones and its grid's levels; None where they were not measured."""
    if figures.histogram_before is None or figures.histogram_after is None or figures.range is None:
        return None
    low, high = figures.range
    outliers = levels = ""
    if high > low:

        def place(value: float) -> float:
            return (value - low) / (high - low) * BINS

        if figures.fences is not None:
            outliers = _zones(place(figures.fences[0]), place(figures.fences[1]))
        seen = (place(level) for level in figures.levels or ())
        levels = "".join(f"M{_short(x)} {BEFORE}v{STRIP}" for x in seen if 0 <= x <= BINS)
    return Histogram(
        before=_area(_heights(figures.histogram_before, BEFORE), BEFORE, -1),
        after=_area(_heights(figures.histogram_after, AFTER), BEFORE + STRIP, 1),
        outliers=outliers,
        levels=levels,
    )


def _heights(counts: Sequence[int], height: int) -> list[int]:
    most = max(counts)
    return [max(1, round(height * math.sqrt(count / most))) if count else 0 for count in counts]


def _area(heights: Sequence[int], base: int, direction: int) -> str:
    """Columns of width 1 on the line y = base, equal neighbours drawn as one."""
    runs = "".join(f"V{base + direction * height}h{len(list(run))}" for height, run in groupby(heights))
    return f"M0 {base}{runs}V{base}z"


def _zones(low: float, high: float) -> str:
    """What lies left of `low` and right of `high`, over the whole height."""
    total = BEFORE + STRIP + AFTER
    left = f"M0 0H{_short(min(low, BINS))}V{total}H0z" if low > 0 else ""
    return left + (f"M{BINS} 0H{_short(max(high, 0))}V{total}H{BINS}z" if high < BINS else "")


def _short(value: float) -> str:
    """A coordinate to a tenth: 3, 3.5, -0.1."""
    return f"{round(value, 1) + 0.0:g}"


WIDTHS_HEIGHT = 100


@dataclass(frozen=True)
class Widths:
    """SVG paths in a box of one column a tensor by WIDTHS_HEIGHT, which stands for `most` bits."""

    columns: int
    most: int
    widths: str
    entropies: str


def widths(layers: Sequence[tuple[int, float]]) -> Widths | None:
    """The width of each tensor's codes, and their entropy below it; None without any.

    layers  (bits, entropy in bits a code) in the order in which they are drawn
    """
    if not layers:
        return None
    most = max(1, *(bits for bits, _ in layers))
    scale = WIDTHS_HEIGHT / most
    return Widths(
        columns=len(layers),
        most=most,
        widths=_area([round(bits * scale) for bits, _ in layers], WIDTHS_HEIGHT, -1),
        entropies=_area([round(min(max(entropy, 0.0), bits) * scale) for bits, entropy in layers], WIDTHS_HEIGHT, -1),
    )


SCATTER = (480, 320)
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 20, 40
MARGIN = 0.08
"""Room between the outermost points and the edge, as a share of their distance."""


@dataclass(frozen=True)
class Tick:
    """A line across the chart, and where its text stands."""

    line: str
    x: str
    y: str
    text: str


@dataclass(frozen=True)
class Dot:
    """One artifact; `low` and `high` are the ends of its interval, "" where it has none."""

    x: str
    y: str
    low: str
    high: str
    label: str
    text: str
    pareto_front: bool
    leftwards: bool


@dataclass(frozen=True)
class Scatter:
    """Size to the right and quality upwards, whichever direction of the metric is better, in a box of SCATTER."""

    title: str
    higher_is_better: bool
    dots: tuple[Dot, ...]
    front: str
    sizes: tuple[Tick, ...]
    values: tuple[Tick, ...]


def scatter(trade_off: TradeOff, names: dict[str, str]) -> Scatter:
    """The chart of a trade-off; `names` are the artifacts by their labels."""
    points = trade_off.points
    bytes_range = _padded([point.artifact_bytes for point in points])
    ends = [end for point in points for end in point.interval or ()]
    value_range = _padded([*(point.value for point in points), *ends])
    right, bottom = SCATTER[0] - RIGHT, SCATTER[1] - BOTTOM
    x = _scale(bytes_range, LEFT, right)
    y = _scale(value_range, *((bottom, TOP) if trade_off.higher_is_better else (TOP, bottom)))
    dots = tuple(
        Dot(
            x=_short(x(point.artifact_bytes)),
            y=_short(y(point.value)),
            low=_short(y(point.interval[0])) if point.interval else "",
            high=_short(y(point.interval[1])) if point.interval else "",
            label=point.label,
            text=f"{point.label} {names[point.label]}: {size_words(point.artifact_bytes)}, "
            f"{number_words(point.value, 4)}",
            pareto_front=point.pareto_front,
            leftwards=x(point.artifact_bytes) > right - 2 * RIGHT,
        )
        for point in points
    )
    return Scatter(
        title=FIGURES[WORST].title if trade_off.metric == WORST else trade_off.metric,
        higher_is_better=trade_off.higher_is_better,
        dots=dots,
        front=_stairs([(x(point.artifact_bytes), y(point.value)) for point in trade_off.front]),
        sizes=tuple(_size_tick(_short(x(tick)), tick) for tick in nice_ticks(*bytes_range, 4)),
        values=tuple(_value_tick(_short(y(tick)), tick) for tick in nice_ticks(*value_range, 6)),
    )


def _size_tick(x: str, n_bytes: float) -> Tick:
    bottom = SCATTER[1] - BOTTOM
    return Tick(f"M{x} {TOP}V{bottom}", x, str(bottom + BOTTOM // 2), size_words(round(n_bytes)))


def _value_tick(y: str, value: float) -> Tick:
    return Tick(f"M{LEFT} {y}H{SCATTER[0] - RIGHT}", str(LEFT - 6), y, number_words(value, 4))


def _stairs(points: Sequence[tuple[float, float]]) -> str:
    """From the smallest artifact on: up to the size of the next, the best that can be had is the one before."""
    (first_x, first_y), *rest = points
    return f"M{_short(first_x)} {_short(first_y)}" + "".join(f"H{_short(x)}V{_short(y)}" for x, y in rest)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = MARGIN * (high - low) or 0.05 * abs(high) or 1.0
    return (low - room, high + room)


def _scale(values: tuple[float, float], start: float, end: float) -> Callable[[float], float]:
    low, high = values
    return lambda value: start + (value - low) / (high - low) * (end - start)


def nice_ticks(low: float, high: float, steps: int) -> list[float]:
    """Round numbers within [low, high], 1, 2, 2.5 or 5 times a power of ten apart, so that at most `steps` fit in."""
    rough = (high - low) / steps
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its path, how strongly it is drawn (0 to 1), and its name at its right end."""

    path: str
    opacity: str
    text: str
    x: str
    y: str


@dataclass(frozen=True)
class Curves:
    """Lines over a row of layers in the box SCATTER, on a logarithmic axis."""

    curves: tuple[Curve, ...]
    ticks: tuple[Tick, ...]


def curves(lines: Sequence[tuple[str, Sequence[float | None]]]) -> Curves | None:
    """A curve for each (name, value at each place or None); None where there is nothing above 0 to draw.

    The first is drawn strongest. Values of 0 lie on the axis, and a place without a value is passed over.
    """
    positive = [value for _, values in lines for value in values if value is not None and value > 0]
    if not positive:
        return None
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    right, bottom = SCATTER[0] - 2 * RIGHT, SCATTER[1] - BOTTOM
    y = _scale((low, high), bottom, TOP)
    most = max(1, *(len(values) - 1 for _, values in lines))

    def place(index: int, value: float) -> tuple[str, str]:
        exponent = math.log10(value) if value > 0 else low
        return _short(LEFT + index / most * (right - LEFT)), _short(y(exponent))

    drawn = []
    for index, (text, values) in enumerate(lines):
        points = [place(at, value) for at, value in enumerate(values) if value is not None]
        if points:
            path = "M" + "L".join(f"{x} {height}" for x, height in points)
            drawn.append(Curve(path, f"{1 - 0.75 * index / max(1, len(lines) - 1):.2f}", text, *points[-1]))
    step = max(1, (high - low) // 6)
    ticks = tuple(_value_tick(_short(y(exponent)), 10.0**exponent) for exponent in range(low, high + 1, step))
    return Curves(tuple(drawn), ticks)
