"""What --dry-run prints: every tensor, what happens to it and why, and the size to the byte."""

from __future__ import annotations

import sys
from dataclasses import asdict
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
    """The plan as JSON data. `exact` false: sizes are the most that entropy coding can need.

    While a budget has yet to choose widths, sizes are those of the narrowest, and `artifact_bytes` is null. Where it
    decides steps, the whole is what it allows, and a tensor's bytes are the most that any codes could take.
    """
    from qcompress.allocate import is_open, narrowest, refuse_infeasible
    from qcompress.artifact.layout import make_slots
    from qcompress.limit import is_unbounded, most_bytes
    from qcompress.recipe import recipe_hash
    from qcompress.shards import planned_files

    refuse_infeasible(source, plan, choice)
    least = narrowest(plan, choice)
    sizes = {d.tensor.name: sum(slot.n_bytes for slot in make_slots(d, choice)) for d in least.decisions}
    files = planned_files(source, least, choice)
    total = sum(files.values())
    budget = plan.recipe.budget
    if budget is not None and is_unbounded(plan) and (budget.bpw is not None or budget.size is not None):
        total = min(total, most_bytes(source, plan, choice))
        files = {name: min(size, total) for name, size in files.items()}
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "input": str(source.path),
        "output": str(target),
        "baseline_bytes": source.file_bytes,
        "artifact_bytes": None if is_open(plan) else total,
        "exact": choice == "packed" and not is_open(plan),
        "files": files,
        "recipe_hash": recipe_hash(plan.recipe),
        "tensors": [_tensor_json(decision, sizes[decision.tensor.name]) for decision in plan.decisions],
    }
    if budget is not None:
        limits = asdict(budget)
        document["budget"] = {name: limit for name, limit in limits.items() if limit is not None}
        document["least_bytes"] = total if is_open(plan) else None
    return document


def _tensor_json(decision: Decision, n_bytes: int) -> dict[str, Any]:
    tensor = decision.tensor
    config = decision.config.widest if decision.is_open else decision.config
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
            **{name: getattr(config, name, None) for name in ("bits", "granularity", "group_size", "form")},
            "axis": list(decision.axis),
        }
    if decision.is_open:
        row |= {"bits": None, "widths": list(decision.config.configs)}
    return row


def _view(document: dict[str, Any]) -> View:
    from qcompress.report.view import Column, Table, View
    from qcompress.report.words import size_words

    baseline, bound = document["baseline_bytes"], "" if document["exact"] else "at most "
    size = document["artifact_bytes"]
    if size is None:
        size, bound = document["least_bytes"], "at least "
    facts = [("size", f"{size_words(baseline)} -> {bound}{size_words(size)}, {size:,} bytes")]
    if "budget" in document:
        facts.append(("budget", _budget_words(document)))
    columns = tuple(Column(title, right=title in NUMBERS, spare=SPARE.get(title, 0)) for title in COLUMNS)
    rows = tuple(_cells(row) for row in document["tensors"])
    kept = frozenset(index for index, row in enumerate(document["tensors"]) if row["method"] == "kept")
    return View(f"plan of {document['output']}", tuple(facts), (Table(columns, rows, kept),), ())


def _budget_words(document: dict[str, Any]) -> str:
    name, limit = next((name, limit) for name, limit in document["budget"].items() if name != "sensitivity")
    match name:
        case "bpw":
            words = f"{limit:g} bits per compressed weight"
        case "size":
            words = f"{limit:,} bytes"
        case _:
            words = "the smallest artifact that holds the gates"
    return words if document["artifact_bytes"] is not None else f"{words}; widths are chosen once weights are read"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from qcompress.report.words import name_words, shape_words

    grid = row.get("granularity", "")
    if row.get("group_size"):
        grid = f"{grid} {row['group_size']}"
    axis = ",".join(map(str, row.get("axis", [])))
    name, shape, size = name_words(row["name"]), shape_words(tuple(row["shape"])), f"{row['bytes']:,}"
    bits = str(row.get("bits") or "")
    if "widths" in row:
        bits, size = f"{row['widths'][0]}-{row['widths'][-1]}", f"{size}+"
    return (name, shape, row["dtype"], row["method"], bits, grid, axis, size, row["reason"])
