"""One report becomes a page here, text in cells, which the templates only lay out. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qcompress.report.document import AccuracyFigures, LayerReport, Report, badness
from qcompress.report.html.charts import Histogram, Widths, histogram, widths
from qcompress.report.html.parts import Cell, Figure, Grid, Head, Row, bar, percent
from qcompress.report.view import (
    NOT_MEASURED,
    bits_words,
    count_words,
    decibel_words,
    drop_words,
    gate_words,
    interval_words,
    name_words,
    number_words,
    shape_words,
    share_words,
    size_words,
    sqnr_words,
    width_words,
)
from qcompress.types.encoded import ClassUse

RULE_HEADS = (
    Head("reason", right=False),
    Head("method", right=False),
    Head("bits"),
    Head("layers", "tensors"),
    Head("weights", spare=True),
    Head("bytes"),
    Head("bits_per_weight", "b/weight"),
    Head("worst_sqnr_db"),
)

LAYER_HEADS = (
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

CLASS_HEADS = (Head("context", right=False), Head("magnitude"), Head("count"), Head("ideal_bits"), Head("table_bits"))


@dataclass(frozen=True)
class Part:
    """A share of the artifact's bytes, in per cent."""

    term: str
    text: str
    share: str


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


@dataclass(frozen=True)
class Page:
    """A report's page from its top to its end; of each gate whether it passed, and the words that say so."""

    title: str
    cards: tuple[Figure, ...]
    parts: tuple[Part, ...]
    gates: tuple[tuple[bool, str], ...]
    warnings: tuple[str, ...]
    rules: Grid
    layers: Grid
    widths: Widths | None
    drawn: tuple[Drawn, ...]
    run: tuple[Figure, ...]


def report_page(report: Report) -> Page:
    """The page of one report; every compressed tensor with figures is drawn."""
    compressed = report.compressed
    anchors = {layer.name: f"t{index}" for index, layer in enumerate(compressed) if layer.figures is not None}
    measured = [
        (layer.bits, layer.measured.entropy)
        for layer in compressed
        if layer.bits is not None and layer.measured.entropy is not None
    ]
    return Page(
        title=name_words(report.artifact.name),
        cards=_cards(report),
        parts=_parts(report),
        gates=tuple((gate.passed, gate_words(gate)) for gate in report.gates),
        warnings=tuple(map(name_words, report.warnings)),
        rules=_rules_grid(report),
        layers=_layers_grid(report, anchors),
        widths=widths(measured),
        drawn=tuple(_drawn_layer(layer, anchors[layer.name]) for layer in compressed if layer.name in anchors),
        run=_run(report),
    )


def _cards(report: Report) -> tuple[Figure, ...]:
    size, worst = report.size, report.worst
    cards = [
        Figure(
            "artifact_bytes",
            size_words(size.artifact_bytes),
            notes=(Figure("baseline_bytes", size_words(size.baseline_bytes)),),
        ),
        Figure("ratio", NOT_MEASURED if size.ratio is None else f"{size.ratio:.2f}x"),
        Figure(
            "bits_per_weight",
            bits_words(size.bits_per_weight),
            notes=(
                Figure("bits_per_weight_file", bits_words(size.bits_per_weight_file), "whole file"),
                Figure("entropy", bits_words(size.entropy_bits), "entropy of the codes"),
            ),
        ),
        Figure(
            "worst_sqnr_db",
            "not measured" if worst is None else sqnr_words(worst.sqnr_db),
            notes=() if worst is None else (Figure("worst_layer", name_words(worst.name), "in"),),
        ),
    ]
    cards += [_accuracy_card(item) for item in report.accuracy or ()]
    return (*cards, *([] if report.accuracy else [Figure("accuracy", "not measured")]))


def _accuracy_card(item: AccuracyFigures) -> Figure:
    return Figure(
        "metric",
        number_words(item.artifact, 4),
        name_words(item.metric),
        (
            Figure(
                "artifact_interval", interval_words(item.artifact_interval).strip(" ()") or NOT_MEASURED, "interval"
            ),
            Figure("baseline", number_words(item.baseline, 4) + interval_words(item.baseline_interval)),
            Figure("drop", drop_words(item)),
            Figure("samples", f"{item.samples:,}"),
        ),
    )


def _parts(report: Report) -> tuple[Part, ...]:
    whole, sizes = max(1, report.size.artifact_bytes), report.size.parts.by_owner
    return tuple(Part(term, f"{size:,}", percent(size / whole)) for term, size in sizes.items() if size)


def _rules_grid(report: Report) -> Grid:
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
    return Grid(RULE_HEADS, tuple(rows))


