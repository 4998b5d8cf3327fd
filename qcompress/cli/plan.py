"""What --dry-run prints: every tensor, what happens to it and why, and the size to the byte."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.cli.streams import Streams, print_result, terminal_of, write_json

if TYPE_CHECKING:
    from qcompress.checkpoint import Checkpoint
    from qcompress.coding.payload import CodingChoice
    from qcompress.report.view import View
    from qcompress.types import Decision, Plan

SCHEMA = "qcompress.plan/1"
COLUMNS = ("tensor", "shape", "dtype", "method", "bits", "grid", "axis", "bytes", "why")
NUMBERS = {"bits", "bytes"}
SPARE = {"shape": 2, "dtype": 3, "axis": 1}
"""How soon a narrow terminal drops a column."""


def print_plan(
    source: Checkpoint,
    plan: Plan,
    target: Path,
    choice: CodingChoice,
    streams: Streams,
) -> None:
    """The plan as a table or as JSON; with -q the output's path."""
    from qcompress.report.render import render_view

    document = plan_json(source, plan, target, choice)
    if streams.json_to is not None:
        write_json(document, streams.json_to)
    if streams.json_to == "-":
        return
    if streams.quiet:
        print_result(str(target))
        return
    print_result(render_view(_view(document), **terminal_of(sys.stdout, streams.no_color)))


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


def _view(document: dict[str, Any]) -> View:
    from qcompress.report.view import Column, Table, View
    from qcompress.report.words import size_words

    size, baseline = document["artifact_bytes"], document["baseline_bytes"]
    bound = "" if document["exact"] else "at most "
    facts = (("size", f"{size_words(baseline)} -> {bound}{size_words(size)}, {size:,} bytes"),)
    columns = tuple(Column(title, right=title in NUMBERS, spare=SPARE.get(title, 0)) for title in COLUMNS)
    rows = tuple(_cells(row) for row in document["tensors"])
    kept = frozenset(index for index, row in enumerate(document["tensors"]) if row["method"] == "kept")
    return View(f"plan of {document['output']}", facts, (Table(columns, rows, kept),), ())


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from qcompress.report.words import name_words, shape_words

    grid = row.get("granularity", "")
    if row.get("group_size"):
        grid = f"{grid} {row['group_size']}"
    axis = ",".join(map(str, row.get("axis", [])))
    name, shape, bits = name_words(row["name"]), shape_words(tuple(row["shape"])), str(row.get("bits") or "")
    return (name, shape, row["dtype"], row["method"], bits, grid, axis, f"{row['bytes']:,}", row["reason"])
