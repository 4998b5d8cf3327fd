"""Normal variables that are cut off below and above, one a channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RANGE_DEVIATIONS = 6.0


@dataclass(frozen=True)
class ClippedNormal:
    """Values modelled as min(max(x, low), high) with x normal, one model a channel: float64 [channels].

    mean_known  false behind a max-pool, which moves the mean in no closed form, and the range not at all
    """

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor
    mean_known: bool = True

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the values."""
        return clipped_moments(self.mean, self.deviation, self.low, self.high)

    @property
    def range(self) -> tuple[float, float]:
        """The ends that hold six deviations of every channel."""
        reach = RANGE_DEVIATIONS * self.deviation
        low, high = (_bounded(end, self.low, self.high) for end in (self.mean - reach, self.mean + reach))
        return float(low.min()), float(high.max())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> ClippedNormal:
        """All four tensors changed alike."""
        low, high = change(self.low), change(self.high)
        return ClippedNormal(change(self.mean), change(self.deviation), low, high, self.mean_known)

    def clipped(self, low: Tensor | float = -math.inf, high: Tensor | float = math.inf) -> ClippedNormal:
        """min(max(value, low), high), bounds as numbers or one a channel."""
        low, high = (torch.as_tensor(end).to(self.mean) for end in (low, high))
        return replace(self, low=_bounded(self.low, low, high), high=_bounded(self.high, low, high))

    def bent(self, slope: Tensor) -> ClippedNormal:
        """max(value, 0) + slope * min(value, 0), taken for normal; slope one number or one a channel."""
        (above, above_variance), (below, below_variance) = self.clipped(low=0.0).moments, self.clipped(high=0.0).moments
        mean = above + slope * below
        # One of the two parts is always zero, and so is their product.
        second = above_variance + above.square() + slope.square() * (below_variance + below.square())
        return replace(normal(mean, (second - mean.square()).clamp_min(0).sqrt()), mean_known=self.mean_known)

    def plus(self, other: ClippedNormal) -> ClippedNormal:
        """The sum of the two as if independent, taken for normal within the sums of their bounds."""
        (mean, variance), (other_mean, other_variance) = self.moments, other.moments
        return ClippedNormal(
            mean + other_mean,
            (variance + other_variance).sqrt(),
            self.low + other.low,
            self.high + other.high,
            self.mean_known and other.mean_known,
        )


def normal(mean: Tensor, deviation: Tensor) -> ClippedNormal:
    """The normal itself, cut off nowhere."""
    bound = torch.full_like(mean, math.inf)
    return ClippedNormal(mean, deviation, -bound, bound)


def clipped_moments(mean: Tensor, deviation: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of min(max(x, low), high) for normal x.

    Nagel et al. 2019, arXiv 1906.04721, appendix C, gives the mean; the variance follows in the same way.

    mean, deviation  float64, of one shape; a deviation of 0 is a constant, its sign does not matter
    low, high        of the same shape, low <= high; infinite where there is no bound
    """
    deviation = deviation.abs()
    safe = torch.where(deviation > 0, deviation, 1.0)
    below, above = (low - mean) / safe, (high - mean) / safe
    mass_below, mass_above = torch.special.ndtr(below), torch.special.ndtr(-above)
    inside = 1 - mass_below - mass_above
    density_below, density_above = _density(below), _density(above)
    # A bound at infinity has neither mass nor density: 0 keeps it from making a product with infinity.
    bottom, top = torch.where(low.isinf(), 0.0, low), torch.where(high.isinf(), 0.0, high)
    first = bottom * mass_below + top * mass_above + mean * inside + safe * (density_below - density_above)
    second = (
        bottom.square() * mass_below
        + top.square() * mass_above
        + (mean.square() + safe.square()) * inside
        + safe * ((mean + bottom) * density_below - (mean + top) * density_above)
    )
    spread = deviation > 0
    variance = (second - first.square()).clamp_min(0)
    return torch.where(spread, first, _bounded(mean, low, high)), torch.where(spread, variance, 0.0)


def _density(x: Tensor) -> Tensor:
    """The standard normal density, 0 at infinity."""
    return (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)


def _bounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)
