"""A plan decides of each tensor what happens to it and why; or every reason why not is raised at once.

Made from names, shapes and dtypes alone, so that it can be printed and refused before any weight is read.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from qcompress.artifact.layout import make_slots
from qcompress.checkpoint.side_files import count_representatives
from qcompress.errors import DataError, InputError, RecipeError, Subject, raise_all
from qcompress.plan.axes import find_axes, find_tied
from qcompress.plan.network import Network
from qcompress.plan.roles import ROLES, find_roles
from qcompress.plan.rules import RuleUse, find_deciders, rule_uses
from qcompress.plan.stacks import whole_stacks, without_broken_stacks
from qcompress.plan.targets import hold, refuse_unlinked, target_of
from qcompress.registry import METHODS, ClusterConfig, RdConfig, refuse_cost
from qcompress.registry.targets import Target
from qcompress.types.config import MethodConfig, Shape
from qcompress.types.plan import (
    CODED,
    COMMAND_LINE,
    KEPT,
    ROLE_MARK,
    ROLE_NAMES,
    STORED_AS_F16,
    WEIGHT_DTYPES,
    Axis,
    CodebookSpec,
    Decision,
    Keep,
    ModelFacts,
    Plan,
    Recipe,
    Role,
    Rule,
    TensorFacts,
    TensorInfo,
    Widths,
    row_shape,
    shared_groups,
)

WEIGHT_ROLES: tuple[Role, ...] = ("matrix", "convolution", "depthwise", "embedding", "head", "expert", "router")
"""What gets another method where a rule's own cannot take it; all else is kept."""
LEAST_CODED = 1 << 10
"""Bytes of a kept tensor that is worth coding: a smaller one saves little more than its entry in a manifest takes."""
HALVED = ("F32", "F64")
"""The dtypes that `keep_dtype: f16` changes: bfloat16 would lose range and gain nothing."""


def make_plan(
    recipe: Recipe,
    tensors: Sequence[TensorInfo],
    tied: Mapping[str, str],
    config: Mapping[str, object],
    *,
    model: ModelFacts | None = None,
    representatives: Path | None = None,
    nonfinite: Callable[[TensorInfo], int] | None = None,
) -> Plan:
    """The plan of `recipe` for a checkpoint of `tensors`; `tied` is what its metadata say, `config` its config.json.

    model            what the recipe's network says, which knows channel axes and tied weights that headers do not show
    representatives  the file of what finetune-reg has learned, read where a method takes it up
    nonfinite        how many values of a weight are NaN or Inf, asked of each that would be compressed once all else is
                     right: one that has any is kept
    raises           RecipeError, or Refusals with one for each rule that decides nothing and each tensor that cannot
                     follow its rule; DataError where learned representatives do not fit
    """
    names = {tensor.name for tensor in tensors}
    facts = {name: one for name, one in (model or {}).items() if name in names}
    network = Network(tensors, config, facts)
    roles = find_roles(network)
    axes = find_axes(network, roles)
    told = {name: one.tied_to for name, one in facts.items() if one.tied_to in names}
    tied = told | find_tied(network, roles) | dict(tied)
    calibrated = recipe.data is not None and recipe.data.calibration is not None
    deciders = find_deciders(recipe.rules, roles)
    twins = _stored_twins(deciders, tied)
    whole = whole_stacks(facts, deciders)
    target = target_of(recipe.target)
    decisions: list[Decision] = []
    errors: list[InputError] = []
    for tensor in tensors:
        rule = deciders[tensor.name]
        try:
            fact = facts.get(tensor.name)
            because = _not_taken(rule, fact, calibrated, whole, roles[tensor.name])
            stack = fact.stack if fact is not None and _is_watched(rule, calibrated) else None
            known = _Known(roles[tensor.name], axes.get(tensor.name), twins.get(tensor.name), because, stack)
            decision = replace(_decide(tensor, rule, known, target), role=known.role)
            decision = decision if target is None else hold(decision, rule, target)
            decisions.append(_stored(decision, rule, recipe))
        except RecipeError as error:
            errors.append(error)
    if not errors and target is not None and target.linked:
        errors = [*refuse_unlinked(decisions, deciders)]
    if not errors:
        errors = [*_idle_rules(recipe, deciders, roles, decisions), *_stepless(recipe), *_unshareable(decisions)]
    raise_all(errors)
    if nonfinite is not None:
        decisions = [_without_nonfinite(d, nonfinite(d.tensor)) if d.compresses else d for d in decisions]
    decisions = [*without_broken_stacks(decisions, facts)]
    return Plan(recipe, tuple(_learned(decisions, representatives)))


