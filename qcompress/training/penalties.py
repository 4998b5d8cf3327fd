"""The regularizers of a recipe are attached here to the weights of a live model, and act in its training loop.

Gradients go straight into the weights' own, after the backward pass and its unscaling, so a penalty is added once a
step whatever the accumulation, and is the same on every rank without a word between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError, RecipeError, Subject, TrainingError, raise_all
from qcompress.model.build import channel_axes, facts_of
from qcompress.plan.network import Network
from qcompress.plan.roles import find_roles
from qcompress.plan.rules import find_deciders, rule_uses
from qcompress.registry.regularizers import RegularizerConfig, RepresentativesConfig, refuse_levels
from qcompress.regularizers.penalty import Evaluated, Penalty, make_penalty
from qcompress.regularizers.representatives import Representatives, ToRepresentatives
from qcompress.training.optimizers import Group
from qcompress.types.plan import Role, Rule, TensorInfo
from qcompress.types.settings import AdamW, Optimizer

COUNTED_RATE = 0.1
"""Learning rate of representatives whose gradient is divided by their counts, with SGD."""

LARGEST_FACTOR = 1e30
"""Of a step: whatever it is multiplied with is then beyond what a network uses, or float32 holds."""


@dataclass
class Regularized:
    """One weight and its penalty.

    regularizer  its name
    order        dimensions with the channels first, where the weight has them elsewhere
    share        1, or one over the weights of the rule where their penalties are averaged
    started      whether the penalty has begun
    """

    name: str
    weight: nn.Parameter
    regularizer: str
    penalty: Penalty[RegularizerConfig]
    where: str
    order: tuple[int, ...] | None = None
    share: float = 1.0
    started: bool = False

    @property
    def config(self) -> RegularizerConfig:
        return self.penalty.config

    @property
    def counted(self) -> bool:
        """Whether the gradients of what it learns are divided by the weights of each representative."""
        return isinstance(self.config, RepresentativesConfig) and self.config.gradient == "count"

    def seen(self) -> Tensor:
        """The weight as penalties see it: contiguous, its channels first."""
        return _channels_first(self.weight, self.order)

    def accumulate(self, into: Tensor | None, factor: float) -> Evaluated:
        """The penalty; factor times its gradient is added to `into`, shaped like the weight.

        raises  TrainingError for a factor of which float32 could not hold the products
        """
        _refuse_runaway(self.name, factor)
        seen = self.seen()
        if into is None or (self.order is None and into.is_contiguous()):
            return self.penalty.accumulate(seen, into, factor)
        buffer = torch.zeros_like(seen)
        found = self.penalty.accumulate(seen, buffer, factor)
        into.add_(buffer if self.order is None else buffer.permute(*(self.order.index(i) for i in range(into.ndim))))
        return found

    def act(self, factor: float, rate: float) -> Evaluated:
        """The penalty; its gradient is added to the weight's own, or takes a step of its own at the learning rate.

        Such a step is taken as AdamW takes its decay: before the optimizer's, so that both are of the same weights.

        raises  as accumulate
        """
        if not self.weight.requires_grad or self.config.coupling == "proximal":
            return self.accumulate(None, factor)
        if self.config.coupling == "coupled":
            if self.weight.grad is None:
                self.weight.grad = torch.zeros_like(self.weight)
            return self.accumulate(self.weight.grad, factor)
        change = torch.zeros_like(self.weight)
        found = self.accumulate(change, -factor * rate)
        with torch.no_grad():
            self.weight.add_(change)
        return found

    def factor(self, step: int, total: int) -> float:
        """What the penalty is multiplied by in a step; 0 where it is not applied."""
        if step % self.config.every:
            return 0.0
        return strength_at(self.config, step / max(total, 1)) * self.share * self.config.every


def strength_at(config: RegularizerConfig, share: float) -> float:
    """The strength when `share` of all steps are done: nothing, rising, held, nothing again."""
    # A schedule's strength is a number by the time that anything is trained.
    assert isinstance(config.strength, int | float)
    return config.strength * shape_at(config, share)


def shape_at(config: RegularizerConfig, share: float) -> float:
    """The share of its strength that a penalty has when `share` of all steps are done."""
    start, ramp = config.start, config.ramp
    assert start is not None and ramp is not None
    if share < start or (config.hold is not None and share >= start + ramp + config.hold):
        return 0.0
    if share >= start + ramp:
        return 1.0
    risen = (share - start) / ramp
    match config.shape:
        case "linear":
            return risen
        case "cosine":
            return (1 - math.cos(math.pi * risen)) / 2
        case "tanh":
            return (1 + math.tanh(6 * risen - 3)) / 2


@dataclass
class Penalties:
    """All of them; `regularized` in the order of the model's parameters."""

    regularized: Sequence[Regularized]
    last: dict[str, Evaluated] = field(default_factory=dict)

    def learned(self, optimizer: Optimizer) -> list[Group]:
        """The optimizer's groups of what is learned, one for each temperature, set of representatives or margin."""
        groups: dict[int, Group] = {}
        for one in self.regularized:
            for term in one.penalty.terms.values():
                rate = one.config.learning_rate
                if one.counted and rate is None and not isinstance(optimizer, AdamW):
                    rate = COUNTED_RATE
                groups[id(term)] = {
                    "params": [term],
                    # A step along the mean of its weights needs no momentum, and no scale but its own.
                    **({"momentum": 0.0} if one.counted else {}),
                    **({"lr": rate} if rate is not None else {}),
                }
        return list(groups.values())

    def add(self, step: int, total: int, rate: float) -> float:
        """Before the optimizer's step at rate `rate`: add gradients, or take the steps that are the penalties' own.

        Both are of the weights as they are, as the loss's gradient is. Gives the penalty, strengths included.
        """
        self.last = {}
        value = 0.0
        for one in self.regularized:
            factor = one.factor(step, total)
            if not factor:
                continue
            self._begin(one)
            found = self.last[one.name] = one.act(factor, rate)
            value += factor / one.config.every * float(found.value)
        self._add_terms(step, total)
        return value

    def _add_terms(self, step: int, total: int) -> None:
        """The gradients of what is learned, summed over the weights that share it."""
        sums: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        for one in self.regularized:
            found = self.last.get(one.name)
            if found is None:
                continue
            factor = 1.0 if one.counted else one.factor(step, total)
            for name, slope in found.terms.items():
                term = one.penalty.terms[name]
                counts = _divisor(one, found)
                before = sums.get(id(term))
                slope = factor * slope
                if before is not None:
                    slope = before[1] + slope
                    counts = None if counts is None or before[2] is None else before[2] + counts
                sums[id(term)] = (term, slope, counts)
        for term, slope, counts in sums.values():
            slope = slope if counts is None else slope / counts.clamp_min(torch.finfo(counts.dtype).tiny)
            term.grad = slope.to(term.dtype)

    def after(self, step: int, total: int, rate: float) -> None:
        """After the optimizer's step at rate `rate`: proximal steps, and the bounds of what penalties learn."""
        merged: dict[int, Evaluated] = {}
        for one in self.regularized:
            found = self.last.get(one.name)
            if found is None:
                continue
            factor = one.factor(step, total) * rate
            if one.config.coupling == "proximal":
                _refuse_runaway(one.name, factor)
                with torch.no_grad():
                    one.penalty.shrink(one.weight, factor)
            before = merged.get(id(one.penalty.shared))
            if before is not None and before.counts is not None and found.counts is not None:
                found = Evaluated(found.value, found.terms, before.counts + found.counts)
            merged[id(one.penalty.shared)] = found
        for one in self.regularized:
            # Once for what several weights share.
            together = merged.pop(id(one.penalty.shared), None)
            if together is not None:
                one.penalty.settle(one.seen(), together)

    def zero_grad(self) -> None:
        for one in self.regularized:
            for term in one.penalty.terms.values():
                term.grad = None

    def saved(self) -> dict[str, Tensor]:
        """What goes beside the checkpoint: `T.alpha`, `T.representatives`, `T.margin`, float32 on the CPU."""
        return {
            f"{one.name}.{key}": value.contiguous().clone()
            for one in self.regularized
            for key, value in one.penalty.saved(one.seen()).items()
        }

    def facts(self) -> dict[str, dict[str, Any]]:
        """What a report says of each weight: its regularizer, strength, penalty, temperature, dead representatives."""
        found: dict[str, dict[str, Any]] = {}
        for one in self.regularized:
            seen = one.seen()
            penalty = float(one.penalty.accumulate(seen, None, 0.0).value) if one.started else None
            fact: dict[str, Any] = {
                "regularizer": one.regularizer,
                "strength": one.config.strength
                if isinstance(one.config.strength, str)
                else float(one.config.strength or 0.0),
                "penalty": penalty,
            }
            if "alpha" in (saved := one.penalty.saved(seen)):
                alpha = saved["alpha"].double()
                soft_range = None if penalty is None else penalty - float(torch.exp(-alpha).mean())
                fact |= {"temperature": float(alpha.mean()), "soft_range": soft_range}
            if isinstance(one.penalty, ToRepresentatives):
                fact["dead"] = one.penalty.representatives.dead
            found[one.name] = fact
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed run needs beside the optimizer: tensors, and plain values."""
        tensors = {
            f"{one.name}.{key}": value.detach()
            for one in self.regularized
            for key, value in one.penalty.state().items()
        }
        values = {one.name: {"started": one.started, "ends": list(one.penalty.ends or ())} for one in self.regularized}
        return tensors, values

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Back to a saved state. Raises KeyError or RuntimeError where it is of other penalties."""
        with torch.no_grad():
            for one in self.regularized:
                for key, value in one.penalty.state().items():
                    value.copy_(tensors[f"{one.name}.{key}"])
                one.started = values[one.name]["started"]
                if values[one.name]["ends"]:
                    low, high = values[one.name]["ends"]
                    one.penalty.ends = (low, high)

    def _begin(self, one: Regularized) -> None:
        """Fix ranges and first representatives when a penalty first acts, from all weights that share them."""
        if one.started:
            return
        family = [other for other in self.regularized if other.penalty.shared is one.penalty.shared]
        for other in family:
            other.started = True
        weights = one.seen() if len(family) == 1 else torch.cat([other.seen().flatten() for other in family])
        try:
            one.penalty.begin(weights)
        except ModelError as error:
            raise ModelError(f"{one.where}: {one.name}", error.what, error.hint) from None


