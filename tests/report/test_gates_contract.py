"""What holds for every gate of a recipe: it is checked, at its limit and beyond, refused unmeasured, and told of.

`EXAMPLES` says of each field of `Gates` how it is set, and to what a report must keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass, replace
from typing import Any
from xml.etree import ElementTree

import pytest

from qcompress.cli.gate_options import GateFlags
from qcompress.errors import UnmeasuredError
from qcompress.report.document import AccuracyFigures, LayerFigures, Report
from qcompress.report.document_json import REPORT, report_text
from qcompress.report.gates import check_gates, gate_errors
from qcompress.report.glossary import find_term
from qcompress.report.render import render, render_junit
from qcompress.report.view import gate_words
from qcompress.types.plan import Gates
from report.examples import kept, layer, make_report

TOP1 = AccuracyFigures(metric="top1", baseline=0.75, artifact=0.7, drop=0.05, samples=10)
MEASURED = replace(
    make_report(layer("a", LayerFigures(relative_error=0.01)), layer("b", LayerFigures(relative_error=0.1))),
    accuracy=(TOP1,),
)
"""216 bytes, 3 bits per weight, 10 dB at worst, 0.7 and a drop of 0.05."""

UNMEASURED = make_report(kept("bias"))
"""Nothing but its size is known."""


@dataclass(frozen=True)
class Example:
    """One field of `Gates`.

    name     of its result, and how errors and reports call it
    value    what MEASURED has
    set_to   a limit -> the field's value
    always   whether every report has the figure, so that it is never unmeasured
    """

    name: str
    value: float
    set_to: Callable[[float], Any] = lambda limit: limit
    always: bool = False

    @property
    def worse(self) -> float:
        """A limit that the value just misses."""
        down = self.name.startswith("max-")
        if isinstance(self.value, int):
            return self.value - 1 if down else self.value + 1
        return math.nextafter(self.value, -math.inf if down else math.inf)


def for_top1(limit: float) -> dict[str, float]:
    return {"top1": limit}


EXAMPLES = {
    "max_size": Example("max-size", 216, always=True),
    "max_bpw": Example("max-bpw", 3.0),
    "min_sqnr": Example("min-sqnr", 10.0),
    "min_metric": Example("min-metric top1", 0.7, for_top1),
    "max_drop": Example("max-drop top1", 0.05, for_top1),
}

each_gate = pytest.mark.parametrize("field", [field.name for field in fields(Gates)])


def gates_at(field: str, limit: float, kind: type[Gates] = Gates) -> Gates:
    return kind(**{field: EXAMPLES[field].set_to(limit)})


def with_gate(report: Report, field: str, limit: float) -> Report:
    return replace(report, gates=check_gates(gates_at(field, limit), report))


def assert_whole(kind: type[Gates]) -> None:
    """Every field has an example, a flag of its own spelling, and a line in the glossary."""
    names = {field.name for field in fields(kind)}
    assert names == set(EXAMPLES), "give EXAMPLES what the contract needs to know of each gate"
    assert names == {field.name for field in fields(GateFlags)}
    for field in names:
        flag = field.replace("_", "-")
        assert EXAMPLES[field].name.split()[0] == flag
        assert find_term(flag) == flag
    assert check_gates(kind(), MEASURED) == (), "what is not given is not checked"


def assert_checked(field: str, kind: type[Gates] = Gates) -> None:
    """A value equal to the limit passes, and the next beyond fails and is told of."""
    example = EXAMPLES[field]
    for limit, passed in ((example.value, True), (example.worse, False)):
        results = check_gates(gates_at(field, limit, kind), MEASURED)
        assert [(one.name, one.limit, one.value, one.passed) for one in results] == [
            (example.name, limit, example.value, passed)
        ]
        errors = gate_errors(results)
        assert (errors == []) is passed
        for error in errors:
            assert error.exit_code == 4
            assert error.where == f"gate {example.name}"


def test_every_gate_has_an_example_a_flag_and_a_definition() -> None:
    assert_whole(Gates)


@each_gate
def test_it_passes_at_its_limit_and_fails_beyond(field: str) -> None:
    assert_checked(field)


@each_gate
def test_it_refuses_what_was_not_measured(field: str) -> None:
    example = EXAMPLES[field]
    if example.always:
        (result,) = check_gates(gates_at(field, math.inf), UNMEASURED)
        assert result.passed
        return
    with pytest.raises(UnmeasuredError) as caught:
        check_gates(gates_at(field, example.value), UNMEASURED)
    assert caught.value.where == f"gate {example.name}"
    assert caught.value.exit_code == 3


@each_gate
@pytest.mark.parametrize("passes", [True, False])
def test_it_is_told_of_in_text_json_and_junit(field: str, passes: bool) -> None:
    example = EXAMPLES[field]
    report = with_gate(MEASURED, field, example.value if passes else example.worse)
    (gate,) = report.gates
    words = gate_words(gate)
    assert words.startswith(f"{'passed' if passes else 'FAILED'} {example.name} ")
    for reports in ([report], [MEASURED, report]):
        assert words in render(reports, "table")
    assert REPORT.plain(report)["gates"] == [
        {"name": example.name, "limit": gate.limit, "value": gate.value, "passed": passes}
    ]
    assert REPORT.parse(report_text(report), "test").gates == report.gates
    (case,) = ElementTree.fromstring(render_junit([report])).iter("testcase")
    assert case.get("name") == example.name
    assert (case.find("failure") is None) is passes


def test_a_gate_that_is_not_whole_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    wider = make_dataclass("Wider", [("max_seconds", float | None, None)], bases=(Gates,), frozen=True)
    with pytest.raises(AssertionError, match="give EXAMPLES"):
        assert_whole(wider)
    monkeypatch.setitem(EXAMPLES, "max_seconds", Example("max-seconds", 1.0))
    with pytest.raises(AssertionError):
        assert_whole(wider)
    with pytest.raises(AssertionError):
        assert_checked("max_seconds", wider)
