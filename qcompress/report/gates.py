"""Limits held against a report: what passed, what failed, and what was never measured. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from qcompress.errors import GateFailed, UnmeasuredError, raise_all
from qcompress.report.document import AccuracyFigures, GateResult, Report
from qcompress.types import Gates

Checked: TypeAlias = GateResult | UnmeasuredError

_METRIC_MEND = "give a recipe with model, data and task, so that the metric is measured"


def check_gates(gates: Gates, report: Report) -> tuple[GateResult, ...]:
    """One result for each gate, size first, then quality. NaN never passes.

    max_size is held against the artifact on disk, max_bpw against the compressed weights with all their side
    information, min_sqnr against the worst compressed tensor. Raises UnmeasuredError (Refusals where several) for
    gates on what the report does not hold.
    """
    checked: list[Checked] = []
    if gates.max_size is not None:
        checked.append(_at_most("max-size", gates.max_size, report.size.artifact_bytes))
    if gates.max_bpw is not None:
        checked.append(_check_bits(gates.max_bpw, report))
    if gates.min_sqnr is not None:
        checked.append(_check_sqnr(gates.min_sqnr, report))
    checked += [_check_metric(f"min-metric {metric}", limit, report) for metric, limit in gates.min_metric.items()]
    checked += [_check_metric(f"max-drop {metric}", limit, report) for metric, limit in gates.max_drop.items()]
    raise_all([item for item in checked if isinstance(item, UnmeasuredError)])
    return tuple(item for item in checked if isinstance(item, GateResult))


def check_metrics(limits: Mapping[str, float], measured: Mapping[str, float]) -> tuple[GateResult, ...]:
    """One result for each least metric. Raises UnmeasuredError (Refusals where several) for what was not measured."""
    names = ", ".join(measured) or "none"
    raise_all(
        [
            UnmeasuredError(f"gate min-metric {metric}", f"{metric} was not measured (measured: {names})", _METRIC_MEND)
            for metric in limits
            if metric not in measured
        ]
    )
    return tuple(_at_least(f"min-metric {metric}", limit, measured[metric]) for metric, limit in limits.items())


def gate_error(results: Sequence[GateResult]) -> GateFailed | None:
    """The error that names every failed gate with its value and its limit, or None."""
    failed = [result for result in results if not result.passed]
    if not failed:
        return None
    mend = "loosen the limit or change the recipe"
    if len(failed) == 1:
        return GateFailed(f"gate {failed[0].name}", failure_words(failed[0]), mend)
    return GateFailed("gates", "; ".join(f"{result.name} {failure_words(result)}" for result in failed), mend)


def failure_words(result: GateResult) -> str:
    """Why a gate failed, with as many digits as tell value and limit apart: 2.201 bits per weight > 2.2."""
    sign = ">" if result.name.startswith("max-") else "<"
    value, limit = _apart(result.value, result.limit)
    unit = {"max-size": " bytes", "max-bpw": " bits per weight", "min-sqnr": " dB"}.get(result.name, "")
    return f"{value}{unit} {sign} {limit}"


def _apart(value: float | None, limit: float) -> tuple[str, str]:
    if value is None or math.isnan(value):
        return ("not a number", f"{limit:g}")
    if isinstance(value, int) and isinstance(limit, int):
        return (f"{value:,}", f"{limit:,}")
    for digits in range(4, 17):
        texts = (f"{value:.{digits}g}", f"{limit:.{digits}g}")
        if texts[0] != texts[1] and math.isclose(float(texts[1]), limit, rel_tol=1e-12):
            return texts
    return (repr(value), repr(limit))


def _check_bits(limit: float, report: Report) -> Checked:
    if report.size.bits_per_weight is None:
        return UnmeasuredError("gate max-bpw", "no tensor was compressed", "check the recipe's rules with --dry-run")
    return _at_most("max-bpw", limit, report.size.bits_per_weight)


def _check_sqnr(limit: float, report: Report) -> Checked:
    if not report.compressed:
        return UnmeasuredError("gate min-sqnr", "no tensor was compressed", "check the recipe's rules with --dry-run")
    for layer in report.compressed:
        if layer.sqnr_db is None and layer.tied_to is None and layer.weights:
            return UnmeasuredError(
                "gate min-sqnr", f"the error of {layer.name} was not measured", "add --baseline CHECKPOINT"
            )
    worst = report.worst
    if worst is None or worst.sqnr_db is None:
        return UnmeasuredError("gate min-sqnr", "no tensor's error was measured", "add --baseline CHECKPOINT")
    return _at_least("min-sqnr", limit, worst.sqnr_db)


def _check_metric(name: str, limit: float, report: Report) -> Checked:
    kind, metric = name.split(" ", 1)
    figures = _accuracy(metric, report)
    if figures is None:
        measured = ", ".join(item.metric for item in report.accuracy or ()) or "none"
        return UnmeasuredError(f"gate {name}", f"{metric} was not measured (measured: {measured})", _METRIC_MEND)
    return _at_least(name, limit, figures.artifact) if kind == "min-metric" else _at_most(name, limit, figures.drop)


def _accuracy(metric: str, report: Report) -> AccuracyFigures | None:
    return next((item for item in report.accuracy or () if item.metric == metric), None)


def _at_most(name: str, limit: float, value: float | None) -> GateResult:
    return GateResult(name=name, limit=limit, value=value, passed=value is not None and value <= limit)


def _at_least(name: str, limit: float, value: float | None) -> GateResult:
    return GateResult(name=name, limit=limit, value=value, passed=value is not None and value >= limit)
