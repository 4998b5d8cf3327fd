"""Reports become text here: for terminals, pipes, Markdown, CSV and JUnit XML. No torch; rich for terminals only."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from qcompress.errors import printable
from qcompress.plan.sensitivity import SENSITIVITY, Sensitivity
from qcompress.report.compare import compare_reports, comparison_text
from qcompress.report.document import GateResult, LayerFigures, LayerReport, Report
from qcompress.report.document_json import REPORT, report_text
from qcompress.report.gates import failure_words
from qcompress.report.glossary import FIGURES
from qcompress.report.table import Table, View
from qcompress.report.view import gate_words, view_comparison, view_report
from qcompress.report.view_sensitivity import view_sensitivity
from qcompress.types.document import DIGITS, rounded

if TYPE_CHECKING:
    import rich.table

GAP = 2
"""Spaces between two columns."""

FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""What a spreadsheet takes a cell for a formula by, in full width too."""
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
NOUNS = (LayerReport, LayerFigures)

# Between two columns rich puts a space on either side of the rule's character, which is blank here.
RULED_GAP = 3
Format: TypeAlias = Literal["table", "json", "markdown", "csv"]
FORMATS: tuple[str, ...] = get_args(Format)


def _printable(view: View) -> View:
    """The view with each of its texts on one line: what a terminal would obey instead of print is escaped."""
    return View(
        title=printable(view.title),
        facts=tuple((printable(label), printable(text)) for label, text in view.facts),
        tables=tuple(map(_printable_table, view.tables)),
        notes=tuple(map(printable, view.notes)),
    )


def _printable_table(table: Table) -> Table:
    return replace(
        table,
        columns=tuple(replace(column, title=printable(column.title)) for column in table.columns),
        rows=tuple(tuple(map(printable, cells)) for cells in table.rows),
    )


def render_plain(view: View) -> str:
    """Aligned columns without boxes or colour, as wide as their longest cell: nothing is cut."""
    view = _printable(view)
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
    view = _printable(view)
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
    """A line for each tensor of each report, every figure but the lists. Empty: not measured; inf: no error."""
    of_layer, of_figures = ([one.name for one in fields(noun) if FIGURES[one.name].form] for noun in NOUNS)
    columns = ["artifact", *of_layer, "bits_per_weight", "range_low", "range_high", *of_figures]
    rows = []
    for report in reports:
        for layer, row in zip(report.layers, REPORT.plain(report)["layers"], strict=True):
            figures = row["figures"] or {}
            row |= figures | {"artifact": report.artifact.name, "shape": "x".join(map(str, layer.shape))}
            row["range_low"], row["range_high"] = figures.get("range") or (None, None)
            row["bits_per_weight"] = rounded(layer.bits_per_weight, DIGITS)
            row["sqnr_db"] = "inf" if layer.sqnr_db == math.inf else figures.get("sqnr_db")
            rows.append([row.get(name) for name in columns])
    return csv_text(columns, rows)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows below their columns' names; texts as a terminal shows them, and none that a spreadsheet would compute."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_csv_cell, columns))
    writer.writerows(map(_csv_cell, row) for row in rows)
    return text.getvalue()


def _csv_cell(value: object) -> object:
    match value:
        case bool():
            return str(value).lower()
        case str():
            shown = printable(value)
            return f"'{shown}" if value.startswith(FORMULA) and not NUMBER.fullmatch(value) else shown
    return value


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
        name = printable(report.artifact.name)
        suite = SubElement(root, "testsuite", {"name": name, **_counts(report.gates)})
        for gate in report.gates:
            case = SubElement(suite, "testcase", {"classname": name, "name": printable(gate.name), "time": "0"})
            if not gate.passed:
                message = printable(f"{gate.name} {failure_words(gate)}")
                SubElement(case, "failure", {"type": "gate", "message": message}).text = message
            else:
                SubElement(case, "system-out").text = printable(gate_words(gate))
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

    view = _printable(view)
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
    if form == "csv":
        return render_csv(reports)
    comparison = compare_reports(reports) if len(reports) > 1 else None
    if form == "json":
        return comparison_text(comparison) if comparison else report_text(reports[0])
    view = view_comparison(comparison) if comparison else view_report(reports[0])
    if form == "markdown":
        # A table stands beside its warnings on stderr; Markdown is pasted where nobody sees them.
        warnings = tuple(f"warning: {warning}" for report in reports for warning in report.warnings)
        return render_markdown(replace(view, notes=view.notes + warnings))
    return render_view(view, terminal)


def render_sensitivity(found: Sensitivity, form: Format, terminal: Terminal | None = None) -> str:
    """The text of sensitivities, ending in a newline, in any format of `render`; csv: a line for each width."""
    if form == "json":
        return SENSITIVITY.text(found)
    if form == "csv":
        return render_sensitivity_csv(found)
    view = view_sensitivity(found)
    return render_markdown(view) if form == "markdown" else render_view(view, terminal)


def render_sensitivity_csv(found: Sensitivity) -> str:
    """A line for each width of each tensor; a column more for each metric."""
    columns = ["name", "shape", "method", "grid", "bits", "bytes", "relative_error", "divergence", "drop"]
    rows = []
    for layer in found.layers:
        for cost in layer.widths:
            row = [layer.name, "x".join(map(str, layer.shape)), layer.method, layer.grid, cost.bits, cost.bytes]
            numbers = [cost.relative_error, cost.divergence, found.drop(cost), *map(cost.metrics.get, found.baseline)]
            rows.append([*row, *(None if number is None else f"{number:.6g}" for number in numbers)])
    return csv_text([*columns, *found.baseline], rows)


def render_view(view: View, terminal: Terminal | None = None) -> str:
    """The text of a view for a terminal; without one plain and aligned."""
    if terminal is None:
        return render_plain(view)
    return render_terminal(view, terminal.width, color=terminal.color)
