"""A report that somebody made up is an error with one line, or is shown: no value of it crashes a command."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompress.errors import InputError, ReportError, printable
from qcompress.report.compare import compare_reports
from qcompress.report.document import LayerFigures, Report
from qcompress.report.document_json import REPORT, report_text
from qcompress.report.gates import BaselineGates, check_gates, gate_errors
from qcompress.report.html.render_html import render_html
from qcompress.report.render import FORMATS, render, render_junit
from qcompress.types.encoded import ClassUse
from qcompress.types.plan import Gates
from report.examples import conv_figures, full_report, layer

EXTREMES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2, 64, 10**17, 10**18 - 1, -(10**17), 10**400),
    *(0.0, -0.0, 0.5, -1.0, 1e-320, 1e308, -1e308, 1e15),
    *("", "=1+1", "\x1b[2J", "a" * 5000, [], {}, [[]], [0] * 64, [10**17] * 200, [1e308, -1e308], [-1e308, 1e308]),
)


def whole_report() -> Report:
    """Every key filled, scale classes and codebooks too."""
    use = ClassUse(context=1, count=100, magnitude=1.5, ideal_bits=2.5, table_bits=2.6)
    figures = replace(conv_figures(), classes=(use,), entries=4, dead=1, duplicates=0, step=0.5, sampled=True)
    first = replace(layer("w", figures), sensitivity=0.25, codebook_in="v", group_size=4)
    report = full_report()
    assert report.accuracy is not None
    tuned = replace(report.accuracy[0], untuned=0.7, kmeans=0.6, kmeans_ratio=1.2, untuned_ratio=1.1)
    return replace(report, accuracy=(tuned,), layers=(first, *report.layers[1:]))


DOCUMENT: dict[str, Any] = REPORT.plain(whole_report())


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


PLACES = sorted(places(DOCUMENT), key=str)


def changed(changes: list[tuple[tuple[Any, ...], Any]]) -> str:
    document = copy.deepcopy(DOCUMENT)
    for path, value in changes:
        inner = document
        try:
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
        except (TypeError, KeyError, IndexError):
            continue
    return json.dumps(document)


def show_everywhere(report: Report) -> None:
    """All that a command does with a report that it has read."""
    plain = REPORT.parse(report_text(whole_report()), "plain")
    for reports in ([report], [report, plain], [plain, report]):
        for form in FORMATS:
            render(reports, form)  # type: ignore[arg-type]
        render_html(reports)
        render_junit(reports)
    compare_reports([report, report])
    gates = Gates(max_size=1, max_bpw=1.0, min_sqnr=1.0, min_metric={"top1": 0.5}, max_drop={"top1": 0.5})
    for one, earlier in ((report, plain), (plain, report), (report, report)):
        since = BaselineGates(report=earlier, where="x", max_growth=0.1, max_drop={"top1": 0.01})
        try:
            gate_errors(check_gates(gates, one, since))
        except InputError as error:
            assert error.exit_code == 3


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(EXTREMES)), min_size=1, max_size=3))
def test_a_changed_report_is_refused_or_shown(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    try:
        report = REPORT.parse(changed(changes), "x")
    except ReportError as error:
        assert len(error.lines()) == 1
        assert len(error.lines()[0]) < 500
        return
    show_everywhere(report)


@pytest.mark.slow
@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_every_extreme_at_every_place_is_refused_or_shown(path: tuple[Any, ...]) -> None:
    for value in EXTREMES:
        test_a_changed_report_is_refused_or_shown.hypothesis.inner_test([(path, value)])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" * 50_000, "not a JSON document"),
        ('{"a":' * 50_000, "not a JSON document"),
        (json.dumps(DOCUMENT).replace('"samples": 1000', '"samples": 1e400'), "1e400 is no finite number"),
        (json.dumps(DOCUMENT).replace('"samples": 1000', '"samples": 1' + "0" * 5000), "an integer of 5001 digits"),
        (json.dumps(DOCUMENT).replace('"samples": 1000', '"samples": -Infinity'), "-Infinity is not JSON"),
        (json.dumps(DOCUMENT).replace('"conv.bias"', '"\\ud800"'), "document: Invalid JSON"),
        (changed([(("layers", 0, "shape"), [10**17, 10**17])]), "layers.0: no tensor has so many weights"),
        (changed([(("layers", 0, "dim"), 0)]), "layers.0.dim: Input should be greater than or equal to 1"),
        (changed([(("layers", 0, "figures", "relative_error"), -1.0)]), "relative_error: Input should be greater"),
        (changed([(("run", "versions"), {"a" * 5000: 1})]), "run.versions.aaa"),
    ],
)
def test_what_no_report_holds_is_told_in_one_line(text: str, what: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.report.json"
    path.write_text(text)
    for words in (["report", path], ["report", path, path, "--format", "html"]):
        ran = run(*words)
        assert (ran.code, len(ran.error_lines), ran.out) == (3, 1, "")
        assert what in ran.error_lines[0]
        assert len(ran.error_lines[0]) < 500 + len(str(path))


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\uff1d1+1", "\t=1", "a\r\n=1", "\x1b]0;x\x07"]
)
def test_no_cell_of_a_csv_is_a_formula_or_steers_a_terminal(name: str) -> None:
    report = whole_report()
    first = replace(report.layers[0], name=name, method=name, dtype=name, reason=name, tied_to=name, coding=name)
    text = render([replace(report, artifact=replace(report.artifact, name=name), layers=(first,))], "csv")
    assert text.count("\n") == 2
    (row,) = csv.DictReader(io.StringIO(text))
    for key in ("artifact", "name", "method", "dtype", "reason", "tied_to", "coding"):
        assert row[key].isprintable()
        assert row[key] in (f"'{name}", printable(name))
        assert not row[key].startswith(tuple("=+-@\uff1d\t\r"))


def test_numbers_of_a_csv_stay_numbers() -> None:
    report = whole_report()
    below = replace(report.layers[0], figures=LayerFigures(relative_error=2.0, range=(-1.5, 2.0)))
    (row,) = csv.DictReader(io.StringIO(render([replace(report, layers=(below,))], "csv")))
    assert float(row["sqnr_db"]) == pytest.approx(-3.0103, abs=1e-4)
    assert row["range_low"] == "-1.5"
