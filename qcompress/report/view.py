"""What a person is shown of one or several reports, as text in cells; the renderers only lay it out. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qcompress.report.compare import WORST, Comparison, LayerComparison
from qcompress.report.document import KEPT, AccuracyFigures, GateResult, LayerReport, Report, badness
from qcompress.report.gates import failure_words, scaled
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

SHOW_ALL = 40
SHOW_WORST = 20


@dataclass(frozen=True)
class Column:
    """right: numbers. spare: how soon a narrow terminal drops it; 0: never."""

    title: str
    right: bool = True
    spare: int = 0


@dataclass(frozen=True)
class Table:
    """Cells by row; `dim` are the rows of kept tensors, `total` the last line."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    dim: frozenset[int] = frozenset()
    total: tuple[str, ...] | None = None

    def without(self, column: int) -> Table:
        def cut(cells: tuple[str, ...]) -> tuple[str, ...]:
            return cells[:column] + cells[column + 1 :]

        return replace(
            self,
            columns=self.columns[:column] + self.columns[column + 1 :],
            rows=tuple(map(cut, self.rows)),
            total=cut(self.total) if self.total else None,
        )

    def widths(self) -> list[int]:
        lines = [tuple(column.title for column in self.columns), *self.rows, *([self.total] if self.total else [])]
        return [max(map(len, cells)) for cells in zip(*lines, strict=True)]

    def fitted(self, width: int, gap: int) -> Table:
        """Without the columns that matter least, until `width` holds it or only those without `spare` are left."""
        table = self
        while sum(table.widths()) + gap * len(table.columns) > width:
            last = max(range(len(table.columns)), key=lambda index: table.columns[index].spare)
            if not table.columns[last].spare:
                break
            table = table.without(last)
        return table


@dataclass(frozen=True)
class View:
    """A title, (label, text) lines above the tables, and lines below them."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def view_report(report: Report) -> View:
    size = report.size
    facts = [
        ("size", f"{size_words(size.baseline_bytes)} -> {size_words(size.artifact_bytes)}{_ratio(size.ratio)}"),
        ("bits per weight", _bits_fact(report)),
        ("bytes", parts_words(report)),
        ("worst layer", _worst_fact(report.worst)),
    ]
    facts += [("accuracy", text) for text in accuracy_words(report)]
    facts += [("gate", gate_words(gate)) for gate in report.gates]
    layers, notes = _shown(report.layers)
    return View(name_words(report.artifact.name), tuple(facts), (_layer_table(layers, report),), tuple(notes))


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.2f}x)"


def _bits_fact(report: Report) -> str:
    size = report.size
    text = (
        f"{bits_words(size.bits_per_weight)} with side information, {bits_words(size.bits_per_weight_file)} whole file"
    )
    if size.entropy_bound_bytes is not None and size.compressed_weights:
        bound = bits_words(8 * size.entropy_bound_bytes / size.compressed_weights)
        text += f", entropy of the codes {bound}"
    return text


def parts_words(report: Report) -> str:
    parts = report.size.parts
    named = {
        "codes": parts.codes,
        "side information": parts.side_information,
        "kept": parts.kept,
        "header": parts.header,
        "index": parts.index,
    }
    sums = " + ".join(f"{name} {count:,}" for name, count in named.items() if count)
    return f"{sums} = {report.size.artifact_bytes:,}"


def _worst_fact(worst: LayerReport | None) -> str:
    return "not measured" if worst is None else f"{name_words(worst.name)} {_with_unit(worst.sqnr_db)}"


def _with_unit(sqnr_db: float | None) -> str:
    text = decibel_words(sqnr_db)
    return f"{text} dB" if text[-1].isdigit() else text


def accuracy_words(report: Report) -> list[str]:
    lines = []
    for item in report.accuracy or ():
        before = number_words(item.baseline, 4) + interval_words(item.baseline_interval)
        after = number_words(item.artifact, 4) + interval_words(item.artifact_interval)
        tuned = f", {number_words(item.untuned, 4)} before tuning" if item.untuned is not None else ""
        text = f"{name_words(item.metric)} {before} -> {after}{tuned}, drop {drop_words(item)}{_kmeans_words(item)}"
        lines.append(f"{text}, {count_words(item.samples, 'sample')}")
    return lines


def _kmeans_words(item: AccuracyFigures) -> str:
    """How the artifact stands to plain k-means."""
    if item.kmeans is None:
        return ""
    ratios = [(item.kmeans_ratio, "")]
    if item.untuned is not None:
        ratios.append((item.untuned_ratio, " before tuning"))
    shown = ", ".join(f"{number_words(ratio, 4)}{when}" for ratio, when in ratios if ratio is not None)
    return f", k-means alone {number_words(item.kmeans, 4)}" + (f" (ratio {shown})" if shown else "")


def interval_words(interval: tuple[float, float] | None) -> str:
    return f" (95 %: {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""


def gate_words(gate: GateResult) -> str:
    name = name_words(gate.name)
    if not gate.passed:
        return f"FAILED {name} {failure_words(gate)}"
    sign = "<=" if gate.name.startswith("max-") else ">="
    return f"passed {name} {gate_value(gate.name, gate.value)} {sign} {gate_value(gate.name, gate.limit)}"


def gate_value(name: str, value: float | None) -> str:
    """A gate's value or limit; a value of None is that of a gate which passed without any error to measure."""
    shown, unit = scaled(name, value)
    if shown is None or shown == math.inf:
        return "exact"
    return f"{shown:,}" if isinstance(shown, int) else f"{shown:.6g}{unit if unit == '%' else ''}"


