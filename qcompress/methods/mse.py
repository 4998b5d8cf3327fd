"""The grid of least error: by alternating least squares, or by a search over shrunken ranges."""

from __future__ import annotations

from torch import Tensor

from qcompress.coding.rows import blocks_from_rows, grid_shape
from qcompress.encoded import Affine
from qcompress.registry import MseConfig
from qcompress.solvers.grids import affine_from_grid
from qcompress.solvers.least_squares import HIGH, NORMAL
from qcompress.solvers.ranges import least_squares_grid, shrunken_grid


def encode(weight: Tensor, config: MseConfig, exponent: int) -> Affine:
    """The weight in the nearest codes of the grids of least error.

    weight    float32 [rows, ...]
    exponent  of scales and offsets, from the tensor's largest value
    returns   for no block worse than round to nearest on a min-max grid of the same form: in squared error with `als`,
              in the configured norm with `grid`
    """
    assert config.granularity is not None and config.norm is not None
    blocks = blocks_from_rows(weight, config.granularity, config.group_size)
    if config.search == "als":
        effort = HIGH if config.effort == "high" else NORMAL
        grid = least_squares_grid(blocks, config.bits, bool(config.symmetric), exponent, effort)
    else:
        grid = shrunken_grid(blocks, config.bits, bool(config.symmetric), config.norm, exponent)
    shape = grid_shape(tuple(weight.shape), config.granularity, config.group_size)
    return affine_from_grid(weight, grid, config.bits, exponent, shape)
