"""A Recipe back to data: resolved, canonical, hashed, and as YAML that reads as the same recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from itertools import groupby
from typing import Any

from qcompress.recipe.frame import VERSION
from qcompress.recipe.sections import SECTIONS
from qcompress.settings import OPTIMIZERS, SCHEDULES, TASKS
from qcompress.types import Finetune, Recipe, Rule, Widths

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
    data = _resolved(recipe)
    lines = [f"{key}: {data[key]}" for key in ("version", "seed", "keep_dtype") if key in data]
    for section in SECTIONS:
        if section in data and isinstance(data[section], dict):
            lines += [f"{section}:", *(f"  {key}: {_flow(value)}" for key, value in data[section].items())]
        elif section in data:
            lines.append(f"{section}: {_flow(data[section])}")
    if "rules" in data:
        lines += ["rules:", *_rule_lines(data["rules"], "  ")]
    if "finetune" in data:
        options = {key: value for key, value in data["finetune"].items() if key != "regularize"}
        lines += ["finetune:", *(f"  {key}: {_flow(value)}" for key, value in options.items())]
        if "regularize" in data["finetune"]:
            lines += ["  regularize:", *_rule_lines(data["finetune"]["regularize"], "    ")]
    if "gates" in data:
        lines += ["gates:", *(f"  {name}: {_flow(limit)}" for name, limit in data["gates"].items())]
    return "\n".join(lines) + "\n"


def _rule_lines(rules: list[dict[str, Any]], indent: str) -> list[str]:
    lines = []
    for rule in rules:
        (action,) = rule.keys() - {"match"}
        lines += [
            f"{indent}- match: {_flow(rule['match'], quote=True)}",
            f"{indent}  {action}: {_flow(rule[action])}",
        ]
    return lines


def _rules(rules: tuple[Rule, ...]) -> list[dict[str, Any]]:
    """The rules as they are written, those of one list of patterns together."""
    groups = groupby(rules, key=lambda rule: (rule.where, rule.method, repr(rule.config)))
    return [_rule([*group]) for _, group in groups]


def _resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data, in the order in which people write it."""
    gates = {name: limit for name, limit in _present(recipe.gates).items() if limit != {}}
    keep = {} if recipe.keep_dtype is None else {"keep_dtype": recipe.keep_dtype}
    frame = {"version": VERSION, "seed": recipe.seed, **keep, **_sections(recipe)}
    rules = {"rules": _rules(recipe.rules)} if recipe.rules or recipe.finetune is None else {}
    finetune = {} if recipe.finetune is None else {"finetune": _finetune(recipe.finetune)}
    return frame | rules | finetune | ({"gates": gates} if gates else {})


def _finetune(section: Finetune) -> dict[str, Any]:
    training = section.training
    found = _written(training.options)
    for name, kinds in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        chosen = getattr(training, name)
        (kind,) = (kind for kind, config in kinds.items() if type(chosen) is config)
        found[name] = {kind: _written(chosen)}
    if training.distil is not None:
        found["distil"] = _written(training.distil)
    if section.regularize:
        found["regularize"] = _rules(section.regularize)
    return found


def _sections(recipe: Recipe) -> dict[str, Any]:
    """The sections that the recipe has, each as it is written."""
    found: dict[str, Any] = {}
    if recipe.model is not None:
        found["model"] = _written(recipe.model)
    if recipe.data is not None:
        data = {part: _written(getattr(recipe.data, part)) for part in ("calibration", "eval", "normalize")}
        train = recipe.data.train
        data["train"] = {} if train is None else {**_written(train.source), "augment": list(train.augment)}
        found["data"] = {part: value for part, value in data.items() if value}
    if recipe.task is not None:
        (name,) = (name for name, kind in TASKS.items() if isinstance(recipe.task, kind))
        found["task"] = {name: _written(recipe.task)}
    if recipe.activations is not None:
        found["activations"] = _written(recipe.activations)
    if recipe.companions:
        found["companions"] = list(recipe.companions)
    if recipe.budget is not None:
        found["budget"] = _present(recipe.budget)
    return found


def _written(settings: Any) -> dict[str, Any]:
    """A section's settings without what is absent or empty."""
    if settings is None:
        return {}
    return {name: value for name, value in _present(settings).items() if value not in ((), {})}


def _rule(patterns: list[Rule]) -> dict[str, Any]:
    """The one rule that was read as a rule for each of its patterns."""
    first = patterns[0]
    match = first.match if len(patterns) == 1 else [rule.match for rule in patterns]
    return {"match": match, first.method or "keep": {} if first.config is None else _options(first.config)}


def _options(config: Any) -> dict[str, Any]:
    """A method's options; of open widths those that are the same at each, which resolve to the same widths again."""
    if not isinstance(config, Widths):
        return _present(config)
    widest, *others = [_present(one) for _, one in sorted(config.configs.items(), reverse=True)]
    return {name: value for name, value in widest.items() if all(name in one and one[name] == value for one in others)}


def _present(config: Any) -> dict[str, Any]:
    """A dataclass's fields that are not None, in their order."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


def _flow(value: Any, *, quote: bool = False) -> str:
    """A value on one line of YAML, true to its type in YAML 1.1 and 1.2."""
    match value:
        case dict():
            return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(_flow(item, quote=quote) for item in value) + "]"
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
