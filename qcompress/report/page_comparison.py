"""What an HTML page of several reports says. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qcompress.report.charts import Scatter, scatter
from qcompress.report.compare import Comparison, LayerComparison
from qcompress.report.page import gate_row
from qcompress.report.page_nouns import Cell, Figure, Grid, Head, Row, percent, sqnr_words, terms_of
from qcompress.report.view import drop_words, signed_size
from qcompress.report.words import (
    NOT_MEASURED,
    bits_words,
    count_words,
    decibel_words,
    name_words,
    number_words,
    size_words,
)


@dataclass(frozen=True)
class ComparisonPage:
    title: str
    files: Grid
    gates: tuple[tuple[bool, str], ...]
    warnings: tuple[str, ...]
    scatters: tuple[Scatter, ...]
    layers: Grid
    words: tuple[Figure, ...]


def comparison_page(comparison: Comparison) -> ComparisonPage:
    names = {file.label: name_words(file.name) for file in comparison.files}
    files, layers = _files(comparison), _changes(comparison)
    labelled = list(zip(comparison.files, comparison.reports, strict=True))
    gates = [(file.label, gate_row(gate)) for file, report in labelled for gate in report.gates]
    warnings = [f"{file.label}: {name_words(text)}" for file, report in labelled for text in report.warnings]
    return ComparisonPage(
        title=f"{count_words(len(comparison.files), 'artifact')} compared",
        files=files,
        gates=tuple((passed, f"{label}: {text}") for label, (passed, text) in gates),
        warnings=tuple(warnings),
        scatters=tuple(scatter(one, names) for one in comparison.trade_offs),
        layers=layers,
        words=terms_of((), (*files.heads, *layers.heads), ("pareto_front",)),
    )


def _files(comparison: Comparison) -> Grid:
    """A line for each artifact; bars of sizes by the largest."""
    metrics = list(dict.fromkeys(item.metric for report in comparison.reports for item in report.accuracy or ()))
    fronts = {one.metric: {point.label for point in one.front} for one in comparison.trade_offs}
    most = max((file.artifact_bytes for file in comparison.files), default=0) or 1
    heads = [
        Head("label", " ", right=False),
        Head("name", "artifact", right=False),
        Head("artifact_bytes"),
        Head("bytes_change", "change"),
        Head("ratio"),
        Head("bits_per_weight", "b/weight"),
        Head("worst_sqnr_db"),
        Head("worst_layer", right=False, spare=True),
    ]
    for metric in metrics:
        heads += [Head("metric", name_words(metric)), Head("drop")]
    rows = []
    for file, report in zip(comparison.files, comparison.reports, strict=True):
        measured = {item.metric: item for item in report.accuracy or ()}
        cells = [
            Cell(file.label),
            Cell(name_words(file.name)),
            Cell(size_words(file.artifact_bytes), percent(file.artifact_bytes / most)),
            Cell(signed_size(file.bytes_change), mark=_mark(-file.bytes_change)),
            Cell(NOT_MEASURED if file.ratio is None else f"{file.ratio:.2f}x"),
            Cell(bits_words(file.bits_per_weight)),
            Cell(sqnr_words(file.worst_sqnr_db)),
            Cell(name_words(file.worst_layer or NOT_MEASURED)),
        ]
        for metric in metrics:
            item = measured.get(metric)
            mark = "front" if file.label in fronts.get(metric, ()) else ""
            cells += [
                Cell(NOT_MEASURED if item is None else number_words(item.artifact, 4), mark=mark),
                Cell(NOT_MEASURED if item is None else drop_words(item)),
            ]
        rows.append(Row(tuple(cells)))
    return Grid(tuple(heads), tuple(rows))


def _changes(comparison: Comparison) -> Grid:
    """A line for each tensor, the largest change first; bars of the change in SQNR by the largest of all."""
    labels = [file.label for file in comparison.files]
    heads = [Head("name", "layer", right=False)]
    heads += [Head("bytes", f"bytes {label}") for label in labels]
    heads += [Head("sqnr_db", f"dB {label}") for label in labels]
    heads += [Head("sqnr_change_db", f"change {label}") for label in labels[1:]]
    layers = sorted(comparison.layers, key=lambda layer: layer.largest_change, reverse=True)
    finite = [abs(c) for layer in layers for c in layer.sqnr_change_db if c is not None and abs(c) < float("inf")]
    most = max(finite, default=0.0)
    return Grid(tuple(heads), tuple(Row(tuple(_change_cells(layer, most))) for layer in layers))


def _change_cells(layer: LayerComparison, most: float) -> list[Cell]:
    cells = [Cell(name_words(layer.name))]
    for size, growth in zip(layer.bytes, layer.bytes_change, strict=True):
        mark = "" if growth is None else _mark(-growth)
        cells.append(Cell(NOT_MEASURED if size is None else size_words(size), mark=mark))
    cells += [Cell(decibel_words(value)) for value in layer.sqnr_db]
    for change in layer.sqnr_change_db[1:]:
        bar = "" if change is None or not most else percent(abs(change) / most)
        cells.append(
            Cell(NOT_MEASURED if change is None else f"{change:+.1f}", bar, "" if not change else _mark(change))
        )
    return cells


def _mark(change: float) -> str:
    return "better" if change > 0 else "worse" if change < 0 else ""
