"""The JSON Schema (draft 2020-12) of a recipe, as pydantic makes it of the model, described by the docstrings.

It says less than `parse_recipe` checks: not which options exclude each other, nor that a recipe holds one family.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema, core_schema

from qcompress.recipe.model import WrittenRecipe, takes_budget
from qcompress.recipe.yaml_tree import Path
from qcompress.registry import METHODS
from qcompress.registry.targets import TARGETS
from qcompress.types.config import MethodConfig
from qcompress.types.plan import KEYS, Budget
from qcompress.types.written import Schema, reader

_OPTION_LINE = re.compile(r"([a-z_][a-z0-9_]*) {2,}(\S.*)")


def recipe_schema() -> Schema:
    """The schema of a recipe's YAML as JSON data."""
    schema = reader(WrittenRecipe).json_schema(schema_generator=_Whole)
    open_to_budgets = [name for name, method in METHODS.items() if takes_budget(method)]
    for name in open_to_budgets:
        schema["$defs"][METHODS[name].config.__name__]["required"].remove("bits")
    deciding = [name for name, target in TARGETS.items() if target.only_bits is not None]
    schema["$defs"]["Budget"]["oneOf"] = [{"required": [limit]} for limit in Budget.limits]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qcompress recipe",
        **schema,
        "anyOf": [{"required": [section]} for section in ("rules", "finetune", "budget", "task")],
        "if": {"required": ["budget"]},
        "then": _of_rules({name: {"properties": {"bits": False}} for name in open_to_budgets}),
        "else": {
            "if": {"required": ["for"], "properties": {"for": {"enum": deciding}}},
            "else": _of_rules({name: {"required": ["bits"]} for name in open_to_budgets}),
        },
    }


def _of_rules(options: Schema) -> Schema:
    """What else holds of the options of some methods in every rule."""
    return {"properties": {"rules": {"items": {"properties": options}}}}


def schema_text() -> str:
    """The schema as the bytes of recipes/schema.json, in UTF-8."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def fragment(part: Any, data: object, path: Path) -> Schema:
    """The schema of what stands at `path` in `data` that is read as `part`.

    Its branches are resolved, and $defs holds what it refers to. Where several are of mappings and the data are one, it
    is the branch that knows most of its keys.
    """
    schema = _fitting(_resolved({"part": part}, {}), data)
    for step in path:
        branches = [_under(branch, step) for branch in schema.get("anyOf", [schema])]
        # A kind may be given by its name alone.
        data = data[step] if isinstance(data, dict | list) else {}  # type: ignore[index]
        schema = _fitting(next((branch for branch in branches if branch), {}), data)
    return schema


def _under(schema: Schema, step: str | int) -> Schema:
    """The schema of a key or an item; nothing where there is none."""
    if isinstance(step, int):
        items = schema.get("prefixItems", ())
        found = items[step] if step < len(items) else schema.get("items")
    else:
        found = schema.get("properties", {}).get(step) or schema.get("additionalProperties")
    return _resolved(found, schema["$defs"]) if isinstance(found, dict) else {}


def _fitting(schema: Schema, data: object) -> Schema:
    mappings = [branch for branch in schema.get("anyOf", ()) if "properties" in branch]
    if not isinstance(data, dict) or not mappings:
        return schema
    return max(mappings, key=lambda branch: len(branch["properties"].keys() & data.keys()))


def _resolved(schema: Schema, defs: Schema) -> Schema:
    """A schema without a reference or a part at its top, in its branches and its items; $defs has what it refers to."""
    while "$ref" in schema or "part" in schema:
        if "part" in schema:
            found = reader(schema["part"]).json_schema(schema_generator=_Outline)
            defs = found.get("$defs", {})
        else:
            found = defs[schema["$ref"].rpartition("/")[2]]
        schema = {**found, **{key: value for key, value in schema.items() if key not in ("$ref", "part")}}
    schema = {**schema, "$defs": defs}
    if isinstance(schema.get("items"), dict):
        schema["items"] = _resolved(schema["items"], defs)
    if "anyOf" in schema:
        schema["anyOf"] = [_resolved(branch, defs) for branch in schema["anyOf"]]
    return schema


class _Whole(GenerateJsonSchema):
    """pydantic's schema without titles, with descriptions from docstrings and each part that is read later."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> Schema:
        return describe(super().dataclass_schema(schema), schema["cls"])

    def function_plain_schema(self, schema: core_schema.PlainValidatorFunctionSchema) -> Schema:
        made = [self.part(part) for part in schema["metadata"]["parts"]()]
        return made[0] if len(made) == 1 else {"anyOf": made}

    def part(self, part: Any) -> Schema:
        """The schema of what is read later; of a dataclass it is a definition."""
        schema: Any = reader(part).core_schema
        if schema["type"] == "dataclass" and "ref" not in schema:
            schema = {**schema, "ref": f"{part.__module__}.{part.__qualname__}:{id(part)}"}
        return self.generate_inner(schema)

    def sort(self, value: Schema, parent_key: str | None = None) -> Schema:
        """Keys stay in the order in which people write them."""
        return value

    def field_title_should_be_set(self, schema: CoreSchema | Any) -> bool:
        return False


class _Outline(_Whole):
    """The same without what is read later, which is only named."""

    def part(self, part: Any) -> Schema:
        return {"part": part}


def describe(schema: Schema, cls: type) -> Schema:
    """A dataclass's schema with what its docstring says of it and its options; no default where that is null."""
    names = [one.name for one in dataclasses.fields(cls)]
    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        # What all methods' configs have in common is no option yet: a config says of its own what they mean.
        if base is not MethodConfig:
            described |= _described(base, names)
    schema = {**schema, "description": " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())}
    schema.pop("title", None)
    if example := getattr(cls, "example", None):
        schema["examples"] = [copy.deepcopy(example)]
    described = {KEYS.get(name, name) if cls is WrittenRecipe else name: text for name, text in described.items()}
    for name, option in schema["properties"].items():
        if option.get("default", 0) is None:
            del option["default"]
        if name in described:
            option["description"] = described[name]
    return schema


def _described(cls: type, names: list[str]) -> dict[str, str]:
    """What the class's own docstring says of its options: lines "name  text", continued where they are indented."""
    described: dict[str, str] = {}
    name = None
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        start = _OPTION_LINE.fullmatch(line)
        if start and start[1] in names:
            name = start[1]
            described[name] = start[2]
        elif name and line.startswith("  "):
            described[name] += " " + line.strip()
        else:
            name = None
    return described
