"""RTN rounds to nearest on the min-max range: the papers' naive quantization."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qcompress.registry import RtnConfig
from qcompress.solvers.blocks import extremes
from qcompress.solvers.grids import Grid, affine_from_grid, grid_of_rows, offset_grid, symmetric_grid, zero_point_grid
from qcompress.types.encoded import Affine
from qcompress.types.run import EncodeContext


def encode(weight: Tensor, config: RtnConfig, context: EncodeContext) -> Affine:
    """The weight in the nearest codes of its min-max grids.

    weight    float32 [rows, ...]
    returns   with a zero point, no value is off by more than half a scale; likewise where symmetric, but with
              `full-range`, where the end nearer to zero may be off by a whole one. Scales are rounded up to float16
    """

    def make(blocks: Tensor) -> Grid:
        low, high = extremes(blocks)
        if config.symmetric:
            return _symmetric(low, high, config, context.exponent)
        if config.zero_point == "real":
            return offset_grid(low, high, config.bits, context.exponent)
        return zero_point_grid(low, high, config.bits, context.exponent)

    return affine_from_grid(weight, grid_of_rows(weight, config, make), config, context.exponent)


def _symmetric(low: Tensor, high: Tensor, config: RtnConfig, exponent: int) -> Grid:
    """The tools' conventions differ in the scale alone; two of them keep a code that their own range never reaches.

    With b bits and n = 2**b - 1 the scale is absmax over: `narrow` and `aimet` 2**(b-1) - 1, `full-range` 2**(b-1),
    `gptq` and `mid-rise` n / 2. At `aimet` the lowest code is spare, at `gptq` the highest is missed by half a scale.
    """
    match config.convention:
        case "full-range":
            return symmetric_grid(low, high, config.bits, "full", exponent)
        case "aimet":
            return replace(symmetric_grid(low, high, config.bits, "narrow", exponent), convention="full")
        case "gptq":
            return replace(symmetric_grid(low, high, config.bits, "mid-rise", exponent), convention="full")
        case "narrow" | "mid-rise":
            return symmetric_grid(low, high, config.bits, config.convention, exponent)
        case None:
            raise AssertionError("RtnConfig sets the convention of a symmetric grid")
