"""A plan for a target compresses what the target's files hold exactly, and keeps all else with its reason. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qcompress.errors import InputError, RecipeError, Subject
from qcompress.plan.siblings import linked_names
from qcompress.registry.targets import TARGETS, Target
from qcompress.types.config import MethodConfig
from qcompress.types.plan import KEPT, Decision, Plan, Rule, Widths


def target_of(name: str | None) -> Target | None:
    """The target that a recipe names."""
    return None if name is None else TARGETS[name]


def hold(decision: Decision, rule: Rule | None, target: Target) -> Decision:
    """The decision with scales that the target holds, of open widths those that it takes; or to keep the tensor.

    raises  RecipeError where the rule names a tensor that the target cannot hold, or has a width that it does not take
    """
    if not decision.compresses or rule is None:
        return decision
    tensor, config = decision.tensor, decision.config
    widest = config.widest if isinstance(config, Widths) else config
    because = target.refuse_weight(tensor, decision.role, decision.axis, widest)
    if because is not None:
        if rule.names(tensor.name) or rule.by_role:
            hint = "use keep: {} for it, or name no tensor that does not fit"
            raise RecipeError(rule.where, f"{target.name}: {because}", hint, Subject(tensor.name, tensor.shape))
        return Decision(tensor, None, KEPT, f"{target.name}: {because}", role=decision.role)
    if isinstance(config, Widths):
        taken = {bits: one for bits, one in config.configs.items() if target.refuse(one, decision.role) is None}
        refused = None if taken else target.refuse(widest, decision.role)
    else:
        taken, refused = {0: config}, target.refuse(config, decision.role)
    if refused is not None:
        what, _, hint = refused.partition("; ")
        raise RecipeError(rule.where, what, hint, Subject(tensor.name, tensor.shape))
    scales = target.scales_of(tensor)
    if scales is not None:
        taken = {bits: one.changed(scales=scales) for bits, one in taken.items()}
    return replace(decision, config=Widths(taken) if isinstance(config, Widths) else taken[0])


def refuse_unlinked(decisions: Sequence[Decision], rules: Mapping[str, Rule | None]) -> Iterator[InputError]:
    """An error for weights that a tool computes as one and that would not all have one kind of grid."""
    by_name = {decision.tensor.name: decision for decision in decisions if not decision.tied_to}
    for name, first in by_name.items():
        for other in linked_names(name, by_name)[1:]:
            rule = rules[other] or rules[name]
            if other != name and _scheme(first) != _scheme(by_name[other]) and rule is not None:
                what = f"{_words(by_name[other])}, and {name} {_words(first)}: they are computed as one weight"
                hint = "give both one rule, or the same bits, groups and form"
                yield RecipeError(rule.where, what, hint, Subject(other))


def _scheme(decision: Decision) -> object:
    config = decision.config
    bits = tuple(config.configs) if isinstance(config, Widths) else config.bits
    return decision.compresses, bits, config.form, config.unit, config.group_size


def _words(decision: Decision) -> str:
    if not decision.compresses:
        return "is kept"
    config = decision.config
    bits = "open" if isinstance(config, Widths) else str(config.bits)
    return f"has {bits} bits in {f'groups of {config.group_size}' if config.unit == 'group' else 'channels'}"


@dataclass(frozen=True)
class TargetFigures:
    """What the target's file will take.

    weights  in codes, of so many tensors
    n_bytes  of these; of the narrowest widths where a budget has yet to choose
    kept     why tensors are kept, each reason once -> their names
    """

    name: str
    tensors: int
    weights: int
    n_bytes: int
    kept: Mapping[str, Sequence[str]]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / max(self.weights, 1)


def target_figures(plan: Plan) -> TargetFigures | None:
    """What the file of the plan's target will take; None without a target."""
    target = target_of(plan.recipe.target)
    if target is None:
        return None
    compressed = [decision for decision in plan.decisions if decision.compresses]
    kept: dict[str, list[str]] = {}
    for decision in plan.decisions:
        if not decision.compresses and decision.reason.startswith(f"{target.name}: "):
            kept.setdefault(decision.reason, []).append(decision.tensor.name)
    bits = sum(target.stored_bits(d.tensor, d.axis, _narrowest(d.config)) for d in compressed)
    return TargetFigures(target.name, len(compressed), sum(d.tensor.numel for d in compressed), bits // 8, kept)


def _narrowest(config: MethodConfig) -> MethodConfig:
    return config.at(min(config.configs)) if isinstance(config, Widths) else config
