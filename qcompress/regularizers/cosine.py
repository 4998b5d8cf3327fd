"""Cosine is |cos| of a weight: its minima lie in the middle of equal parts of a range, none at its ends.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614: R_cos = sum |cos(pi k u)| with u = (w - a) / (b - a). The formula
is a reconstruction: the paper says that the phase is the difference to the sine and that no minimum lies at an end.
"""

from __future__ import annotations

import math

from torch import Tensor

from qcompress.registry.regularizers import CosineConfig
from qcompress.regularizers.periodic import Periodic, Wave, half_turns, minima_of


class Cosine(Periodic[CosineConfig]):
    """minima: in the middle of so many equal parts of the range."""

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """representatives, float32 [levels]."""
        assert self.config.levels is not None
        return {"representatives": minima_of(*self.ends, self.config.levels, inside=True).float()}

    def wave(self, weight: Tensor) -> Wave:
        assert self.config.levels is not None
        low, high = self.ends
        rate = half_turns(low, high, self.config.levels)
        quarter = math.pi / 2 / rate
        # The sine of a phase that is a quarter turn ahead.
        origin = low - quarter
        # Beyond the outermost minima, half a part inside the range, the penalty only grows.
        ends = (None, None) if self.config.outside == "periodic" else (low + quarter, high - quarter)
        return Wave(weight.new_full((1, 1), rate), weight.new_full((1, 1), origin), *ends)
