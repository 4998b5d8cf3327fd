"""`--method`, `--bits` and their like -> a recipe of one rule."""

from __future__ import annotations

from collections.abc import Mapping

from qcompress import registry
from qcompress.errors import UsageError
from qcompress.recipe.configs import make_config, option_names, options_schema
from qcompress.recipe.expect import expected
from qcompress.recipe.frame import LATER_METHODS
from qcompress.recipe.hints import listed, quoted, suggest
from qcompress.recipe.tree import Node, Place, Problems
from qcompress.types import Family, Recipe, Rule

SOURCE = "command line"

FLAGS = ("bits", "dim", "granularity", "group_size", "share", "symmetric")
"""The options that have a flag of their own; the others are set in a recipe."""


def recipe_from_flags(method: str | None, options: Mapping[str, object], family: Family = "quantize") -> Recipe:
    """The recipe whose one rule gives every tensor `method`, the family's default where None.

    options  by the config's field names ("group_size" for --group-size); None means that the flag was not given

    Raises UsageError for the first flag that cannot be.
    """
    chosen = _method(method, family)
    given = {name: value for name, value in options.items() if value is not None}
    places = {name: Place(_flag(name, value), index) for index, (name, value) in enumerate(given.items())}
    words = [f"--method {chosen.name}"] * (method is not None) + [place.text for place in places.values()]
    known = option_names(chosen.config)
    for name in given:
        if name not in known:
            mend = f"{quoted(chosen.name)} takes {listed(_flag_name(option) for option in FLAGS if option in known)}"
            raise UsageError(places[name].text, f"not an option of {quoted(chosen.name)}", mend)
    schema = options_schema(chosen.config)
    for name in schema.get("required", ()):
        if name not in given:
            mend = f"add {_flag_name(name)}, {expected(schema['properties'][name])}"
            raise UsageError(" ".join(words) or SOURCE, f"{_flag_name(name)} is missing", mend)
    problems = Problems()
    children = {name: Node(_value(value), places[name], "") for name, value in given.items()}
    config = make_config(chosen.name, chosen.config, Node(children, Place(" ".join(words), len(given)), ""), problems)
    if config is None:
        _, error = min(problems.found, key=lambda problem: problem[0])
        raise UsageError(error.where, error.what, error.mend)
    return Recipe(family, (Rule("*", chosen.name, config, SOURCE),), source=SOURCE)


def _method(name: str | None, family: Family) -> registry.Method:
    methods = registry.METHODS
    of_family = [method.name for method in methods.values() if method.family == family]
    if name is None:
        name = registry.DEFAULT_METHOD if registry.DEFAULT_METHOD in of_family else next(iter(of_family), None)
    if name is None:
        raise UsageError(SOURCE, f"no {family} method is available in this version", "use `qcompress quantize`")
    if name not in methods:
        where = f"--method {name}"
        if name in LATER_METHODS:
            mend = f"use one of {listed(of_family)}" if of_family else "use `qcompress quantize`"
            raise UsageError(where, "not available in this version", mend)
        raise UsageError(where, f"unknown method {quoted(name)}", suggest(name, of_family))
    if methods[name].family != family:
        other = methods[name].family
        raise UsageError(f"--method {name}", f"{quoted(name)} is a {other} method", f"use `qcompress {other}`")
    return methods[name]


def _flag_name(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _flag(option: str, value: object) -> str:
    """The flag as it was typed: "--bits 9", "--asymmetric"."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{option.replace('_', '-')}" if option != "symmetric" else _symmetry(value)
    return f"{_flag_name(option)} {value}"


def _symmetry(symmetric: bool) -> str:
    return "--symmetric" if symmetric else "--asymmetric"


def _value(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float) else str(value)
