"""Reports become pages here, text in cells, which the templates only lay out. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from qcompress.report.compare import Comparison
from qcompress.report.document import KEPT, AccuracyFigures, LayerFigures, LayerReport, Report, badness
from qcompress.report.glossary import FIGURES
from qcompress.report.html.charts import Histogram, Scatter, Widths, histogram, scatter, widths
from qcompress.report.html.parts import Fact, fact, terms_of
from qcompress.report.table import Table, bar, bars, column, percent
from qcompress.report.view import change_table, file_table, gate_words, layer_table, most_changed
from qcompress.report.words import NOT_MEASURED, bits_words, cell, drop_words, interval_words, number_words, words
from qcompress.types.encoded import ClassUse

RULE_COLUMNS = ("reason", "method", "bits", "layers", "weights", "bytes", "bits_per_weight", "worst_sqnr_db")


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
    figures: tuple[Fact, ...]
    classes: Table | None = None


@dataclass(frozen=True)
class Page:
    """A report's page from its top to its end; of each gate whether it passed, and the words that say so."""

    title: str
    cards: tuple[Fact, ...]
    parts: tuple[Part, ...]
    gates: tuple[tuple[bool, str], ...]
    warnings: tuple[str, ...]
    rules: Table
    layers: Table
    widths: Widths | None
    drawn: tuple[Drawn, ...]
    run: tuple[Fact, ...]

    @property
    def words(self) -> tuple[Fact, ...]:
        """Every term that the page shows, with its definition."""
        facts = (*self.cards, *(one for drawn in self.drawn for one in drawn.figures), *self.run)
        terms = (*(part.term for part in self.parts), "histogram_before", "histogram_after", "levels", "fences")
        return terms_of(facts, (self.rules, self.layers), terms)


def report_page(report: Report) -> Page:
    """The page of one report; every compressed tensor with figures is drawn."""
    drawn = [layer for layer in report.compressed if layer.figures is not None]
    anchors = {layer.name: f"t{index}" for index, layer in enumerate(drawn)}
    measured = [
        (layer.bits, layer.measured.entropy)
        for layer in report.compressed
        if layer.bits is not None and layer.measured.entropy is not None
    ]
    return Page(
        title=report.artifact.name,
        cards=_cards(report),
        parts=_parts(report),
        gates=tuple((gate.passed, gate_words(gate)) for gate in report.gates),
        warnings=report.warnings,
        rules=_rules_table(report),
        layers=layer_table(report, report.layers, [anchors.get(layer.name, "") for layer in report.layers]),
        widths=widths(measured),
        drawn=tuple(_drawn_layer(layer, anchors[layer.name]) for layer in drawn),
        run=_run(report),
    )


def _cards(report: Report) -> tuple[Fact, ...]:
    size, worst = report.size, report.worst
    cards = [
        fact("artifact_bytes", size.artifact_bytes, notes=(fact("baseline_bytes", size.baseline_bytes),)),
        fact("ratio", size.ratio),
        fact(
            "bits_per_weight",
            size.bits_per_weight,
            notes=(
                fact("bits_per_weight_file", size.bits_per_weight_file, "whole file"),
                Fact("entropy", bits_words(size.entropy_bits), "entropy of the codes"),
            ),
        ),
        Fact("worst_sqnr_db", "not measured")
        if worst is None
        else fact("worst_sqnr_db", worst.sqnr_db, notes=(fact("worst_layer", worst.name, "in"),)),
    ]
    cards += [_accuracy_card(item) for item in report.accuracy or ()]
    return (*cards, *([] if report.accuracy else [Fact("accuracy", "not measured")]))


def _accuracy_card(item: AccuracyFigures) -> Fact:
    interval = interval_words(item.artifact_interval).strip(" ()") or NOT_MEASURED
    notes = (
        Fact("artifact_interval", interval, "interval"),
        Fact("baseline", number_words(item.baseline, 4) + interval_words(item.baseline_interval)),
        Fact("drop", drop_words(item)),
        fact("samples", item.samples),
    )
    return Fact("metric", number_words(item.artifact, 4), item.metric, notes)


def _parts(report: Report) -> tuple[Part, ...]:
    whole, sizes = max(1, report.size.artifact_bytes), report.size.parts.by_owner
    return tuple(Part(term, f"{size:,}", percent(size / whole)) for term, size in sizes.items() if size)


