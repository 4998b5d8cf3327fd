"""Several reports are compared here, by file and by tensor, each held against the first. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qcompress.report.document import AccuracyFigures, LayerReport, Report
from qcompress.report.document_json import AGAIN, REPORT
from qcompress.types.document import Document, json_text
from qcompress.types.figures import figure

WORST = "worst_sqnr_db"
LARGEST = 1e300
"""Beyond it a value is no number to compare by: an axis that held it would leave the floats."""

Measured: TypeAlias = Mapping[str, tuple[float | None, tuple[float, float] | None]]
"""A label's value, and its interval where there is one."""


@dataclass(frozen=True, kw_only=True)
class FileComparison:
    """One artifact."""

    # fmt: off
    label: str = field(metadata=figure(
        "label", "text", "A, B, C: the artifacts in the order in which they were given", short=" "))
    name: str
    artifact_bytes: int
    bytes_change: int = field(metadata=figure(
        "change in bytes", "bytes", "bytes less those of the first artifact", short="change", spare=2))
    ratio: float | None
    bits_per_weight: float | None
    worst_sqnr_db: float | None = field(metadata=figure(
        "worst SQNR", "decibels", "the least SQNR of the compressed tensors, in dB", other=("worst dB",)))
    worst_layer: str | None = field(metadata=figure(
        "worst layer", "text", "the compressed tensor of least SQNR", spare=3))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class LayerComparison:
    """One tensor name across the artifacts, in their order; null where an artifact lacks it or it was not measured."""

    # fmt: off
    name: str
    bytes: tuple[int | None, ...]
    bytes_change: tuple[int | None, ...]
    sqnr_db: tuple[float | None, ...]
    sqnr_change_db: tuple[float | None, ...] = field(metadata=figure(
        "change in SQNR", "decibels", "SQNR less that of the first artifact, in dB; positive is better",
        "0 where neither has an error", short="change", spare=1))
    # fmt: on

    @property
    def largest_change(self) -> tuple[float, int]:
        """A key that grows with the change: by dB, then by bytes."""
        decibels = max((abs(change) for change in self.sqnr_change_db if change is not None), default=0.0)
        return (decibels, max((abs(change) for change in self.bytes_change if change is not None), default=0))


