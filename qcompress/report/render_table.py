"""Reports on a terminal. The only file of the report that imports rich; imports no torch."""

from __future__ import annotations

import io

import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

from qcompress.report.render_text import fact_lines
from qcompress.report.view import Table, View

# Between two columns rich puts a space on either side of the rule's character, which is blank here.
GAP = 3


def render_terminal(view: View, width: int, *, color: bool) -> str:
    """The view with rules, and colours where wanted; columns that matter least give way to a narrow terminal."""
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
            console.print(_rich_table(table.fitted(width, GAP)))
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
