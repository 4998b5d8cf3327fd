"""A learned margin plus what passes it: the pull of the largest magnitude, spread over several weights.

R2-Loss (Kundu et al. 2023, arXiv 2303.08253), margin form: M + sum max(|w| - M, 0), M learned, its start recalled from
the paper as 2 standard deviations. With `tail_fraction` b the sum is divided by b N: the conditional value at risk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.registry.regularizers import MarginConfig
from qcompress.regularizers.penalty import Evaluated, Groups, matrix_of, spread, tiles


def make(config: MarginConfig, weight: Tensor) -> Margin:
    return Margin(config, weight)


class Margin:
    """terms: `margin`, [1 or channels]."""

    def __init__(self, config: MarginConfig, weight: Tensor) -> None:
        self.config = config
        self.per_row = config.granularity == "channel"
        groups = Groups(matrix_of(weight), self.per_row)
        self.margin = torch.ones(
            groups.number, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )
        self._start(weight)
        self.margin.requires_grad_(True)
        self.terms: dict[str, Tensor] = {"margin": self.margin}

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        groups = Groups(matrix_of(weight), self.per_row)
        into = None if gradient is None else matrix_of(gradient)
        scale = 1 / spread(weight, self.config.normalize)
        if self.config.reduction == "mean":
            scale /= groups.number
        fraction = self.config.tail_fraction
        pull = 1.0 if fraction is None else 1 / (fraction * groups.size)
        margin = self.margin.detach().view(-1, 1).to(weight.dtype)
        excess, outside = groups.zeros(), groups.zeros()
        for rows, columns in tiles(groups.matrix):
            part = groups.matrix[rows, columns]
            limit = groups.of(margin, rows)
            over = part - part.clamp(-limit, limit)
            signs = over.sign()
            if into is not None:
                into[rows, columns].add_(signs, alpha=factor * scale * pull)
            groups.add(outside, rows, signs.abs())
            groups.add(excess, rows, over.abs_())
        value = scale * (margin.double() + pull * excess).sum()
        slope = scale * (1 - pull * outside)
        return Evaluated(value, {"margin": slope.view(-1).to(self.margin.dtype)})

    def begin(self, weight: Tensor) -> None:
        """The margin starts where the weights now are."""
        self._start(weight)

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """A margin below 0 has no meaning."""
        with torch.no_grad():
            self.margin.clamp_(min=0)

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        return {"margin": self.margin.detach().float().cpu().clone()}

    def _start(self, weight: Tensor) -> None:
        _, variance = Groups(matrix_of(weight), self.per_row).moments()
        with torch.no_grad():
            self.margin.copy_((self.config.margin * variance.sqrt()).view(-1))
