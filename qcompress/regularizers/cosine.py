"""|cos| of a weight: minima in the middle of equal parts of a range, none at its ends.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614: R_cos = sum |cos(pi k u)| with u = (w - a) / (b - a). The formula
is a reconstruction: the paper says that the phase is the difference to the sine and that no minimum lies at an end.
"""

from __future__ import annotations

import math

from torch import Tensor

from qcompress.registry.regularizers import CosineConfig
from qcompress.regularizers.penalty import Evaluated
from qcompress.regularizers.periodic import Wave, accumulate, find_range, half_turns, minima_of


def make(config: CosineConfig, weight: Tensor) -> Cosine:
    return Cosine(config, weight)


class Cosine:
    """Learns nothing."""

    def __init__(self, config: CosineConfig, weight: Tensor) -> None:
        self.config = config
        self.terms: dict[str, Tensor] = {}
        assert config.levels is not None
        self.levels = config.levels
        self.begin(weight)

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        return accumulate(self.config, weight, gradient, factor, self._wave(weight))

    def begin(self, weight: Tensor) -> None:
        """The range."""
        self.ends = find_range(self.config, weight)

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """Nothing is learned."""

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """representatives, float32 [levels]."""
        return {"representatives": minima_of(*self.ends, self.levels, ends=False).float()}

    def _wave(self, weight: Tensor) -> Wave:
        rate = half_turns(*self.ends, self.levels)
        # The sine of a phase that is a quarter turn ahead.
        origin = self.ends[0] - math.pi / 2 / rate
        whole = self.config.outside == "periodic"
        # Beyond the outermost minima, half a part inside the range, the penalty only grows.
        inner = math.pi / 2 / rate
        ends = (None, None) if whole else (self.ends[0] + inner, self.ends[1] - inner)
        return Wave(weight.new_full((1, 1), rate), weight.new_full((1, 1), origin), *ends)
