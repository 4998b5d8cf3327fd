"""Grids are made from the ranges of blocks, one for each, and codes are taken nearest on a grid.

A block is what shares one grid: blocks float32 [blocks, length], finite. Grids come rounded to what the disk holds and
codes are chosen against that. A block of zeros decodes to zeros, but on a mid-rise grid to half the least scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.coding.grids import HALF_TINY, from_half, middle, round_offset, round_scale
from qcompress.coding.rows import tiles
from qcompress.solvers.blocks import CHUNK_VALUES, extremes
from qcompress.types.config import Convention
from qcompress.types.encoded import Affine

ROUND_TO_INTEGER = 1.5 * 2.0**23
"""Added to a small float32 it rounds it half to even, and leaves the integer in the low bits."""


@dataclass(frozen=True, slots=True)
class Grid:
    """One grid per block, already rounded to its disk dtype; the values are those of `Affine`.

    scale       float16 [blocks], not 0
    offset      float16 [blocks], the value of code 0
    zero_point  uint8 [blocks], the code of zero
    convention  where neither is present
    """

    scale: Tensor
    offset: Tensor | None = None
    zero_point: Tensor | None = None
    convention: Convention | None = None


def offset_grid(low: Tensor, high: Tensor, bits: int, exponent: int) -> Grid:
    """The real-offset grid whose levels run from `low` or just below it to `high` or just above.

    low, high  float32 [blocks]
    """
    low = low.double() * 2.0**-exponent
    high = high.double() * 2.0**-exponent
    nearest = round_offset(low, 0)
    # More than half a step of float16 and less than one and a half, so that rounding makes it one step.
    lower = nearest.double() - (nearest.double().abs() * (1.25 * 2.0**-11)).clamp_min(0.75 * HALF_TINY)
    offset = torch.where(nearest.double() > low, round_offset(lower, 0), nearest)
    return Grid(round_scale((high - offset.double()) / (2**bits - 1), 0, up=True), offset=offset)


def zero_point_grid(low: Tensor, high: Tensor, bits: int, exponent: int) -> Grid:
    """The integer-zero grid that spans [min(low, 0), max(high, 0)]: within it no value is off by more than half a step.

    low, high  float32 [blocks]
    """
    steps = 2**bits - 1
    low, high = low.clamp(max=0).double(), high.clamp(min=0).double()
    scale = round_scale((high - low) / steps, exponent, up=True)
    zero_point = (-low / (scale.double() * 2.0**exponent)).round_().clamp_(0, steps)
    return Grid(scale, zero_point=zero_point.to(torch.uint8))


def symmetric_grid(low: Tensor, high: Tensor, bits: int, convention: Convention, exponent: int) -> Grid:
    """The symmetric grid that just holds the end farther from zero.

    `full` puts that end on the extra code, and so has a negative scale where it is the high one: the other end may be
    off by a whole step. `narrow` and `mid-rise` have levels on both ends.

    low, high  float32 [blocks]
    """
    absmax = torch.maximum(high, -low).double()
    scale = round_scale(absmax / middle(convention, bits), exponent, up=True)
    if convention == "full":
        scale = torch.where(high > -low, -scale, scale)
    return Grid(scale, convention=convention)


def minmax_grid(blocks: Tensor, bits: int, exponent: int) -> Grid:
    """The real-offset grid that spans each block's values."""
    return offset_grid(*extremes(blocks), bits, exponent)


def nearest_codes(blocks: Tensor, grid: Grid, bits: int, exponent: int) -> Tensor:
    """The codes uint8 [blocks, length] whose decoded values lie nearest to the blocks; ties go to the even code."""
    if exponent < -100:
        # The reciprocal of a scale would not fit float32.
        return nearest_codes(blocks * 2.0**64, grid, bits, exponent + 64)
    codes = blocks.new_empty(blocks.shape, dtype=torch.uint8)
    if not blocks.numel():
        return codes
    count, length = blocks.shape
    rate = (2.0**-exponent / grid.scale.double()).float().unsqueeze(1)
    shift, zero = _shift_and_zero(grid, bits, exponent)
    buffer = blocks.new_empty(min(blocks.numel(), CHUNK_VALUES))
    for rows, columns in tiles(count, length, CHUNK_VALUES):
        source = blocks[rows, columns]
        scaled = buffer[: source.numel()].view(source.shape)
        if shift is None:
            torch.mul(source, rate[rows], out=scaled)
        else:
            torch.sub(source, shift[rows], out=scaled).mul_(rate[rows])
        scaled.add_(zero if isinstance(zero, float) else zero[rows])
        scaled.clamp_(ROUND_TO_INTEGER, ROUND_TO_INTEGER + (2**bits - 1))
        codes[rows, columns].copy_(scaled.view(torch.int32))
    return codes


def _shift_and_zero(grid: Grid, bits: int, exponent: int) -> tuple[Tensor | None, Tensor | float]:
    """The weight that is moved to zero before it is scaled, and the code of zero on top of ROUND_TO_INTEGER."""
    if grid.offset is not None:
        return from_half(grid.offset, exponent).unsqueeze(1), ROUND_TO_INTEGER
    if grid.zero_point is not None:
        return None, grid.zero_point.unsqueeze(1) + ROUND_TO_INTEGER
    assert grid.convention is not None
    zero = middle(grid.convention, bits)
    if grid.convention == "mid-rise":
        # A half is lost beside ROUND_TO_INTEGER.
        return from_half(grid.scale, exponent).unsqueeze(1) * -zero, ROUND_TO_INTEGER
    return None, ROUND_TO_INTEGER + zero


def joined_grid(grids: Iterable[Grid]) -> Grid:
    """The grids of consecutive blocks as one."""
    parts = list(grids)
    offsets = [part.offset for part in parts if part.offset is not None]
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return Grid(
        torch.cat([part.scale for part in parts]),
        offset=torch.cat(offsets) if offsets else None,
        zero_point=torch.cat(zero_points) if zero_points else None,
        convention=parts[0].convention,
    )


def affine_from_grid(weight: Tensor, grid: Grid, bits: int, exponent: int, shape: tuple[int, int]) -> Affine:
    """The weight float32 [rows, ...] in the nearest codes of its grid, one for each of `shape` blocks."""
    blocks = shape[0] * shape[1]
    codes = nearest_codes(weight.reshape(blocks, weight.numel() // blocks if blocks else 0), grid, bits, exponent)
    affine = affine_from_codes(codes.view(weight.shape[0], math.prod(weight.shape[1:])), grid, bits, exponent, shape)
    return replace(affine, shape=tuple(weight.shape))


def affine_from_codes(codes: Tensor, grid: Grid, bits: int, exponent: int, shape: tuple[int, int]) -> Affine:
    """Codes uint8 [rows, columns] on a grid, one for each of `shape` blocks, as a weight of that shape."""
    return Affine(
        codes=codes,
        bits=bits,
        scale=grid.scale.view(shape),
        exponent=exponent,
        shape=tuple(codes.shape),
        zero_point=None if grid.zero_point is None else grid.zero_point.view(shape),
        offset=None if grid.offset is None else grid.offset.view(shape),
        convention=grid.convention,
    )
