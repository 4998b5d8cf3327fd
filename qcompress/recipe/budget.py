"""The `budget` of a recipe, from its section or from a flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompress import registry
from qcompress.recipe.expect import make_mapping, make_number, refuse, refuse_unknown
from qcompress.recipe.frame import BUDGET, SENSITIVITY
from qcompress.recipe.gates import make_size
from qcompress.recipe.hints import listed, quoted
from qcompress.recipe.overrides import AFTER_ALL_LINES
from qcompress.recipe.tree import Node, Place, Problems
from qcompress.types import Budget

EXAMPLE = "write `budget: {bpw: 2.0}`, or {size: 1.2MB}"


@dataclass(frozen=True, slots=True)
class BudgetFlag:
    """A budget as the command line gives it, which beats the recipe's; `text` is how it was typed: "--bpw 2.0"."""

    text: str
    key: str
    value: float | str

    def node(self, instead_of: Node | None = None) -> Node:
        """What the recipe's `budget` would be; of the one that it has, the file of sensitivities stays."""
        place = Place(self.text, AFTER_ALL_LINES)
        keys = {self.key: Node(self.value, place, "")}
        if instead_of is not None and isinstance(instead_of.value, dict):
            keys |= {key: node for key, node in instead_of.value.items() if key == "sensitivity"}
        return Node(keys, place, "")


def make_budget(node: Node, problems: Problems) -> Budget | None:
    """The budget under `budget`; None where it is refused, which `problems` then says."""
    keys = make_mapping(node, problems, EXAMPLE)
    refuse_unknown(keys, (*BUDGET, "sensitivity"), problems)
    given = [key for key in BUDGET if key in keys]
    if len(given) > 1:
        problems.add(keys[given[1]], f"{listed(given)} are given together", "keep one of them")
    elif not given and isinstance(node.value, dict) and not keys.keys() - {"sensitivity"}:
        problems.add(node, "names no limit", EXAMPLE)
    limits: dict[str, Any] = {}
    for key in given:
        child = keys[key]
        if key == "bpw":
            limits[key] = float(make_number(child, BUDGET[key], problems))
        elif key == "size":
            limits[key] = make_size(child, problems)
        elif child.value in BUDGET[key]["enum"]:
            limits[key] = child.value
        elif not child.is_broken:
            refuse(child, BUDGET[key], problems)
    if "sensitivity" in keys:
        file = keys["sensitivity"]
        if isinstance(file.value, str) and file.value:
            limits["sensitivity"] = file.value
        elif not file.is_broken:
            refuse(file, SENSITIVITY, problems)
    return Budget(**limits) if len(given) == 1 and given[0] in limits else None


def refuse_undecided(node: Node, methods: Sequence[str], problems: Problems) -> None:
    """Say of a budget over `methods` that it cannot decide: over codebooks, or over two kinds of method at once."""
    found = [registry.METHODS[name] for name in dict.fromkeys(methods)]
    clusters = [method.name for method in found if method.family == "cluster"]
    if clusters:
        what = f"a budget decides the widths of grids, and {quoted(clusters[0])} makes codebooks"
        problems.add(node, what, "remove it, or use a method of quantize")
        return
    with_widths = [method.name for method in found if method.has_widths]
    without = [method.name for method in found if not method.has_widths]
    if with_widths and without:
        what = (
            f"{quoted(with_widths[0])} has widths and {quoted(without[0])} has none, and one budget is to decide both"
        )
        problems.add(node, what, "use methods of one kind")
