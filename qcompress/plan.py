"""Recipe x TensorInfo -> Plan: what happens to each tensor and why, or every reason why not, at once.

Made from names, shapes and dtypes alone, so that it can be printed and refused before any weight is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from qcompress.errors import InputError, RecipeError, raise_all
from qcompress.registry import METHODS, refuse_cost
from qcompress.types import (
    COMMAND_LINE,
    WEIGHT_DTYPES,
    Axis,
    Book,
    Decision,
    KeepDtype,
    Plan,
    Recipe,
    Rule,
    TensorInfo,
    Widths,
    row_shape,
    shared_groups,
)

HALVED = ("F32", "F64")
"""The dtypes that `keep_dtype: f16` changes: bfloat16 would lose range and gain nothing."""

STORED_AS_F16 = "; stored as F16"


def make_plan(
    recipe: Recipe,
    tensors: Sequence[TensorInfo],
    tied: Mapping[str, str],
    axes: Mapping[str, Axis],
) -> Plan:
    """The plan of `recipe` for a checkpoint of `tensors`; `tied` and `axes` are what the checkpoint says of them.

    Raises RecipeError, or Refusals with one RecipeError for each rule that decides nothing and each tensor that cannot
    follow its rule.
    """
    deciders = {tensor.name: _first_match(recipe.rules, tensor.name) for tensor in tensors}
    twins = _stored_twins(deciders, tied)
    decisions: list[Decision] = []
    errors: list[InputError] = []
    for tensor in tensors:
        rule = deciders[tensor.name]
        try:
            decision = _decide(tensor, rule, twins.get(tensor.name), axes.get(tensor.name))
            decisions.append(_stored(decision, rule, recipe.keep_dtype))
        except RecipeError as error:
            errors.append(error)
    if not errors:
        errors = [*_idle_rules(recipe, deciders, decisions), *_stepless(recipe), *_unshareable(decisions)]
    raise_all(errors)
    return Plan(recipe, tuple(decisions))


def _stepless(recipe: Recipe) -> list[InputError]:
    """Rules of a method without widths that neither a budget nor a step of their own decides."""
    if recipe.budget is not None:
        return []
    mend = "add --bpw 2.0, --target-size SIZE or a `budget`, or `step: 0.3` to the rule"
    return [
        RecipeError(rule.where, f"{rule.method} has no widths, and nothing says how fine its grids are", mend)
        for rule in recipe.rules
        if rule.method is not None and METHODS[rule.method].live is not None and rule.options.step is None
    ]


def _first_match(rules: Sequence[Rule], name: str) -> Rule | None:
    return next((rule for rule in rules if fnmatchcase(name, rule.match)), None)


def _stored_twins(deciders: Mapping[str, Rule | None], tied: Mapping[str, str]) -> dict[str, str]:
    """Tied name -> the tensor that is stored for it, which is no copy itself. A rule of its own unties a name."""
    copies = {
        name: tied[name] for name, rule in deciders.items() if name in tied and not (rule and rule.names_one_tensor)
    }
    twins = {}
    for name, twin in copies.items():
        while twin in copies:
            twin = copies[twin]
        twins[name] = twin
    return twins


def _decide(tensor: TensorInfo, rule: Rule | None, twin: str | None, known: Axis | None) -> Decision:
    if twin is not None:
        return Decision(tensor, None, None, f"tied to {twin}, stored once", tied_to=twin)
    if rule is None:
        return Decision(tensor, None, None, "no rule matches")
    if rule.method is None:
        return Decision(tensor, None, None, f"kept by {rule.where}")
    because = _unfit(tensor)
    if because is not None:
        if rule.names_one_tensor and tensor.numel:
            raise RecipeError(rule.where, f"{rule.method} cannot compress {tensor.name}: {because}", "use keep: {}")
        return Decision(tensor, None, None, because)
    if len(tensor.shape) < 2 and not rule.names_one_tensor:
        return Decision(tensor, None, None, "fewer than two dimensions")
    axis, reason = _channel_axis(tensor, rule, known)
    accepted = _accepted(tensor, rule, axis)
    shared = shared_by(tensor.name, getattr(rule.options, "share", None))
    if shared is not None:
        reason = f"{reason}; one codebook for the {shared}"
    return Decision(tensor, rule.method, accepted, reason, axis, book=Book(shared=shared))


def _accepted(tensor: TensorInfo, rule: Rule, axis: tuple[int, ...]) -> Any:
    """The rule's config; of open widths those that the weight can have. Raises RecipeError where it can have none."""
    widths = rule.config.configs if isinstance(rule.config, Widths) else {0: rule.config}
    refusals = {width: refuse(tensor, rule.method or "", config, axis) for width, config in widths.items()}
    accepted = {width: config for width, config in widths.items() if refusals[width] is None}
    if not accepted:
        what = f"{tensor.name} {list(tensor.shape)}: {refusals[max(widths)]}"
        mend = "use -r RECIPE with a rule of its own for it, or keep: {}"
        raise RecipeError(rule.where, what, mend if rule.where == COMMAND_LINE else "change the rule or add one")
    return Widths(accepted) if isinstance(rule.config, Widths) else rule.config