def _divisor(one: Regularized, found: Evaluated) -> Tensor | None:
    """What a representative's gradient is divided by: its weights, or their share where the penalty is a mean."""
    if found.counts is None or not one.counted:
        return None
    assert isinstance(one.config, RepresentativesConfig)
    return found.counts / one.weight.numel() if one.config.reduction == "mean" else found.counts


def attach_penalties(module: nn.Module, rules: Sequence[Rule]) -> Penalties:
    """The penalties of a model's weights; the first rule that matches a name decides.

    Weights of convolutions and dense layers are matched; any other parameter only by a rule that names it without a
    wildcard. Tied weights count once, by their first name.

    raises  RecipeError for a rule that decides nothing; ModelError for a weight that cannot follow its rule; Refusals
            where several
    """
    axes = channel_axes(module)
    parameters = dict(module.named_parameters())
    found: list[Regularized] = []
    for name, rule in decide_penalties(module, rules).items():
        weight, order = parameters[name], None
        assert rule.method is not None
        if name in axes:
            first = axes[name].axes
            order = (*first, *(place for place in range(weight.ndim) if place not in first))
        try:
            penalty = make_penalty(rule.method, config_of(rule), _channels_first(weight, order))
        except ModelError as error:
            raise ModelError(f"{rule.where}: {name}", error.what, error.hint) from None
        found.append(Regularized(name, weight, rule.method, penalty, rule.where, order))
    for one in found:
        if one.config.layer_reduction == "mean":
            one.share = 1 / sum(other.where == one.where for other in found)
    _share_representatives(found, weight_kinds(module))
    return Penalties(found)