def _without_nonfinite(decision: Decision, count: int) -> Decision:
    """The decision, or to keep a weight that holds NaN or Inf."""
    if not count:
        return decision
    return replace(decision, method=None, config=KEPT, reason=f"{count} values are NaN or Inf (--skip-nonfinite)")


def _learned(decisions: Iterable[Decision], path: Path | None) -> Iterator[Decision]:
    """The decisions with the bits that their learned representatives need. Raises DataError, Refusals."""
    errors: list[InputError] = []
    for decision in decisions:
        if path is not None and decision.compresses and METHODS[decision.method or ""].representatives:
            try:
                entries = count_representatives(path, decision.tensor.name, 2**decision.config.code_bits)
            except DataError as error:
                errors.append(error)
                if error.subject is None:
                    break
                continue
            config = decision.config.changed(bits=max(1, math.ceil(math.log2(entries))))
            decision = replace(decision, config=config, codebook=replace(decision.codebook, entries=entries))
        yield decision
    raise_all(errors)


def _stepless(recipe: Recipe) -> list[InputError]:
    """Rules of a method without widths that neither a budget nor a step of their own decides, or whose step is none."""
    if recipe.budget is not None:
        return []
    if recipe.model is not None and recipe.data is not None and recipe.data.calibration is not None:
        what = "step is for weights alone: with calibration data a budget decides all steps together"
        hint = "add `budget: {bpw: 2.0}` in its place, or take data.calibration out"
        stepped = [rule for rule in recipe.rules if isinstance(rule.config, RdConfig) and rule.config.step is not None]
        if stepped:
            return [RecipeError(rule.where, what, hint) for rule in stepped]
    what = "has no widths, and neither a budget nor a step says how fine its grids are"
    flags, keys = (
        "add --bpw 2.0 or --target-size SIZE",
        "add `budget: {bpw: 2.0}` to the recipe, or `step: 0.3` to the rule",
    )
    return [
        RecipeError(rule.where, f"{rule.method} {what}", flags if rule.where == COMMAND_LINE else keys)
        for rule in recipe.rules
        if isinstance(rule.config, RdConfig) and rule.config.step is None
    ]


