"""Recipes are read from YAML and flags, checked, and written back.

Names are looked up on first use: pydantic and yaml are imported only by a command that reads a recipe.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcompress.recipe.complete import refuse_from_scratch as refuse_from_scratch
    from qcompress.recipe.complete import refuse_missing as refuse_missing
    from qcompress.recipe.complete import refuse_offload as refuse_offload
    from qcompress.recipe.complete import refuse_untrainable as refuse_untrainable
    from qcompress.recipe.complete import trains as trains
    from qcompress.recipe.flags import lossless_recipe as lossless_recipe
    from qcompress.recipe.flags import recipe_from_flags as recipe_from_flags
    from qcompress.recipe.flags import table_rules as table_rules
    from qcompress.recipe.flags import with_effort as with_effort
    from qcompress.recipe.parse import BudgetFlag as BudgetFlag
    from qcompress.recipe.parse import parse_recipe as parse_recipe
    from qcompress.recipe.parse import read_recipe as read_recipe
    from qcompress.recipe.schema import recipe_schema as recipe_schema
    from qcompress.recipe.schema import schema_text as schema_text
    from qcompress.recipe.show import recipe_hash as recipe_hash
    from qcompress.recipe.show import recipe_json as recipe_json
    from qcompress.recipe.show import recipe_yaml as recipe_yaml

_MODULES = {
    **dict.fromkeys(
        ("refuse_from_scratch", "refuse_missing", "refuse_offload", "refuse_untrainable", "trains"), "complete"
    ),
    **dict.fromkeys(("lossless_recipe", "recipe_from_flags", "table_rules", "with_effort"), "flags"),
    **dict.fromkeys(("BudgetFlag", "parse_recipe", "read_recipe"), "parse"),
    **dict.fromkeys(("recipe_schema", "schema_text"), "schema"),
    **dict.fromkeys(("recipe_hash", "recipe_json", "recipe_yaml"), "show"),
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
