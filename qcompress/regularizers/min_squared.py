"""The squared distance of each weight to the nearest representative, which may be learned with the weights.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614: R_min = sum min_j (w - c_j)^2. The gradient of a representative is
-2 sum (w - c_j) over its weights: with learning rate 1 / (2 n_j) one step lands on their mean, as Lloyd's does.
"""

from __future__ import annotations

from torch import Tensor

from qcompress.registry.regularizers import MinSquaredConfig
from qcompress.regularizers.penalty import Evaluated
from qcompress.regularizers.representatives import Representatives, accumulate, nearest_of


def make(config: MinSquaredConfig, weight: Tensor) -> MinSquared:
    return MinSquared(config, weight)


class MinSquared:
    """terms: `representatives`, [levels], where they are learned."""

    def __init__(self, config: MinSquaredConfig, weight: Tensor) -> None:
        self.config = config
        self.share(Representatives(config, weight))
        self.begin(weight)

    def share(self, representatives: Representatives) -> None:
        """Use these, which other weights may use too."""
        self.representatives = representatives
        self.terms: dict[str, Tensor] = {"representatives": representatives.values} if self.config.learnable else {}

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        return accumulate(self.config, weight, gradient, factor, self.representatives, self._bend)

    def shrink(self, weight: Tensor, rate: float) -> None:
        """The proximal step of `rate` times the penalty, in place: it never passes the representative."""
        rate = rate / weight.numel() if self.config.reduction == "mean" else rate
        centres = nearest_of(weight, self.representatives.values)
        moved = (weight + 2 * rate * centres) / (1 + 2 * rate)
        weight.copy_(moved)

    def begin(self, weight: Tensor) -> None:
        """The representatives start from these weights."""
        self.representatives.begin(weight)

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """Dead representatives get a new place."""
        if found.counts is not None:
            self.representatives.reseed(found.counts)

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """representatives, float32 [levels], sorted."""
        return {"representatives": self.representatives.values.detach().float().sort().values.cpu()}

    def _bend(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        return distance.square(), distance.mul_(2)
