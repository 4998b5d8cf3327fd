"""`--method`, `--bits` and their like make a recipe of one rule; `--effort` changes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic import ValidationError

from qcompress import registry
from qcompress.errors import UsageError
from qcompress.recipe.explain import expected, explain
from qcompress.recipe.model import Asked, method_part
from qcompress.recipe.parse import BudgetFlag
from qcompress.recipe.schema import fragment
from qcompress.recipe.yaml_tree import Document, Path, Place
from qcompress.registry import BUDGET_METHOD
from qcompress.registry.targets import TARGETS, Target
from qcompress.types.plan import COMMAND_LINE, ROLE_MARK, Budget, Family, Recipe, Role, Rule, Widths
from qcompress.types.words import listed, quoted, suggest
from qcompress.types.written import read

FLAGS = ("bits", "dim", "granularity", "group_size", "share", "symmetric")
"""The options that have a flag of their own; the others are set in a recipe."""


def recipe_from_flags(
    method: str | None,
    options: Mapping[str, object],
    family: Family = "quantize",
    budget: BudgetFlag | None = None,
    target: str | None = None,
) -> Recipe:
    """The recipe whose one rule gives every tensor `method`, where None the family's default, or what a budget means.

    options  by the config's field names ("group_size" for --group-size); None means that the flag was not given
    budget   decides the bits, which are then not among the options
    target   decides what the options leave open

    Raises UsageError for the first flag that cannot be.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if budget is not None and "bits" in given:
        where = f"{_flag('bits', given['bits'])} {budget.text}"
        raise UsageError(where, "the budget decides the bits", "leave one of them out")
    asked = Asked(budget is not None, _target(target))
    by_rate = budget is not None and method is None and asked.target is None
    chosen = registry.METHODS[BUDGET_METHOD] if by_rate else _method(method, family)
    words = [f"--method {chosen.name}"] * (method is not None) + [_flag(name, value) for name, value in given.items()]
    words += [] if target is None else [f"--for {target}"]
    place = Place(" ".join(words) or COMMAND_LINE, (len(given), 0), bare=True)
    typed = Document(COMMAND_LINE, {chosen.name: {}}, {(): place})
    for index, (name, value) in enumerate(given.items()):
        typed.put((chosen.name, name), _value(value), Place(_flag(name, value), (index, 0), bare=True))
    _refuse_foreign(chosen, typed)
    # A target that refuses the method, or has one width, decides before a width can be missing.
    decided = asked.budget or (asked.target is not None and asked.target.decides_bits(chosen))
    _refuse_missing(chosen, typed, "bits" if decided else None)
    config = _read(method_part(chosen), typed, (chosen.name,), asked)
    rule = Rule("*", chosen.name, config, COMMAND_LINE)
    if budget is None:
        return Recipe(family, (rule,), target=target)
    spent = _read(Budget, budget.document())
    return Recipe(family, (rule,), target=target, budget=spent, places={"budget": budget.text})


def lossless_recipe(family: Family) -> Recipe:
    """The recipe that keeps every tensor, entropy coded."""
    return Recipe(family, (Rule("*", None, None, COMMAND_LINE),), keep_coding="auto")


def _target(name: str | None) -> Target | None:
    """The target of this name. Raises UsageError for one that is not known."""
    if name is not None and name not in TARGETS:
        raise UsageError(f"--for {name}", f"unknown target {quoted(name)}", suggest(name, TARGETS))
    return TARGETS[name] if name is not None else None


TABLE_ROLES: tuple[Role, ...] = ("embedding", "head")
"""The roles to which `--bits` gives more bits than to the others."""
TABLE_BITS = 8
TABLE_METHOD = "mse"
"""Of embeddings and heads, where a target takes none of a method's grids at so many bits."""


def table_rules(
    method: str | None, options: Mapping[str, object], family: Family, bits: int | None, target: str | None = None
) -> tuple[Rule, ...]:
    """The rules for embeddings and heads, which go before the one of `recipe_from_flags` with the same flags.

    bits    of these rules; None: as many as the flags say, and at least 8; none where the method has not that many
    raises  UsageError for bits that the method cannot have
    """
    known = _target(target)
    own = options.get("bits") or (known.only_bits if known is not None else None)
    if not isinstance(own, int):
        if bits is not None:
            raise UsageError(f"--bits-embedding {bits}", "no --bits is given beside it", "add --bits N")
        return ()
    # A code names one row here, so that its bits are those of a weight.
    vectors = options.get("dim") not in (None, 1)
    wanted = max(own, TABLE_BITS) if bits is None else bits
    if wanted == own and not vectors:
        return ()
    scalars = {name: value for name, value in options.items() if name != "dim"}
    try:
        (rule,) = recipe_from_flags(method, {**scalars, "bits": wanted}, family, target=target).rules
    except UsageError as error:
        if bits is None and known is not None and method != TABLE_METHOD:
            # A target may hold so many bits in another form alone than that which the method gives.
            return table_rules(TABLE_METHOD, options, family, bits, target)
        if bits is None:
            return ()
        raise UsageError(f"--bits-embedding {bits}", error.what, error.hint) from None
    roles = [role for role in TABLE_ROLES if known is None or bits is not None or role in known.roles]
    return tuple(replace(rule, match=f"{ROLE_MARK}{role}") for role in roles)


def _refuse_foreign(method: registry.Method, typed: Document) -> None:
    """Raise UsageError for a flag that is no option of the method."""
    known = [one.name for one in fields(method.config)]
    for name in typed.data[method.name]:
        if name not in known:
            takes = [_flag_name(option) for option in FLAGS if option in known]
            hint = f"{quoted(method.name)} takes {listed(takes)}" if takes else "leave it out, and add --bpw 2.0"
            raise UsageError(typed.where((method.name, name)), f"not an option of {quoted(method.name)}", hint)


def _refuse_missing(method: registry.Method, typed: Document, decided: str | None) -> None:
    """Raise UsageError for a flag that the method cannot do without, but for one that a budget decides."""
    schema = fragment(method.config, {}, ())
    for name in schema.get("required", ()):
        if name not in typed.data[method.name] and name != decided:
            hint = f"add {_flag_name(name)}, {expected(schema['properties'][name])}"
            raise UsageError(typed.where(()), f"{_flag_name(name)} is missing", hint)


def _read(part: Any, typed: Document, path: Path = (), known: Asked | None = None) -> Any:
    """The value of what was typed. Raises UsageError for the first that is wrong."""
    try:
        return read(part, typed.at(path), known)
    except ValidationError as error:
        explain(error, typed, part, path)
        _, first = min(typed.found, key=lambda found: found[0])
        raise UsageError(first.where, first.what, first.hint) from None


def _method(name: str | None, family: Family) -> registry.Method:
    methods = registry.METHODS
    of_family = [method.name for method in methods.values() if method.family == family]
    if name is None:
        name = registry.DEFAULT_METHOD if registry.DEFAULT_METHOD in of_family else of_family[0]
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
    option = fragment(registry.METHODS[method].config, {}, ())["properties"].get("effort", {})
    return [choice for branch in option.get("anyOf", [option]) for choice in branch.get("enum", ())]


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
