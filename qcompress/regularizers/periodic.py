"""Sine and cosine share what repeats: zero on evenly spaced minima, largest half-way between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qcompress.errors import ModelError
from qcompress.registry.regularizers import PeriodicConfig, RangeOf
from qcompress.regularizers.penalty import Evaluated, Groups, Penalty, matrix_of, scale_of, tiles_of

TAILS = (0.01, 0.99)
SIGMAS = 2.5
SAMPLED = 1 << 20
"""Weights at most that quantiles are taken of."""

PeriodicT_co = TypeVar("PeriodicT_co", bound=PeriodicConfig, covariant=True)


@dataclass(frozen=True)
class Wave:
    """|sin(rate * (w - origin))|, zero at origin.

    rate, origin  [groups, 1] of the weight's dtype
    low, high     where it ends; float, None where it goes on for ever
    """

    rate: Tensor
    origin: Tensor
    low: float | None = None
    high: float | None = None


def find_range(kind: RangeOf | tuple[float, float], weight: Tensor) -> tuple[float, float]:
    """The ends of the range that a config asks for.

    raises  ModelError for a constant weight, which has no range
    """
    if isinstance(kind, tuple):
        return float(kind[0]), float(kind[1])
    flat = weight.detach().flatten().double()
    if kind == "minmax":
        low, high = (float(end) for end in torch.aminmax(flat))
    elif kind == "sigma":
        mean, deviation = float(flat.mean()), float(flat.std(correction=0))
        low, high = mean - SIGMAS * deviation, mean + SIGMAS * deviation
    else:
        kept = flat[:: -(-len(flat) // SAMPLED)]
        low, high = (float(torch.quantile(kept, tail)) for tail in TAILS)
    if low >= high:
        raise ModelError("regularizer", "a weight is constant and has no range", "leave it out of the rule's match")
    return low, high


class Periodic(Penalty[PeriodicT_co]):
    """Learns nothing; takes its range from the weight when it begins."""

    ends: tuple[float, float] = (0.0, 1.0)

    def __init__(self, config: PeriodicT_co, weight: Tensor) -> None:
        super().__init__(config, weight)
        self.begin(weight)

    def begin(self, weight: Tensor) -> None:
        assert self.config.range is not None
        self.ends = find_range(self.config.range, weight)

    def wave(self, weight: Tensor) -> Wave:
        """The wave whose zeros are the minima."""
        raise NotImplementedError

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        config, wave = self.config, self.wave(weight)
        groups = Groups(matrix_of(weight), wave.rate.numel() > 1)
        into = None if gradient is None else matrix_of(gradient)
        scale = scale_of(weight, config.normalize, config.reduction, weight.numel())
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for rows, columns in tiles_of(groups.matrix):
            rate, origin = groups.of(wave.rate, rows), groups.of(wave.origin, rows)
            part = groups.matrix[rows, columns]
            inside = part if wave.low is None else part.clamp(wave.low, wave.high)
            turns = (inside - origin).mul_(rate / math.pi)
            # Within a quarter turn of the nearest minimum the cosine is the root that is not negative.
            height = turns.sub_(turns.round()).mul_(math.pi).sin_()
            slope = (1 - height.square()).clamp_min_(0).sqrt_()
            if config.power == 1:
                slope.mul_(height.sign()).mul_(rate)
                height.abs_()
            else:
                slope.mul_(height).mul_(rate * 2)
                height.square_()
            if wave.low is not None:
                _extend(part, inside, height, slope, rate, hinge=config.outside == "hinge")
            if config.height == "gap":
                unit = torch.where(rate > 0, rate, torch.inf).pow(-config.power)
                height.mul_(unit)
                slope.mul_(unit)
            total += height.sum()
            if into is not None:
                into[rows, columns].add_(slope, alpha=factor * scale)
        return Evaluated(total * scale)


def _extend(part: Tensor, inside: Tensor, height: Tensor, slope: Tensor, rate: Tensor, *, hinge: bool) -> None:
    """What goes on beyond the ends: a line of the wave's steepest slope, or what the end has, flat."""
    over = part - inside
    sign = over.sign()
    slope.mul_(1 - sign.abs())
    if hinge:
        height.addcmul_(over.abs_(), rate)
        slope.addcmul_(sign, rate)


def minima_of(low: float, high: float, levels: int, *, inside: bool) -> Tensor:
    """Evenly spaced minima in a range, float64 [levels]: in the middle of equal parts, or both ends included."""
    if not inside:
        return torch.linspace(low, high, levels, dtype=torch.float64)
    step = (high - low) / levels
    return low + step * (torch.arange(levels, dtype=torch.float64) + 0.5)


def half_turns(low: float, high: float, parts: int) -> float:
    """The rate with which so many equal parts of a range are half a turn each."""
    return math.pi * parts / (high - low)
