"""The JSON Schema (draft 2020-12) of a recipe is made: its frame by hand, all options from the config dataclasses.

It says less than `parse_recipe` checks: not which options exclude each other, nor that a recipe holds one family.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from qcompress import registry
from qcompress.recipe.configs import Schema, option_names, options_schema, takes_budget
from qcompress.recipe.sections import BUDGET, GATES, SEED, SENSITIVITY, VERSION
from qcompress.registry.regularizers import REGULARIZERS
from qcompress.types.config import MethodConfig
from qcompress.types.plan import Keep, KeepDtype
from qcompress.types.settings import (
    AUGMENTATIONS,
    DATA_KINDS,
    OPTIMIZERS,
    SCHEDULES,
    TASKS,
    ActivationSettings,
    Companion,
    Distil,
    ModelSettings,
    Normalize,
    TrainingOptions,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_OPTION_LINE = re.compile(r"([a-z_][a-z0-9_]*) {2,}(\S.*)")


def recipe_schema() -> Schema:
    """The schema of a recipe's YAML as JSON data."""
    actions = {name: {"$ref": f"#/$defs/{name}"} for name in registry.METHODS}
    open_to_budgets = [name for name, method in registry.METHODS.items() if takes_budget(method)]
    defs: Schema = {}
    for name, method in registry.METHODS.items():
        options = _options(method.config)
        defs |= options.pop("$defs", {})
        if name in open_to_budgets:
            options["required"].remove("bits")
        defs[name] = options
    exempt = {"description": "Leave the tensors as they are", "type": "object", "additionalProperties": False}
    keep = {**_options(Keep), "description": "Do not compress the tensors"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qcompress recipe",
        "type": "object",
        "properties": {
            "version": {"description": "Version of the recipe format", "const": VERSION},
            "seed": {"description": "Of everything that is drawn at random", **SEED},
            "keep_dtype": {
                "description": "Store what is not compressed in 16 bits, where its values bear that",
                "enum": list(get_args(KeepDtype)),
            },
            **_sections(defs),
            "rules": {
                "description": "The first rule that matches a tensor's name decides; what none matches is kept",
                "type": "array",
                "minItems": 1,
                "items": _rule({"keep": keep, **actions}),
            },
            "finetune": _finetune(defs, exempt),
            "budget": {
                "description": "What the compressed weights may take; the methods' `bits` are then left out",
                "type": "object",
                "properties": {**copy.deepcopy(BUDGET), "sensitivity": dict(SENSITIVITY)},
                "additionalProperties": False,
                "oneOf": [{"required": [limit]} for limit in BUDGET],
            },
            "gates": {
                "description": "Limits; a run that breaks one exits with code 4",
                "type": "object",
                "properties": copy.deepcopy(GATES),
                "additionalProperties": False,
            },
        },
        "required": ["version"],
        "anyOf": [{"required": ["rules"]}, {"required": ["finetune"]}, {"required": ["budget"]}],
        "additionalProperties": False,
        "if": {"required": ["budget"]},
        "then": _options_of_rules(open_to_budgets, {"properties": {"bits": False}}),
        "else": _options_of_rules(open_to_budgets, {"required": ["bits"]}),
        "$defs": defs,
    }


def _options_of_rules(methods: Sequence[str], schema: Schema) -> Schema:
    """What else holds of the options of these methods in every rule."""
    items = {"properties": {name: copy.deepcopy(schema) for name in methods}}
    return {"properties": {"rules": {"items": items}}}


def _sections(defs: Schema) -> Schema:
    """The schemas of `model`, `data`, `task`, `activations` and `companions`; those of data sources go to `defs`."""
    kinds = {kind: _options(config) for kind, config in DATA_KINDS.items()}
    kinds["dataset"]["properties"]["inputs"] = _one_or_list(kinds["dataset"]["properties"]["inputs"])
    augment = {
        "description": "What is done to an image each time it is drawn",
        "type": "array",
        "items": {"$ref": "#/$defs/augmentation"},
        "uniqueItems": True,
    }
    defs["augmentation"] = _choice("In order; random_resized_crop comes first, mixup and cutmix last", AUGMENTATIONS)
    for kind, options in kinds.items():
        defs |= options.pop("$defs", {})
        defs[f"data-{kind}"] = options
        trained = {**options, "properties": {**options["properties"], "augment": augment}}
        defs[f"train-{kind}"] = trained
    source = {"anyOf": [{"$ref": f"#/$defs/data-{kind}"} for kind in kinds]}
    parts = {
        "calibration": {"description": "What methods learn from; labels are not looked at", **source},
        "eval": {"description": "What the task is measured on", **source},
        "train": {"anyOf": [{"$ref": f"#/$defs/train-{kind}"} for kind in kinds]},
        "normalize": _options(Normalize),
    }
    model = _options(ModelSettings)
    model["properties"]["blocks"] = _one_or_list(model["properties"]["blocks"])
    return {
        "model": model,
        "data": {
            "description": "What the live model runs on",
            "type": "object",
            "properties": parts,
            "additionalProperties": False,
        },
        "task": _choice("What the live model is measured by", TASKS),
        "activations": _options(ActivationSettings),
        "companions": {
            "description": "What goes with any method, after it",
            "type": "array",
            "items": {"enum": list(get_args(Companion))},
            "uniqueItems": True,
        },
    }


