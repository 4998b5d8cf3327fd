"""The `gates` of a recipe: limits that turn a finished run into a failed one."""

from __future__ import annotations

from typing import Any

from qcompress.recipe.expect import make_mapping, make_number, refuse_unknown
from qcompress.recipe.frame import GATES, SIZE
from qcompress.recipe.sizes import parse_size
from qcompress.recipe.tree import Node, Problems, shown
from qcompress.types import Gates


def make_gates(node: Node, problems: Problems) -> Gates:
    """The limits under `gates`; whatever is refused is in `problems`."""
    keys = make_mapping(node, problems, "write `gates: {max_size: 2MB}`")
    refuse_unknown(keys, tuple(GATES), problems)
    limits: dict[str, Any] = {}
    for key in (key for key in GATES if key in keys):
        child = keys[key]
        if key == "max_size":
            limits[key] = make_size(child, problems)
        elif GATES[key]["type"] == "object":
            fragment = GATES[key]["additionalProperties"]
            metrics = make_mapping(child, problems, "give a number for each metric, as {top1: 0.1}")
            limits[key] = {name: float(make_number(metric, fragment, problems)) for name, metric in metrics.items()}
        else:
            limits[key] = float(make_number(child, GATES[key], problems))
    return Gates(**limits)


def make_size(node: Node, problems: Problems) -> int | None:
    """Bytes, from their number or from text; None where the node holds neither, which `problems` then says."""
    if isinstance(node.value, int) and not isinstance(node.value, bool):
        return int(make_number(node, SIZE["anyOf"][0], problems))
    if not isinstance(node.value, str):
        if not node.is_broken:
            problems.add(node, f"{shown(node.data())} is not a size", "give a number of bytes, or text like 2MB")
        return None
    try:
        return parse_size(node.value)
    except ValueError as error:
        what, _, mend = str(error).partition("; ")
        problems.add(node, what, mend)
        return None
