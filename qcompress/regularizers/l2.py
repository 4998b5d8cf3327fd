"""Half the sum of squares: weight decay as a regularizer, for heavy L2 as the papers' control."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.registry.regularizers import L2Config
from qcompress.regularizers.penalty import Evaluated, matrix_of, spread, tiles


def make(config: L2Config, weight: Tensor) -> L2:
    return L2(config)


class L2:
    """Learns nothing."""

    def __init__(self, config: L2Config) -> None:
        self.config = config
        self.terms: dict[str, Tensor] = {}

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        scale = self._scale(weight) / spread(weight, self.config.normalize)
        matrix = matrix_of(weight)
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for rows, columns in tiles(matrix):
            part = matrix[rows, columns].flatten()
            total += torch.dot(part, part)
        if gradient is not None:
            gradient.add_(weight, alpha=factor * scale)
        return Evaluated(total * (scale / 2))

    def shrink(self, weight: Tensor, rate: float) -> None:
        """The proximal step of `rate` times the penalty, in place."""
        weight.div_(1 + rate * self._scale(weight))

    def begin(self, weight: Tensor) -> None:
        """Nothing is fixed."""

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """Nothing is learned."""

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def _scale(self, weight: Tensor) -> float:
        return 1 / weight.numel() if self.config.reduction == "mean" else 1.0