def _finetune(defs: Schema, keep: Schema) -> Schema:
    """The schema of `finetune`; the regularizers' options go to `defs`."""
    options = _options(TrainingOptions)
    for name, one in REGULARIZERS.items():
        described = _options(one.config)
        defs |= described.pop("$defs", {})
        defs[f"regularizer-{name}"] = described
    actions = {name: {"$ref": f"#/$defs/regularizer-{name}"} for name in REGULARIZERS}
    options["properties"] |= {
        "optimizer": _choice("What makes a step of a gradient", OPTIMIZERS),
        "schedule": _choice("How the learning rate goes", SCHEDULES),
        "distil": _options(Distil),
        "regularize": {
            "description": "The first rule that matches a weight's name decides",
            "type": "array",
            "items": _rule({"keep": keep, **actions}),
        },
    }
    options["required"] = ["optimizer"]
    return options


def _choice(description: str, kinds: Mapping[str, type[DataclassInstance]]) -> Schema:
    """One of a few kinds, by name alone where it needs no option."""
    made = {name: _options(config) for name, config in kinds.items()}
    bare = [name for name, options in made.items() if not options.get("required")]
    mapping = {
        "type": "object",
        "properties": made,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"description": description, "anyOf": [mapping, *([{"enum": bare}] if bare else [])]}


def _one_or_list(option: Schema) -> Schema:
    """An option that takes a text for a list of one."""
    described: Schema = {key: option.pop(key) for key in ("description", "default") if key in option}
    return {**described, "anyOf": [{"type": "string"}, option]}


def schema_text() -> str:
    """The schema as the bytes of recipes/schema.json, in UTF-8."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _rule(actions: Schema) -> Schema:
    """A rule: `match` and exactly one action."""
    pattern = {"type": "string", "minLength": 1}
    match = {
        "description": "A glob over tensor names, or a list of them: * any text, ? a character, [abc] one of them",
        "anyOf": [pattern, {"type": "array", "items": pattern, "minItems": 1}],
    }
    return {
        "type": "object",
        "properties": {"match": match, **actions},
        "required": ["match"],
        "additionalProperties": False,
        "minProperties": 2,
        "maxProperties": 2,
    }


def _options(config: type[DataclassInstance]) -> Schema:
    """A config's schema without pydantic's titles, its descriptions from the dataclasses' docstrings."""
    schema = copy.deepcopy(options_schema(config))
    del schema["title"]
    schema["description"] = _summary(config)
    described: dict[str, str] = {}
    for base in reversed(config.__mro__):
        # What all methods' configs have in common is no option yet: a config says of its own what they mean.
        if base is not MethodConfig:
            described |= _described(base, option_names(config))
    for name, option in schema["properties"].items():
        option.pop("title", None)
        if option.get("default", 0) is None:
            del option["default"]
        if name in described:
            schema["properties"][name] = {"description": described[name], **option}
    return schema


def _summary(config: type[DataclassInstance]) -> str:
    return " ".join((inspect.getdoc(config) or "").partition("\n\n")[0].split())


def _described(config: type[DataclassInstance], names: list[str]) -> dict[str, str]:
    """What the class's own docstring says of its options: lines "name  text", continued where they are indented."""
    described: dict[str, str] = {}
    name = None
    for line in inspect.cleandoc(config.__doc__ or "").splitlines():
        start = _OPTION_LINE.fullmatch(line)
        if start and start[1] in names:
            name = start[1]
            described[name] = start[2]
        elif name and line.startswith("  "):
            described[name] += " " + line.strip()
        else:
            name = None
    return described
