"""Several reports side by side, by file and by tensor, each held against the first. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompress.report.document import LayerReport, Report
from qcompress.report.document_json import plain, report_json

SCHEMA = "qcompress.comparison/1"


@dataclass(frozen=True, kw_only=True)
class FileComparison:
    """One artifact. `bytes_change` is against the first; worst is its compressed tensor of least SQNR."""

    label: str
    name: str
    artifact_bytes: int
    bytes_change: int
    ratio: float | None
    bits_per_weight: float | None
    worst_layer: str | None
    worst_sqnr_db: float | None


@dataclass(frozen=True, kw_only=True)
class LayerComparison:
    """One tensor name across the artifacts, in their order; None where an artifact lacks it or it was not measured.

    bytes_change, sqnr_change_db  against the first artifact; 0 dB where neither has an error
    """

    name: str
    bytes: tuple[int | None, ...]
    bytes_change: tuple[int | None, ...]
    sqnr_db: tuple[float | None, ...]
    sqnr_change_db: tuple[float | None, ...]

    @property
    def largest_change(self) -> tuple[float, int]:
        """A key that grows with the change: by dB, then by bytes."""
        decibels = max((abs(change) for change in self.sqnr_change_db if change is not None), default=0.0)
        return (decibels, max((abs(change) for change in self.bytes_change if change is not None), default=0))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    files: tuple[FileComparison, ...]
    layers: tuple[LayerComparison, ...]
    reports: tuple[Report, ...]


def compare_reports(reports: Sequence[Report]) -> Comparison:
    """The reports side by side; tensors in the order in which they are first met."""
    layers = [{layer.name: layer for layer in report.layers} for report in reports]
    names = dict.fromkeys(name for by_name in layers for name in by_name)
    return Comparison(
        files=tuple(_compare_file(index, report, reports) for index, report in enumerate(reports)),
        layers=tuple(_compare_layer(name, [by_name.get(name) for by_name in layers]) for name in names),
        reports=tuple(reports),
    )


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison in plain JSON types, the whole reports at its end."""
    return {
        "schema": SCHEMA,
        "files": [plain(file) for file in comparison.files],
        "layers": [plain(layer) for layer in comparison.layers],
        "reports": [report_json(report) for report in comparison.reports],
    }


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
