"""A method's options as a tree -> its config dataclass; pydantic checks them, the errors are ours."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qcompress import registry
from qcompress.recipe.expect import expected, refuse
from qcompress.recipe.hints import nearest, quoted, suggest
from qcompress.recipe.tree import Node, Problems, shown
from qcompress.types import Widths

_READERS: dict[type[Any], tuple[TypeAdapter[Any], dict[str, Any]]] = {}


def _reader(config: type[Any]) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    """pydantic's reader of a config dataclass and its JSON Schema, made once: that takes longer than all the rest."""
    if config not in _READERS:
        adapter = TypeAdapter(config)
        _READERS[config] = (adapter, adapter.json_schema())
    return _READERS[config]


def options_schema(config: type[Any]) -> dict[str, Any]:
    """JSON Schema of a config dataclass, as pydantic gives it."""
    return _reader(config)[1]


def option_names(config: type[Any]) -> list[str]:
    return [option.name for option in dataclasses.fields(config)]


def make_config(method: str, config: type[Any], node: Node, problems: Problems) -> Any | None:
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
        _translate(error, method, Node(options, node.place, node.path), options_schema(config), meant, problems)
        return None


def takes_budget(method: registry.Method) -> bool:
    """Whether a budget decides the bits of a method's config."""
    return method.family == "quantize" and method.has_widths


def make_widths(method: str, config: type[Any], node: Node, problems: Problems) -> Widths | None:
    """The options in `node`, which leave the bits to a budget, at each width that takes them; None where none does."""
    options = {} if node.value is None else node.value
    if isinstance(options, dict) and "bits" in options:
        problems.add(options["bits"], "the budget decides the bits", "take `bits` out, or the budget")
        return None
    if not isinstance(options, dict):
        make_config(method, config, node, problems)
        return None
    bits = options_schema(config)["properties"]["bits"]
    found: dict[int, Any] = {}
    reasons = Problems()
    for width in range(bits["maximum"], bits["minimum"] - 1, -1):
        given = Node({"bits": Node(width, node.place, node.path), **options}, node.place, node.path)
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
    schema: dict[str, Any],
    meant: set[str | None],
    problems: Problems,
) -> None:
    """One problem for each option that pydantic refuses; none for a missing one that an unknown key stands for."""
    assert isinstance(node.value, dict)
    fragments = schema["properties"]
    seen: set[str] = set()
    for reason in error.errors(include_url=False):
        if not reason["loc"]:
            if not meant:
                what, _, mend = str(reason["ctx"]["error"]).partition("; ")
                problems.add(node, what, mend or f"see {quoted(method)} in docs/recipes.md")
            continue
        name = str(reason["loc"][0])
        if reason["type"] != "missing" and name not in seen:
            refuse(node.value[name], fragments[name], problems)
        elif name not in seen and name not in meant:
            problems.add(node, f"{quoted(name)} is missing", f"add {quoted(name)}, {expected(fragments[name])}")
        seen.add(name)