def _stored_twins(deciders: Mapping[str, Rule | None], tied: Mapping[str, str]) -> dict[str, str]:
    """Tied name -> the tensor that is stored for it, which is no copy itself. A rule of its own unties a name."""
    copies = {name: tied[name] for name, rule in deciders.items() if name in tied and not (rule and rule.names(name))}
    twins = {}
    for name, twin in copies.items():
        while twin in copies:
            twin = copies[twin]
        twins[name] = twin
    return twins


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a tensor beside its rule.

    axis     its channel axes, where they are not the first
    twin     the tensor that is stored for it
    foreign  why the rule's method cannot take its weight
    stack    what the network holds it as rows of, where the rule's method would take that one whole
    """

    role: Role
    axis: Axis | None = None
    twin: str | None = None
    foreign: str | None = None
    stack: str | None = None


def _decide(tensor: TensorInfo, rule: Rule | None, known: _Known, target: Target | None = None) -> Decision:
    """What happens to a tensor, before it is asked whether the target holds it. Raises RecipeError."""
    if known.twin is not None:
        return Decision(tensor, None, KEPT, f"tied to {known.twin}, stored once", tied_to=known.twin)
    if rule is None:
        return Decision(tensor, None, KEPT, "no rule matches")
    if rule.method is None:
        return Decision(tensor, None, KEPT, f"kept by {rule.where}")
    because = _unfit(tensor)
    if because is not None:
        if rule.names(tensor.name) and tensor.numel:
            what = f"{rule.method} cannot compress it: {because}"
            raise RecipeError(rule.where, what, "use keep: {}", Subject(tensor.name, tensor.shape))
        return Decision(tensor, None, KEPT, because)
    named = rule.by_role or rule.names(tensor.name)
    because = None if named else _kept_unnamed(tensor, known)
    if because is not None:
        return Decision(tensor, None, KEPT, because)
    stands_in, stack = "", known.stack
    if known.foreign is not None:
        instead = _rule_instead(tensor, rule, known, target)
        if instead is None:
            return Decision(tensor, None, KEPT, f"{rule.method} cannot take it: {known.foreign}")
        stands_in = f"; {instead.method}, for {rule.method} cannot take it: {known.foreign}"
        rule, stack = instead, None
    elif stack is not None:
        stands_in = f"; {rule.method} sees {stack}, whose rows it is"
    axis, reason = _channel_axis(tensor, rule, known.axis)
    reason += stands_in
    accepted = _accepted(tensor, rule, axis)
    shared = shared_by(tensor.name, accepted.share)
    if shared is not None:
        reason = f"{reason}; one codebook for the {shared}"
    decision = Decision(tensor, rule.method, accepted, reason, axis, codebook=CodebookSpec(shared=shared), stack=stack)
    return decision if named else _if_smaller(decision)


def _kept_unnamed(tensor: TensorInfo, known: _Known) -> str | None:
    """Why a tensor is kept that its rule does not name, or None."""
    if len(tensor.shape) < 2:
        return "fewer than two dimensions"
    if ROLES[known.role].kept:
        return f"{known.role}, kept unless a rule names it"
    channels = known.axis.axes if known.axis is not None else (0,)
    columns = math.prod(size for index, size in enumerate(tensor.shape) if index not in channels)
    return "one value a channel" if columns == 1 else None


def _if_smaller(decision: Decision) -> Decision:
    """The decision, or to keep a tensor whose codes and grids would take no fewer bytes than it does."""
    config = decision.config
    if isinstance(config, Widths):
        smaller = {bits: one for bits, one in config.configs.items() if _is_smaller(replace(decision, config=one))}
        if smaller:
            return decision if len(smaller) == len(config.configs) else replace(decision, config=Widths(smaller))
    elif _is_smaller(decision):
        return decision
    return Decision(decision.tensor, None, KEPT, f"would take no fewer bytes than its {decision.tensor.n_bytes}")


def _is_smaller(decision: Decision) -> bool:
    """Whether codes and grids, packed, take less than the tensor, as far as a plan knows before any weight is read."""
    # Codes without a width are weighed by their budget, and learned representatives are yet to be counted.
    if decision.config.form in ("unbounded", "constant") or METHODS[decision.method or ""].representatives:
        return True
    tensor, shared = decision.tensor, decision.codebook.shared is not None
    return _packed_bytes(tensor.shape, tensor.dtype, decision.axis, decision.config, shared) < tensor.n_bytes


@lru_cache(maxsize=4096)
def _packed_bytes(shape: Shape, dtype: str, axis: tuple[int, ...], config: MethodConfig, shared: bool) -> int:
    """What codes and grids of a tensor take, packed; a codebook that several share is not this one's to pay."""
    codebook = CodebookSpec(shared="several", stored_in="another") if shared else CodebookSpec()
    decision = Decision(TensorInfo("", shape, dtype), "", config, "", axis, codebook=codebook)
    return sum(slot.n_bytes for slot in make_slots(decision, "packed"))


def _is_watched(rule: Rule | None, calibrated: bool) -> bool:
    """Whether the rule's method sees a weight in a live model, rather than alone."""
    if rule is None or rule.method is None:
        return False
    method = METHODS[rule.method]
    return method.needs != "weights" or (method.rates and calibrated)


def _not_taken(
    rule: Rule | None, fact: TensorFacts | None, calibrated: bool, whole: frozenset[str], role: Role
) -> str | None:
    """Why the rule's method, which needs more than weights, cannot take a weight, or None.

    fact   what a live model says of it; without one its role alone tells what has no inputs
    whole  the stacks that a method may take whole, where it takes what a module multiplies by inside itself
    """
    if rule is None or rule.method is None or not _is_watched(rule, calibrated):
        return None
    method = METHODS[rule.method]
    if fact is None:
        return "an embedding has no inputs" if role == "embedding" and method.statistics else None
    if fact.merged and not (fact.stack in whole and "inner" in method.takes):
        return f"{fact.module} holds it as a part of another tensor"
    if fact.kind == "idle" and (method.called or method.takes):
        return f"no forward pass calls its module, {fact.module}"
    if method.called and not fact.called:
        return "the model reads this weight without calling its module"
    if method.takes and fact.kind not in method.takes:
        inner = f"{fact.module} multiplies by it inside itself"
        return inner if fact.kind == "inner" else f"its module, {fact.module}, is not a matrix product"
    return None


