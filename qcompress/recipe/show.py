"""A Recipe is turned back into data: resolved, canonical, hashed, and as YAML that reads as the same recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qcompress.recipe.sections import VERSION
from qcompress.types.plan import Finetune, Recipe, Rule, Widths
from qcompress.types.settings import AUGMENTATIONS, OPTIMIZERS, SCHEDULES, TASKS, Augmentation, augmentation_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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
                yield f"{indent}  - match: {_flow(rule['match'], quote=True)}"
                yield f"{indent}    {action}: {_flow(rule[action])}"
        elif isinstance(value, dict) and not indent:
            yield f"{key}:"
            yield from _lines(value, "  ")
        else:
            yield f"{indent}{key}: {_flow(value)}"


def _resolved(recipe: Recipe) -> dict[str, object]:
    """The recipe as data, in the order in which people write it."""
    found: dict[str, object] = {"version": VERSION, "seed": recipe.seed}
    if recipe.keep_dtype is not None:
        found["keep_dtype"] = recipe.keep_dtype
    found |= _sections(recipe)
    if recipe.rules or recipe.finetune is None:
        found["rules"] = _rules(recipe.rules)
    if recipe.finetune is not None:
        found["finetune"] = _finetune(recipe.finetune)
    gates = {name: limit for name, limit in _present(recipe.gates).items() if limit != {}}
    return found | ({"gates": gates} if gates else {})


def _sections(recipe: Recipe) -> dict[str, object]:
    """The sections that the recipe has, each as it is written."""
    found: dict[str, object] = {}
    if recipe.model is not None:
        found["model"] = _written(recipe.model)
    if recipe.data is not None:
        data, train = recipe.data, recipe.data.train
        augment = {} if train is None else {"augment": [_short(step) for step in train.augment]}
        parts: dict[str, dict[str, object]] = {
            "calibration": _written(data.calibration),
            "eval": _written(data.eval),
            "normalize": _written(data.normalize),
            "train": _written(train and train.source) | augment,
        }
        found["data"] = {part: value for part, value in parts.items() if value}
    if recipe.task is not None:
        found["task"] = _named(recipe.task, TASKS)
    if recipe.activations is not None:
        found["activations"] = _written(recipe.activations)
    if recipe.companions:
        found["companions"] = list(recipe.companions)
    if recipe.budget is not None:
        found["budget"] = _present(recipe.budget)
    return found


def _finetune(section: Finetune) -> dict[str, object]:
    training = section.training
    found = _written(training.options)
    found["optimizer"] = _named(training.optimizer, OPTIMIZERS)
    found["schedule"] = _named(training.schedule, SCHEDULES)
    if training.distil is not None:
        found["distil"] = _written(training.distil)
    if section.regularize:
        found["regularize"] = _rules(section.regularize)
    return found


def _rules(rules: tuple[Rule, ...]) -> list[dict[str, object]]:
    """The rules as they are written, those of one list of patterns together."""
    groups = groupby(rules, key=lambda rule: (rule.where, rule.method, repr(rule.config)))
    return [_rule([*group]) for _, group in groups]


def _rule(patterns: list[Rule]) -> dict[str, object]:
    """The one rule that was read as a rule for each of its patterns."""
    first = patterns[0]
    match = first.match if len(patterns) == 1 else [rule.match for rule in patterns]
    return {"match": match, first.method or "keep": {} if first.config is None else _options(first.config)}


def _options(config: DataclassInstance) -> dict[str, object]:
    """A method's options; of open widths those that are the same at each, which resolve to the same widths again."""
    if not isinstance(config, Widths):
        return _present(config)
    widest, *others = [_present(one) for _, one in sorted(config.configs.items(), reverse=True)]
    return {name: value for name, value in widest.items() if all(name in one and one[name] == value for one in others)}


def _named(chosen: DataclassInstance, kinds: Mapping[str, type]) -> dict[str, object]:
    """One of a few kinds under its name."""
    (kind,) = (kind for kind, config in kinds.items() if type(chosen) is config)
    return {kind: _written(chosen)}


def _short(step: Augmentation) -> object:
    """An augmentation by its name alone where it has no options."""
    return _named(step, AUGMENTATIONS) if _written(step) else augmentation_name(step)


def _written(settings: DataclassInstance | None) -> dict[str, object]:
    """A section's settings without what is absent or empty."""
    if settings is None:
        return {}
    return {name: value for name, value in _present(settings).items() if value not in ((), {})}


def _present(config: DataclassInstance) -> dict[str, object]:
    """A dataclass's fields that are not None, in their order."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


def _flow(value: object, *, quote: bool = False) -> str:
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
