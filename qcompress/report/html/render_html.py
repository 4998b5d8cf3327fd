"""Reports become one self-contained HTML file. The only file that imports jinja2; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qcompress.errors import printable
from qcompress.plan.sensitivity import Sensitivity
from qcompress.report.compare import compare_reports
from qcompress.report.document import BINS, Report
from qcompress.report.glossary import FIGURES
from qcompress.report.html.charts import AFTER, BEFORE, SCATTER, STRIP, WIDTHS_HEIGHT
from qcompress.report.html.page import comparison_page, report_page
from qcompress.report.html.page_sensitivity import sensitivity_page
from qcompress.types import VERSION

TEMPLATES = Path(__file__).with_name("templates")
BOXES = {"histogram": (BINS, BEFORE + STRIP + AFTER), "scatter": SCATTER, "widths": WIDTHS_HEIGHT}
"""Width and height of the boxes that charts are drawn in."""

SPARE = 3
"""Columns that a terminal would drop so soon are left out on a narrow screen."""


def render_html(reports: Sequence[Report]) -> str:
    """The page of one report, or of the comparison of several, ending in a newline.

    It holds no script and asks for nothing: its policy forbids both, whatever a file's names contain. Texts are
    escaped for HTML, and what a terminal would obey is spelt out.
    """
    if len(reports) > 1:
        page = comparison_page(compare_reports(reports))
        return _templates().get_template("comparison.html").render(page=page)
    return _templates().get_template("report.html").render(page=report_page(reports[0]))


def render_sensitivity_html(found: Sensitivity) -> str:
    """The page of sensitivities, as closed to the outside as that of a report."""
    return _templates().get_template("sensitivity.html").render(page=sensitivity_page(found))


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(version=VERSION, glossary=FIGURES, box=BOXES, spare=SPARE)
    return environment


def _printable(value: object) -> object:
    """Every text of a page, but for what templates make, on one line."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