def _rule_instead(tensor: TensorInfo, rule: Rule, known: _Known, target: Target | None) -> Rule | None:
    """The rule of mse, or of kmeans, at the same bits for a weight that the method cannot take; None where it is kept.

    raises  RecipeError where the rule names the tensor, and where it is one of many of a layer that the network holds
            as one, which a method without widths leaves no bits for
    """
    method = METHODS[rule.method or ""]
    other = "kmeans" if method.family == "cluster" else "mse"
    if rule.names(tensor.name) or (method.rates and known.role == "expert"):
        hint = f"give it a rule of its own with {other}, which needs weights alone, or keep: {{}}"
        what = f"{method.name} cannot take it: {known.foreign}"
        raise RecipeError(rule.where, what, hint, Subject(tensor.name, tensor.shape))
    if method.rates or known.role not in WEIGHT_ROLES:
        return None

    def make(bits: int | None) -> MethodConfig:
        make_config: Callable[..., MethodConfig] = METHODS[other].config
        options = {"bits": bits}
        return make_config(**(options if target is None else target.filled(METHODS[other], options)))

    config = rule.options
    if isinstance(config, Widths):
        return replace(rule, method=other, config=Widths({width: make(width) for width in config.configs}))
    return replace(rule, method=other, config=make(config.bits))


def _accepted(tensor: TensorInfo, rule: Rule, axis: tuple[int, ...]) -> MethodConfig:
    """The rule's config; of open widths those that the weight can have. Raises RecipeError where it can have none."""
    config = rule.options
    widths = config.configs if isinstance(config, Widths) else {0: config}
    refusals = {width: refuse(tensor, one, axis) for width, one in widths.items()}
    accepted = {width: one for width, one in widths.items() if refusals[width] is None}
    if not accepted:
        hint = "use -r RECIPE with a rule of its own for it, or keep: {}"
        hint = hint if rule.where == COMMAND_LINE else "change the rule or add one"
        raise RecipeError(rule.where, str(refusals[max(widths)]), hint, Subject(tensor.name, tensor.shape))
    return Widths(accepted) if isinstance(config, Widths) else config


def refuse(tensor: TensorInfo, config: MethodConfig, axis: tuple[int, ...]) -> str | None:
    """Why a tensor cannot be encoded by a config, or None; of a codebook that several share, they answer together."""
    rows = row_shape(tensor.shape, axis)
    refusal = config.refuse(rows)
    if refusal is None and isinstance(config, ClusterConfig) and config.share is None:
        refusal = refuse_cost(config, [rows], tensor.n_bytes)
    return refusal


def _stored(decision: Decision, rule: Rule | None, recipe: Recipe) -> Decision:
    """The decision with how a kept tensor is stored: its dtype and coding are its rule's, or else the recipe's."""
    own = rule.config if rule is not None and isinstance(rule.config, Keep) else Keep()
    dtype, coding, tensor = own.dtype or recipe.keep_dtype, own.coding or recipe.keep_coding, decision.tensor
    if decision.compresses or decision.tied_to or tensor.dtype not in WEIGHT_DTYPES or not tensor.numel:
        return decision
    if dtype is not None and tensor.dtype in HALVED:
        decision = replace(decision, stored="F16", reason=f"{decision.reason}{STORED_AS_F16}")
    if coding is not None and decision.stored_as.n_bytes >= LEAST_CODED:
        decision = replace(decision, coding=coding, reason=f"{decision.reason}{CODED}")
    return decision


def shared_by(name: str, scope: str | None) -> str | None:
    """What a tensor shares its codebook with: "model", "type q_proj.weight", "layer model.layers.3"; None: nothing.

    A layer is all up to the first number in the name, without one the parent of the tensor's module.
    """
    if scope is None or scope == "model":
        return scope
    parts = name.split(".")
    if scope == "type":
        return f"type {'.'.join(parts[-2:])}"
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    prefix = parts[: numbers[0] + 1] if numbers else parts[:-2]
    return f"layer {'.'.join(prefix)}".rstrip()


