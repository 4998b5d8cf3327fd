"""Gates as JUnit XML, which CI systems show as tests: a suite for each artifact, a case for each gate. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from qcompress.report.document import GateResult, Report
from qcompress.report.gates import failure_words
from qcompress.report.view import gate_words
from qcompress.report.words import name_words


def render_junit(reports: Sequence[Report]) -> str:
    """The gates that each report holds, as an XML document that ends in a newline.

    A gate that failed is a failure whose message tells value and limit. Characters that XML 1.0 cannot hold are
    escaped as on a terminal.
    """
    every = [gate for report in reports for gate in report.gates]
    root = Element("testsuites", {"name": "qcompress", **_counts(every)})
    for report in reports:
        name = name_words(report.artifact.name)
        suite = SubElement(root, "testsuite", {"name": name, **_counts(report.gates)})
        for gate in report.gates:
            case = SubElement(suite, "testcase", {"classname": name, "name": name_words(gate.name), "time": "0"})
            if not gate.passed:
                message = name_words(f"{gate.name} {failure_words(gate)}")
                SubElement(case, "failure", {"type": "gate", "message": message}).text = message
            else:
                SubElement(case, "system-out").text = gate_words(gate)
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _counts(gates: Sequence[GateResult]) -> dict[str, str]:
    failed = sum(not gate.passed for gate in gates)
    return {"tests": str(len(gates)), "failures": str(failed), "errors": "0", "skipped": "0", "time": "0"}
