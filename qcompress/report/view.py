"""Reports become views here, titles and tables of text, which the renderers only lay out. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompress.report.compare import WORST, Comparison, LayerComparison
from qcompress.report.document import AccuracyFigures, GateResult, LayerReport, Report, SizeFigures, badness
from qcompress.report.gates import failure_words, scaled
from qcompress.report.glossary import FIGURES
from qcompress.report.table import Column, Table, View, bar, bars, column
from qcompress.report.words import (
    NOT_MEASURED,
    bits_words,
    cell,
    count_words,
    drop_words,
    interval_words,
    number_words,
    signed_size,
    size_words,
    words,
)

SHOW_ALL = 40
SHOW_WORST = 20
"""Of more than SHOW_ALL tensors a table shows so many."""

LAYER_COLUMNS = (
    *("name", "shape", "method", "bits", "bytes", "bits_per_weight", "sqnr_db", "relative_error", "entropy"),
    *("sensitivity", "clipped_share", "outlier_share", "reason"),
)
FILE_COLUMNS = (
    *("label", "name", "artifact_bytes", "bytes_change", "ratio", "bits_per_weight", "worst_sqnr_db", "worst_layer"),
)
"""What the tables of tensors and of artifacts show, of all figures that they have."""


def view_report(report: Report) -> View:
    size, worst = report.size, report.worst
    ratio = "" if size.ratio is None else f" ({size.ratio:.2f}x)"
    facts = [
        ("size", f"{size_words(size.baseline_bytes)} -> {size_words(size.artifact_bytes)}{ratio}"),
        ("bits per weight", _bits_fact(size)),
        ("bytes", _parts_words(size)),
        ("worst layer", "not measured" if worst is None else f"{worst.name} {sqnr_words(worst.sqnr_db)}"),
    ]
    facts += [("accuracy", accuracy_line(item)) for item in report.accuracy or ()]
    facts += [("gate", gate_words(gate)) for gate in report.gates]
    layers, notes = _shown(report.layers)
    table = layer_table(report, layers)
    return View(report.artifact.name, tuple(facts), (table.without(len(table.columns) - 1),), tuple(notes))


def _bits_fact(size: SizeFigures) -> str:
    text = (
        f"{bits_words(size.bits_per_weight)} with side information, {bits_words(size.bits_per_weight_file)} whole file"
    )
    bound = size.entropy_bits
    return text if bound is None else f"{text}, entropy of the codes {bits_words(bound)}"


def _parts_words(size: SizeFigures) -> str:
    owners = {name.replace("_", " "): count for name, count in size.parts.by_owner.items() if count}
    return " + ".join(f"{name} {count:,}" for name, count in owners.items()) + f" = {size.artifact_bytes:,}"


def accuracy_line(item: AccuracyFigures) -> str:
    before = number_words(item.baseline, 4) + interval_words(item.baseline_interval)
    after = number_words(item.artifact, 4) + interval_words(item.artifact_interval)
    tuned = f", {number_words(item.untuned, 4)} before tuning" if item.untuned is not None else ""
    text = f"{item.metric} {before} -> {after}{tuned}, drop {drop_words(item)}{_kmeans_words(item)}"
    return f"{text}, {count_words(item.samples, 'sample')}"


def _kmeans_words(item: AccuracyFigures) -> str:
    """How the artifact stands to plain k-means."""
    if item.kmeans is None:
        return ""
    ratios = [(item.kmeans_ratio, "")]
    if item.untuned is not None:
        ratios.append((item.untuned_ratio, " before tuning"))
    shown = ", ".join(f"{number_words(ratio, 4)}{when}" for ratio, when in ratios if ratio is not None)
    return f", k-means alone {number_words(item.kmeans, 4)}" + (f" (ratio {shown})" if shown else "")


def gate_words(gate: GateResult) -> str:
    if not gate.passed:
        return f"FAILED {gate.name} {failure_words(gate)}"
    sign = "<=" if gate.name.startswith("max-") else ">="
    return f"passed {gate.name} {gate_value(gate.name, gate.value)} {sign} {gate_value(gate.name, gate.limit)}"


def gate_value(name: str, value: float | None) -> str:
    """A gate's value or limit; a value of None is that of a gate which passed without any error to measure."""
    shown, unit = scaled(name, value)
    if shown is None or shown == math.inf:
        return "exact"
    return f"{shown:,}" if isinstance(shown, int) else f"{shown:.6g}{unit if unit == '%' else ''}"


def sqnr_words(sqnr_db: float | None) -> str:
    """An SQNR with its unit; exact where there is no error."""
    return words(FIGURES["sqnr_db"], sqnr_db)


def _shown(layers: Sequence[LayerReport]) -> tuple[list[LayerReport], list[str]]:
    """The layers to show, and the line that says how to see the others."""
    if len(layers) <= SHOW_ALL:
        return list(layers), []
    shown = sorted(layers, key=lambda layer: (badness(layer.sqnr_db), -layer.bytes))[:SHOW_WORST]
    return shown, [more_words(len(layers), "worst SQNR")]


def more_words(count: int, order: str) -> str:
    return f"{SHOW_WORST} of {count:,} tensors, {order} first; all of them: --format csv"