def decide_penalties(module: nn.Module, rules: Sequence[Rule]) -> dict[str, Rule]:
    """Weight -> the rule of its penalty, from names and shapes alone. Raises what `attach_penalties` raises."""
    kinds = weight_kinds(module)
    parameters = dict(module.named_parameters())

    def reaches(rule: Rule, name: str) -> bool:
        if rule.names(name) or rule.by_role or rule.method is None:
            return True
        return name in kinds and config_of(rule).layers in ("all", kinds[name])

    roles = _roles_of(module, parameters)
    deciders = find_deciders(rules, roles, reaches)
    _refuse_idle(rules, deciders, roles)
    found = {name: rule for name, rule in deciders.items() if rule is not None and rule.method is not None}
    errors = []
    for name, rule in found.items():
        shape = tuple(parameters[name].shape)
        because = refuse_levels(config_of(rule), shape)
        if because is not None:
            hint = "ask for fewer, or leave the tensor out of the match"
            errors.append(ModelError(rule.where, because, hint, Subject(name, shape)))
    raise_all(errors)
    return found


def config_of(rule: Rule) -> RegularizerConfig:
    """The config of a rule that regularizes."""
    assert isinstance(rule.config, RegularizerConfig)
    return rule.config


def _refuse_runaway(name: str, factor: float) -> None:
    if not abs(factor) <= LARGEST_FACTOR:
        what = f"the penalty of {name!r} takes steps of {abs(factor):.3g} times its gradient"
        raise TrainingError("training", what, "lower its strength or the learning rate")


def _channels_first(weight: Tensor, order: tuple[int, ...] | None) -> Tensor:
    weight = weight.detach()
    return (weight if order is None else weight.permute(order)).contiguous()


def _roles_of(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Role]:
    """The role of each parameter, as its network tells it."""
    infos = [TensorInfo(name, tuple(value.shape), "F32") for name, value in parameters.items()]
    return find_roles(Network(infos, model=facts_of(module)))


def _refuse_idle(rules: Sequence[Rule], deciders: Mapping[str, Rule | None], roles: Mapping[str, Role]) -> None:
    """Raise RecipeError, or Refusals, where a rule decides nothing."""
    example = next((name for name in deciders if name.endswith("weight")), "nothing here")
    hint = f"weights are named like {example}; see `layers`"
    idle = (use for use in rule_uses(rules, deciders, roles) if not use.decided)
    raise_all([RecipeError(use.where, f"match {use.globs!r} decides nothing", hint) for use in idle])


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


def _share_representatives(found: Sequence[Regularized], kinds: Mapping[str, str]) -> None:
    """One set of representatives for the layers of a rule that ask for it."""
    sets: dict[tuple[str, str], Representatives] = {}
    for one in found:
        if isinstance(one.penalty, ToRepresentatives) and one.penalty.config.share != "layer":
            scope = kinds.get(one.name, "other") if one.penalty.config.share == "type" else "model"
            one.penalty.share(sets.setdefault((one.where, scope), one.penalty.representatives))
