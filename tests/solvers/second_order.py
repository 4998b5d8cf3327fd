"""Layers with correlated inputs, as behind a ReLU, for the solvers that look at the inputs' second moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.solvers.grids import Grid
from qcompress.solvers.hessian import row_levels
from qcompress.solvers.ranges import least_squares_grid


@dataclass(frozen=True)
class Options:
    """What solvers ask of a method's config."""

    bits: int = 3
    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = False
    scales: str | None = None

    @property
    def unit(self) -> str:
        return self.granularity

    @property
    def form(self) -> str:
        return "symmetric" if self.symmetric else "offset"

    @property
    def stored_convention(self) -> str:
        return "mid-rise" if self.bits <= 2 else "full"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(columns: int, positions: int = 4000, groups: int = 1, seed: int = 0) -> Tensor:
    """Inputs float64 [groups, positions, columns]: mixed, clipped at zero, some columns far more active than others."""
    generator = seeded(seed)
    hidden = torch.randn(groups, positions, max(columns // 2, 1), generator=generator, dtype=torch.float64)
    mix = torch.randn(groups, hidden.shape[2], columns, generator=generator, dtype=torch.float64)
    spread = torch.randn(columns, generator=generator, dtype=torch.float64).mul(0.7).exp()
    noise = 0.3 * torch.randn(groups, positions, columns, generator=generator, dtype=torch.float64)
    return (hidden @ mix / hidden.shape[2] ** 0.5 + noise).clamp(min=0) * spread


def moments(x: Tensor) -> Tensor:
    return x.transpose(1, 2) @ x / x.shape[1]


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=seeded(seed))


def fitted(rows: Tensor, bits: int) -> tuple[Grid, Tensor, Tensor]:
    """The least-squares grid a row, its scale and its lowest level."""
    grid = least_squares_grid(rows, bits, False, -8)
    return (grid, *row_levels(grid, Options(bits), -8, rows))


def nearest(rows: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    return ((rows.double() - low) / scale).round().clamp(0, 2**bits - 1)
