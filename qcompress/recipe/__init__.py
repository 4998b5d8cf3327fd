"""Recipes are read from YAML and flags, checked, and written back.

Names are looked up on first use: pydantic and yaml are imported only by a command that reads a recipe.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcompress.recipe.complete import refuse_missing, refuse_untrainable, trains
    from qcompress.recipe.flags import recipe_from_flags, with_effort
    from qcompress.recipe.hints import nearest, parse_size, suggest
    from qcompress.recipe.parse import parse_recipe, read_recipe
    from qcompress.recipe.schema import recipe_schema, schema_text
    from qcompress.recipe.sections import BudgetFlag
    from qcompress.recipe.show import recipe_hash, recipe_json, recipe_yaml

__all__ = [
    "BudgetFlag",
    "nearest",
    "parse_recipe",
    "parse_size",
    "read_recipe",
    "recipe_from_flags",
    "recipe_hash",
    "recipe_json",
    "recipe_schema",
    "recipe_yaml",
    "refuse_missing",
    "refuse_untrainable",
    "schema_text",
    "suggest",
    "trains",
    "with_effort",
]

_MODULES = {
    "BudgetFlag": "sections",
    "nearest": "hints",
    "parse_recipe": "parse",
    "parse_size": "hints",
    "read_recipe": "parse",
    "recipe_from_flags": "flags",
    "recipe_hash": "show",
    "recipe_json": "show",
    "recipe_schema": "schema",
    "recipe_yaml": "show",
    "refuse_missing": "complete",
    "refuse_untrainable": "complete",
    "schema_text": "schema",
    "suggest": "hints",
    "trains": "complete",
    "with_effort": "flags",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