def layer_table(report: Report, layers: Sequence[LayerReport], links: Sequence[str] = ()) -> Table:
    """These tensors of a report, a line each; without any sensitivity there is no column for it.

    Bars of bytes, error and sensitivity are by the largest of these, of entropy by the width of its codes.
    """
    measured = any(layer.sensitivity is not None for layer in report.layers)
    names = [name for name in LAYER_COLUMNS if measured or name != "sensitivity"]
    drawn = {name: bars([one.value(name) for one in layers]) for name in ("bytes", "relative_error", "sensitivity")}
    drawn["entropy"] = [bar(layer.measured.entropy, layer.bits or 0) for layer in layers]
    whole = {
        "name": f"all {count_words(len(report.layers), 'tensor')}",
        "shape": f"{report.size.weights:,}",
        "bytes": size_words(sum(layer.bytes for layer in report.layers)),
    }
    return Table(
        columns=tuple(column(name, bars=drawn.get(name, ())) for name in names),
        rows=tuple(tuple(_layer_cell(layer, name) for name in names) for layer in layers),
        dim=frozenset(index for index, layer in enumerate(layers) if not layer.compressed),
        total=tuple(whole.get(name, "") for name in names),
        links=tuple(links),
    )


def _layer_cell(layer: LayerReport, name: str) -> str:
    if name == "reason" and layer.tied_to is not None:
        return f"tied to {layer.tied_to}"
    return cell(FIGURES[name], layer.width if name == "bits" else layer.value(name))


def view_comparison(comparison: Comparison) -> View:
    layers = list(comparison.layers)
    notes = []
    if len(layers) > SHOW_ALL:
        layers = most_changed(layers)[:SHOW_WORST]
        notes.append(more_words(len(comparison.layers), "largest change"))
    facts = [
        (f"gate {file.label}", gate_words(gate))
        for file, report in zip(comparison.files, comparison.reports, strict=True)
        for gate in report.gates
    ]
    facts += [
        (f"front {one.metric}", ", ".join(point.label for point in one.front))
        for one in comparison.trade_offs
        if one.metric != WORST
    ]
    title = f"{count_words(len(comparison.files), 'artifact')}, changes against {comparison.files[0].label}"
    return View(title, tuple(facts), (file_table(comparison), change_table(comparison, layers)), tuple(notes))


def file_table(comparison: Comparison) -> Table:
    """A line for each artifact; bars of sizes by the largest, metrics on the Pareto front marked."""
    fronts = {one.metric: {point.label for point in one.front} for one in comparison.trade_offs}
    files, reports = comparison.files, comparison.reports
    drawn = {"artifact_bytes": bars([file.artifact_bytes for file in files])}
    marks = {"bytes_change": [_mark(-file.bytes_change) for file in files]}
    columns = [
        column(name, "artifact" if name == "name" else "", drawn.get(name, ()), marks.get(name, ()))
        for name in FILE_COLUMNS
    ]
    rows = [
        [
            signed_size(file.bytes_change) if name == "bytes_change" else words(FIGURES[name], getattr(file, name))
            for name in FILE_COLUMNS
        ]
        for file in files
    ]
    for metric in comparison.metrics:
        on_front = ["front" if file.label in fronts.get(metric, ()) else "" for file in files]
        columns += [Column(metric, term="metric", marks=tuple(on_front)), column("drop")]
        for row, report in zip(rows, reports, strict=True):
            row += metric_words(report.measured.get(metric))
    return Table(tuple(columns), tuple(map(tuple, rows)))


def metric_words(item: AccuracyFigures | None) -> tuple[str, str]:
    """A metric of the artifact, and its drop."""
    if item is None:
        return (NOT_MEASURED, NOT_MEASURED)
    return (number_words(item.artifact, 4), drop_words(item))


def most_changed(layers: Sequence[LayerComparison]) -> list[LayerComparison]:
    return sorted(layers, key=lambda layer: layer.largest_change, reverse=True)


def change_table(comparison: Comparison, layers: Sequence[LayerComparison]) -> Table:
    """A line for each tensor; bars of the change in SQNR by the largest of all."""
    every = [abs(c) for layer in layers for c in layer.sqnr_change_db if c is not None and math.isfinite(c)]
    most = max(every, default=0.0)
    columns, cells = [column("name")], [[layer.name for layer in layers]]
    for index, file in enumerate(comparison.files):
        sizes = [(layer.bytes[index], layer.bytes_change[index]) for layer in layers]
        marks = [_mark(-(growth or 0)) for _, growth in sizes]
        columns.append(column("bytes", f"bytes {file.label}", marks=marks))
        cells.append([cell(FIGURES["bytes"], size) for size, _ in sizes])
    for index, file in enumerate(comparison.files):
        columns.append(column("sqnr_db", f"dB {file.label}"))
        cells.append([cell(FIGURES["sqnr_db"], layer.sqnr_db[index]) for layer in layers])
    for index, file in enumerate(comparison.files[1:], 1):
        changes = [layer.sqnr_change_db[index] for layer in layers]
        lengths = [bar(None if change is None else abs(change), most) for change in changes]
        columns.append(column("sqnr_change_db", f"change {file.label}", lengths, [_mark(c or 0) for c in changes]))
        cells.append([NOT_MEASURED if change is None else f"{change:+.1f} dB" for change in changes])
    return Table(tuple(columns), tuple(zip(*cells, strict=True)))


def _mark(change: float) -> str:
    return "better" if change > 0 else "worse" if change < 0 else ""
