"""Reports become views here, titles and tables of text, which the renderers only lay out. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qcompress.report.compare import WORST, Comparison, LayerComparison
from qcompress.report.document import KEPT, AccuracyFigures, GateResult, LayerReport, Report, SizeFigures, badness
from qcompress.report.gates import failure_words, scaled
from qcompress.types.config import Shape

NOT_MEASURED = "-"

SHOW_ALL = 40
SHOW_WORST = 20
"""Of more than SHOW_ALL tensors a table shows so many."""


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


LAYER_CELLS: tuple[tuple[Column, Callable[[LayerReport], str]], ...] = (
    (Column("layer", right=False), lambda layer: name_words(layer.name)),
    (Column("shape", right=False, spare=3), lambda layer: shape_words(layer.shape)),
    (Column("method", right=False, spare=1), lambda layer: name_words(layer.method)),
    (Column("bits"), lambda layer: width_words(layer.bits, layer.bits_per_weight, layer.method)),
    (Column("bytes"), lambda layer: size_words(layer.bytes)),
    (Column("b/weight", spare=2), lambda layer: bits_words(layer.bits_per_weight)),
    (Column("SQNR dB"), lambda layer: decibel_words(layer.sqnr_db)),
    (Column("rel. error", spare=4), lambda layer: number_words(layer.measured.relative_error)),
    (Column("entropy", spare=5), lambda layer: number_words(layer.measured.entropy)),
    (Column("sensitivity", spare=3), lambda layer: number_words(layer.sensitivity)),
    (Column("clipped", spare=6), lambda layer: share_words(layer.measured.clipped_share)),
    (Column("outliers", spare=7), lambda layer: share_words(layer.measured.outlier_share)),
)


def view_report(report: Report) -> View:
    size, worst = report.size, report.worst
    ratio = "" if size.ratio is None else f" ({size.ratio:.2f}x)"
    facts = [
        ("size", f"{size_words(size.baseline_bytes)} -> {size_words(size.artifact_bytes)}{ratio}"),
        ("bits per weight", _bits_fact(size)),
        ("bytes", _parts_words(size)),
        ("worst layer", "not measured" if worst is None else f"{name_words(worst.name)} {sqnr_words(worst.sqnr_db)}"),
    ]
    facts += [("accuracy", accuracy_line(item)) for item in report.accuracy or ()]
    facts += [("gate", gate_words(gate)) for gate in report.gates]
    layers, notes = _shown(report.layers)
    return View(name_words(report.artifact.name), tuple(facts), (_layer_table(layers, report),), tuple(notes))


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
    text = f"{name_words(item.metric)} {before} -> {after}{tuned}, drop {drop_words(item)}{_kmeans_words(item)}"
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


def _layer_table(layers: Sequence[LayerReport], report: Report) -> Table:
    whole = {
        "layer": f"all {count_words(len(report.layers), 'tensor')}",
        "shape": f"{report.size.weights:,}",
        "bytes": size_words(sum(layer.bytes for layer in report.layers)),
    }
    table = Table(
        columns=tuple(column for column, _ in LAYER_CELLS),
        rows=tuple(tuple(cell(layer) for _, cell in LAYER_CELLS) for layer in layers),
        dim=frozenset(index for index, layer in enumerate(layers) if layer.method == KEPT),
        total=tuple(whole.get(column.title, "") for column, _ in LAYER_CELLS),
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
    rows = []
    for file, report in zip(comparison.files, comparison.reports, strict=True):
        rows.append(
            (
                f"{file.label} {name_words(file.name)}",
                size_words(file.artifact_bytes),
                signed_size(file.bytes_change),
                number_words(file.ratio),
                bits_words(file.bits_per_weight),
                decibel_words(file.worst_sqnr_db),
                name_words(file.worst_layer or NOT_MEASURED),
                *(text for metric in comparison.metrics for text in metric_words(report.measured.get(metric))),
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
        *(column for metric in comparison.metrics for column in (Column(name_words(metric)), Column("drop", spare=4))),
    )
    return Table(columns, tuple(rows))


def metric_words(item: AccuracyFigures | None) -> tuple[str, str]:
    """A metric of the artifact, and its drop."""
    if item is None:
        return (NOT_MEASURED, NOT_MEASURED)
    return (number_words(item.artifact, 4), drop_words(item))


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


def size_words(n_bytes: int) -> str:
    """A size with three significant digits in powers of 1000: 812 B, 1.21 MB."""
    value, unit = float(n_bytes), "B"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{n_bytes} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def signed_size(change: int | None) -> str:
    if change is None:
        return NOT_MEASURED
    return f"{'+' if change > 0 else '-' if change < 0 else ''}{size_words(abs(change))}"


def decibel_words(sqnr_db: float | None) -> str:
    """An SQNR with one decimal; exact where there is no error, nan where it is not a number."""
    if sqnr_db is None:
        return NOT_MEASURED
    return "exact" if sqnr_db == math.inf else f"{sqnr_db:.1f}"


def sqnr_words(sqnr_db: float | None) -> str:
    """The same with its unit."""
    text = decibel_words(sqnr_db)
    return f"{text} dB" if text[-1].isdigit() else text


def number_words(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits."""
    return NOT_MEASURED if value is None else f"{value:.{digits}g}"


def bits_words(value: float | None) -> str:
    """Bits per weight with three decimals: the third is what a scale per channel costs."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def width_words(bits: int | None, bits_per_weight: float | None, method: str) -> str:
    """The bits of a code; of codes without a bound what a weight has taken."""
    if bits is None and method != KEPT and bits_per_weight is not None:
        return f"{bits_per_weight:.2f}"
    return NOT_MEASURED if bits is None else str(bits)


def share_words(share: float | None) -> str:
    """A share in per cent."""
    return NOT_MEASURED if share is None else f"{100 * share:.3g}%"


def shape_words(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def interval_words(interval: tuple[float, float] | None) -> str:
    return f" (95 %: {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""


def drop_words(item: AccuracyFigures) -> str:
    return number_words(item.drop, 4) + interval_words(item.interval)


def name_words(name: str) -> str:
    """A name on one line: what a terminal would obey instead of print is escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def count_words(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
