from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qcompress.errors import Refusals, UnmeasuredError
from qcompress.report.document import AccuracyFigures, LayerFigures, Report
from qcompress.report.gates import check_gates, gate_error
from qcompress.types import Gates

from .examples import kept, layer, make_report


def report_of(*errors: float | None, **accuracy: tuple[float, float]) -> Report:
    """Tensors of these relative errors; each metric's value and drop."""
    layers = [layer(f"w{i}", None if e is None else LayerFigures(relative_error=e)) for i, e in enumerate(errors)]
    metrics = tuple(
        AccuracyFigures(metric=name, baseline=value + drop, artifact=value, drop=drop, samples=10)
        for name, (value, drop) in accuracy.items()
    )
    return replace(make_report(*layers), accuracy=metrics or None)


TWO = report_of(0.01, 0.1, top1=(0.7, 0.02), top5=(0.9, -0.01))
"""216 bytes, 3 bits per weight, 10 dB at worst."""


@pytest.mark.parametrize(
    ("gates", "value", "passed"),
    [
        (Gates(max_size=216), 216, True),
        (Gates(max_size=215), 216, False),
        (Gates(max_bpw=3.0), 3.0, True),
        (Gates(max_bpw=2.999), 3.0, False),
        (Gates(min_sqnr=10.0), 10.0, True),
        (Gates(min_sqnr=10.001), 10.0, False),
        (Gates(min_metric={"top1": 0.7}), 0.7, True),
        (Gates(min_metric={"top1": 0.71}), 0.7, False),
        (Gates(min_metric={"top5": 0.9}), 0.9, True),
        (Gates(max_drop={"top1": 0.02}), 0.02, True),
        (Gates(max_drop={"top1": 0.01}), 0.02, False),
        (Gates(max_drop={"top5": 0.0}), -0.01, True),
    ],
)
def test_each_gate(gates: Gates, value: float, passed: bool) -> None:
    (result,) = check_gates(gates, TWO)
    assert result.value == pytest.approx(value)
    assert result.passed is passed
    assert (gate_error([result]) is None) is passed


def test_all_gates_are_checked_and_named_in_order() -> None:
    gates = Gates(max_size=1, max_bpw=9, min_sqnr=1, min_metric={"top5": 1, "top1": 0}, max_drop={"top1": 1})
    results = check_gates(gates, TWO)
    names = ["max-size", "max-bpw", "min-sqnr", "min-metric top5", "min-metric top1", "max-drop top1"]
    assert [result.name for result in results] == names
    assert check_gates(Gates(), TWO) == ()
    assert gate_error([]) is None


@pytest.mark.parametrize(
    ("report", "value", "passed"),
    [
        (report_of(0.0, 0.0), math.inf, True),
        (report_of(0.0, 0.01), 20, True),
        (report_of(0.01, math.nan), math.nan, False),
        (report_of(math.nan, 0.01), math.nan, False),
        (report_of(0.01, math.inf), -math.inf, False),
    ],
)
def test_the_worst_tensor_decides(report: Report, value: float, passed: bool) -> None:
    (result,) = check_gates(Gates(min_sqnr=-1000.0), report)
    assert result.value == pytest.approx(value, nan_ok=True)
    assert result.passed is passed


@pytest.mark.parametrize("bad", [math.nan, None])
def test_what_is_not_a_number_never_passes(bad: float | None) -> None:
    figures = AccuracyFigures(metric="top1", baseline=bad, artifact=bad, drop=bad, samples=1)
    report = replace(TWO, accuracy=(figures,))
    for gates in (Gates(min_metric={"top1": -math.inf}), Gates(max_drop={"top1": math.inf})):
        (result,) = check_gates(gates, report)
        assert not result.passed
        error = gate_error([result])
        assert error is not None
        assert "not a number" in str(error)


@pytest.mark.parametrize(
    ("gates", "report", "message"),
    [
        (
            Gates(min_sqnr=1),
            report_of(0.1, None),
            "gate min-sqnr: the error of w1 was not measured; add --baseline CHECKPOINT",
        ),
        (Gates(min_sqnr=1), make_report(kept("a")), "gate min-sqnr: no tensor was compressed"),
        (Gates(max_bpw=1), make_report(kept("a")), "gate max-bpw: no tensor was compressed"),
        (
            Gates(min_metric={"top1": 0.5}),
            report_of(0.1),
            "gate min-metric top1: top1 was not measured (measured: none)",
        ),
        (Gates(max_drop={"bleu": 0.5}), TWO, "gate max-drop bleu: bleu was not measured (measured: top1, top5)"),
    ],
)
def test_a_gate_on_what_was_not_measured_is_an_error(gates: Gates, report: Report, message: str) -> None:
    with pytest.raises(UnmeasuredError) as caught:
        check_gates(gates, report)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 3


def test_every_unmeasured_gate_is_named_even_beside_a_failed_one() -> None:
    with pytest.raises(Refusals) as caught:
        check_gates(Gates(max_size=1, min_sqnr=1, min_metric={"top1": 1}), report_of(None))
    assert [line.split(":")[0] for line in caught.value.lines()] == ["gate min-sqnr", "gate min-metric top1"]


def test_the_error_lists_every_failure_with_value_and_limit() -> None:
    error = gate_error(check_gates(Gates(max_size=200, max_bpw=9, min_sqnr=12, max_drop={"top1": 0.01}), TWO))
    assert error is not None
    assert error.exit_code == 4
    assert error.what == "max-size 216 bytes > 200; min-sqnr 10 dB < 12; max-drop top1 0.02 > 0.01"
    one = gate_error(check_gates(Gates(max_size=200), TWO))
    assert str(one).startswith("gate max-size: 216 bytes > 200; ")


def test_a_near_miss_shows_the_digits_that_differ() -> None:
    (result,) = check_gates(Gates(max_bpw=3 - 1e-7), TWO)
    assert "3 bits per weight > 2.9999999" in str(gate_error([result]))
