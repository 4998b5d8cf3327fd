"""KURE pulls the weights' distribution towards the uniform one, which has kurtosis 1.8.

Chmiel et al. 2020, arXiv 2002.07686, with population moments where the official code has the unbiased deviation; the
kurtosis does not change with the weights' scale, and neither does this.
"""

from __future__ import annotations

from torch import Tensor

from qcompress.registry.regularizers import KurtosisConfig
from qcompress.regularizers.penalty import Evaluated, Penalty, groups_of, matrix_of, tiles_of


class Kurtosis(Penalty[KurtosisConfig]):
    """Learns nothing. A constant group has no kurtosis: it adds nothing."""

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        groups = groups_of(weight, self.config.granularity)
        matrix = groups.matrix
        mean, variance = groups.moments()
        centre = mean.to(matrix.dtype)
        third, fourth = groups.zeros(), groups.zeros()
        for rows, columns in tiles_of(matrix):
            part = matrix[rows, columns] - groups.of(centre, rows)
            square = part * part
            groups.add(third, rows, part.mul_(square))
            groups.add(fourth, rows, square.mul_(square))
        third, fourth = third / groups.size, fourth / groups.size
        alive = variance > 0
        safe = variance.where(alive, variance.new_ones(()))
        kurtosis = (fourth / safe.square()).where(alive, variance.new_full((), self.config.target))
        scale = 1 / groups.number if self.config.reduction == "mean" else 1.0
        off = kurtosis - self.config.target
        if gradient is not None:
            slope = factor * scale * 2 * off * 4 / (groups.size * safe.square())
            parts = [one.to(matrix.dtype) for one in (slope, third, fourth / safe)]
            into = matrix_of(gradient)
            for rows, columns in tiles_of(matrix):
                pull, skew, tail = (groups.of(one, rows) for one in parts)
                part = matrix[rows, columns] - groups.of(centre, rows)
                bent = (part * part).sub_(tail).mul_(part).sub_(skew)
                into[rows, columns].add_(bent.mul_(pull))
        return Evaluated(scale * off.square().sum())
