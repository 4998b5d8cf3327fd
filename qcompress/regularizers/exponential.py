"""Exponential is 1 - exp(-scale |w - c|) to the nearest representative c: bounded, sharp, insensitive to outliers.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614: R_exp with scale 1, since the paper names none. With weights of
around 0.05 that is close to the plain distance; scale near 1 / gap makes it saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.registry.regularizers import ExponentialConfig
from qcompress.regularizers.representatives import ToRepresentatives, nearest_of


class Exponential(ToRepresentatives[ExponentialConfig]):
    def shrink(self, weight: Tensor, rate: float) -> None:
        """As every penalty's, its slope taken where the weight is."""
        rate = rate / weight.numel() if self.config.reduction == "mean" else rate
        centres = nearest_of(weight, self.representatives.values)
        distance = weight - centres
        length = distance.abs()
        step = rate * self.config.scale * torch.exp(-self.config.scale * length)
        weight.copy_(centres + distance.sign() * (length - step).clamp_min(0))

    def bend(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        sign = distance.sign()
        near = distance.abs_().mul_(-self.config.scale).exp_()
        slope = sign.mul_(near).mul_(self.config.scale)
        return near.neg_().add_(1.0), slope
