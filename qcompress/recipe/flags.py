"""`--method`, `--bits` and their like make a recipe of one rule; `--effort` changes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qcompress import registry
from qcompress.errors import UsageError
from qcompress.recipe.configs import expected, make_config, make_widths, option_names, options_schema, takes_budget
from qcompress.recipe.hints import listed, quoted, suggest
from qcompress.recipe.sections import BudgetFlag, make_budget
from qcompress.recipe.yaml_tree import Node, Place, Problems
from qcompress.registry import BUDGET_METHOD
from qcompress.types.plan import COMMAND_LINE, Family, Recipe, Rule, Widths

FLAGS = ("bits", "dim", "granularity", "group_size", "share", "symmetric")
"""The options that have a flag of their own; the others are set in a recipe."""


def recipe_from_flags(
    method: str | None,
    options: Mapping[str, object],
    family: Family = "quantize",
    budget: BudgetFlag | None = None,
) -> Recipe:
    """The recipe whose one rule gives every tensor `method`, where None the family's default, or what a budget means.

    options  by the config's field names ("group_size" for --group-size); None means that the flag was not given
    budget   decides the bits, which are then not among the options

    Raises UsageError for the first flag that cannot be.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if budget is not None and "bits" in given:
        where = f"{_flag('bits', given['bits'])} {budget.text}"
        raise UsageError(where, "the budget decides the bits", "leave one of them out")
    chosen = _method(method, family) if budget is None or method is not None else registry.METHODS[BUDGET_METHOD]
    typed = {name: Place(_flag(name, value), index) for index, (name, value) in enumerate(given.items())}
    words = [f"--method {chosen.name}"] * (method is not None) + [place.text for place in typed.values()]
    known = option_names(chosen.config)
    for name in given:
        if name not in known:
            takes = [_flag_name(option) for option in FLAGS if option in known]
            hint = f"{quoted(chosen.name)} takes {listed(takes)}" if takes else "leave it out, and add --bpw 2.0"
            raise UsageError(typed[name].text, f"not an option of {quoted(chosen.name)}", hint)
    schema = options_schema(chosen.config)
    is_open = budget is not None and takes_budget(chosen)
    for name in schema.get("required", ()):
        if name not in given and not (is_open and name == "bits"):
            hint = f"add {_flag_name(name)}, {expected(schema['properties'][name])}"
            raise UsageError(" ".join(words) or COMMAND_LINE, f"{_flag_name(name)} is missing", hint)
    problems = Problems()
    children = {name: Node(_value(value), typed[name], "") for name, value in given.items()}
    make = make_widths if is_open else make_config
    config = make(chosen.name, chosen.config, Node(children, Place(" ".join(words), len(given)), ""), problems)
    node = None if budget is None else budget.node()
    limit = None if node is None else make_budget(node, problems)
    if problems.found:
        _, error = min(problems.found, key=lambda problem: problem[0])
        raise UsageError(error.where, error.what, error.hint)
    rule = Rule("*", chosen.name, config, COMMAND_LINE)
    places = {} if node is None else {"budget": node.where}
    return Recipe(family, (rule,), budget=limit, places=places)


def _method(name: str | None, family: Family) -> registry.Method:
    methods = registry.METHODS
    of_family = [method.name for method in methods.values() if method.family == family]
    if name is None:
        name = registry.DEFAULT_METHOD if registry.DEFAULT_METHOD in of_family else next(iter(of_family), None)
    if name is None:
        raise UsageError(COMMAND_LINE, f"no {family} method is available in this version", "use `qcompress quantize`")
    if name not in methods:
        raise UsageError(f"--method {name}", f"unknown method {quoted(name)}", suggest(name, of_family))
    if methods[name].family != family:
        other = methods[name].family
        raise UsageError(f"--method {name}", f"{quoted(name)} is a {other} method", f"use `qcompress {other}`")
    return methods[name]


def with_effort(recipe: Recipe, effort: str) -> Recipe:
    """The recipe whose methods make this effort, those that know degrees of it. Raises UsageError where none does."""
    where = f"--effort {effort}"
    known: set[str] = set()
    rules = []
    for rule in recipe.rules:
        choices = _efforts(rule.method)
        known.update(choices)
        if effort in choices:
            rule = _with_effort(rule, effort)
        rules.append(rule)
    if not known:
        raise UsageError(where, "no method of this run knows degrees of effort", "leave it out")
    if effort not in known:
        raise UsageError(where, "no method of this run knows this effort", suggest(effort, sorted(known)))
    return replace(recipe, rules=tuple(rules))


def _efforts(method: str | None) -> list[str]:
    """The degrees of effort that a method knows."""
    if method is None:
        return []
    option = options_schema(registry.METHODS[method].config)["properties"].get("effort", {})
    branches = option.get("anyOf", [option])
    return [choice for branch in branches for choice in branch.get("enum", ())]


def _with_effort(rule: Rule, effort: str) -> Rule:
    """The rule with this effort in its config, or in the one of each width. Raises UsageError."""
    try:
        if isinstance(rule.config, Widths):
            widths = {bits: config.changed(effort=effort) for bits, config in rule.config.configs.items()}
            return replace(rule, config=Widths(widths))
        return replace(rule, config=rule.options.changed(effort=effort))
    except ValueError as error:
        what, _, hint = str(error).partition("; ")
        raise UsageError(f"--effort {effort}", what, hint or "leave it out") from None


def _flag_name(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _flag(option: str, value: object) -> str:
    """The flag as it was typed: "--bits 9", "--asymmetric"."""
    if option == "symmetric" and isinstance(value, bool):
        return "--symmetric" if value else "--asymmetric"
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{option.replace('_', '-')}"
    return f"{_flag_name(option)} {value}"


def _value(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float) else str(value)
