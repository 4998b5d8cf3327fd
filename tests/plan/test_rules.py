"""The first rule that matches decides, and rules that decide nothing are found."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import given
from hypothesis import strategies as st

from qcompress.plan.rules import find_deciders, rule_uses
from qcompress.types.plan import Role, Rule

ROLES: dict[str, Role] = {"a.weight": "matrix", "a.bias": "bias", "b.weight": "embedding", "head": "head"}
NAMES = [*ROLES]
GLOBS = ["*", "a.*", "*.weight", "head", "x*", "[ab].bias", "@embedding", "@head", "@router"]


def is_match(rule: Rule, name: str) -> bool:
    return rule.match == f"@{ROLES[name]}" or fnmatchcase(name, rule.match)


def rules_of(globs: list[tuple[str, int]]) -> list[Rule]:
    """Rules in order; those of equal numbers in a row come from one list of globs."""
    return [Rule(glob, "l2", None, f"rules[{number}]") for glob, number in globs]


globs = st.lists(st.tuples(st.sampled_from(GLOBS), st.integers(0, 2)), max_size=6).map(
    lambda found: sorted(found, key=lambda one: one[1])
)


@given(globs)
def test_the_decider_is_the_first_that_matches(chosen: list[tuple[str, int]]) -> None:
    rules = rules_of(chosen)
    deciders = find_deciders(rules, ROLES)
    assert list(deciders) == NAMES
    for name, decider in deciders.items():
        matching = [rule for rule in rules if is_match(rule, name)]
        assert decider is (matching[0] if matching else None)


@given(globs)
def test_every_rule_is_in_one_use_and_every_decided_name_too(chosen: list[tuple[str, int]]) -> None:
    rules = rules_of(chosen)
    deciders = find_deciders(rules, ROLES)
    uses = list(rule_uses(rules, deciders, ROLES))
    assert [rule for use in uses for rule in use.rules] == rules
    assert len({use.where for use in uses}) == len(uses)
    decided = [name for use in uses for name in use.decided]
    assert sorted(decided) == sorted(name for name, decider in deciders.items() if decider is not None)
    for use in uses:
        assert set(use.decided) <= set(use.matched)
        assert all(use.matched[name] is deciders[name] for name in use.matched)
        assert set(use.matched) == {name for name in NAMES if any(is_match(rule, name) for rule in use.rules)}


def test_a_rule_that_does_not_reach_a_name_leaves_it_to_the_next() -> None:
    wide, narrow = Rule("*", "l2", None, "a"), Rule("*.weight", "linf", None, "b")
    deciders = find_deciders([wide, narrow], ROLES, lambda rule, name: rule is narrow or name == "head")
    assert deciders == {"a.weight": narrow, "a.bias": None, "b.weight": narrow, "head": wide}
    assert [use.decided for use in rule_uses([wide, narrow], deciders, ROLES)] == [("head",), ("a.weight", "b.weight")]


def test_globs_are_those_of_the_recipe_alone_or_a_list() -> None:
    rules = [Rule("a.*", None, None, "a"), Rule("x", None, None, "b"), Rule("y", None, None, "b")]
    uses = list(rule_uses(rules, find_deciders(rules, ROLES), ROLES))
    assert [use.globs for use in uses] == ["a.*", ["x", "y"]]
    assert uses[0].decided and not uses[1].matched


def test_a_name_that_looks_like_a_role_is_a_name() -> None:
    roles: dict[str, Role] = {"@head": "matrix", "b": "head"}
    rule = Rule("@head", "l2", None, "a")
    assert find_deciders([rule], roles) == {"@head": rule, "b": None}
    assert rule.names("@head") and not rule.names("b")
