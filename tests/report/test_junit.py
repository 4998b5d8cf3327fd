"""JUnit XML as any reader of XML sees it."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from qcompress.report.document import GateResult, Report
from qcompress.report.render import render_junit
from report.examples import full_report, small_report


def cases_of(text: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    for level in (root, *root):
        cases = list(level.iter("testcase"))
        failed = [case for case in cases if case.find("failure") is not None]
        assert (level.get("tests"), level.get("failures")) == (str(len(cases)), str(len(failed)))
        assert (level.get("errors"), level.get("skipped")) == ("0", "0")
    return list(root.iter("testcase"))


def test_a_case_for_each_gate_of_each_report() -> None:
    other = replace(full_report(), artifact=replace(full_report().artifact, name="other.safetensors"))
    text = render_junit([full_report(), other, small_report()])
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    assert text.endswith("</testsuites>\n")
    cases = cases_of(text)
    assert [(case.get("classname"), case.get("name")) for case in cases] == [
        (name, gate) for name in ("model-w2.safetensors", "other.safetensors") for gate in ("max-size", "min-sqnr")
    ]
    passed, failed = cases[0], cases[1]
    assert (passed.find("failure"), passed.findtext("system-out")) == (None, "passed max-size 248 <= 1,000")
    failure = failed.find("failure")
    assert failure is not None
    assert failure.get("message") == failure.text == "min-sqnr 20 dB < 20.5"


values = st.none() | st.integers(0, 10**12) | st.floats()


@given(st.lists(st.tuples(st.text(), values, st.booleans()), max_size=5), st.text(min_size=1))
def test_any_names_and_values_make_well_formed_xml(gates: list[tuple[str, float | None, bool]], name: str) -> None:
    results = tuple(GateResult(name=gate, limit=1.5, value=value, passed=passed) for gate, value, passed in gates)
    report: Report = replace(small_report(), gates=results)
    report = replace(report, artifact=replace(report.artifact, name=name))
    cases = cases_of(render_junit([report]))
    assert [case.find("failure") is None for case in cases] == [passed for _, _, passed in gates]
