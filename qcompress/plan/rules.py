"""Which rule decides a tensor: the first that matches; and what became of every rule. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from qcompress.types.plan import Role, Rule, find_matches


@dataclass(frozen=True)
class RuleUse:
    """What the rules of one place in a recipe do: a list of globs has become one Rule a glob, and is judged as one.

    matched  names that one of the globs fits -> the rule that decides each; None where none does
    decided  those that these rules decide, in the names' order
    """

    rules: tuple[Rule, ...]
    matched: Mapping[str, Rule | None]
    decided: tuple[str, ...]

    @property
    def where(self) -> str:
        return self.rules[0].where

    @property
    def globs(self) -> str | list[str]:
        """The glob, or the list of them, as the recipe has it."""
        globs = [rule.match for rule in self.rules]
        return globs[0] if len(globs) == 1 else globs


def find_deciders(
    rules: Sequence[Rule], roles: Mapping[str, Role], reaches: Callable[[Rule, str], bool] = lambda _, __: True
) -> dict[str, Rule | None]:
    """Name -> the first rule that matches it and `reaches` it, None where there is none; `roles` is of all names."""
    found: dict[str, Rule | None] = dict.fromkeys(roles)
    for rule in rules:
        for name in find_matches(rule.match, found, roles):
            if found[name] is None and reaches(rule, name):
                found[name] = rule
    return found


def rule_uses(
    rules: Sequence[Rule], deciders: Mapping[str, Rule | None], roles: Mapping[str, Role]
) -> Iterator[RuleUse]:
    """What became of every rule, in their order; `deciders` is what `find_deciders` gave for the same rules."""
    order = {name: place for place, name in enumerate(deciders)}
    for where, group in groupby(rules, key=lambda rule: rule.where):
        same = tuple(group)
        named = {name for rule in same for name in find_matches(rule.match, deciders, roles)}
        matched = {name: deciders[name] for name in sorted(named, key=order.__getitem__)}
        decided = tuple(name for name, one in matched.items() if one is not None and one.where == where)
        yield RuleUse(same, matched, decided)
