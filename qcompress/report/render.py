"""Reports become text here: for terminals, pipes, Markdown, CSV and JUnit XML. No torch; rich for terminals only."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from qcompress.report.compare import compare_reports, comparison_json
from qcompress.report.document import GateResult, LayerReport, Report
from qcompress.report.document_json import json_text, plain, plain_fields, report_text
from qcompress.report.gates import failure_words
from qcompress.report.view import Table, View, gate_words, name_words, view_comparison, view_report
from qcompress.types.run import Json

if TYPE_CHECKING:
    import rich.table

    from qcompress.plan.sensitivity import Sensitivity

GAP = 2
"""Spaces between two columns."""

LAYER_COLUMNS = (
    "name", "shape", "dtype", "method", "bits", "dim", "granularity", "group_size", "form", "coding", "bytes",
    "side_information_bytes", "baseline_bytes", "tied_to", "codebook_in", "reason", "sensitivity",
    "bound_gap_db",
)  # fmt: skip
FIGURE_COLUMNS = (
    "relative_error", "sqnr_db", "max_error", "outlier_share", "kurtosis", "step", "levels_used", "entropy",
    "clipped_share", "entries", "dead", "duplicates", "sampled",
)  # fmt: skip
CSV_COLUMNS = ("artifact", *LAYER_COLUMNS, "bits_per_weight", "range_low", "range_high", *FIGURE_COLUMNS)
# Between two columns rich puts a space on either side of the rule's character, which is blank here.
RULED_GAP = 3
Format: TypeAlias = Literal["table", "json", "markdown", "csv"]
FORMATS: tuple[str, ...] = get_args(Format)


def render_plain(view: View) -> str:
    """Aligned columns without boxes or colour, as wide as their longest cell: nothing is cut."""
    blocks = ["\n".join([view.title, *fact_lines(view)])]
    blocks += ["\n".join(_aligned(table)) for table in view.tables]
    if view.notes:
        blocks.append("\n".join(view.notes))
    return "\n\n".join(blocks) + "\n"


def fact_lines(view: View) -> list[str]:
    """The facts above the tables, their texts aligned."""
    width = max((len(label) for label, _ in view.facts), default=0)
    return [f"{label:<{width}}  {text}" for label, text in view.facts]


def _aligned(table: Table) -> Iterable[str]:
    widths = table.widths()
    titles = tuple(column.title for column in table.columns)
    for cells in (titles, *table.rows, *([table.total] if table.total else [])):
        padded = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(cells, widths, table.columns, strict=True)
        ]
        yield (" " * GAP).join(padded).rstrip()


def render_markdown(view: View) -> str:
    """Markdown for a pull request: the headline as a list, the layers folded away."""
    lines = [f"**{_escaped(view.title)}**", ""]
    lines += [f"- {label}: {_escaped(text)}" for label, text in view.facts]
    *open_tables, layers = view.tables
    for table in open_tables:
        lines += ["", *_markdown_table(table)]
    lines += [
        "",
        f"<details><summary>{len(layers.rows)} layers</summary>",
        "",
        *_markdown_table(layers),
        "",
        "</details>",
    ]
    if view.notes:
        lines += ["", *(f"- {_escaped(note)}" for note in view.notes)]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(map(_escaped, cells)) + " |"

    rule = "|" + "|".join("---:" if column.right else ":---" for column in table.columns) + "|"
    rows = [*table.rows, *([table.total] if table.total else [])]
    return [line(column.title for column in table.columns), rule, *map(line, rows)]


def _escaped(text: str) -> str:
    """Text that Markdown prints as it stands."""
    for mark in "\\`*_|<[]~&":
        text = text.replace(mark, f"\\{mark}")
    return text


def render_csv(reports: Sequence[Report]) -> str:
    """A line for each tensor of each report, every figure but the histograms. Empty: not measured; inf: no error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for report in reports:
        writer.writerows({"artifact": report.artifact.name, **_csv_row(layer)} for layer in report.layers)
    return text.getvalue()


