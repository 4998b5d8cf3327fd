"""An activation quantizer whose step is learned, at a layer's input; its zero point stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompress.encoded import ActivationGrid


class Step(nn.Module):
    """The quantizer.

    keep       probability that a value passes as it is
    generator  of the coins for that
    """

    def __init__(self, grid: ActivationGrid, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(grid.scale, device=device))
        self.zero_point, self.bits = grid.zero_point, grid.bits
        self.keep = 0.0
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        most = 2**self.bits - 1
        steps = x / self.scale
        rounded = steps + (steps.round() - steps).detach()
        quantized = ((rounded + self.zero_point).clamp(0, most) - self.zero_point) * self.scale
        if not self.keep:
            return quantized
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) < self.keep
        return torch.where(kept, x, quantized)

    def hook(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])

    def grid(self) -> ActivationGrid:
        return ActivationGrid(self.bits, float(self.scale.detach().abs().clamp_min(2.0**-100)), self.zero_point)