def _layers_grid(report: Report, anchors: dict[str, str]) -> Grid:
    """Every tensor; bars of bytes, error and sensitivity by the largest of all, of entropy by the width of its codes.

    Without any sensitivity there is no column for it.
    """
    most_bytes = max((layer.bytes for layer in report.layers), default=0)
    errors = [layer.measured.relative_error for layer in report.layers]
    most_error = max((error for error in errors if error is not None and math.isfinite(error)), default=0.0)
    costs = [layer.sensitivity for layer in report.layers if layer.sensitivity is not None]
    rows = []
    for layer in report.layers:
        figures = layer.measured
        cells = (
            Cell(name_words(layer.name)),
            Cell(shape_words(layer.shape)),
            Cell(name_words(layer.method)),
            Cell(width_words(layer.bits, layer.bits_per_weight, layer.method)),
            Cell(size_words(layer.bytes), bar(layer.bytes, most_bytes)),
            Cell(bits_words(layer.bits_per_weight)),
            Cell(decibel_words(layer.sqnr_db)),
            Cell(number_words(figures.relative_error), bar(figures.relative_error, most_error)),
            Cell(number_words(figures.entropy), bar(figures.entropy, layer.bits or 0)),
            Cell(number_words(layer.sensitivity), bar(layer.sensitivity, max(costs, default=0.0))),
            Cell(share_words(figures.clipped_share)),
            Cell(share_words(figures.outlier_share)),
            Cell(name_words(layer.reason if layer.tied_to is None else f"tied to {layer.tied_to}")),
        )
        rows.append(Row(cells, link=anchors.get(layer.name, ""), dim=not layer.compressed))
    total = [""] * len(LAYER_HEADS)
    total[0] = f"all {count_words(len(report.layers), 'tensor')}"
    total[1] = f"{report.size.weights:,}"
    total[4] = size_words(sum(layer.bytes for layer in report.layers))
    grid = Grid(LAYER_HEADS, tuple(rows), tuple(total))
    return grid if costs else grid.without("sensitivity")


def _drawn_layer(layer: LayerReport, anchor: str) -> Drawn:
    """A compressed tensor with its figures, but for those that were not measured."""
    figures, gap = layer.measured, layer.bound_gap_db
    low, high = figures.range or (None, None)
    width = "" if layer.bits is None else f" of {layer.bits} bits"
    named = [
        Figure("sqnr_db", sqnr_words(figures.sqnr_db)),
        Figure("entropy", f"{number_words(figures.entropy)}{width}"),
        Figure("bound_gap_db", f"{gap:.1f} dB" if gap is not None and math.isfinite(gap) else NOT_MEASURED),
        Figure("step", number_words(figures.step)),
        Figure("levels_used", NOT_MEASURED if figures.levels_used is None else f"{figures.levels_used:,}"),
        *_codebook_cells(layer),
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
        used=bar(figures.entropy, layer.bits or 0),
        figures=tuple(one for one in named if one.value != NOT_MEASURED),
        classes=_classes_grid(figures.classes) if figures.classes else None,
    )


def _codebook_cells(layer: LayerReport) -> list[Figure]:
    """What is worth saying of the tensor's codebooks."""
    figures = layer.measured
    if figures.entries is None:
        return []
    counts = {"entries": figures.entries, "dead": figures.dead, "duplicates": figures.duplicates}
    named = [Figure(name, f"{count:,}") for name, count in counts.items() if count is not None]
    named.append(Figure("side_information_bytes", size_words(layer.side_information_bytes)))
    return named + ([Figure("codebook_in", name_words(layer.codebook_in))] if layer.codebook_in is not None else [])


def _classes_grid(classes: Sequence[ClassUse]) -> Grid:
    """What the tables of a tensor take; bars of the codes by the most of all."""
    most = max(one.count for one in classes)
    rows = (
        Row(
            (
                Cell(str(one.context)),
                Cell(number_words(one.magnitude)),
                Cell(f"{one.count:,}", bar(one.count, most)),
                Cell(bits_words(one.ideal_bits)),
                Cell(bits_words(one.table_bits)),
            )
        )
        for one in classes
    )
    return Grid(CLASS_HEADS, tuple(rows))


def _run(report: Report) -> tuple[Figure, ...]:
    facts = []
    if report.run is not None:
        run = report.run
        facts += [
            Figure("seconds", f"{number_words(run.seconds)} s"),
            Figure("cpu_seconds", f"{number_words(run.cpu_seconds)} s"),
            Figure("peak_memory_bytes", size_words(run.peak_memory_bytes)),
            Figure("device", name_words(run.device)),
            Figure("versions", ", ".join(f"{name_words(a)} {name_words(b)}" for a, b in sorted(run.versions.items()))),
        ]
    facts += [
        Figure("sha256", name_words(report.artifact.sha256)),
        Figure("recipe_hash", name_words(report.recipe_hash)),
        Figure("input_sha256", name_words(report.input_sha256 or NOT_MEASURED)),
    ]
    return tuple(facts)