def _rules_table(report: Report) -> Table:
    """What each rule of the recipe, or each reason to keep, decided; the most bytes first."""
    groups: dict[tuple[str, str, int | None], list[LayerReport]] = {}
    for layer in report.layers:
        # Behind the semicolon stands what differs from tensor to tensor, such as the channel axis.
        reason = layer.reason.partition("; ")[0]
        groups.setdefault((reason, layer.method, layer.bits), []).append(layer)
    whole = max(1, sum(layer.bytes for layer in report.layers))
    found, shares = [], []
    for (reason, method, bits), layers in sorted(groups.items(), key=lambda item: -sum(one.bytes for one in item[1])):
        n_bytes, weights = sum(one.bytes for one in layers), sum(one.weights for one in layers if one.tied_to is None)
        bits_per_weight = 8 * n_bytes / weights if weights else None
        worst = min((one.sqnr_db for one in layers), key=badness)
        found.append((reason, method, bits, len(layers), weights, n_bytes, bits_per_weight, worst))
        shares.append(percent(n_bytes / whole))
    return Table(
        columns=tuple(
            column(name, "tensors" if name == "layers" else "", shares if name == "bytes" else ())
            for name in RULE_COLUMNS
        ),
        rows=tuple(
            tuple(words(FIGURES[name], value) for name, value in zip(RULE_COLUMNS, values, strict=True))
            for values in found
        ),
        dim=frozenset(index for index, values in enumerate(found) if values[1] == KEPT),
    )


def _drawn_layer(layer: LayerReport, anchor: str) -> Drawn:
    """A compressed tensor with its figures, but for those that were not measured."""
    figures = layer.measured
    low, high = figures.range or (None, None)
    return Drawn(
        anchor=anchor,
        name=layer.name,
        chart=histogram(figures),
        low=number_words(low),
        high=number_words(high),
        used=bar(figures.entropy, layer.bits or 0),
        figures=tuple(one for one in _layer_facts(layer) if one.value != NOT_MEASURED),
        classes=_classes_table(figures.classes) if figures.classes else None,
    )


def _layer_facts(layer: LayerReport) -> list[Fact]:
    """All that was measured of a tensor; its relative error is what the SQNR says, and stands in the table."""
    facts = []
    for name in [one.name for one in fields(LayerFigures) if FIGURES[one.name].form and one.name != "relative_error"]:
        one = fact(name, layer.value(name))
        if name == "entropy" and layer.bits is not None:
            one = Fact(name, f"{one.value} of {layer.bits} bits")
        facts.append(one)
    gap = layer.bound_gap_db
    facts.append(fact("bound_gap_db", gap if gap is not None and math.isfinite(gap) else None))
    facts.append(fact("sensitivity", layer.sensitivity))
    if layer.measured.entries is not None:
        facts += [fact(name, layer.value(name)) for name in ("side_information_bytes", "codebook_in")]
    return facts


def _classes_table(classes: Sequence[ClassUse]) -> Table:
    """What the tables of a tensor take; bars of the codes by the most of all."""
    names = [one.name for one in fields(ClassUse)]
    drawn = {"count": bars([one.count for one in classes])}
    rows = tuple(tuple(cell(FIGURES[name], getattr(one, name)) for name in names) for one in classes)
    return Table(tuple(column(name, bars=drawn.get(name, ())) for name in names), rows)


def _run(report: Report) -> tuple[Fact, ...]:
    facts = []
    if report.run is not None:
        run = report.run
        facts += [fact(name, getattr(run, name)) for name in ("seconds", "cpu_seconds", "peak_memory_bytes", "device")]
        facts.append(Fact("versions", ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))))
    facts += [
        fact("sha256", report.artifact.sha256),
        fact("recipe_hash", report.recipe_hash),
        fact("input_sha256", report.input_sha256),
    ]
    return tuple(facts)


@dataclass(frozen=True)
class ComparisonPage:
    """A page of several reports; of each gate whether it passed, and the words that say so."""

    title: str
    files: Table
    gates: tuple[tuple[bool, str], ...]
    warnings: tuple[str, ...]
    scatters: tuple[Scatter, ...]
    layers: Table
    words: tuple[Fact, ...]


def comparison_page(comparison: Comparison) -> ComparisonPage:
    names = {file.label: file.name for file in comparison.files}
    files, layers = file_table(comparison), change_table(comparison, most_changed(comparison.layers))
    labelled = list(zip(comparison.files, comparison.reports, strict=True))
    gates = [(g.passed, f"{file.label}: {gate_words(g)}") for file, report in labelled for g in report.gates]
    warnings = [f"{file.label}: {text}" for file, report in labelled for text in report.warnings]
    return ComparisonPage(
        title=f"{len(comparison.files)} artifacts compared",
        files=files,
        gates=tuple(gates),
        warnings=tuple(warnings),
        scatters=tuple(scatter(one, names) for one in comparison.trade_offs),
        layers=layers,
        words=terms_of((), (files, layers), ("pareto_front",)),
    )
