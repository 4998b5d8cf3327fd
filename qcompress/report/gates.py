"""Limits are held against a report here: each passes, fails, or is refused as never measured. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from qcompress.errors import GateFailed, ReportError, Subject, UnmeasuredError, raise_all
from qcompress.report.document import AccuracyFigures, GateResult, Report
from qcompress.types.plan import Gates

MAX_GROWTH = "max-growth"
SINCE = " since the baseline"
"""Ends the name of a gate that is held against an earlier report: "max-drop top1 since the baseline"."""

COMPRESS_HINT = "compress it by rules that match some of its weights"
METRIC_HINT = "give a recipe with model, data and task, so that the metric is measured"
BASELINE_HINT = "commit a report whose artifact was measured like this one"


@dataclass(frozen=True, kw_only=True)
class BaselineGates:
    """Limits on what changed since an earlier report of the same checkpoint; `where` names it in errors.

    max_growth  of the artifact's bytes, as a share of the earlier ones: 0.02 is 2 %
    max_drop    metric -> how much larger its drop may be than the earlier one
    """

    report: Report
    where: str
    max_growth: float | None = None
    max_drop: Mapping[str, float] = field(default_factory=dict)


def check_gates(gates: Gates, report: Report, since: BaselineGates | None = None) -> tuple[GateResult, ...]:
    """One result for each gate, size first, then quality, then what changed since the baseline. NaN never passes.

    max_size is held against the artifact on disk, max_bpw against the compressed weights with all their side
    information, min_sqnr against the worst compressed tensor. Raises UnmeasuredError (Refusals where several) for
    gates on what the report or the baseline does not hold, ReportError where the baseline is of another checkpoint.
    """
    checks: list[Callable[[], GateResult]] = []
    if gates.max_size is not None:
        checks.append(partial(_at_most, "max-size", gates.max_size, report.size.artifact_bytes))
    if gates.max_bpw is not None:
        checks.append(partial(_check_bits, gates.max_bpw, report))
    if gates.min_sqnr is not None:
        checks.append(partial(_check_sqnr, gates.min_sqnr, report))
    for kind, limits in (("min-metric", gates.min_metric), ("max-drop", gates.max_drop)):
        checks += [partial(_check_metric, kind, metric, limit, report) for metric, limit in limits.items()]
    if since is not None:
        _refuse_other_input(report, since)
        if since.max_growth is not None:
            checks.append(partial(_check_growth, since.max_growth, report, since.report))
        checks += [
            partial(_check_further_drop, metric, limit, report, since) for metric, limit in since.max_drop.items()
        ]
    results, unmeasured = [], []
    for check in checks:
        try:
            results.append(check())
        except UnmeasuredError as error:
            unmeasured.append(error)
    raise_all(unmeasured)
    return tuple(results)


def _check_bits(limit: float, report: Report) -> GateResult:
    if report.size.bits_per_weight is None:
        raise UnmeasuredError("gate max-bpw", "no tensor was compressed", COMPRESS_HINT)
    return _at_most("max-bpw", limit, report.size.bits_per_weight)


def _check_sqnr(limit: float, report: Report) -> GateResult:
    if not report.compressed:
        raise UnmeasuredError("gate min-sqnr", "no tensor was compressed", COMPRESS_HINT)
    hint = "add --baseline CHECKPOINT"
    for layer in report.compressed:
        if layer.sqnr_db is None and layer.tied_to is None and layer.weights:
            raise UnmeasuredError("gate min-sqnr", f"the error of {layer.name} was not measured", hint)
    if report.worst is None:
        raise UnmeasuredError("gate min-sqnr", "no tensor's error was measured", hint)
    return _at_least("min-sqnr", limit, report.worst.sqnr_db)


def _check_metric(kind: str, metric: str, limit: float, report: Report) -> GateResult:
    name = f"{kind} {metric}"
    figures = _measured(name, metric, report)
    return _at_least(name, limit, figures.artifact) if kind == "min-metric" else _at_most(name, limit, figures.drop)


def _refuse_other_input(report: Report, since: BaselineGates) -> None:
    earlier = since.report
    hint = "write the baseline again with `qcompress report ARTIFACT --json FILE`, from an artifact of this checkpoint"
    if report.input_sha256 is not None and earlier.input_sha256 is not None:
        if report.input_sha256 == earlier.input_sha256:
            return
        what = f"is of another checkpoint than {report.artifact.name} (the hashes of their inputs differ)"
        raise ReportError(since.where, what, hint)
    tensors, earlier_tensors = ({one.name: (one.shape, one.dtype) for one in of.layers} for of in (report, earlier))
    if tensors != earlier_tensors:
        name = min(dict(tensors.items() ^ earlier_tensors.items()))
        what = f"is of another network than {report.artifact.name}: {name} is not the same in both"
        raise ReportError(since.where, what, hint)


def _check_growth(limit: float, report: Report, earlier: Report) -> GateResult:
    now, then = report.size.artifact_bytes, earlier.size.artifact_bytes
    return _at_most(MAX_GROWTH, limit, (now - then) / then if then else math.inf)


def _check_further_drop(metric: str, limit: float, report: Report, since: BaselineGates) -> GateResult:
    """How much larger the drop is than that of the baseline, whose samples must be as many."""
    name = f"max-drop {metric}{SINCE}"
    now, then = _measured(name, metric, report), since.report.measured.get(metric)
    if then is None:
        what = f"{since.where} has no {metric} (it has: {', '.join(since.report.measured) or 'none'})"
        raise UnmeasuredError(f"gate {name}", what, BASELINE_HINT)
    if then.samples != now.samples:
        what = f"{since.where} measured {then.samples:,} samples, this artifact {now.samples:,}"
        raise UnmeasuredError(f"gate {name}", what, BASELINE_HINT)
    if now.drop is None or then.drop is None:
        return _at_most(name, limit, None)
    # Stored drops have 6 significant digits: what lies below the last of them is not a difference.
    digits = 6 - _exponent(max(abs(now.drop), abs(then.drop)))
    return _at_most(name, limit, round(now.drop - then.drop, digits))


def _exponent(value: float) -> int:
    """How many digits stand before the decimal point; less than 0 for 0.001."""
    return math.floor(math.log10(value)) + 1 if value and math.isfinite(value) else 0


def _measured(name: str, metric: str, report: Report) -> AccuracyFigures:
    found = report.measured.get(metric)
    if found is None:
        what = f"{metric} was not measured (measured: {', '.join(report.measured) or 'none'})"
        raise UnmeasuredError(f"gate {name}", what, METRIC_HINT)
    return found


def check_metrics(
    limits: Mapping[str, float], measured: Mapping[str, float], kind: Literal["min-metric", "max-drop"] = "min-metric"
) -> tuple[GateResult, ...]:
    """One result for each metric's least value, or largest drop.

    raises  UnmeasuredError (Refusals where several) for what was not measured
    """
    what = f"was not measured (measured: {', '.join(measured) or 'none'})"
    missing = [metric for metric in limits if metric not in measured]
    raise_all([UnmeasuredError(f"gate {kind} {metric}", f"{metric} {what}", METRIC_HINT) for metric in missing])
    check = _at_least if kind == "min-metric" else _at_most
    return tuple(check(f"{kind} {metric}", limit, measured[metric]) for metric, limit in limits.items())


def _at_most(name: str, limit: float, value: float | None) -> GateResult:
    return GateResult(name=name, limit=limit, value=value, passed=value is not None and value <= limit)


def _at_least(name: str, limit: float, value: float | None) -> GateResult:
    return GateResult(name=name, limit=limit, value=value, passed=value is not None and value >= limit)


def gate_errors(results: Sequence[GateResult], artifact: str | None = None) -> list[GateFailed]:
    """An error for each gate that did not hold, with its value and its limit; `artifact` is named where given."""
    subject = None if artifact is None else Subject(artifact, kind="artifact")
    hint = "loosen the limit or change the recipe"
    return [
        GateFailed(f"gate {result.name}", failure_words(result), hint, subject, f"the limit is {limit_words(result)}")
        for result in results
        if not result.passed
    ]


def raise_failed(results: Sequence[GateResult]) -> None:
    """Raise GateFailed, of several GatesFailed, where a gate did not hold."""
    raise_all(gate_errors(results))


def failure_words(result: GateResult) -> str:
    """Why a gate failed, with as many digits as tell value and limit apart: 2.201 bits per weight > 2.2."""
    sign = ">" if result.name.startswith("max-") else "<"
    (measured, unit), (most, _) = scaled(result.name, result.value), scaled(result.name, result.limit)
    value, limit = _apart(measured, most or 0)
    return f"{value}{unit} {sign} {limit}{unit if unit == '%' else ''}"


def limit_words(result: GateResult) -> str:
    """A gate's limit as its failure tells it: 2.2 bits per weight."""
    limit, unit = scaled(result.name, result.limit)
    return f"{_apart(None, limit or 0)[1] if not isinstance(limit, int) else f'{limit:,}'}{unit}"


def scaled(name: str, value: float | None) -> tuple[float | None, str]:
    """A gate's value or limit in the unit that people read, and that unit: growth in per cent."""
    if name == MAX_GROWTH:
        return (None if value is None else 100 * value, "%")
    return (value, {"max-size": " bytes", "max-bpw": " bits per weight", "min-sqnr": " dB"}.get(name, ""))


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
