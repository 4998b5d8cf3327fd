"""What an HTML page of one report says, as text in cells; the templates only lay it out. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qcompress.report.charts import Widths, widths
from qcompress.report.document import AccuracyFigures, GateResult, Report
from qcompress.report.page_layers import Drawn, drawn_layer, layers_grid, rules_grid
from qcompress.report.page_nouns import Figure, Grid, percent, sqnr_words
from qcompress.report.view import gate_words, interval_words
from qcompress.report.words import NOT_MEASURED, bits_words, name_words, number_words, size_words


@dataclass(frozen=True)
class Part:
    """A share of the artifact's bytes, in per cent."""

    term: str
    text: str
    share: str


@dataclass(frozen=True)
class Page:
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
    compressed = report.compressed
    anchors = {layer.name: f"t{index}" for index, layer in enumerate(compressed) if layer.figures is not None}
    measured = [
        (layer.bits, layer.figures.entropy)
        for layer in compressed
        if layer.bits is not None and layer.figures is not None and layer.figures.entropy is not None
    ]
    return Page(
        title=name_words(report.artifact.name),
        cards=_cards(report),
        parts=_parts(report),
        gates=tuple(gate_row(gate) for gate in report.gates),
        warnings=tuple(map(name_words, report.warnings)),
        rules=rules_grid(report),
        layers=layers_grid(report, anchors),
        widths=widths(measured),
        drawn=tuple(drawn_layer(layer, anchors[layer.name]) for layer in compressed if layer.name in anchors),
        run=_run(report),
    )


def gate_row(gate: GateResult) -> tuple[bool, str]:
    """Whether a gate passed, and the words that say so."""
    return (gate.passed, gate_words(gate))


def _cards(report: Report) -> tuple[Figure, ...]:
    size, worst = report.size, report.worst
    codes = size.entropy_bound_bytes
    bound = None if codes is None or not size.compressed_weights else 8 * codes / size.compressed_weights
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
                Figure("entropy", bits_words(bound), "entropy of the codes"),
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
            Figure("drop", number_words(item.drop, 4) + interval_words(item.interval)),
            Figure("samples", f"{item.samples:,}"),
        ),
    )


def _parts(report: Report) -> tuple[Part, ...]:
    parts = report.size.parts
    sizes = {
        "codes": parts.codes,
        "side_information": parts.side_information,
        "kept": parts.kept,
        "header": parts.header,
        "index": parts.index,
    }
    whole = max(1, report.size.artifact_bytes)
    return tuple(Part(term, f"{size:,}", percent(size / whole)) for term, size in sizes.items() if size)


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
