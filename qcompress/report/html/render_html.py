"""Reports become one self-contained HTML file. The only file that imports jinja2; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qcompress.report.compare import Comparison, LayerComparison, compare_reports
from qcompress.report.document import BINS, Report
from qcompress.report.glossary import GLOSSARY
from qcompress.report.html.charts import AFTER, BEFORE, SCATTER, STRIP, WIDTHS_HEIGHT, Scatter, scatter
from qcompress.report.html.page import Page, report_page
from qcompress.report.html.parts import Cell, Figure, Grid, Head, Row, bar, percent, terms_of
from qcompress.report.view import (
    NOT_MEASURED,
    bits_words,
    count_words,
    decibel_words,
    gate_words,
    metric_words,
    name_words,
    signed_size,
    size_words,
    sqnr_words,
)
from qcompress.types import VERSION

if TYPE_CHECKING:
    from qcompress.plan.sensitivity import Sensitivity

TEMPLATES = Path(__file__).with_name("templates")
BOXES = {"histogram": (BINS, BEFORE + STRIP + AFTER), "scatter": SCATTER, "widths": WIDTHS_HEIGHT}
"""Width and height of the boxes that charts are drawn in."""


@dataclass(frozen=True)
class ComparisonPage:
    """A page of several reports; of each gate whether it passed, and the words that say so."""

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
    gates = [(g.passed, f"{file.label}: {gate_words(g)}") for file, report in labelled for g in report.gates]
    warnings = [f"{file.label}: {name_words(text)}" for file, report in labelled for text in report.warnings]
    return ComparisonPage(
        title=f"{count_words(len(comparison.files), 'artifact')} compared",
        files=files,
        gates=tuple(gates),
        warnings=tuple(warnings),
        scatters=tuple(scatter(one, names) for one in comparison.trade_offs),
        layers=layers,
        words=terms_of((), (*files.heads, *layers.heads), ("pareto_front",)),
    )


def _files(comparison: Comparison) -> Grid:
    """A line for each artifact; bars of sizes by the largest."""
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
    for metric in comparison.metrics:
        heads += [Head("metric", name_words(metric)), Head("drop")]
    rows = []
    for file, report in zip(comparison.files, comparison.reports, strict=True):
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
        for metric in comparison.metrics:
            value, drop = metric_words(report.measured.get(metric))
            cells += [Cell(value, mark="front" if file.label in fronts.get(metric, ()) else ""), Cell(drop)]
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
        if change is None:
            cells.append(Cell(NOT_MEASURED))
        else:
            cells.append(Cell(f"{change:+.1f}", bar(abs(change), most), _mark(change)))
    return cells


def _mark(change: float) -> str:
    return "better" if change > 0 else "worse" if change < 0 else ""


def render_html(reports: Sequence[Report]) -> str:
    """The page of one report, or of the comparison of several, ending in a newline.

    It holds no script and asks for nothing: its policy forbids both, whatever a file's names contain. Texts are
    escaped for HTML, and what a terminal would obey is spelt out.
    """
    if len(reports) > 1:
        page = comparison_page(compare_reports(reports))
        return _templates().get_template("comparison.html").render(page=page)
    single = report_page(reports[0])
    return _templates().get_template("report.html").render(page=single, words=_words(single))


def _words(page: Page) -> tuple[Figure, ...]:
    """Every term that the page shows, with its definition."""
    figures = (*page.cards, *(figure for one in page.drawn for figure in one.figures), *page.run)
    terms = (*(part.term for part in page.parts), "histogram_before", "histogram_after", "levels", "fences")
    return terms_of(figures, (*page.rules.heads, *page.layers.heads), terms)


def render_sensitivity_html(found: Sensitivity) -> str:
    """The page of sensitivities, as closed to the outside as that of a report."""
    # What draws a stored report starts without numpy, which sensitivities bring.
    from qcompress.report.html.page_sensitivity import sensitivity_page

    return _templates().get_template("sensitivity.html").render(page=sensitivity_page(found))


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(version=VERSION, glossary=GLOSSARY, box=BOXES)
    return environment