def refuse(tensor: TensorInfo, method: str, config: Any, axis: tuple[int, ...]) -> str | None:
    """Why a tensor cannot follow a method's config, or None; of a codebook that several share, they answer together."""
    rows = row_shape(tensor.shape, axis)
    refusal = METHODS[method].refuse(config, rows)
    if refusal is None and config.form == "codebook" and getattr(config, "share", None) is None:
        refusal = refuse_cost(config, [rows], tensor.n_bytes)
    return refusal


def _stored(decision: Decision, rule: Rule | None, every: KeepDtype | None) -> Decision:
    """The decision with the dtype in which a kept tensor is stored: its rule's, or else that of `every` tensor."""
    keeps = rule is not None and rule.method is None and rule.config is not None
    wanted = rule.config.dtype if rule is not None and keeps else every
    tensor = decision.tensor
    if wanted is None or decision.compresses or decision.tied_to or tensor.dtype not in HALVED or not tensor.numel:
        return decision
    return replace(decision, stored="F16", reason=f"{decision.reason}{STORED_AS_F16}")


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
        refusal = refuse_cost(first.config, shapes, sum(d.tensor.n_bytes for d in group))
        if refusal is not None:
            what = f"{first.book.shared}: {refusal}"
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
    inside = all(0 <= axis < rank for axis in axes) and len(set(axes)) == len(axes)
    if not inside or not 0 < len(axes) < max(rank, 2):
        what = f"axis {chosen} is none of {tensor.name} {list(tensor.shape)}"
        raise RecipeError(rule.where, what, f"give one to {max(rank - 1, 1)} different axes below {rank}")
    return axes, rule.where


def _idle_rules(recipe: Recipe, deciders: Mapping[str, Rule | None], decisions: Sequence[Decision]) -> list[InputError]:
    """An error for each rule that decides nothing; a method's rule must compress at least one tensor.

    A rule with a list of globs has come here as one Rule a glob, all of the same `where`, and is judged as one.
    """
    errors: list[InputError] = []
    for where, group in groupby(recipe.rules, key=lambda rule: rule.where):
        rules = list(group)
        globs = [rule.match for rule in rules]
        shown = f"match {globs[0] if len(globs) == 1 else globs!r}"
        matched = {
            name: decider for name, decider in deciders.items() if any(fnmatchcase(name, glob) for glob in globs)
        }
        decided = [d for d in decisions if (rule := matched.get(d.tensor.name)) is not None and rule.where == where]
        if not matched:
            close = difflib.get_close_matches(globs[0], deciders, n=3, cutoff=0.0)
            mend = f"nearest names: {', '.join(close)}" if close else "the checkpoint has no tensors"
            errors.append(RecipeError(where, f"{shown} fits no tensor", mend))
        elif not decided:
            earlier = next(rule for rule in matched.values() if rule is not None)
            what = f"{shown} decides nothing: {earlier.where} comes first"
            errors.append(RecipeError(where, what, "put the narrower rule first"))
        elif rules[0].method is not None and not any(decision.compresses for decision in decided):
            what = f"{shown} compresses nothing: {decided[0].tensor.name}: {decided[0].reason}"
            errors.append(RecipeError(where, what, "match weights of two dimensions or more, or use keep: {}"))
    return errors
