"""Which of several artifacts are worth having: the Pareto front, against a slower way to find it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompress.report.compare import compare_reports
from qcompress.report.document import AccuracyFigures, LayerFigures, Report
from qcompress.report.render import render
from report.examples import layer, make_report


def sized(n_bytes: int, metric: str = "top1", value: float | None = None, drop: float | None = 0.0) -> Report:
    """An artifact of so many bytes, and one figure of accuracy."""
    report = make_report(layer("w", LayerFigures(relative_error=0.1)), header_bytes=n_bytes - 48)
    if value is None and drop is None:
        return report
    baseline = 0.5 if value is None else value + (drop or 0.0)
    figures = AccuracyFigures(metric=metric, baseline=baseline, artifact=value, drop=drop, samples=10)
    return replace(report, accuracy=(figures,))


points = st.lists(st.tuples(st.integers(100, 110), st.integers(0, 5)), min_size=2, max_size=9)


@given(points)
def test_the_front_holds_the_best_of_every_size(sizes: list[tuple[int, int]]) -> None:
    (found,) = compare_reports([sized(n_bytes, value=float(value)) for n_bytes, value in sizes]).trade_offs
    for (n_bytes, value), point in zip(sizes, found.points, strict=True):
        best_no_larger = max(v for n, v in sizes if n <= n_bytes)
        best_smaller = max((v for n, v in sizes if n < n_bytes), default=-1)
        assert point.pareto_front == (value == best_no_larger and value > best_smaller)
        assert (point.artifact_bytes, point.value) == (n_bytes, value)
    assert [point.artifact_bytes for point in found.front] == sorted(point.artifact_bytes for point in found.front)
    assert any(point.pareto_front for point in found.points)


@given(points)
def test_the_front_of_a_loss_is_that_of_its_negative(sizes: list[tuple[int, int]]) -> None:
    higher = compare_reports([sized(n, "top1", float(v), 1.0) for n, v in sizes]).trade_offs[0]
    # What grows where the artifact is worse is a loss: its drop is positive though its figure is the larger one.
    lower = compare_reports(
        [
            replace(
                sized(n),
                accuracy=(AccuracyFigures(metric="ppl", baseline=-v - 1.0, artifact=float(-v), drop=1.0, samples=9),),
            )
            for n, v in sizes
        ]
    ).trade_offs[0]
    assert (higher.higher_is_better, lower.higher_is_better) == (True, False)
    assert [p.pareto_front for p in higher.points] == [p.pareto_front for p in lower.points]


def test_what_was_not_measured_is_no_point() -> None:
    found = compare_reports([sized(100, value=1.0), sized(90, value=2.0), sized(80, value=None)])
    (one,) = found.trade_offs
    assert [point.label for point in one.points] == ["A", "B"]
    assert [point.label for point in one.front] == ["B"]


def test_without_a_metric_of_two_artifacts_the_worst_tensor_stands_for_quality() -> None:
    found = compare_reports([sized(100, value=None, drop=None), sized(90, "bleu", 1.0)])
    (one,) = found.trade_offs
    assert (one.metric, one.higher_is_better, len(one.points)) == ("worst_sqnr_db", True, 2)
    assert [point.label for point in one.front] == ["B"]
    exact = make_report(layer("w", LayerFigures(relative_error=0.0)))
    assert compare_reports([exact, exact]).trade_offs == ()


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_texts_name_the_front_and_each_drop(form: str) -> None:
    text = render([sized(100, value=0.9), sized(90, value=0.8, drop=0.125), sized(95, value=0.7)], form)  # type: ignore[arg-type]
    assert "front top1" in text
    assert "B, A" in text
    assert "0.125" in text
