"""Options of a recipe become config dataclasses: pydantic checks them, and its refusals are said in our words."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

from pydantic import TypeAdapter, ValidationError

from qcompress import registry
from qcompress.recipe.hints import listed, nearest, quoted, suggest
from qcompress.recipe.yaml_tree import Broken, Node, Problems, shown
from qcompress.types.config import MethodConfig
from qcompress.types.plan import Widths

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

Schema: TypeAlias = dict[str, Any]
"""A JSON Schema, or a part of one."""

_READERS: dict[type, tuple[TypeAdapter[Any], Schema]] = {}
_NOUNS = {
    "integer": ("an integer", "integers"),
    "number": ("a number", "numbers"),
    "boolean": ("true or false", "true or false"),
    "string": ("text", "texts"),
    "object": ("a mapping", "mappings"),
    "array": ("a list", "lists"),
}


def expected(fragment: Schema) -> str:
    """What fits, in words: "an integer between 1 and 8", "`als` or `grid`"."""
    return " or ".join(" ".join(filter(None, (_noun(branch), limits(branch)))) for branch in _branches(fragment))


def limits(fragment: Schema) -> str:
    """The range of a number in words: "between 1 and 8", "above 0", or nothing."""
    if "anyOf" in fragment:
        return " or ".join(filter(None, (limits(branch) for branch in _branches(fragment))))
    low, high = fragment.get("minimum"), fragment.get("maximum")
    above, below = fragment.get("exclusiveMinimum"), fragment.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"between {_number(low)} and {_number(high)}"
    bounds = {"at least": low, "above": above, "at most": high, "below": below}
    return " and ".join(f"{words} {_number(bound)}" for words, bound in bounds.items() if bound is not None)


def fits(value: object, fragment: Schema) -> TypeGuard[int | float]:
    """Whether a number lies in the fragment's range and is of its type; true and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if fragment["type"] == "integer" and not isinstance(value, int):
        return False
    low, high = fragment.get("minimum", -math.inf), fragment.get("maximum", math.inf)
    above, below = fragment.get("exclusiveMinimum", -math.inf), fragment.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)


def make_number(node: Node, fragment: Schema, problems: Problems) -> float:
    """The node's number, or 0 where it does not fit, which `problems` then says."""
    if fits(node.value, fragment):
        return node.value
    if not isinstance(node.value, Broken):
        refuse(node, fragment, problems)
    return 0


def make_list(node: Node, problems: Problems, hint: str) -> list[Node]:
    """The node's list, or an empty one where it is none, which `problems` then says."""
    if isinstance(node.value, list):
        return node.value
    if not node.is_broken:
        problems.add(node, f"{shown(node.data())} is not a list", hint)
    return []


def make_mapping(node: Node, problems: Problems, hint: str) -> dict[str, Node]:
    """The node's mapping, or an empty one where it is none, which `problems` then says."""
    if isinstance(node.value, dict):
        return node.value
    if not isinstance(node.value, Broken):
        problems.add(node, f"{shown(node.data())} is not a mapping", hint)
    return {}


def refuse_unknown(keys: Mapping[str, Node], known: Sequence[str], problems: Problems, noun: str = "key") -> None:
    """Say of each key that is not `known` what it may have meant."""
    for key, node in keys.items():
        if key not in known:
            problems.add(node, f"unknown {noun} {quoted(key)}", suggest(key, known))


def refuse(node: Node, fragment: Schema, problems: Problems) -> None:
    """Say why the node's value, which does not fit `fragment`, does not."""
    value = node.data()
    choices = [choice for branch in _branches(fragment) for choice in _enumerated(branch)]
    if _is_out_of_range(value, fragment):
        problems.add(node, f"{shown(value)} is out of range", f"must be {limits(fragment)}")
    elif choices and isinstance(value, str):
        problems.add(node, f"unknown value {shown(value)}", suggest(value, choices))
    else:
        noun = " or ".join(_noun(branch) for branch in _branches(fragment))
        problems.add(node, f"{shown(value)} is not {noun}", f"give {expected(fragment)}")


def _is_out_of_range(value: object, fragment: Schema) -> bool:
    """Whether only the range is against a number."""
    numeric = [branch for branch in _branches(fragment) if branch.get("type") in ("integer", "number")]
    return any(limits(branch) and fits(value, {"type": branch["type"]}) for branch in numeric)


def _branches(fragment: Schema) -> Sequence[Schema]:
    """The fragment's alternatives, without null: a value that may be absent is simply left out."""
    return [branch for branch in fragment.get("anyOf", [fragment]) if branch.get("type") != "null"]


