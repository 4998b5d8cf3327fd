"""Sensitivities become a view here. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompress.plan.sensitivity import LayerCosts, Sensitivity, WidthCost
from qcompress.report.glossary import FIGURES
from qcompress.report.table import Column, Table, View, column, percent
from qcompress.report.view import SHOW_ALL, SHOW_WORST
from qcompress.report.words import NOT_MEASURED, cell, count_words, number_words, size_words

KINDS = {
    "kl": "Kullback-Leibler divergence of the predictions, in nats",
    "relative-error": "relative error of the output",
}


def worst_first(found: Sensitivity) -> list[LayerCosts]:
    """The layers, those first that cost the most at their narrowest width."""
    return sorted(found.layers, key=lambda layer: (-layer.widths[0].divergence, layer.name))


def view_sensitivity(found: Sensitivity) -> View:
    """What was measured, and the table of the layers."""
    layers, notes = worst_first(found), []
    if len(layers) > SHOW_ALL:
        notes = [f"{SHOW_WORST} of {len(layers):,} tensors, the most sensitive first; all of them: --format csv"]
        layers = layers[:SHOW_WORST]
    title = f"sensitivity of {found.checkpoint}"
    return View(title, _facts(found), (cost_table(found, layers, found.bits),), tuple(notes))


def _facts(found: Sensitivity) -> tuple[tuple[str, str], ...]:
    facts = [("figures", f"{KINDS[found.divergence_kind]}, each layer quantized alone")]
    facts.append(("data", f"{count_words(found.divergence_samples, 'sample')} of data.{found.divergence_data}"))
    for metric, value in found.baseline.items():
        of = f"{number_words(value, 4)} unquantized, {count_words(found.metric_samples, 'sample')} of data.eval"
        facts.append((metric, of))
    return tuple(facts)


def cost_table(found: Sensitivity, layers: Sequence[LayerCosts], drops: Sequence[int]) -> Table:
    """Divergence of each layer at each width, bars by its logarithm, and the headline's drop at the widths `drops`."""
    costs = [[layer.by_width.get(bits) for layer in layers] for bits in found.bits]
    ends = _ends(found)
    columns = [column("name"), column("shape"), column("method"), column("bytes", "bytes at the widest")]
    cells = [[cell(FIGURES[name], getattr(layer, name)) for layer in layers] for name in ("name", "shape", "method")]
    cells.append([size_words(layer.widths[-1].bytes) for layer in layers])
    for bits, of_width in zip(found.bits, costs, strict=True):
        bars = ["" if cost is None else _log_bar(cost.divergence, ends) for cost in of_width]
        columns.append(column("divergence", f"{bits} bits", bars))
        cells.append([NOT_MEASURED if cost is None else number_words(cost.divergence) for cost in of_width])
    for bits in drops if found.metric else ():
        columns.append(Column(f"drop at {bits}", spare=1 if bits > found.bits[0] else 3, term="drop"))
        cells.append([_drop_words(found, layer.by_width.get(bits)) for layer in layers])
    return Table(tuple(columns), tuple(zip(*cells, strict=True)))


def _drop_words(found: Sensitivity, cost: WidthCost | None) -> str:
    return NOT_MEASURED if cost is None else number_words(found.drop(cost))


def _ends(found: Sensitivity) -> tuple[float, float]:
    """The least and the largest divergence above nothing, whose bars are the shortest and the longest."""
    positive = [cost.divergence for layer in found.layers for cost in layer.widths if cost.divergence > 0]
    return (min(positive), max(positive)) if positive else (1.0, 1.0)


def _log_bar(value: float, ends: tuple[float, float]) -> str:
    """A bar by the logarithm: what a width costs falls by the same factor with each bit."""
    low, high = ends
    if value <= 0 or high <= low:
        return percent(0.0 if value <= 0 else 1.0)
    return percent(math.log(value / low) / math.log(high / low))