def _csv_row(layer: LayerReport) -> dict[str, Json]:
    written, figures = plain_fields(layer), plain_fields(layer.measured)
    row = {name: written[name] for name in LAYER_COLUMNS} | {name: figures[name] for name in FIGURE_COLUMNS}
    low, high = layer.measured.range or (None, None)
    row |= {"bits_per_weight": plain(layer.bits_per_weight), "range_low": plain(low), "range_high": plain(high)}
    row["shape"] = "x".join(map(str, layer.shape))
    row["sampled"] = None if layer.figures is None else str(layer.figures.sampled).lower()
    if layer.sqnr_db == float("inf"):
        row["sqnr_db"] = "inf"
    return row


JUNIT_START = '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="qcompress"'
"""How the XML of every run begins."""


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
    text = tostring(root, encoding="unicode").removeprefix('<testsuites name="qcompress"')
    return f"{JUNIT_START}{text}\n"


def _counts(gates: Sequence[GateResult]) -> dict[str, str]:
    failed = sum(not gate.passed for gate in gates)
    return {"tests": str(len(gates)), "failures": str(failed), "errors": "0", "skipped": "0", "time": "0"}


def render_terminal(view: View, width: int, *, color: bool) -> str:
    """The view with rules, and colours where wanted; columns that matter least give way to a narrow terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        no_color=not color,
        color_system="standard" if color else None,
        highlight=False,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(Text(view.title, style="bold"))
        for line in fact_lines(view):
            console.print(Text(line, style=_fact_style(line)), soft_wrap=True)
        for table in view.tables:
            console.print()
            console.print(_rich_table(table.fitted(width, RULED_GAP)))
        if view.notes:
            console.print()
        for note in view.notes:
            console.print(Text(note, style="dim"), soft_wrap=True)
    return capture.get()


def _fact_style(line: str) -> str:
    if not line.startswith("gate"):
        return ""
    return "bold red" if "  FAILED " in line else "green"


def _rich_table(table: Table) -> rich.table.Table:
    import rich.table
    from rich import box
    from rich.text import Text

    drawn = rich.table.Table(
        box=box.SIMPLE_HEAD, show_footer=table.total is not None, pad_edge=False, footer_style="bold", show_edge=False
    )
    for index, column in enumerate(table.columns):
        drawn.add_column(
            Text(column.title),
            Text(table.total[index] if table.total else ""),
            justify="right" if column.right else "left",
            # Names fold where a terminal is too narrow; numbers stay whole.
            overflow="fold",
            no_wrap=column.right,
        )
    for index, cells in enumerate(table.rows):
        drawn.add_row(*map(Text, cells), style="dim" if index in table.dim else "")
    return drawn


@dataclass(frozen=True)
class Terminal:
    """A terminal of `width` columns, which shows colours where `color`."""

    width: int
    color: bool


def render(reports: Sequence[Report], form: Format, terminal: Terminal | None = None) -> str:
    """The text of one or more reports, ending in a newline.

    form      table; json: exactly one document; markdown: for a pull request; csv: a line for each tensor
    terminal  that a table is drawn for; None: plain aligned text
    """
    comparison = compare_reports(reports) if len(reports) > 1 else None
    if form == "json":
        return json_text(comparison_json(comparison)) if comparison else report_text(reports[0])
    if form == "csv":
        return render_csv(reports)
    view = view_comparison(comparison) if comparison else view_report(reports[0])
    if form == "markdown":
        # A table stands beside its warnings on stderr; Markdown is pasted where nobody sees them.
        warnings = tuple(f"warning: {name_words(warning)}" for report in reports for warning in report.warnings)
        return render_markdown(replace(view, notes=view.notes + warnings))
    return render_view(view, terminal)


def render_sensitivity(found: Sensitivity, form: Format, terminal: Terminal | None = None) -> str:
    """The text of sensitivities, ending in a newline, in any format of `render`; csv: a line for each width."""
    # What reads a stored report starts without numpy, which sensitivities bring.
    from qcompress.report.view_sensitivity import render_sensitivity_csv, sensitivity_text, view_sensitivity

    if form == "json":
        return sensitivity_text(found)
    if form == "csv":
        return render_sensitivity_csv(found)
    view = view_sensitivity(found)
    return render_markdown(view) if form == "markdown" else render_view(view, terminal)


def render_view(view: View, terminal: Terminal | None = None) -> str:
    """The text of a view for a terminal; without one plain and aligned."""
    if terminal is None:
        return render_plain(view)

    return render_terminal(view, terminal.width, color=terminal.color)