@dataclass(frozen=True, kw_only=True)
class TradePoint:
    """One artifact's size and quality."""

    # fmt: off
    label: str
    artifact_bytes: int
    value: float
    interval: tuple[float, float] | None
    pareto_front: bool = field(metadata=figure(
        "Pareto front", "flag", "artifacts that none beats: no other is as small and as good, and better in one",
        other=("front",)))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Size against one quality, a metric or worst_sqnr_db, of the artifacts that have a number for it."""

    # fmt: off
    metric: str
    higher_is_better: bool = field(metadata=figure(
        "higher is better", "flag", "whether a larger value of the metric is the better one"))
    points: tuple[TradePoint, ...]
    # fmt: on

    @property
    def front(self) -> tuple[TradePoint, ...]:
        """The points of the Pareto front, smallest first."""
        return tuple(sorted((p for p in self.points if p.pareto_front), key=lambda p: (p.artifact_bytes, p.label)))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several reports, in the order of `files`."""

    # fmt: off
    files: tuple[FileComparison, ...]
    trade_offs: tuple[TradeOff, ...] = field(metadata=figure(
        "trade-offs", "", "size against quality of several artifacts, with their Pareto front",
        "for each metric that two of them have, else for worst_sqnr_db"))
    layers: tuple[LayerComparison, ...]
    reports: tuple[Report, ...]
    # fmt: on

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that any of them has, in the order in which they are first met."""
        return tuple(dict.fromkeys(metric for report in self.reports for metric in report.measured))


def compare_reports(reports: Sequence[Report]) -> Comparison:
    """The reports side by side; tensors in the order in which they are first met."""
    layers = [{layer.name: layer for layer in report.layers} for report in reports]
    names = dict.fromkeys(name for by_name in layers for name in by_name)
    files = tuple(_compare_file(index, report, reports) for index, report in enumerate(reports))
    return Comparison(
        files=files,
        trade_offs=_trade_offs(files, reports),
        layers=tuple(_compare_layer(name, [by_name.get(name) for by_name in layers]) for name in names),
        reports=tuple(reports),
    )


COMPARISON = Document(Comparison, "qcompress.comparison/1", "comparison", AGAIN, whole=frozenset({"reports"}))


def comparison_text(comparison: Comparison) -> str:
    """The comparison as JSON, the whole reports at its end."""
    document = COMPARISON.plain(comparison)
    return json_text({**document, "reports": [REPORT.plain(report) for report in comparison.reports]})


def _compare_file(index: int, report: Report, reports: Sequence[Report]) -> FileComparison:
    worst = report.worst
    return FileComparison(
        label=chr(ord("A") + index) if len(reports) <= 26 else str(index + 1),
        name=report.artifact.name,
        artifact_bytes=report.size.artifact_bytes,
        bytes_change=report.size.artifact_bytes - reports[0].size.artifact_bytes,
        ratio=report.size.ratio,
        bits_per_weight=report.size.bits_per_weight,
        worst_layer=worst.name if worst else None,
        worst_sqnr_db=worst.sqnr_db if worst else None,
    )


def _compare_layer(name: str, layers: Sequence[LayerReport | None]) -> LayerComparison:
    sizes = tuple(layer.bytes if layer else None for layer in layers)
    decibels = tuple(layer.sqnr_db if layer else None for layer in layers)
    return LayerComparison(
        name=name,
        bytes=sizes,
        bytes_change=tuple(None if size is None or sizes[0] is None else size - sizes[0] for size in sizes),
        sqnr_db=decibels,
        sqnr_change_db=tuple(_difference(value, decibels[0]) for value in decibels),
    )


def _difference(value: float | None, first: float | None) -> float | None:
    if value is None or first is None:
        return None
    # Infinity less infinity is not a number, but two exact tensors do not differ.
    return 0.0 if value == first else value - first


def _trade_offs(files: Sequence[FileComparison], reports: Sequence[Report]) -> tuple[TradeOff, ...]:
    """One for each metric that two artifacts or more have; without any, one for the worst SQNR."""
    found: dict[str, dict[str, AccuracyFigures]] = {}
    for file, report in zip(files, reports, strict=True):
        for metric, item in report.measured.items():
            found.setdefault(metric, {})[file.label] = item
    sizes = {file.label: file.artifact_bytes for file in files}
    made = []
    for metric, items in found.items():
        measured = {label: (one.artifact, one.artifact_interval) for label, one in items.items()}
        made.append(_trade_off(metric, _higher_is_better(list(items.values())), measured, sizes))
    made = [one for one in made if len(one.points) > 1]
    worst = _trade_off(WORST, True, {file.label: (file.worst_sqnr_db, None) for file in files}, sizes)
    return tuple(made) or ((worst,) if len(worst.points) > 1 else ())


def _trade_off(metric: str, higher: bool, measured: Measured, sizes: Mapping[str, int]) -> TradeOff:
    values = {label: value for label, (value, _) in measured.items() if value is not None and abs(value) < LARGEST}

    def beaten(label: str) -> bool:
        own = (-sizes[label], values[label] if higher else -values[label])
        others = ((-sizes[other], values[other] if higher else -values[other]) for other in values)
        return any(a >= own[0] and b >= own[1] and (a, b) != own for a, b in others)

    points = tuple(
        TradePoint(
            label=label,
            artifact_bytes=sizes[label],
            value=value,
            interval=_drawable(measured[label][1]),
            pareto_front=not beaten(label),
        )
        for label, value in values.items()
    )
    return TradeOff(metric=metric, higher_is_better=higher, points=points)


def _drawable(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return interval if interval is not None and all(abs(end) < LARGEST for end in interval) else None


def _higher_is_better(items: Sequence[AccuracyFigures]) -> bool:
    """Read off the sign of a drop: it is positive where the artifact is worse."""
    for item in items:
        if item.baseline is not None and item.artifact is not None and item.drop and item.baseline != item.artifact:
            return (item.drop > 0) == (item.baseline > item.artifact)
    return True