def _shown(layers: Sequence[LayerReport]) -> tuple[list[LayerReport], list[str]]:
    """The layers to show, and the line that says how to see the others."""
    if len(layers) <= SHOW_ALL:
        return list(layers), []
    shown = sorted(layers, key=lambda layer: (badness(layer.sqnr_db), -layer.bytes))[:SHOW_WORST]
    return shown, [_more(len(layers), "worst SQNR")]


def _more(count: int, order: str) -> str:
    return f"{SHOW_WORST} of {count:,} tensors, {order} first; all of them: --format csv"


_LAYER_CELLS: tuple[tuple[Column, Callable[[LayerReport], str]], ...] = (
    (Column("layer", right=False), lambda layer: name_words(layer.name)),
    (Column("shape", right=False, spare=3), lambda layer: shape_words(layer.shape)),
    (Column("method", right=False, spare=1), lambda layer: name_words(layer.method)),
    (Column("bits"), lambda layer: width_words(layer.bits, layer.bits_per_weight, layer.method)),
    (Column("bytes"), lambda layer: size_words(layer.bytes)),
    (Column("b/weight", spare=2), lambda layer: bits_words(layer.bits_per_weight)),
    (Column("SQNR dB"), lambda layer: decibel_words(layer.sqnr_db)),
    (Column("rel. error", spare=4), lambda layer: _figure(layer, "relative_error")),
    (Column("entropy", spare=5), lambda layer: _figure(layer, "entropy")),
    (Column("sensitivity", spare=3), lambda layer: number_words(layer.sensitivity)),
    (Column("clipped", spare=6), lambda layer: share_words(layer.figures.clipped_share if layer.figures else None)),
    (Column("outliers", spare=7), lambda layer: share_words(layer.figures.outlier_share if layer.figures else None)),
)


def _figure(layer: LayerReport, name: str) -> str:
    return number_words(getattr(layer.figures, name)) if layer.figures else NOT_MEASURED


