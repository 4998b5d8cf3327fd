"""Reports -> the text that a command prints. Imports no torch; rich only for a terminal, jinja2 only for HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from qcompress.report.compare import compare_reports, comparison_json
from qcompress.report.document import Report
from qcompress.report.document_json import json_text, report_text
from qcompress.report.render_text import render_csv, render_markdown, render_plain
from qcompress.report.view import View, view_comparison, view_report
from qcompress.report.words import name_words

if TYPE_CHECKING:
    from qcompress.report.sensitivity import Sensitivity

Format: TypeAlias = Literal["table", "json", "markdown", "csv", "html"]
FORMATS: tuple[str, ...] = get_args(Format)


def render(
    reports: Sequence[Report],
    form: Format,
    *,
    terminal: bool = False,
    width: int = 80,
    color: bool = True,
) -> str:
    """The text of one or more reports, ending in a newline.

    form      table; json: exactly one document; markdown: for a pull request; csv: a line for each tensor;
              html: one self-contained file
    terminal  a table is drawn for a terminal of `width` columns, with colours where `color`; else plain aligned text
    """
    comparison = compare_reports(reports) if len(reports) > 1 else None
    if form == "json":
        return json_text(comparison_json(comparison)) if comparison else report_text(reports[0])
    if form == "csv":
        return render_csv(reports)
    if form == "html":
        from qcompress.report.render_html import render_html

        return render_html(reports, comparison)
    view = view_comparison(comparison) if comparison else view_report(reports[0])
    if form == "markdown":
        # A table stands beside its warnings on stderr; Markdown is pasted where nobody sees them.
        warnings = tuple(f"warning: {name_words(warning)}" for report in reports for warning in report.warnings)
        return render_markdown(replace(view, notes=view.notes + warnings))
    return render_view(view, terminal=terminal, width=width, color=color)


def render_sensitivity(
    found: Sensitivity, form: Format, *, terminal: bool = False, width: int = 80, color: bool = True
) -> str:
    """The text of sensitivities, ending in a newline, in any format of `render`; csv: a line for each width."""
    from qcompress.report.sensitivity import sensitivity_text
    from qcompress.report.view_sensitivity import render_sensitivity_csv, view_sensitivity

    if form == "json":
        return sensitivity_text(found)
    if form == "csv":
        return render_sensitivity_csv(found)
    if form == "html":
        from qcompress.report.render_html import render_sensitivity_html

        return render_sensitivity_html(found)
    view = view_sensitivity(found)
    if form == "markdown":
        return render_markdown(view)
    return render_view(view, terminal=terminal, width=width, color=color)


def render_view(view: View, *, terminal: bool = False, width: int = 80, color: bool = True) -> str:
    """The text of a view: for a terminal of `width` columns, with colours where `color`; else plain and aligned."""
    if not terminal:
        return render_plain(view)

    from qcompress.report.render_table import render_terminal

    return render_terminal(view, width, color=color)
