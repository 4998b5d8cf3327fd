"""A fragment of JSON Schema in words, and what is wrong with a value that does not fit it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from qcompress.recipe.hints import listed, quoted, suggest
from qcompress.recipe.tree import Broken, Node, Problems, shown

Fragment = Mapping[str, Any]

_NOUNS = {
    "integer": ("an integer", "integers"),
    "number": ("a number", "numbers"),
    "boolean": ("true or false", "true or false"),
    "string": ("text", "texts"),
    "object": ("a mapping", "mappings"),
    "array": ("a list", "lists"),
}


def expected(fragment: Fragment) -> str:
    """What fits, in words: "an integer between 1 and 8", "`als` or `grid`"."""
    return " or ".join(" ".join(filter(None, (_noun(branch), limits(branch)))) for branch in _branches(fragment))


def limits(fragment: Fragment) -> str:
    """The range of a number in words: "between 1 and 8", "above 0", or nothing."""
    if "anyOf" in fragment:
        return " or ".join(filter(None, (limits(branch) for branch in _branches(fragment))))
    low, high = fragment.get("minimum"), fragment.get("maximum")
    above, below = fragment.get("exclusiveMinimum"), fragment.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"between {_number(low)} and {_number(high)}"
    bounds = {"at least": low, "above": above, "at most": high, "below": below}
    return " and ".join(f"{words} {_number(bound)}" for words, bound in bounds.items() if bound is not None)


def fits(value: object, fragment: Fragment) -> TypeGuard[int | float]:
    """Whether a number lies in the fragment's range and is of its type; true and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if fragment["type"] == "integer" and not isinstance(value, int):
        return False
    low, high = fragment.get("minimum", -math.inf), fragment.get("maximum", math.inf)
    above, below = fragment.get("exclusiveMinimum", -math.inf), fragment.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)


def make_number(node: Node, fragment: Fragment, problems: Problems) -> float:
    """The node's number, or 0 where it does not fit, which `problems` then says."""
    if fits(node.value, fragment):
        return node.value
    if not isinstance(node.value, Broken):
        refuse(node, fragment, problems)
    return 0


def make_mapping(node: Node, problems: Problems, mend: str) -> dict[str, Node]:
    """The node's mapping, or an empty one where it is none, which `problems` then says."""
    if isinstance(node.value, dict):
        return node.value
    if not isinstance(node.value, Broken):
        problems.add(node, f"{shown(node.data())} is not a mapping", mend)
    return {}


def refuse_unknown(keys: Mapping[str, Node], known: Sequence[str], problems: Problems, noun: str = "key") -> None:
    """Say of each key that is not `known` what it may have meant."""
    for key, node in keys.items():
        if key not in known:
            problems.add(node, f"unknown {noun} {quoted(key)}", suggest(key, known))


def refuse(node: Node, fragment: Fragment, problems: Problems) -> None:
    """Say why the node's value, which does not fit `fragment`, does not."""
    value = node.data()
    choices = _choices(fragment)
    if _is_out_of_range(value, fragment):
        problems.add(node, f"{shown(value)} is out of range", f"must be {limits(fragment)}")
    elif choices and isinstance(value, str):
        problems.add(node, f"unknown value {shown(value)}", suggest(value, choices))
    else:
        noun = " or ".join(_noun(branch) for branch in _branches(fragment))
        problems.add(node, f"{shown(value)} is not {noun}", f"give {expected(fragment)}")


def _is_out_of_range(value: object, fragment: Fragment) -> bool:
    """Whether only the range is against a number."""
    numeric = [branch for branch in _branches(fragment) if branch.get("type") in ("integer", "number")]
    return any(limits(branch) and fits(value, {"type": branch["type"]}) for branch in numeric)


def _branches(fragment: Fragment) -> Sequence[Fragment]:
    """The fragment's alternatives, without null: a value that may be absent is simply left out."""
    return [branch for branch in fragment.get("anyOf", [fragment]) if branch.get("type") != "null"]


def _choices(fragment: Fragment) -> list[str]:
    return [str(choice) for branch in _branches(fragment) for choice in _enumerated(branch)]


def _enumerated(branch: Fragment) -> Sequence[Any]:
    """The values that a branch lists, or its only one."""
    return [branch["const"]] if "const" in branch else branch.get("enum", ())


def _noun(branch: Fragment) -> str:
    if _enumerated(branch):
        return f"one of {listed(map(str, _enumerated(branch)))}"
    if branch.get("type") == "array" and branch.get("items", {}).get("type") in _NOUNS:
        return f"a list of {_NOUNS[branch['items']['type']][1]}"
    return _NOUNS.get(branch.get("type", "object"), _NOUNS["object"])[0]


def _number(bound: float) -> str:
    return f"{bound:g}" if abs(bound) < 10**6 else str(bound)
