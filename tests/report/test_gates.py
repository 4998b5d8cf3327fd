from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qcompress.errors import GateFailed, Refusals, ReportError, UnmeasuredError, group_lines
from qcompress.report.document import AccuracyFigures, LayerFigures, Report
from qcompress.report.gates import BaselineGates, check_gates, gate_errors, raise_failed
from qcompress.report.view import gate_words
from qcompress.types.plan import Gates
from report.examples import kept, layer, make_report


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
    assert (gate_errors([result]) == []) is passed


def test_all_gates_are_checked_and_named_in_order() -> None:
    gates = Gates(max_size=1, max_bpw=9, min_sqnr=1, min_metric={"top5": 1, "top1": 0}, max_drop={"top1": 1})
    results = check_gates(gates, TWO)
    names = ["max-size", "max-bpw", "min-sqnr", "min-metric top5", "min-metric top1", "max-drop top1"]
    assert [result.name for result in results] == names
    assert check_gates(Gates(), TWO) == ()
    assert gate_errors([]) == []


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
        (error,) = gate_errors([result])
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


def test_every_failure_is_a_line_with_value_and_limit() -> None:
    hint = "loosen the limit or change the recipe"
    with pytest.raises(GateFailed) as caught:
        raise_failed(check_gates(Gates(max_size=200, max_bpw=9, min_sqnr=12, max_drop={"top1": 0.01}), TWO))
    assert caught.value.exit_code == 4
    assert caught.value.lines() == [
        f"gate max-size: 216 bytes > 200; {hint}",
        f"gate min-sqnr: 10 dB < 12; {hint}",
        f"gate max-drop top1: 0.02 > 0.01; {hint}",
    ]
    with pytest.raises(GateFailed) as one:
        raise_failed(check_gates(Gates(max_size=200), TWO))
    assert one.value.lines() == [f"gate max-size: 216 bytes > 200; {hint}"]


def test_a_gate_that_several_artifacts_fail_is_one_line() -> None:
    results = check_gates(Gates(max_size=200, min_sqnr=12.5), TWO)
    errors = [error for name in ("a", "b", "c") for error in gate_errors(results, name)]
    hint = "loosen the limit or change the recipe"
    assert group_lines(errors[:1]) == [f"gate max-size: artifact 'a': 216 bytes > 200; {hint}"]
    assert group_lines(errors) == [
        f"gate max-size: 3 artifacts, first 'a': the limit is 200 bytes; {hint}",
        f"gate min-sqnr: 3 artifacts, first 'a': the limit is 12.5 dB; {hint}",
    ]


def test_a_near_miss_shows_the_digits_that_differ() -> None:
    (result,) = check_gates(Gates(max_bpw=3 - 1e-7), TWO)
    assert "3 bits per weight > 2.9999999" in str(gate_errors([result])[0])


def since(report: Report, growth: float | None = None, **drops: float) -> BaselineGates:
    return BaselineGates(report=report, where="old.json", max_growth=growth, max_drop=drops)


def grown(n_bytes: int) -> Report:
    """TWO with so many bytes."""
    return make_report(*TWO.layers, header_bytes=n_bytes - 96)


@pytest.mark.parametrize(
    ("then", "now", "limit", "passed"),
    [
        (1000, 1020, 0.02, True),
        (1000, 1021, 0.02, False),
        (1000, 1003, 0.003, True),
        (1000, 1000, 0.0, True),
        (1000, 1001, 0.0, False),
        (1000, 900, -0.1, True),
        (1000, 901, -0.1, False),
    ],
)
def test_growth_is_a_share_of_the_earlier_bytes(then: int, now: int, limit: float, passed: bool) -> None:
    (result,) = check_gates(Gates(), grown(now), since(grown(then), limit))
    assert (result.name, result.limit, result.passed) == ("max-growth", limit, passed)
    assert result.value == pytest.approx(now / then - 1, abs=1e-12)


