"""Reports as one self-contained HTML file. The only file that imports jinja2; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qcompress import __version__
from qcompress.report.charts import AFTER, BEFORE, SCATTER, STRIP, WIDTHS_HEIGHT
from qcompress.report.compare import Comparison
from qcompress.report.document import BINS, Report
from qcompress.report.glossary import GLOSSARY
from qcompress.report.page import Page, report_page
from qcompress.report.page_comparison import comparison_page
from qcompress.report.page_nouns import Figure, terms_of

if TYPE_CHECKING:
    from qcompress.report.sensitivity import Sensitivity

TEMPLATES = Path(__file__).with_name("templates")
BOXES = {"histogram": (BINS, BEFORE + STRIP + AFTER), "scatter": SCATTER, "widths": WIDTHS_HEIGHT}
"""Width and height of the boxes that charts are drawn in."""


def render_html(reports: Sequence[Report], comparison: Comparison | None = None) -> str:
    """The page of one report, or of the comparison of several, ending in a newline.

    It holds no script and asks for nothing: its policy forbids both, whatever a file's names contain. Texts are
    escaped for HTML, and what a terminal would obey is spelt out.
    """
    if comparison is not None:
        return _templates().get_template("comparison.html").render(page=comparison_page(comparison))
    page = report_page(reports[0])
    return _templates().get_template("report.html").render(page=page, words=_words(page))


def render_sensitivity_html(found: Sensitivity) -> str:
    """The page of sensitivities, as closed to the outside as that of a report."""
    from qcompress.report.view_sensitivity import sensitivity_page

    return _templates().get_template("sensitivity.html").render(page=sensitivity_page(found))


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(version=__version__, glossary=GLOSSARY, box=BOXES)
    return environment


def _words(page: Page) -> tuple[Figure, ...]:
    """Every term that the page shows, with its definition."""
    figures = (*page.cards, *(figure for one in page.drawn for figure in one.figures), *page.run)
    terms = (*(part.term for part in page.parts), "histogram_before", "histogram_after", "levels", "fences")
    return terms_of(figures, (*page.rules.heads, *page.layers.heads), terms)
