"""MSE finds the grid of least error: by alternating least squares, or by a search over shrunken ranges."""

from __future__ import annotations

from torch import Tensor

from qcompress.registry import MseConfig
from qcompress.solvers.grids import Grid, affine_from_grid, grid_of_rows
from qcompress.solvers.least_squares import HIGH, NORMAL
from qcompress.solvers.ranges import least_squares_grid, shrunken_grid
from qcompress.types.encoded import Affine
from qcompress.types.run import EncodeContext


def encode(weight: Tensor, config: MseConfig, context: EncodeContext) -> Affine:
    """The weight in the nearest codes of the grids of least error.

    weight    float32 [rows, ...]
    returns   for no block worse than round to nearest on a min-max grid of the same form: in squared error with `als`,
              in the configured norm with `grid`
    """
    exponent = context.exponent
    assert config.norm is not None
    bits, symmetric, norm = config.bits, bool(config.symmetric), config.norm

    def make(blocks: Tensor) -> Grid:
        if config.search == "als":
            return least_squares_grid(blocks, bits, symmetric, exponent, HIGH if config.effort == "high" else NORMAL)
        return shrunken_grid(blocks, bits, symmetric, norm, exponent)

    return affine_from_grid(weight, grid_of_rows(weight, config, make), config, exponent)
