"""|sin| of a weight: minima at both ends of a range and evenly between, or on the grid that rtn would use now.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614: R_sin = sum |sin(pi (k - 1) u)| with u = (w - a) / (b - a),
reconstructed from the paper's words. Gradient 0 at the kinks. The paper takes one range for all; ours is each weight's
own when the penalty begins. `bits` puts the minima on the grid of round-to-nearest, which follows the weights: its step
counts as a constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompress.registry.regularizers import SineConfig
from qcompress.regularizers.penalty import Evaluated, Groups, matrix_of
from qcompress.regularizers.periodic import Wave, accumulate, find_range, half_turns, minima_of


def make(config: SineConfig, weight: Tensor) -> Sine:
    return Sine(config, weight)


class Sine:
    """Learns nothing."""

    def __init__(self, config: SineConfig, weight: Tensor) -> None:
        self.config = config
        self.terms: dict[str, Tensor] = {}
        self.ends = (0.0, 1.0)
        self.begin(weight)

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        return accumulate(self.config, weight, gradient, factor, self._wave(weight))

    def begin(self, weight: Tensor) -> None:
        """The range, unless it is the grid's."""
        if self.config.bits is None:
            self.ends = find_range(self.config, weight)

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """Nothing is learned."""

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """representatives, float32 [levels], or [1 or channels, levels] on the grid."""
        if self.config.bits is None:
            assert self.config.levels is not None
            return {"representatives": minima_of(*self.ends, self.config.levels, ends=True).float()}
        step, low = self._grid(weight)
        codes = torch.arange(2**self.config.bits, device=step.device)
        return {"representatives": (low + step * codes).float().cpu()}

    def _wave(self, weight: Tensor) -> Wave:
        if self.config.bits is None:
            assert self.config.levels is not None
            rate = weight.new_full((1, 1), half_turns(*self.ends, self.config.levels - 1))
            whole = self.config.outside == "periodic"
            ends = (None, None) if whole else self.ends
            return Wave(rate, weight.new_full((1, 1), self.ends[0]), *ends)
        step, _ = self._grid(weight)
        # A group of zeros has no step, and nothing to be pulled to.
        rate = torch.where(step > 0, math.pi / step, torch.zeros_like(step))
        return Wave(rate.to(weight.dtype), torch.zeros_like(rate, dtype=weight.dtype))

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(step, lowest level) of the min-max grid with an integer zero point, float64 [1 or channels, 1]."""
        assert self.config.bits is not None
        low, high = Groups(matrix_of(weight), self.config.granularity == "channel").ends()
        low, high = low.double().clamp_max(0), high.double().clamp_min(0)
        step = (high - low) / (2**self.config.bits - 1)
        zero = torch.where(step > 0, (-low / step).round(), torch.zeros_like(step))
        return step, -zero * step
