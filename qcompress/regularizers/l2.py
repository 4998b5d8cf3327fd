"""L2 is half the sum of squares: weight decay as a regularizer, for heavy L2 as the papers' control."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.registry.regularizers import L2Config
from qcompress.regularizers.penalty import Evaluated, Penalty, matrix_of, spread, tiles_of


class L2(Penalty[L2Config]):
    """Learns nothing."""

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        scale = self._scale(weight) / spread(weight, self.config.normalize)
        matrix = matrix_of(weight)
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for rows, columns in tiles_of(matrix):
            part = matrix[rows, columns].flatten()
            total += torch.dot(part, part)
        if gradient is not None:
            gradient.add_(weight, alpha=factor * scale)
        return Evaluated(total * (scale / 2))

    def shrink(self, weight: Tensor, rate: float) -> None:
        weight.div_(1 + rate * self._scale(weight))

    def _scale(self, weight: Tensor) -> float:
        return 1 / weight.numel() if self.config.reduction == "mean" else 1.0
