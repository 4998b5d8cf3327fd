"""What a person is shown of sensitivities, as text in cells, as CSV, and on a page. Imports no torch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from qcompress.report.charts import Curves, curves
from qcompress.report.page_nouns import Cell, Figure, Grid, Head, Row, percent, terms_of
from qcompress.report.sensitivity import LayerCosts, Sensitivity, WidthCost
from qcompress.report.view import SHOW_ALL, SHOW_WORST, Column, Table, View
from qcompress.report.words import NOT_MEASURED, count_words, name_words, number_words, shape_words, size_words

KINDS = {
    "kl": "Kullback-Leibler divergence of the predictions, in nats",
    "relative-error": "relative error of the output",
}

CSV_COLUMNS = ("name", "shape", "method", "grid", "bits", "bytes", "relative_error", "divergence", "drop")


def worst_first(found: Sensitivity) -> list[LayerCosts]:
    """The layers, those first that cost the most at their narrowest width."""
    return sorted(found.layers, key=lambda layer: (-layer.widths[0].divergence, layer.name))


def view_sensitivity(found: Sensitivity) -> View:
    """The table: divergence of each layer at each width, and the headline's drop at the narrowest."""
    layers, notes = worst_first(found), []
    if len(layers) > SHOW_ALL:
        notes = [f"{SHOW_WORST} of {len(layers):,} tensors, the most sensitive first; all of them: --format csv"]
        layers = layers[:SHOW_WORST]
    columns = [
        Column("layer", right=False),
        Column("shape", right=False, spare=2),
        Column("method", right=False, spare=4),
        *(Column(f"{bits} bits") for bits in found.bits),
    ]
    drops = found.bits if found.metric else ()
    columns += [Column(f"drop at {bits}", spare=1 if bits > found.bits[0] else 3) for bits in drops]
    rows = []
    for layer in layers:
        cells = [name_words(layer.name), shape_words(layer.shape), name_words(layer.method)]
        cells += [_divergence(layer.by_width.get(bits)) for bits in found.bits]
        cells += [_drop(found, layer.by_width.get(bits)) for bits in drops]
        rows.append(tuple(cells))
    return View(
        f"sensitivity of {name_words(found.checkpoint)}",
        _facts(found),
        (Table(tuple(columns), tuple(rows)),),
        tuple(notes),
    )


def _facts(found: Sensitivity) -> tuple[tuple[str, str], ...]:
    facts = [("figures", f"{KINDS[found.divergence_kind]}, each layer quantized alone")]
    facts.append(("data", f"{count_words(found.divergence_samples, 'sample')} of data.{found.divergence_data}"))
    for metric, value in found.baseline.items():
        of = f"{number_words(value, 4)} unquantized, {count_words(found.metric_samples, 'sample')} of data.eval"
        facts.append((name_words(metric), of))
    return tuple(facts)


def _divergence(cost: WidthCost | None) -> str:
    return NOT_MEASURED if cost is None else number_words(cost.divergence)


def _drop(found: Sensitivity, cost: WidthCost | None) -> str:
    return NOT_MEASURED if cost is None else number_words(found.drop(cost), 3)


def render_sensitivity_csv(found: Sensitivity) -> str:
    """A line for each width of each tensor; a column more for each metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *found.baseline])
    for layer in found.layers:
        for cost in layer.widths:
            drop = found.drop(cost)
            row = [layer.name, "x".join(map(str, layer.shape)), layer.method, layer.grid, cost.bits, cost.bytes]
            row += [f"{cost.relative_error:.6g}", f"{cost.divergence:.6g}", "" if drop is None else f"{drop:.6g}"]
            writer.writerow([*row, *(f"{cost.metrics[metric]:.6g}" for metric in found.baseline)])
    return text.getvalue()


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
        cells.append(Cell(_divergence(cost), "" if cost is None else _log_bar(cost.divergence, scale)))
    if found.metric:
        cells.append(Cell(_drop(found, known.get(found.bits[0]))))
    return Row(tuple(cells))


def _log_bar(value: float, scale: tuple[float, float]) -> str:
    """A bar by the logarithm: what a width costs falls by the same factor with each bit."""
    low, high = scale
    if value <= 0 or high <= low:
        return percent(0.0 if value <= 0 else 1.0)
    return percent(math.log(value / low) / math.log(high / low))
