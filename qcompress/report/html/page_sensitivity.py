"""Sensitivities become a page here: a curve for each width over the layers, and the table. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qcompress.plan.sensitivity import LayerCosts, Sensitivity
from qcompress.report.html.charts import Curves, curves
from qcompress.report.html.parts import Cell, Figure, Grid, Head, Row, percent, terms_of
from qcompress.report.view import (
    name_words,
    number_words,
    shape_words,
    size_words,
)
from qcompress.report.view_sensitivity import divergence_words, drop_words, worst_first


@dataclass(frozen=True)
class SensitivityPage:
    """A page of its own: what was measured, a curve for each width over the layers, and the table."""

    title: str
    cards: tuple[Figure, ...]
    chart: Curves | None
    layers: Grid
    words: tuple[Figure, ...]


def sensitivity_page(found: Sensitivity) -> SensitivityPage:
    heads = (
        Head("name", right=False),
        Head("shape", right=False, spare=True),
        Head("bytes", "bytes at the widest", spare=True),
        *(Head("divergence", f"{bits} bits") for bits in found.bits),
        *((Head("drop", f"drop at {found.bits[0]}"),) if found.metric else ()),
    )
    cards = (
        Figure("layers", f"{len(found.layers):,}"),
        Figure(
            "divergence_kind",
            found.divergence_kind,
            notes=(Figure("divergence_samples", f"{found.divergence_samples:,}"),),
        ),
        *(
            Figure(
                "baseline",
                number_words(value, 4),
                name_words(metric),
                (Figure("metric_samples", f"{found.metric_samples:,}"),),
            )
            for metric, value in found.baseline.items()
        ),
    )
    return SensitivityPage(
        title=f"Sensitivity of {name_words(found.checkpoint)}",
        cards=cards,
        chart=curves([(f"{bits} bits", _line(found, bits)) for bits in found.bits]),
        layers=Grid(heads, tuple(_row(found, layer, _scale(found)) for layer in worst_first(found))),
        words=terms_of(cards, heads),
    )


def _line(found: Sensitivity, bits: int) -> Sequence[float | None]:
    costs = (layer.by_width.get(bits) for layer in found.layers)
    return [None if cost is None else cost.divergence for cost in costs]


def _scale(found: Sensitivity) -> tuple[float, float]:
    """The least and the largest divergence above nothing, whose bars are the shortest and the longest."""
    positive = [cost.divergence for layer in found.layers for cost in layer.widths if cost.divergence > 0]
    return (min(positive), max(positive)) if positive else (1.0, 1.0)


def _row(found: Sensitivity, layer: LayerCosts, scale: tuple[float, float]) -> Row:
    known, last = layer.by_width, layer.widths[-1]
    cells = [Cell(name_words(layer.name)), Cell(shape_words(layer.shape)), Cell(size_words(last.bytes))]
    for bits in found.bits:
        cost = known.get(bits)
        cells.append(Cell(divergence_words(cost), "" if cost is None else _log_bar(cost.divergence, scale)))
    if found.metric:
        cells.append(Cell(drop_words(found, known.get(found.bits[0]))))
    return Row(tuple(cells))


def _log_bar(value: float, scale: tuple[float, float]) -> str:
    """A bar by the logarithm: what a width costs falls by the same factor with each bit."""
    low, high = scale
    if value <= 0 or high <= low:
        return percent(0.0 if value <= 0 else 1.0)
    return percent(math.log(value / low) / math.log(high / low))
