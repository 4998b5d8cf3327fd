"""Linf is the largest magnitude: one weight moves at each step, both ends of the range come in.

R2-Loss (Kundu et al. 2023, arXiv 2303.08253), L-infinity form. Where several weights share the largest magnitude they
share the gradient, as torch's full reduction does.
"""

from __future__ import annotations

from torch import Tensor

from qcompress.registry.regularizers import LinfConfig
from qcompress.regularizers.penalty import Evaluated, Groups, Penalty, groups_of, matrix_of, scale_of, tiles_of


class Linf(Penalty[LinfConfig]):
    """Learns nothing."""

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        groups = groups_of(weight, self.config.granularity)
        low, high = groups.ends()
        most = high.maximum(-low)
        scale = scale_of(weight, self.config.normalize, self.config.reduction, groups.number)
        if gradient is not None:
            _push_ends(groups, most, matrix_of(gradient), factor * scale)
        return Evaluated(most.double().sum() * scale)


def _push_ends(groups: Groups, most: Tensor, into: Tensor, factor: float) -> None:
    """Add factor times the gradient of each group's largest magnitude."""
    matrix = groups.matrix
    found = []
    count = groups.zeros()
    for rows, columns in tiles_of(matrix):
        part = matrix[rows, columns]
        at_most = part.abs().eq_(groups.of(most, rows))
        if bool(at_most.any()):
            groups.add(count, rows, at_most)
            found.append((rows, columns, at_most.mul_(part.sign())))
    share = (factor / count.clamp_min(1)).to(matrix.dtype)
    for rows, columns, signs in found:
        into[rows, columns].add_(signs.mul_(groups.of(share, rows)))
