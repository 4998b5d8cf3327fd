"""MSE finds the grid of least error: by alternating least squares, or by a search over shrunken ranges."""

from __future__ import annotations

from torch import Tensor

from qcompress.coding.rows import blocks_from_rows, grid_shape
from qcompress.registry import MseConfig
from qcompress.solvers.grids import affine_from_grid
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
    blocks = blocks_from_rows(weight, config.unit, config.group_size)
    if config.search == "als":
        effort = HIGH if config.effort == "high" else NORMAL
        grid = least_squares_grid(blocks, config.bits, bool(config.symmetric), exponent, effort)
    else:
        grid = shrunken_grid(blocks, config.bits, bool(config.symmetric), config.norm, exponent)
    shape = grid_shape(tuple(weight.shape), config.unit, config.group_size)
    return affine_from_grid(weight, grid, config.bits, exponent, shape)
