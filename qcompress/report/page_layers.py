"""The layers of a report on an HTML page: by rule, one by one, and drawn. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcompress.encoded import ClassUse
from qcompress.report.charts import Histogram, histogram
from qcompress.report.document import LayerReport, Report, badness
from qcompress.report.page_nouns import Cell, Figure, Grid, Head, Row, percent, sqnr_words
from qcompress.report.words import (
    NOT_MEASURED,
    bits_words,
    count_words,
    decibel_words,
    name_words,
    number_words,
    shape_words,
    share_words,
    size_words,
    width_words,
)


@dataclass(frozen=True)
class Drawn:
    """One compressed tensor with its histograms and figures; `used` is its entropy in per cent of its width."""

    anchor: str
    name: str
    chart: Histogram | None
    low: str
    high: str
    used: str
    figures: tuple[Figure, ...]
    classes: Grid | None = None


_RULE_HEADS = (
    Head("reason", right=False),
    Head("method", right=False),
    Head("bits"),
    Head("layers", "tensors"),
    Head("weights", spare=True),
    Head("bytes"),
    Head("bits_per_weight", "b/weight"),
    Head("worst_sqnr_db"),
)


def rules_grid(report: Report) -> Grid:
    """What each rule of the recipe, or each reason to keep, decided; the most bytes first."""
    groups: dict[tuple[str, str, int | None], list[LayerReport]] = {}
    for layer in report.layers:
        # Behind the semicolon stands what differs from tensor to tensor, such as the channel axis.
        reason = layer.reason.partition("; ")[0]
        groups.setdefault((reason, layer.method, layer.bits), []).append(layer)
    whole = max(1, sum(layer.bytes for layer in report.layers))
    rows = []
    for (reason, method, bits), layers in sorted(groups.items(), key=lambda item: -sum(one.bytes for one in item[1])):
        n_bytes, weights = sum(one.bytes for one in layers), sum(one.weights for one in layers if one.tied_to is None)
        worst = min((one.sqnr_db for one in layers), key=badness)
        cells = (
            Cell(name_words(reason)),
            Cell(name_words(method)),
            Cell(NOT_MEASURED if bits is None else str(bits)),
            Cell(f"{len(layers):,}"),
            Cell(f"{weights:,}"),
            Cell(size_words(n_bytes), percent(n_bytes / whole)),
            Cell(bits_words(8 * n_bytes / weights if weights else None)),
            Cell(sqnr_words(worst)),
        )
        rows.append(Row(cells, dim=not layers[0].compressed))
    return Grid(_RULE_HEADS, tuple(rows))


_LAYER_HEADS = (
    Head("name", "layer", right=False),
    Head("shape", right=False, spare=True),
    Head("method", right=False, spare=True),
    Head("bits"),
    Head("bytes"),
    Head("bits_per_weight", "b/weight", spare=True),
    Head("sqnr_db", "SQNR dB"),
    Head("relative_error"),
    Head("entropy"),
    Head("sensitivity"),
    Head("clipped_share", spare=True),
    Head("outlier_share", spare=True),
    Head("reason", right=False, spare=True),
)
_SENSITIVITY = [head.term for head in _LAYER_HEADS].index("sensitivity")


def layers_grid(report: Report, anchors: dict[str, str]) -> Grid:
    """Every tensor; bars of bytes, error and sensitivity by the largest of all, of entropy by the width of its codes.

    Without any sensitivity there is no column for it.
    """
    most_bytes = max((layer.bytes for layer in report.layers), default=0)
    errors = [_figure(layer, lambda f: f.relative_error) for layer in report.layers]
    most_error = max((error for error in errors if error is not None and math.isfinite(error)), default=0.0)
    costs = [layer.sensitivity for layer in report.layers if layer.sensitivity is not None]
    rows = []
    for layer, error in zip(report.layers, errors, strict=True):
        entropy = _figure(layer, lambda f: f.entropy)
        cells = (
            Cell(name_words(layer.name)),
            Cell(shape_words(layer.shape)),
            Cell(name_words(layer.method)),
            Cell(width_words(layer.bits, layer.bits_per_weight, layer.method)),
            Cell(size_words(layer.bytes), _bar(layer.bytes, most_bytes)),
            Cell(bits_words(layer.bits_per_weight)),
            Cell(decibel_words(layer.sqnr_db)),
            Cell(number_words(error), _bar(error, most_error)),
            Cell(number_words(entropy), _bar(entropy, layer.bits or 0)),
            Cell(number_words(layer.sensitivity), _bar(layer.sensitivity, max(costs, default=0.0))),
            Cell(share_words(_figure(layer, lambda f: f.clipped_share))),
            Cell(share_words(_figure(layer, lambda f: f.outlier_share))),
            Cell(name_words(layer.reason if layer.tied_to is None else f"tied to {layer.tied_to}")),
        )
        rows.append(Row(cells, link=anchors.get(layer.name, ""), dim=not layer.compressed))
    total = [""] * len(_LAYER_HEADS)
    total[0] = f"all {count_words(len(report.layers), 'tensor')}"
    total[1] = f"{report.size.weights:,}"
    total[4] = size_words(sum(layer.bytes for layer in report.layers))
    grid = Grid(_LAYER_HEADS, tuple(rows), tuple(total))
    return grid if costs else _without(grid, _SENSITIVITY)


def _without(grid: Grid, column: int) -> Grid:
    def cut(cells: Sequence[Any]) -> tuple[Any, ...]:
        return (*cells[:column], *cells[column + 1 :])

    rows = tuple(replace(row, cells=cut(row.cells)) for row in grid.rows)
    return Grid(cut(grid.heads), rows, cut(grid.total))


def _figure(layer: LayerReport, of: Callable[..., float | None]) -> float | None:
    return of(layer.figures) if layer.figures is not None else None


def _bar(value: float | None, most: float) -> str:
    return percent(value / most) if value is not None and most else ""


def _book_figures(layer: LayerReport) -> list[Figure]:
    """What is worth saying of the tensor's codebooks."""
    figures = layer.figures
    if figures is None or figures.entries is None:
        return []
    counts = {"entries": figures.entries, "dead": figures.dead, "duplicates": figures.duplicates}
    named = [Figure(name, f"{count:,}") for name, count in counts.items() if count is not None]
    named.append(Figure("side_information_bytes", size_words(layer.side_information_bytes)))
    return named + ([Figure("codebook_in", name_words(layer.codebook_in))] if layer.codebook_in is not None else [])