def _layer_table(layers: Sequence[LayerReport], report: Report) -> Table:
    whole = {
        "layer": f"all {count_words(len(report.layers), 'tensor')}",
        "shape": f"{report.size.weights:,}",
        "bytes": size_words(sum(layer.bytes for layer in report.layers)),
    }
    table = Table(
        columns=tuple(column for column, _ in _LAYER_CELLS),
        rows=tuple(tuple(cell(layer) for _, cell in _LAYER_CELLS) for layer in layers),
        dim=frozenset(index for index, layer in enumerate(layers) if layer.method == KEPT),
        total=tuple(whole.get(column.title, "") for column, _ in _LAYER_CELLS),
    )
    measured = any(layer.sensitivity is not None for layer in report.layers)
    return table if measured else table.without([column.title for column in table.columns].index("sensitivity"))


def view_comparison(comparison: Comparison) -> View:
    layers = list(comparison.layers)
    notes = []
    if len(layers) > SHOW_ALL:
        layers = sorted(layers, key=lambda layer: layer.largest_change, reverse=True)[:SHOW_WORST]
        notes.append(_more(len(comparison.layers), "largest change"))
    facts = [
        (f"gate {file.label}", gate_words(gate))
        for file, report in zip(comparison.files, comparison.reports, strict=True)
        for gate in report.gates
    ]
    facts += [
        (f"front {name_words(one.metric)}", ", ".join(point.label for point in one.front))
        for one in comparison.trade_offs
        if one.metric != WORST
    ]
    title = f"{count_words(len(comparison.files), 'artifact')}, changes against {comparison.files[0].label}"
    tables = (_file_table(comparison), _change_table(comparison, layers))
    return View(title, tuple(facts), tables, tuple(notes))


def _file_table(comparison: Comparison) -> Table:
    metrics = list(dict.fromkeys(item.metric for report in comparison.reports for item in report.accuracy or ()))
    rows = []
    for file, report in zip(comparison.files, comparison.reports, strict=True):
        measured = {item.metric: item for item in report.accuracy or ()}
        rows.append(
            (
                f"{file.label} {name_words(file.name)}",
                size_words(file.artifact_bytes),
                signed_size(file.bytes_change),
                number_words(file.ratio),
                bits_words(file.bits_per_weight),
                decibel_words(file.worst_sqnr_db),
                name_words(file.worst_layer or NOT_MEASURED),
                *(text for metric in metrics for text in _metric_cells(measured.get(metric))),
            )
        )
    columns = (
        Column("artifact", right=False),
        Column("size"),
        Column("change", spare=2),
        Column("ratio", spare=1),
        Column("b/weight"),
        Column("worst dB"),
        Column("worst layer", right=False, spare=3),
        *(column for metric in metrics for column in (Column(name_words(metric)), Column("drop", spare=4))),
    )
    return Table(columns, tuple(rows))


def _metric_cells(item: AccuracyFigures | None) -> tuple[str, str]:
    if item is None:
        return (NOT_MEASURED, NOT_MEASURED)
    return (number_words(item.artifact, 4), drop_words(item))


def drop_words(item: AccuracyFigures) -> str:
    return number_words(item.drop, 4) + interval_words(item.interval)


def signed_size(change: int | None) -> str:
    if change is None:
        return NOT_MEASURED
    return f"{'+' if change > 0 else '-' if change < 0 else ''}{size_words(abs(change))}"


def _change_table(comparison: Comparison, layers: Sequence[LayerComparison]) -> Table:
    labels = [file.label for file in comparison.files]
    columns = [Column("layer", right=False), *(Column(f"bytes {label}") for label in labels)]
    columns += [Column(f"dB {label}") for label in labels]
    columns += [Column(f"change {label}", spare=1) for label in labels[1:]]
    rows = []
    for layer in layers:
        sizes = (NOT_MEASURED if size is None else size_words(size) for size in layer.bytes)
        changes = ("-" if change is None else f"{change:+.1f} dB" for change in layer.sqnr_change_db[1:])
        rows.append((name_words(layer.name), *sizes, *map(decibel_words, layer.sqnr_db), *changes))
    return Table(tuple(columns), tuple(rows))
