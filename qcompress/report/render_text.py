"""Reports as plain text, Markdown and CSV. Imports no torch and no rich."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from qcompress.report.document import LayerReport, Report
from qcompress.report.document_json import plain
from qcompress.report.view import Column, Table, View

GAP = 2


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

    rule = "|" + "|".join(map(_rule, table.columns)) + "|"
    rows = [*table.rows, *([table.total] if table.total else [])]
    return [line(column.title for column in table.columns), rule, *map(line, rows)]


def _rule(column: Column) -> str:
    return "---:" if column.right else ":---"


def _escaped(text: str) -> str:
    """Text that Markdown prints as it stands."""
    for mark in "\\`*_|<[]~&":
        text = text.replace(mark, f"\\{mark}")
    return text


_LAYER_COLUMNS = (
    "name", "shape", "dtype", "method", "bits", "dim", "granularity", "group_size", "form", "coding", "bytes",
    "side_information_bytes", "baseline_bytes", "tied_to", "codebook_in", "reason", "sensitivity",
    "bound_gap_db",
)  # fmt: skip
_FIGURE_COLUMNS = (
    "relative_error", "sqnr_db", "max_error", "outlier_share", "kurtosis", "step", "levels_used", "entropy",
    "clipped_share", "entries", "dead", "duplicates", "sampled",
)  # fmt: skip
CSV_COLUMNS = ("artifact", *_LAYER_COLUMNS, "bits_per_weight", "range_low", "range_high", *_FIGURE_COLUMNS)


def render_csv(reports: Sequence[Report]) -> str:
    """A line for each tensor of each report, every figure but the histograms. Empty: not measured; inf: no error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for report in reports:
        writer.writerows({"artifact": report.artifact.name, **_csv_row(layer)} for layer in report.layers)
    return text.getvalue()


def _csv_row(layer: LayerReport) -> dict[str, Any]:
    written = plain(layer)
    figures = written["figures"] or {}
    low, high = figures.get("range") or (None, None)
    row = {name: written[name] for name in _LAYER_COLUMNS} | {name: figures.get(name) for name in _FIGURE_COLUMNS}
    row |= {"bits_per_weight": plain(layer.bits_per_weight), "range_low": low, "range_high": high}
    row["shape"] = "x".join(map(str, layer.shape))
    if figures:
        row["sampled"] = str(figures["sampled"]).lower()
    if layer.sqnr_db == float("inf"):
        row["sqnr_db"] = "inf"
    return row