def _unshareable(decisions: Sequence[Decision]) -> list[InputError]:
    """An error for each codebook that its tensors cannot pay for together."""
    errors: list[InputError] = []
    for group in shared_groups(decisions).values():
        first = group[0]
        shapes = [row_shape(d.tensor.shape, d.axis) for d in group]
        assert isinstance(first.config, ClusterConfig)
        refusal = refuse_cost(first.config, shapes, sum(d.tensor.n_bytes for d in group))
        if refusal is not None:
            what = f"{first.codebook.shared}: {refusal}"
            errors.append(RecipeError(first.reason.partition("; ")[0], what, "fewer bits, a smaller dim, or no share"))
    return errors


def _unfit(tensor: TensorInfo) -> str | None:
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"dtype {tensor.dtype} is kept"
    if tensor.numel == 0:
        return "no elements"
    return None


def _channel_axis(tensor: TensorInfo, rule: Rule, known: Axis | None) -> tuple[tuple[int, ...], str]:
    """The channel axes, normalised, and the reason to print: the recipe's, the checkpoint's, or axis 0."""
    chosen = rule.options.axis
    if chosen is None:
        return (known.axes, f"{rule.where}; {known.reason}") if known else ((0,), rule.where)
    rank = len(tensor.shape)
    asked = (chosen,) if isinstance(chosen, int) else tuple(chosen)
    axes = tuple(axis + rank if axis < 0 else axis for axis in asked)
    said = chosen if isinstance(chosen, int) else list(chosen)
    what = None
    if not all(0 <= axis < rank for axis in axes):
        what = f"axis {said} is out of range"
    elif len(set(axes)) < len(axes):
        what = f"axis {said} names one axis twice"
    elif not 0 < len(axes) < max(rank, 2):
        what = f"axis {said} leaves no channels, or no columns"
    if what is None:
        return axes, rule.where
    most = max(rank - 1, 1)
    own = ", ".join(map(str, range(rank)))
    hint = f"it has the axes {own}" if most == 1 else f"give one to {most} of its axes {own}"
    raise RecipeError(rule.where, what, hint, Subject(tensor.name, tensor.shape))


def _idle_rules(
    recipe: Recipe,
    deciders: Mapping[str, Rule | None],
    roles: Mapping[str, Role],
    decisions: Sequence[Decision],
) -> list[InputError]:
    """An error for each rule that decides nothing; a method's rule must compress at least one tensor."""
    errors: list[InputError] = []
    by_name = {decision.tensor.name: decision for decision in decisions}
    for use in rule_uses(recipe.rules, deciders, roles):
        if not use.matched:
            errors.append(RecipeError(use.where, f"match {use.globs!r} fits no tensor", _nearest(use, roles)))
        elif not use.decided:
            earlier = next(rule for rule in use.matched.values() if rule is not None)
            what = f"match {use.globs!r} decides nothing: {earlier.where} comes first"
            errors.append(RecipeError(use.where, what, "put the narrower rule first"))
        elif use.rules[0].method is not None and not any(by_name[name].compresses for name in use.decided):
            first = by_name[use.decided[0]]
            what = f"match {use.globs!r} compresses nothing: {first.tensor.name}: {first.reason}"
            hint = "match weights of two dimensions or more, or use keep: {}"
            if ROLES[first.role].kept and len(first.tensor.shape) > 1:
                hint = f'name the tensors, or their role: match "{ROLE_MARK}{first.role}"'
            errors.append(RecipeError(use.where, what, hint))
    return errors


def _nearest(use: RuleUse, roles: Mapping[str, Role]) -> str:
    """The hint for a match that fits nothing: what a checkpoint has that is most like it."""
    if all(rule.by_role for rule in use.rules):
        return f"roles here: {', '.join(f'{ROLE_MARK}{role}' for role in ROLE_NAMES if role in roles.values())}"
    close = difflib.get_close_matches(use.rules[0].match, roles, n=3, cutoff=0.0)
    return f"nearest names: {', '.join(close)}" if close else "the checkpoint has no tensors"
