"""What --dry-run prints: every tensor, what happens to it and why, and the size to the byte."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.cli.streams import print_result, terminal_of, write_json

if TYPE_CHECKING:
    from qcompress.checkpoint import Checkpoint
    from qcompress.coding.payload import CodingChoice
    from qcompress.types import Decision, Plan

SCHEMA = "qcompress.plan/1"
COLUMNS = ("tensor", "shape", "dtype", "method", "bits", "grid", "axis", "bytes", "why")


def print_plan(
    source: Checkpoint,
    plan: Plan,
    target: Path,
    choice: CodingChoice,
    *,
    json_to: str | None,
    quiet: bool,
    no_color: bool,
) -> None:
    """The plan as a table or as JSON; with -q the output's path."""
    document = plan_json(source, plan, target, choice)
    if json_to is not None:
        write_json(document, json_to)
    if json_to == "-":
        return
    if quiet:
        print_result(str(target))
        return
    print_result(_table(document, no_color))


def plan_json(source: Checkpoint, plan: Plan, target: Path, choice: CodingChoice) -> dict[str, Any]:
    """The plan as JSON data. `exact` false: sizes are the most that entropy coding can need."""
    from qcompress.artifact.layout import INDEX_NAME, index_text
    from qcompress.recipe import recipe_hash
    from qcompress.shards import make_shards

    shards = make_shards(source, plan, choice)
    sizes: dict[str, int] = {}
    for shard in shards:
        for slot in shard.layout.slots:
            sizes[slot.tensor] = sizes.get(slot.tensor, 0) + slot.n_bytes
    files = {shard.file: shard.layout.file_bytes for shard in shards}
    if source.is_folder and len(shards) > 1:
        files[INDEX_NAME] = len(index_text({shard.file: shard.layout.slots for shard in shards}).encode())
    return {
        "schema": SCHEMA,
        "input": str(source.path),
        "output": str(target),
        "baseline_bytes": source.file_bytes,
        "artifact_bytes": sum(files.values()),
        "exact": all(shard.layout.exact for shard in shards),
        "files": files,
        "recipe_hash": recipe_hash(plan.recipe),
        "tensors": [_tensor_json(decision, sizes.get(decision.tensor.name, 0)) for decision in plan.decisions],
    }


def _tensor_json(decision: Decision, n_bytes: int) -> dict[str, Any]:
    tensor, config = decision.tensor, decision.config
    row: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "method": decision.method or "kept",
        "bytes": n_bytes,
        "reason": decision.reason,
    }
    if decision.compresses:
        row |= {
            "bits": config.bits,
            "granularity": config.granularity,
            "group_size": config.group_size,
            "form": config.form,
            "axis": list(decision.axis),
        }
    return row


def _table(document: dict[str, Any], no_color: bool) -> str:
    from qcompress.report.words import size_words

    rows = [_cells(row) for row in document["tensors"]]
    bound = "" if document["exact"] else "at most "
    total = f"{bound}{document['artifact_bytes']:,} bytes"
    summary = (
        f"{document['output']}: {total} ({size_words(document['artifact_bytes'])}), "
        f"from {size_words(document['baseline_bytes'])}"
    )
    drawing = terminal_of(sys.stdout, no_color)
    if not drawing["terminal"]:
        widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [COLUMNS, *rows]
        ]
        return "\n".join([*lines, "", summary])
    from rich.console import Console
    from rich.table import Table

    console = Console(width=drawing["width"], no_color=not drawing["color"], force_terminal=True)
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    with console.capture() as capture:
        console.print(table)
        console.print(f"\n{summary}", highlight=False)
    return capture.get()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    grid = row.get("granularity", "")
    if row.get("group_size"):
        grid = f"{grid} {row['group_size']}"
    axis = ",".join(map(str, row.get("axis", [])))
    shape = "x".join(map(str, row["shape"])) or "scalar"
    bits = str(row.get("bits", ""))
    return (row["name"], shape, row["dtype"], row["method"], bits, grid, axis, f"{row['bytes']:,}", row["reason"])
