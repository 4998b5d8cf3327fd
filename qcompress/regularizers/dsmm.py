"""DSMM, the differentiable soft min-max, narrows the range of a weight while it is trained.

Kundu, Yoo, Cho, Adya, "Differentiable Soft Min-Max Loss" (2024), equation 1. With p = softmax(alpha w) and
q = softmax(-alpha w) the penalty is sum(p w) - sum(q w) + exp(-alpha). The paper takes one alpha a tensor; one a
channel, and one range for each place of the vectors of a vector codebook, are ours where the paper is silent. alpha is
kept in [alpha_min, 1e4 / range]: below 0 the penalty would widen the range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompress.registry.regularizers import DsmmConfig
from qcompress.regularizers.penalty import Evaluated, Groups, Penalty, groups_of, matrix_of, spread, tiles_of

MOST_ALPHA_RANGE = 1e4
"""alpha times the range, beyond which soft and true range agree to every digit."""
AUTO = 2.0
"""alpha: auto, in units of 1 / standard deviation: puts the soft ends of a Gaussian two deviations out."""


class Dsmm(Penalty[DsmmConfig]):
    """terms: `alpha`, float32 [1 or channels], where it is learned."""

    def __init__(self, config: DsmmConfig, weight: Tensor) -> None:
        super().__init__(config, weight)
        number = groups_of(weight, config.granularity).number
        self.alpha = torch.ones(number, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        if config.alpha != "auto":
            assert config.alpha is not None
            self.alpha.fill_(config.alpha)
        if config.learnable:
            self.terms = {"alpha": self.alpha.requires_grad_(True)}

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        """float64 throughout the sums; a weight that fills no whole vector is left out."""
        parts = self._parts(weight)
        slopes = [None] * len(parts) if gradient is None else self._parts(gradient)
        number = len(parts) * (parts[0].number if parts else 1)
        share = 1.0 / number if self.config.reduction == "mean" else 1.0
        scale = share / spread(weight, self.config.normalize)
        alpha = self.temperature(weight)
        value = torch.zeros((), dtype=torch.float64, device=weight.device)
        slope = torch.zeros_like(alpha)
        for part, into in zip(parts, slopes, strict=True):
            ranges, variances = _soft_range(part, alpha, None if into is None else into.matrix, factor * scale)
            value += scale * ranges.sum()
            slope += scale * variances
        # exp(-alpha) stands once for each alpha, however many ranges share it.
        push = torch.exp(-alpha)
        alphas = share if alpha.numel() > 1 else 1.0
        value += alphas * push.sum()
        slope -= alphas * push
        terms = {"alpha": slope.view(-1).to(self.alpha.dtype)} if self.terms else {}
        return Evaluated(value, terms)

    def temperature(self, weight: Tensor) -> Tensor:
        """alpha, float64 [groups, 1]."""
        if self.config.alpha != "auto":
            return self.alpha.detach().double().view(-1, 1)
        _, variance = groups_of(weight, self.config.granularity).moments()
        self.alpha = (AUTO / variance.sqrt().clamp_min(1e-30)).view(-1).to(self.alpha.dtype)
        return self.alpha.double().view(-1, 1)

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """alpha back into its bounds."""
        if self.terms:
            low, high = groups_of(weight, self.config.granularity).ends()
            most = (MOST_ALPHA_RANGE / (high - low).clamp_min(1e-30)).view(-1).to(self.alpha.dtype)
            with torch.no_grad():
                self.alpha.copy_(torch.minimum(self.alpha.clamp_min(self.config.alpha_min), most))

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        return {"alpha": self.temperature(weight).view(-1).float().cpu()}

    def _parts(self, weight: Tensor) -> list[Groups]:
        """The weight, or one view of it for every place in the vectors, which lie along the channels."""
        dim = self.config.dim
        if dim == 1:
            return [groups_of(weight, self.config.granularity)]
        matrix = matrix_of(weight)
        whole = matrix[: len(matrix) - len(matrix) % dim]
        return [Groups(whole[place::dim], False) for place in range(dim)]


def _soft_range(groups: Groups, alpha: Tensor, into: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    """(soft maximum - soft minimum, its derivative by alpha), float64 [groups, 1]; its gradient times factor is added
    to `into`.

    The shifts by the ends cancel, so they count as constants; the sums are of differences to the ends, which keeps the
    soft ends exact.
    """
    matrix = groups.matrix
    low, high = groups.ends()
    local = alpha.to(matrix.dtype)
    # torch's exp2 takes a quarter of the time of its exp on the CPU.
    binary = (alpha / math.log(2)).to(matrix.dtype)
    sums = {end: [groups.zeros() for _ in range(3)] for end in ("high", "low")}
    for rows, columns in tiles_of(matrix):
        for end, sign, origin in (("high", 1.0, high), ("low", -1.0, low)):
            distance = matrix[rows, columns] - groups.of(origin, rows)
            weights = (distance * (sign * groups.of(binary, rows))).exp2_()
            for total in sums[end]:
                groups.add(total, rows, weights)
                if total is not sums[end][2]:
                    weights.mul_(distance)
    (z_high, first_high, second_high), (z_low, first_low, second_low) = sums["high"], sums["low"]
    mean_high, mean_low = first_high / z_high, first_low / z_low
    variances = (second_high / z_high - mean_high.square()) + (second_low / z_low - mean_low.square())
    if into is not None:
        kind = matrix.dtype
        ends = (
            (1.0, high, mean_high.to(kind), (factor / z_high).to(kind)),
            (-1.0, low, mean_low.to(kind), (-factor / z_low).to(kind)),
        )
        for rows, columns in tiles_of(matrix):
            for sign, origin, mean, share in ends:
                distance = matrix[rows, columns] - groups.of(origin, rows)
                weights = (distance * (sign * groups.of(binary, rows))).exp2_().mul_(groups.of(share, rows))
                slope = distance.sub_(groups.of(mean, rows)).mul_(sign * groups.of(local, rows)).add_(1.0)
                into[rows, columns].addcmul_(weights, slope)
    soft = (high.double() + mean_high) - (low.double() + mean_low)
    return soft, variances
