"""HQQ, half-quadratic quantization, keeps the min-max scale and fits an offset under an l_p norm.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. With the scale S of the range and
codes q, the error W - S (q - z) is split into a sparse part, shrunk towards zero under the norm, and a rest whose mean
moves z; both in turn. As in the official code beta never grows, and it counts in the weights' own units: a tensor of
small weights sees less shrinkage than the same tensor scaled up.

We differ from the official code in this:
- each block keeps its best iterate under the l_p norm being minimised; the official code stops all blocks at the
  first rise of the mean error over the tensor and keeps the last, so that there the result depends on how it is cut;
- the zero point is kept as the offset -S z, rounded to float16 before its codes are chosen, and so is the scale;
- a block's range may be as small as it likes: the official code gives up below 1e-4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.coding.grids import from_half, round_offset
from qcompress.registry import HqqConfig
from qcompress.solvers.blocks import Chunk, walk
from qcompress.solvers.grids import Grid, affine_from_grid, grid_of_rows, joined_grid, offset_grid
from qcompress.solvers.ranges import power
from qcompress.types.encoded import Affine
from qcompress.types.run import EncodeContext

LEAST_ERROR = 2.0**-60
"""Errors count as no smaller than this, in units of 2**exponent, where a negative power is taken of them."""


def encode(weight: Tensor, config: HqqConfig, context: EncodeContext) -> Affine:
    """The weight in the nearest codes of grids with the min-max scale and a fitted offset.

    weight    float32 [rows, ...]
    returns   for no block worse in the l_p norm than the start: the min-max grid, with `round_zero` moved so that zero
              falls on a level. As in the official code, `round_zero` rounds the start alone
    """
    exponent = context.exponent

    def make(blocks: Tensor) -> Grid:
        return joined_grid(_fit(chunk, config, exponent) for chunk in walk(blocks, exponent))

    return affine_from_grid(weight, grid_of_rows(weight, config, make), config, exponent)


def _fit(chunk: Chunk, config: HqqConfig, exponent: int) -> Grid:
    """The best iterate of each block."""
    start = offset_grid(*chunk.extremes(), config.bits, 0)
    assert start.offset is not None
    scale, offset = from_half(start.scale, 0), start.offset
    if config.round_zero:
        offset = round_offset((from_half(offset, 0) / scale).round() * scale, 0)
    # |error| ** (norm - 1) / beta, in the weights' units, seen in units of 2**exponent.
    strength = min(2.0 ** (exponent * (config.norm - 2)) / config.beta, 2.0**100)
    best, least = offset, torch.full_like(scale, torch.inf, dtype=torch.float64)
    # One more look than there are steps: the last step's result must be measured too.
    for _ in range(config.iterations + 1):
        error, following = _step(chunk, scale, from_half(offset, 0), config, strength)
        better = error < least
        best, least = torch.where(better, offset, best), torch.where(better, error, least)
        previous, offset = offset, round_offset(following, 0)
        if torch.equal(offset, previous):
            break
    return Grid(start.scale, offset=best)


def _step(chunk: Chunk, scale: Tensor, offset: Tensor, config: HqqConfig, strength: float) -> tuple[Tensor, Tensor]:
    """The sum of |error|**norm of each block on its grid, and the offset that follows from it; float64 [blocks]."""
    scale_piece, rate, offset_piece = chunk.spread(scale), chunk.spread(1 / scale), chunk.spread(offset)

    def split(x: Tensor, room: Tensor) -> None:
        rest, powers, error = room
        torch.sub(x, offset_piece, out=rest).mul_(rate).round_().clamp_(0, 2**config.bits - 1).mul_(scale_piece)
        torch.sub(x, rest, out=rest)
        torch.sub(rest, offset_piece, out=error)
        size = error.abs().clamp_(min=LEAST_ERROR)
        power(powers.copy_(size), config.norm - 1)
        sparse = (size - powers * strength).clamp_(min=0).copysign_(error)
        # The offset follows as the mean of x less scale * code less the sparse part of the error.
        rest.sub_(sparse)
        powers.mul_(size)

    rest, powers, _ = chunk.totals(3, split)
    return powers, rest / chunk.length