def test_growth_is_told_in_per_cent() -> None:
    (failed,) = check_gates(Gates(), grown(1034), since(grown(1000), 0.02))
    assert gate_words(failed) == "FAILED max-growth 3.4% > 2%"
    (passed,) = check_gates(Gates(), grown(1000), since(grown(1000), 0.02))
    assert gate_words(passed) == "passed max-growth 0% <= 2%"


@pytest.mark.parametrize(
    ("then", "now", "limit", "passed"),
    [
        (0.01, 0.015, 0.005, True),
        (0.015, 0.02, 0.005, True),
        (0.01, 0.0151, 0.005, False),
        (0.02, 0.01, 0.0, True),
        (-0.01, 0.0, 0.005, False),
        (0.1, 0.2, 0.1, True),
        (0.7, 0.8, 0.1, True),
    ],
)
def test_a_further_drop_is_held_against_the_earlier_drop(then: float, now: float, limit: float, passed: bool) -> None:
    """Whatever the metric's direction, for a drop is positive where the artifact is worse."""
    for value in (0.7, 30.0):
        earlier, later = report_of(0.1, m=(value, then)), report_of(0.1, m=(value + 1, now))
        (result,) = check_gates(Gates(), later, since(earlier, m=limit))
        assert (result.name, result.passed) == ("max-drop m since the baseline", passed)
        assert result.value == pytest.approx(now - then, abs=1e-9)


def test_gates_on_change_stand_behind_the_others() -> None:
    gates = Gates(max_size=10**6, max_drop={"top5": 1})
    names = [result.name for result in check_gates(gates, TWO, since(TWO, 0.0, top1=0.0))]
    assert names == ["max-size", "max-drop top5", "max-growth", "max-drop top1 since the baseline"]


@pytest.mark.parametrize(
    ("earlier", "later", "message"),
    [
        (TWO, report_of(0.1, 0.1), "top1 was not measured (measured: none); give a recipe"),
        (report_of(0.1, 0.1, top5=(1, 0)), TWO, "old.json has no top1 (it has: top5); commit a report"),
        (
            replace(TWO, accuracy=(AccuracyFigures(metric="top1", baseline=1, artifact=1, drop=0, samples=9_999),)),
            TWO,
            "old.json measured 9,999 samples, this artifact 10; commit a report",
        ),
    ],
)
def test_a_drop_that_cannot_be_compared_is_an_error(earlier: Report, later: Report, message: str) -> None:
    with pytest.raises(UnmeasuredError) as caught:
        check_gates(Gates(), later, since(earlier, top1=1.0))
    assert str(caught.value).startswith(f"gate max-drop top1 since the baseline: {message}")


@pytest.mark.parametrize("bad", [math.nan, None])
def test_a_change_of_what_is_not_a_number_never_passes(bad: float | None) -> None:
    figures = AccuracyFigures(metric="top1", baseline=bad, artifact=bad, drop=bad, samples=10)
    broken = replace(TWO, accuracy=(figures,))
    for earlier, later in ((TWO, broken), (broken, TWO), (broken, broken)):
        (result,) = check_gates(Gates(), later, since(earlier, top1=math.inf))
        assert not result.passed


def test_a_baseline_of_another_checkpoint_is_refused_by_its_hash_or_its_tensors() -> None:
    one, other = replace(TWO, input_sha256="a" * 64), replace(TWO, input_sha256="b" * 64)
    with pytest.raises(
        ReportError, match=r"^old.json: is of another checkpoint than .*; write the baseline again"
    ) as c:
        check_gates(Gates(), one, since(other, 9.0))
    assert c.value.exit_code == 3
    for later, earlier in ((one, one), (one, TWO), (TWO, other)):
        assert check_gates(Gates(), later, since(earlier, 9.0))[0].passed
    for layers in (
        TWO.layers[:1],
        (*TWO.layers, kept("more")),
        (TWO.layers[0], replace(TWO.layers[1], shape=(16, 8))),
        (TWO.layers[0], replace(TWO.layers[1], dtype="F16")),
    ):
        with pytest.raises(ReportError, match=r"is of another network than .*: (w1|more) is not the same"):
            check_gates(Gates(), TWO, since(make_report(*layers), 9.0))
