"""Sine is |sin| of a weight: its minima lie at both ends of a range and evenly between, or on the grid of rtn.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614: R_sin = sum |sin(pi (k - 1) u)| with u = (w - a) / (b - a),
reconstructed from the paper's words. Gradient 0 at the kinks. The paper takes one range for all; ours is each weight's
own when the penalty begins. `bits` puts the minima on the grid that round-to-nearest would use now, which follows the
weights: its step counts as a constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompress.registry.regularizers import SineConfig
from qcompress.regularizers.penalty import groups_of
from qcompress.regularizers.periodic import Periodic, Wave, half_turns, minima_of


class Sine(Periodic[SineConfig]):
    """minima: at both ends of the range and between, or on the grid, whose range is its own."""

    def begin(self, weight: Tensor) -> None:
        if self.config.bits is None:
            super().begin(weight)

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """representatives, float32 [levels], or [1 or channels, levels] on the grid."""
        if self.config.bits is None:
            assert self.config.levels is not None
            return {"representatives": minima_of(*self.ends, self.config.levels, inside=False).float()}
        step, low = self._grid(weight)
        codes = torch.arange(2**self.config.bits, device=step.device)
        return {"representatives": (low + step * codes).float().cpu()}

    def wave(self, weight: Tensor) -> Wave:
        if self.config.bits is None:
            assert self.config.levels is not None
            low, high = self.ends
            rate = weight.new_full((1, 1), half_turns(low, high, self.config.levels - 1))
            ends = (None, None) if self.config.outside == "periodic" else (low, high)
            return Wave(rate, weight.new_full((1, 1), low), *ends)
        step, _ = self._grid(weight)
        # A group of zeros has no step, and nothing to be pulled to.
        rate = torch.where(step > 0, math.pi / step, torch.zeros_like(step))
        return Wave(rate.to(weight.dtype), torch.zeros_like(rate, dtype=weight.dtype))

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(step, lowest level) of the min-max grid with an integer zero point, float64 [1 or channels, 1]."""
        assert self.config.bits is not None and self.config.granularity is not None
        low, high = groups_of(weight, self.config.granularity).ends()
        low, high = low.double().clamp_max(0), high.double().clamp_min(0)
        step = (high - low) / (2**self.config.bits - 1)
        zero = torch.where(step > 0, (-low / step).round(), torch.zeros_like(step))
        return step, -zero * step
