"""A margin is learned, and what passes it is added: the pull of the largest magnitude, spread over several weights.

R2-Loss (Kundu et al. 2023, arXiv 2303.08253), margin form: M + sum max(|w| - M, 0), M learned, its start recalled from
the paper as 2 standard deviations. With `tail_fraction` b the sum is divided by b N: the conditional value at risk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.registry.regularizers import MarginConfig
from qcompress.regularizers.penalty import Evaluated, Penalty, groups_of, matrix_of, scale_of, tiles_of


class Margin(Penalty[MarginConfig]):
    """terms: `margin`, [1 or channels]."""

    def __init__(self, config: MarginConfig, weight: Tensor) -> None:
        super().__init__(config, weight)
        number = groups_of(weight, config.granularity).number
        kind = torch.promote_types(weight.dtype, torch.float32)
        self.margin = torch.ones(number, dtype=kind, device=weight.device)
        self.begin(weight)
        self.terms = {"margin": self.margin.requires_grad_(True)}

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        groups = groups_of(weight, self.config.granularity)
        into = None if gradient is None else matrix_of(gradient)
        scale = scale_of(weight, self.config.normalize, self.config.reduction, groups.number)
        fraction = self.config.tail_fraction
        pull = 1.0 if fraction is None else 1 / (fraction * groups.size)
        margin = self.margin.detach().view(-1, 1).to(weight.dtype)
        excess, outside = groups.zeros(), groups.zeros()
        for rows, columns in tiles_of(groups.matrix):
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
        _, variance = groups_of(weight, self.config.granularity).moments()
        with torch.no_grad():
            self.margin.copy_((self.config.margin * variance.sqrt()).view(-1))

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """A margin below 0 has no meaning."""
        with torch.no_grad():
            self.margin.clamp_(min=0)

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        return {"margin": self.margin.detach().float().cpu().clone()}
