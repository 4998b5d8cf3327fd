"""Min-squared is the squared distance of each weight to the nearest representative, which may be learned with it.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614: R_min = sum min_j (w - c_j)^2. The gradient of a representative is
-2 sum (w - c_j) over its weights: with learning rate 1 / (2 n_j) one step lands on their mean, as Lloyd's does.
"""

from __future__ import annotations

from torch import Tensor

from qcompress.registry.regularizers import MinSquaredConfig
from qcompress.regularizers.representatives import ToRepresentatives, nearest_of


class MinSquared(ToRepresentatives[MinSquaredConfig]):
    def shrink(self, weight: Tensor, rate: float) -> None:
        """As every penalty's; it never passes the representative."""
        rate = rate / weight.numel() if self.config.reduction == "mean" else rate
        centres = nearest_of(weight, self.representatives.values)
        weight.copy_((weight + 2 * rate * centres) / (1 + 2 * rate))

    def bend(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        return distance.square(), distance.mul_(2)
