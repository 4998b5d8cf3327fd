"""Matrices of a checkpoint that a network holds as the rows of one tensor are compressed together, or none of them is.

Methods that see a live model see that tensor, a stack, as they do the experts of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from qcompress.types.plan import KEPT, Decision, ModelFacts, Rule


def whole_stacks(facts: ModelFacts, deciders: Mapping[str, Rule | None]) -> frozenset[str]:
    """The stacks of the network whose parts in the checkpoint one rule gives one config, which has a grid a row."""
    rules: dict[str, list[Rule | None]] = {}
    for name, fact in facts.items():
        if fact.stack is not None:
            rules.setdefault(fact.stack, []).append(deciders[name])
    return frozenset(stack for stack, found in rules.items() if _is_one(found))


def _is_one(rules: Sequence[Rule | None]) -> bool:
    rule = rules[0]
    if rule is None or rule.method is None or any(other is not rule for other in rules):
        return False
    return rule.options.form == "unbounded" or rule.options.unit != "tensor"


def without_broken_stacks(decisions: Sequence[Decision], facts: ModelFacts) -> Iterator[Decision]:
    """The decisions; where a part of a stack is kept, which is compressed whole or not at all, its others are too."""
    parts = Counter(fact.stack for fact in facts.values())
    taken = Counter(one.stack for one in decisions if one.compresses)
    for one in decisions:
        if one.stack is not None and one.compresses and taken[one.stack] < parts[one.stack]:
            reason = f"other rows of {one.stack} are kept, which {one.method} compresses whole"
            one = replace(one, method=None, config=KEPT, reason=reason)
        yield one
