"""The regularizers of a recipe on the weights of a live model.

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

from qcompress.errors import ModelError
from qcompress.regularizers.penalty import Evaluated, Penalty
from qcompress.settings import AdamW, Optimizer

COUNTED_RATE = 0.1
"""Learning rate of representatives whose gradient is divided by their counts, with SGD."""


@dataclass
class Regularized:
    """One weight and its penalty.

    share    1, or one over the weights of the rule where their penalties are averaged
    order    dimensions with the channels first, where the weight has them elsewhere
    started  whether the penalty has begun
    """

    name: str
    weight: nn.Parameter
    config: Any
    penalty: Penalty
    where: str
    share: float = 1.0
    order: tuple[int, ...] | None = None
    started: bool = False

    def seen(self) -> Tensor:
        """The weight as penalties see it: contiguous, its channels first."""
        weight = self.weight.detach()
        return (weight if self.order is None else weight.permute(self.order)).contiguous()

    def accumulate(self, into: Tensor | None, factor: float) -> Evaluated:
        """The penalty; factor times its gradient is added to `into`, shaped like the weight."""
        seen = self.seen()
        if into is None or (self.order is None and into.is_contiguous()):
            return self.penalty.accumulate(seen, into, factor)
        buffer = torch.zeros_like(seen)
        found = self.penalty.accumulate(seen, buffer, factor)
        into.add_(buffer if self.order is None else buffer.permute(_inverse(self.order)))
        return found


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(place) for place in range(len(order)))


def strength_at(config: Any, share: float) -> float:
    """The strength when `share` of all steps are done: nothing, rising, held, nothing again."""
    if share < config.start or (config.hold is not None and share >= config.start + config.ramp + config.hold):
        return 0.0
    if share >= config.start + config.ramp:
        return float(config.strength)
    risen = (share - config.start) / config.ramp
    shapes = {
        "linear": risen,
        "cosine": (1 - math.cos(math.pi * risen)) / 2,
        "tanh": (1 + math.tanh(6 * risen - 3)) / 2,
    }
    return float(config.strength * shapes[config.shape])


@dataclass
class Penalties:
    """All of them; `regularized` in the order of the model's parameters."""

    regularized: Sequence[Regularized]
    last: dict[str, Evaluated] = field(default_factory=dict)

    def learned(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The optimizer's groups of what is learned, one for each temperature, set of representatives or margin."""
        groups: dict[int, dict[str, Any]] = {}
        for one in self.regularized:
            for term in one.penalty.terms.values():
                group: dict[str, Any] = {"params": [term]}
                if _is_counted(one):
                    # A step along the mean of its weights needs no momentum, and no scale but its own.
                    group["momentum"] = 0.0
                    rate = one.config.learning_rate or (None if isinstance(optimizer, AdamW) else COUNTED_RATE)
                else:
                    rate = one.config.learning_rate
                groups[id(term)] = group | ({"lr": rate} if rate is not None else {})
        return list(groups.values())

    def add(self, step: int, total: int) -> float:
        """Add the gradients of this step; the penalty that it has, strengths included. Nothing where none is due."""
        self.last = {}
        value = 0.0
        for one in self.regularized:
            factor = self._factor(one, step, total)
            if not factor:
                continue
            self._begin(one)
            if one.config.coupling == "coupled" and one.weight.requires_grad:
                if one.weight.grad is None:
                    one.weight.grad = torch.zeros_like(one.weight)
                found = one.accumulate(one.weight.grad, factor)
            else:
                found = one.accumulate(None, factor)
            self.last[one.name] = found
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
            counted = _is_counted(one)
            factor = 1.0 if counted else self._factor(one, step, total)
            for name, slope in found.terms.items():
                term = one.penalty.terms[name]
                counts = _counts(one, found) if counted else None
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
        """After the optimizer's step at rate `rate`: the penalties' own steps, and the bounds of what they learn."""
        merged: dict[int, Evaluated] = {}
        for one in self.regularized:
            found = self.last.get(one.name)
            if found is None:
                continue
            factor = self._factor(one, step, total) * rate
            with torch.no_grad():
                if one.config.coupling == "decoupled":
                    change = torch.zeros_like(one.weight)
                    one.accumulate(change, -factor)
                    one.weight.add_(change)
                elif one.config.coupling == "proximal":
                    one.penalty.shrink(one.weight, factor)  # type: ignore[attr-defined]
            shared = getattr(one.penalty, "representatives", one.penalty)
            before = merged.get(id(shared))
            if before is not None and before.counts is not None and found.counts is not None:
                found = Evaluated(found.value, found.terms, before.counts + found.counts)
            merged[id(shared)] = found
        settled: set[int] = set()
        for one in self.regularized:
            shared = id(getattr(one.penalty, "representatives", one.penalty))
            if shared in merged and shared not in settled:
                settled.add(shared)
                one.penalty.settle(one.seen(), merged[shared])

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
            fact: dict[str, Any] = {
                "regularizer": type(one.penalty).__module__.rpartition(".")[2].replace("_", "-"),
                "strength": float(one.config.strength),
                "penalty": float(one.penalty.accumulate(seen, None, 0.0).value) if one.started else None,
            }
            if "alpha" in (saved := one.penalty.saved(seen)):
                alpha = saved["alpha"].double()
                fact |= {"temperature": float(alpha.mean()), "soft_range": _soft_range(fact["penalty"], alpha)}
            if hasattr(one.penalty, "representatives"):
                fact["dead"] = int(one.penalty.representatives.dead)
            found[one.name] = fact
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed run needs beside the optimizer: tensors, and plain values."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for one in self.regularized:
            for key, term in one.penalty.terms.items():
                tensors[f"{one.name}.{key}"] = term.detach()
            if not one.penalty.terms and hasattr(one.penalty, "representatives"):
                tensors[f"{one.name}.representatives"] = one.penalty.representatives.values.detach()
            values[one.name] = {"started": one.started, "ends": list(getattr(one.penalty, "ends", ()))}
        return tensors, values

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Back to a saved state. Raises KeyError or RuntimeError where it is of other penalties."""
        with torch.no_grad():
            for one in self.regularized:
                for key, term in one.penalty.terms.items():
                    term.copy_(tensors[f"{one.name}.{key}"])
                if not one.penalty.terms and hasattr(one.penalty, "representatives"):
                    one.penalty.representatives.values.copy_(tensors[f"{one.name}.representatives"])
                one.started = values[one.name]["started"]
                if values[one.name]["ends"]:
                    one.penalty.ends = tuple(values[one.name]["ends"])  # type: ignore[attr-defined]

    def _factor(self, one: Regularized, step: int, total: int) -> float:
        if step % one.config.every:
            return 0.0
        return float(strength_at(one.config, step / max(total, 1)) * one.share * one.config.every)

    def _begin(self, one: Regularized) -> None:
        """Fix ranges and first representatives when a penalty first acts, from all weights that share them."""
        if one.started:
            return
        shared = getattr(one.penalty, "representatives", None)
        family = [
            other
            for other in self.regularized
            if other is one or (shared is not None and getattr(other.penalty, "representatives", None) is shared)
        ]
        for other in family:
            other.started = True
        weights = one.seen() if len(family) == 1 else torch.cat([other.seen().flatten() for other in family])
        try:
            one.penalty.begin(weights)
        except ModelError as error:
            raise ModelError(f"{one.where}: {one.name}", error.what, error.mend) from None


def _soft_range(penalty: float | None, alpha: Tensor) -> float | None:
    return None if penalty is None else penalty - float(torch.exp(-alpha).mean())


def _is_counted(one: Regularized) -> bool:
    return getattr(one.config, "gradient", None) == "count"


def _counts(one: Regularized, found: Evaluated) -> Tensor | None:
    """What a representative's gradient is divided by: its weights, or their share where the penalty is a mean."""
    if found.counts is None:
        return None
    return found.counts / one.weight.numel() if one.config.reduction == "mean" else found.counts
