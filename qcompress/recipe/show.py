"""A Recipe is turned back into data: resolved, canonical, hashed, and as YAML that reads as the same recipe."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qcompress.types.data_settings import AUGMENTATIONS, TrainData
from qcompress.types.plan import KEYS, Recipe, Rule, Sections, Widths
from qcompress.types.settings import OPTIMIZERS, SCHEDULES, TASKS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KINDS: Mapping[type, str] = {
    config: name for kinds in (TASKS, OPTIMIZERS, SCHEDULES, AUGMENTATIONS) for name, config in kinds.items()
}
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NO_TEXT = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as JSON data: every default filled in, absent values left out, keys sorted, tuples as lists.

    Neither the recipe's source nor any rule's `where` is part of it: equal decisions give equal data.
    """
    data: dict[str, Any] = json.loads(json.dumps(_resolved(recipe), sort_keys=True))
    return data


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 in hex of `recipe_json` as UTF-8 JSON with sorted keys and no spaces."""
    text = json.dumps(recipe_json(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: `parse_recipe` of it resolves to the same recipe."""
    return "\n".join(_lines(_resolved(recipe), "")) + "\n"


def _lines(data: Mapping[str, object], indent: str) -> Iterator[str]:
    """The lines of a recipe or of one of its sections: rules two lines each, all else a line a key."""
    for key, value in data.items():
        if key in ("rules", "regularize") and isinstance(value, list):
            yield f"{indent}{key}:"
            for rule in value:
                (action,) = rule.keys() - {"match"}
                yield f"{indent}  - match: {flow(rule['match'], quote=True)}"
                yield f"{indent}    {action}: {flow(rule[action])}"
        elif isinstance(value, dict) and not indent:
            yield f"{key}:"
            yield from _lines(value, "  ")
        else:
            yield f"{indent}{key}: {flow(value)}"


def _resolved(recipe: Recipe) -> dict[str, object]:
    """The recipe as data, in the order in which people write it."""
    found = {KEYS.get(one.name, one.name): _written(getattr(recipe, one.name)) for one in fields(Sections)}
    gates = found.pop("gates")
    if recipe.rules or recipe.finetune is None:
        found["rules"] = _rules(recipe.rules)
    if recipe.finetune is not None:
        training = _options(replace(recipe.finetune, regularize=()))
        penalties = _rules(recipe.finetune.regularize)
        found["finetune"] = training | ({"regularize": penalties} if penalties else {})
    found["gates"] = gates
    return {name: value for name, value in found.items() if value not in (None, [], {})}


def _rules(rules: tuple[Rule, ...]) -> list[dict[str, object]]:
    """The rules as they are written, those of one list of patterns together."""
    groups = groupby(rules, key=lambda rule: (rule.where, rule.method, repr(rule.config)))
    return [_rule([*group]) for _, group in groups]


def _rule(patterns: list[Rule]) -> dict[str, object]:
    """The one rule that was read as a rule for each of its patterns."""
    first = patterns[0]
    match = first.match if len(patterns) == 1 else [rule.match for rule in patterns]
    if not isinstance(first.config, Widths):
        return {"match": match, first.method or "keep": {} if first.config is None else _options(first.config)}
    # Of open widths those options that are the same at each resolve to the same widths again.
    widest, *others = [_options(one) for _, one in sorted(first.config.configs.items(), reverse=True)]
    same = {name: value for name, value in widest.items() if all(one.get(name) == value for one in others)}
    return {"match": match, first.method or "keep": same}


def _written(value: object) -> object:
    """A value as it is written in a recipe."""
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    if not is_dataclass(value) or isinstance(value, type):
        return value
    options, kind = _options(value), _KINDS.get(type(value))
    if kind in AUGMENTATIONS and not options:
        return kind
    return options if kind is None else {kind: options}


def _options(config: DataclassInstance) -> dict[str, object]:
    """The fields of a dataclass in their order, without those that are None, or empty as they are by default."""
    if isinstance(config, TrainData):
        return {**_options(config.source), "augment": _written(config.augment)}
    given = {one.name: (one, getattr(config, one.name)) for one in fields(config)}
    return {name: _written(value) for name, (one, value) in given.items() if not _is_left_out(one, value)}


def _is_left_out(one: Field[Any], value: object) -> bool:
    if value is None:
        return True
    return value in ((), {}) and value in (one.default, one.default_factory is not MISSING and one.default_factory())


def flow(value: object, *, quote: bool = False) -> str:
    """A value on one line of YAML, true to its type in YAML 1.1 and 1.2."""
    match value:
        case dict():
            return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(flow(item, quote=quote) for item in value) + "]"
        case str():
            is_plain = _PLAIN.fullmatch(value) and value.lower() not in _NO_TEXT and not quote
            return value if is_plain else _quoted(value)
        case bool() | int():
            return json.dumps(value)
        case float():
            mantissa, e, exponent = repr(value).partition("e")
            return mantissa + ("" if "." in mantissa else ".0") + e + exponent
    raise TypeError(f"a recipe holds no {type(value).__name__}")


def _quoted(text: str) -> str:
    """Text in double quotes, whatever does not print escaped in eight digits, which YAML reads as one character."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
