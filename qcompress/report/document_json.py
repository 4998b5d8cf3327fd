"""A report becomes JSON, `qcompress.report/1`, and JSON a report; files are written whole. Imports no torch.

An SQNR without error (+infinity in memory) is null, and an SQNR of null beside a relative error of 0 is read as
+infinity again. Gates are written with all their digits, so that `passed` can be checked.
"""

from __future__ import annotations

from pathlib import Path

from qcompress.checkpoint.staging import write_whole
from qcompress.report.document import Report
from qcompress.types.document import Document

AGAIN = "write the report again with `qcompress report ARTIFACT --json FILE`"
REPORT = Document(Report, "qcompress.report/1", "report", AGAIN, whole=frozenset({"gates"}))


def report_text(report: Report) -> str:
    """The report as JSON text: a line for each top-level key and each layer, so that two of them can be compared."""
    return REPORT.text(report)


def read_report(path: Path) -> Report:
    """The report in a file. Raises ReportError where it is missing, damaged, foreign or of a newer schema."""
    return REPORT.read(path)


def write_report(report: Report, path: Path) -> None:
    """Write the report's JSON, whole or not at all. Raises ResourceError."""
    write_whole(report_text(report), path)


def report_path(output: Path) -> Path:
    """Where the report of an artifact lies: `model-w2.report.json` beside `model-w2.safetensors` or `model-w2/`."""
    # `.` and `..` have no name of their own.
    output = output.resolve() if output.name in ("", "..") else output
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.report.json")
