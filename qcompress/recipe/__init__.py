"""YAML text to a checked Recipe, and back: `read_recipe`, `recipe_from_flags`, `recipe_json`, `recipe_schema`.

Names are looked up on first use: pydantic and yaml are imported only by a command that reads a recipe.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompress.recipe.budget import BudgetFlag
    from qcompress.recipe.complete import refuse_missing, refuse_untrainable, trains
    from qcompress.recipe.flags import recipe_from_flags, with_effort
    from qcompress.recipe.hints import nearest, suggest
    from qcompress.recipe.parse import parse_recipe, read_recipe
    from qcompress.recipe.schema import recipe_schema, schema_text
    from qcompress.recipe.show import recipe_hash, recipe_json, recipe_yaml
    from qcompress.recipe.sizes import parse_size

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
    "nearest": "hints",
    "parse_recipe": "parse",
    "parse_size": "sizes",
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
    "with_effort": "flags",
    "BudgetFlag": "budget",
    "trains": "complete",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