def _enumerated(branch: Schema) -> list[str]:
    """The values that a branch lists, or its only one, as texts."""
    return [str(value) for value in ([branch["const"]] if "const" in branch else branch.get("enum", ()))]


def _noun(branch: Schema) -> str:
    if _enumerated(branch):
        return f"one of {listed(_enumerated(branch))}"
    if branch.get("type") == "array" and branch.get("items", {}).get("type") in _NOUNS:
        return f"a list of {_NOUNS[branch['items']['type']][1]}"
    return _NOUNS.get(branch.get("type", "object"), _NOUNS["object"])[0]


def _number(bound: float) -> str:
    return f"{bound:g}" if abs(bound) < 10**6 else str(bound)


def _reader(config: type[Config]) -> tuple[TypeAdapter[Config], Schema]:
    """pydantic's reader of a config dataclass and its JSON Schema, made once: that takes longer than all the rest."""
    if config not in _READERS:
        adapter = TypeAdapter(config)
        _READERS[config] = (adapter, adapter.json_schema())
    return _READERS[config]


def options_schema(config: type[DataclassInstance]) -> Schema:
    """JSON Schema of a config dataclass, as pydantic gives it."""
    return _reader(config)[1]


def option_names(config: type[DataclassInstance]) -> list[str]:
    return [option.name for option in dataclasses.fields(config)]


def make_config(method: str, config: type[Config], node: Node, problems: Problems) -> Config | None:
    """The config of the options in `node`, or None; whatever is refused is in `problems`.

    Lists stand for tuples and integers for reals; nothing else is converted.
    """
    options = {} if node.value is None else node.value
    if not isinstance(options, dict):
        if not node.is_broken:
            problems.add(node, f"{shown(node.data())} is not a mapping", f"write the options of {method}: {{bits: 4}}")
        return None
    names = option_names(config)
    unknown = [name for name in options if name not in names]
    for name in unknown:
        problems.add(options[name], f"unknown key {quoted(name)}", suggest(name, names))
    broken = [name for name in options if options[name].is_broken]
    known = {name: child.data() for name, child in options.items() if name in names and name not in broken}
    try:
        return _reader(config)[0].validate_json(json.dumps(known))
    except ValidationError as error:
        meant = {nearest(name, names) for name in unknown} | set(broken)
        _translate(error, method, dataclasses.replace(node, value=options), config, meant, problems)
        return None


def takes_budget(method: registry.Method) -> bool:
    """Whether a budget decides the bits of a method's config."""
    return method.family == "quantize" and not method.rates


def make_widths(method: str, config: type[MethodConfig], node: Node, problems: Problems) -> Widths | None:
    """The options in `node`, which leave the bits to a budget, at each width that takes them; None where none does."""
    options = {} if node.value is None else node.value
    if isinstance(options, dict) and "bits" in options:
        problems.add(options["bits"], "the budget decides the bits", "take `bits` out, or the budget")
        return None
    if not isinstance(options, dict):
        make_config(method, config, node, problems)
        return None
    bits = options_schema(config)["properties"]["bits"]
    found: dict[int, MethodConfig] = {}
    first = Problems()
    for width in range(bits["maximum"], bits["minimum"] - 1, -1):
        given = dataclasses.replace(node, value={"bits": dataclasses.replace(node, value=width), **options})
        reasons = Problems()
        made = make_config(method, config, given, reasons)
        if made is not None:
            found[width] = made
        elif width == bits["maximum"]:
            first = reasons
    if not found:
        problems.found += first.found
        return None
    return Widths(dict(sorted(found.items())))


def _translate(
    error: ValidationError,
    method: str,
    node: Node,
    config: type[DataclassInstance],
    meant: set[str | None],
    problems: Problems,
) -> None:
    """One problem for each option that pydantic refuses; none for a missing one that an unknown key stands for."""
    assert isinstance(node.value, dict)
    fragments = options_schema(config)["properties"]
    seen: set[str] = set()
    for reason in error.errors(include_url=False):
        if not reason["loc"]:
            if not meant:
                what, _, hint = str(reason["ctx"]["error"]).partition("; ")
                problems.add(node, what, hint or f"see {quoted(method)} in docs/recipes.md")
            continue
        name = str(reason["loc"][0])
        if reason["type"] != "missing" and name not in seen:
            refuse(node.value[name], fragments[name], problems)
        elif name not in seen and name not in meant:
            problems.add(node, f"{quoted(name)} is missing", f"add {quoted(name)}, {expected(fragments[name])}")
        seen.add(name)