def _gap_words(gap: float | None) -> str:
    return f"{gap:.1f} dB" if gap is not None and math.isfinite(gap) else NOT_MEASURED


def drawn_layer(layer: LayerReport, anchor: str) -> Drawn:
    figures = layer.figures
    assert figures is not None
    low, high = figures.range or (None, None)
    width = "" if layer.bits is None else f" of {layer.bits} bits"
    named = [
        Figure("sqnr_db", sqnr_words(figures.sqnr_db)),
        Figure("entropy", f"{number_words(figures.entropy)}{width}"),
        Figure("bound_gap_db", _gap_words(layer.bound_gap_db)),
        Figure("step", number_words(figures.step)),
        Figure("levels_used", NOT_MEASURED if figures.levels_used is None else f"{figures.levels_used:,}"),
        *_book_figures(layer),
        Figure("outlier_share", share_words(figures.outlier_share)),
        Figure("clipped_share", share_words(figures.clipped_share)),
        Figure("kurtosis", number_words(figures.kurtosis)),
        Figure("max_error", number_words(figures.max_error)),
    ]
    if layer.sensitivity is not None:
        named.append(Figure("sensitivity", number_words(layer.sensitivity)))
    if figures.sampled:
        named.append(Figure("sampled", "yes"))
    return Drawn(
        anchor=anchor,
        name=name_words(layer.name),
        chart=histogram(figures),
        low=number_words(low),
        high=number_words(high),
        used=_bar(figures.entropy, layer.bits or 0),
        figures=tuple(one for one in named if one.value != NOT_MEASURED),
        classes=_classes_grid(figures.classes) if figures.classes else None,
    )


_CLASS_HEADS = (Head("context", right=False), Head("magnitude"), Head("count"), Head("ideal_bits"), Head("table_bits"))


def _classes_grid(classes: Sequence[ClassUse]) -> Grid:
    """What the tables of a tensor take; bars of the codes by the most of all."""
    most = max(one.count for one in classes)
    rows = (
        Row(
            (
                Cell(str(one.context)),
                Cell(number_words(one.magnitude)),
                Cell(f"{one.count:,}", _bar(one.count, most)),
                Cell(bits_words(one.ideal_bits)),
                Cell(bits_words(one.table_bits)),
            )
        )
        for one in classes
    )
    return Grid(_CLASS_HEADS, tuple(rows))
