"""Sensitivities become a view, CSV and JSON here. Imports no torch."""

from __future__ import annotations

import csv
import io

from qcompress.plan.sensitivity import SCHEMA, LayerCosts, Sensitivity, WidthCost
from qcompress.report.document_json import json_text, plain_fields
from qcompress.report.view import (
    NOT_MEASURED,
    SHOW_ALL,
    SHOW_WORST,
    Column,
    Table,
    View,
    count_words,
    name_words,
    number_words,
    shape_words,
)

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
        cells += [divergence_words(layer.by_width.get(bits)) for bits in found.bits]
        cells += [drop_words(found, layer.by_width.get(bits)) for bits in drops]
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


def divergence_words(cost: WidthCost | None) -> str:
    return NOT_MEASURED if cost is None else number_words(cost.divergence)


def drop_words(found: Sensitivity, cost: WidthCost | None) -> str:
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


def sensitivity_text(found: Sensitivity) -> str:
    """As JSON: a line for each top-level key and each layer."""
    return json_text({"schema": SCHEMA, **plain_fields(found, digits=9)})
