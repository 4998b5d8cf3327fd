"""1 - exp(-scale |w - c|) to the nearest representative c: bounded, sharp at its minimum, and deaf to outliers.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614: R_exp with scale 1, since the paper names none. With weights of
around 0.05 that is close to the plain distance; scale near 1 / gap makes it saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.registry.regularizers import ExponentialConfig
from qcompress.regularizers.penalty import Evaluated
from qcompress.regularizers.representatives import Representatives, accumulate, nearest_of


def make(config: ExponentialConfig, weight: Tensor) -> Exponential:
    return Exponential(config, weight)


class Exponential:
    """terms: `representatives`, [levels], where they are learned."""

    def __init__(self, config: ExponentialConfig, weight: Tensor) -> None:
        self.config = config
        self.share(Representatives(config, weight))
        self.begin(weight)

    def share(self, representatives: Representatives) -> None:
        """Use these, which other weights may use too."""
        self.representatives = representatives
        self.terms: dict[str, Tensor] = {"representatives": representatives.values} if self.config.learnable else {}

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        return accumulate(self.config, weight, gradient, factor, self.representatives, self._bend)

    def shrink(self, weight: Tensor, rate: float) -> None:
        """The proximal step of `rate` times the penalty, in place, its slope taken where the weight is."""
        rate = rate / weight.numel() if self.config.reduction == "mean" else rate
        centres = nearest_of(weight, self.representatives.values)
        distance = weight - centres
        length = distance.abs()
        step = rate * self.config.scale * torch.exp(-self.config.scale * length)
        weight.copy_(centres + distance.sign() * (length - step).clamp_min(0))

    def begin(self, weight: Tensor) -> None:
        """The representatives start from these weights."""
        self.representatives.begin(weight)

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """Dead representatives get a new place."""
        if found.counts is not None:
            self.representatives.reseed(found.counts)

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """representatives, float32 [levels], sorted."""
        return {"representatives": self.representatives.values.detach().float().sort().values.cpu()}

    def _bend(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        sign = distance.sign()
        near = distance.abs_().mul_(-self.config.scale).exp_()
        slope = sign.mul_(near).mul_(self.config.scale)
        return near.neg_().add_(1.0), slope
