"""A recipe's regularizers -> penalties on the weights of a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from qcompress.errors import InputError, ModelError, RecipeError, raise_all
from qcompress.model.build import channel_axes
from qcompress.registry.regularizers import REGULARIZERS, refuse_levels
from qcompress.regularizers.penalty import Penalty
from qcompress.regularizers.representatives import Representatives
from qcompress.training.penalties import Penalties, Regularized
from qcompress.types import Rule


def attach_penalties(module: nn.Module, rules: Sequence[Rule]) -> Penalties:
    """The penalties of a model's weights; the first rule that matches a name decides.

    Weights of convolutions and dense layers are matched; any other parameter only by a rule that names it without a
    wildcard. Tied weights count once, by their first name.

    raises  RecipeError for a rule that decides nothing; ModelError for a weight that cannot follow its rule
    """
    kinds = weight_kinds(module)
    axes = channel_axes(module)
    deciders = {name: _decider(rules, name, kinds.get(name)) for name, _ in module.named_parameters()}
    raise_all(_idle(rules, deciders))
    found: list[Regularized] = []
    for name, weight in module.named_parameters():
        rule = deciders[name]
        if rule is None or rule.method is None:
            continue
        because = refuse_levels(rule.config, tuple(weight.shape))
        if because is not None:
            raise ModelError(f"{rule.where}: {name}", because, "ask for fewer, or leave the tensor out of the match")
        order = None
        if name in axes:
            first = axes[name].axes
            order = (*first, *(place for place in range(weight.ndim) if place not in first))
        seen = (weight.detach() if order is None else weight.detach().permute(order)).contiguous()
        try:
            penalty = _make(rule, seen)
        except ModelError as error:
            raise ModelError(f"{rule.where}: {name}", error.what, error.mend) from None
        found.append(Regularized(name, weight, rule.config, penalty, rule.where, order=order))
    for one in found:
        if one.config.layer_reduction == "mean":
            one.share = 1 / sum(other.where == one.where for other in found)
    _share_representatives(found, kinds)
    return Penalties(found)


def _make(rule: Rule, weight: Tensor) -> Penalty:
    assert rule.method is not None
    module, _, function = REGULARIZERS[rule.method].target.partition(":")
    penalty: Penalty = getattr(import_module(module), function)(rule.config, weight)
    return penalty


def weight_kinds(module: nn.Module) -> dict[str, str]:
    """Weight name -> `conv` or `dense`."""
    kinds = {}
    for name, one in module.named_modules():
        kind = type(one).__name__
        if isinstance(one, nn.Linear) or (kind == "Conv1D" and type(one).__module__.startswith("transformers.")):
            kinds[f"{name}.weight".lstrip(".")] = "dense"
        elif isinstance(one, nn.modules.conv._ConvNd):
            kinds[f"{name}.weight".lstrip(".")] = "conv"
    return kinds


def _decider(rules: Sequence[Rule], name: str, kind: str | None) -> Rule | None:
    for rule in rules:
        if not fnmatchcase(name, rule.match):
            continue
        if rule.names_one_tensor or rule.method is None:
            return rule
        if kind is not None and rule.config.layers in ("all", kind):
            return rule
    return None


def _idle(rules: Sequence[Rule], deciders: Mapping[str, Rule | None]) -> list[InputError]:
    """An error for each rule that decides nothing; the globs of one list are judged together."""
    errors: list[InputError] = []
    for where, group in groupby(rules, key=lambda rule: rule.where):
        same = list(group)
        if any(decider is not None and decider.where == where for decider in deciders.values()):
            continue
        globs = [rule.match for rule in same]
        what = f"match {globs[0] if len(globs) == 1 else globs} decides nothing"
        example = next((name for name in deciders if name.endswith("weight")), "nothing here")
        errors.append(RecipeError(where, what, f"weights are named like {example}; see `layers`"))
    return errors


def _share_representatives(found: Sequence[Regularized], kinds: Mapping[str, str]) -> None:
    """One set of representatives for the layers of a rule that ask for it."""
    sets: dict[tuple[str, str], Representatives] = {}
    for one in found:
        share = getattr(one.config, "share", "layer")
        if share == "layer":
            continue
        key = (one.where, kinds.get(one.name, "other") if share == "type" else "model")
        penalty: Any = one.penalty
        sets.setdefault(key, penalty.representatives)
        penalty.share(sets[key])
