"""Grids are made from the ranges of blocks, one for each, and codes are taken nearest on a grid.

A block is what shares one grid: blocks float32 [blocks, length], finite. Grids come rounded to what the disk holds and
codes are chosen against that. A block of zeros decodes to zeros, but on a mid-rise grid to half the least scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qcompress.coding.grids import (
    COMMON_EXPONENT,
    HALF_MAX,
    HALF_TINY,
    LARGE_EXPONENT,
    Exponent,
    from_half,
    middle,
    round_offset,
    round_scale,
    rows_alike,
    with_row_exponents,
)
from qcompress.coding.rows import blocks_from_rows, column_parts, grid_shape, tiles
from qcompress.solvers.blocks import CHUNK_VALUES, extremes
from qcompress.types.config import Convention, Granularity, ScaleDtype
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
    if exponent > LARGE_EXPONENT:
        # The difference of a weight and the lowest level may not.
        return nearest_codes(blocks * 2.0**-8, grid, bits, exponent - 8)
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


class Layout(Protocol):
    """What a config says of how its grids lie in a weight."""

    @property
    def bits(self) -> int: ...
    @property
    def unit(self) -> Granularity: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def scales(self) -> ScaleDtype | None: ...


def held_grid(grid: Grid, layout: Layout, exponent: int) -> Grid:
    """The grid whose scales and offsets are numbers of the layout's dtype: each the nearest, the middle level in place.

    Nothing changes where the layout names no dtype, nor of a grid that is so already. float16 rounds scales to no
    less than 2**-24 and no more than 65504; what a weight of `exponent` cannot have is as near to it as it can.
    """
    if layout.scales is None:
        return grid
    scale = _held(grid.scale, layout.scales, exponent)
    least = max(HALF_TINY, 2.0**-24 * 2.0**-exponent) if layout.scales == "f16" else HALF_TINY
    scale = torch.where(scale == 0, torch.full_like(scale, min(least, HALF_MAX)), scale)
    if grid.offset is None:
        return replace(grid, scale=scale)
    moved = (grid.scale.double() - scale.double()) * ((2**layout.bits - 1) / 2)
    offset = round_offset(grid.offset.double() + moved, 0)
    return replace(grid, scale=scale, offset=_held(offset, layout.scales, exponent))


def _held(half: Tensor, dtype: ScaleDtype, exponent: int) -> Tensor:
    """float16 whose values times 2**exponent are the nearest numbers of `dtype`."""
    if dtype == "bf16":
        # A power of two changes no mantissa.
        return half.float().to(torch.bfloat16).float().clamp_(-HALF_MAX, HALF_MAX).half()
    value = (half.double() * 2.0**exponent).clamp_(-HALF_MAX, HALF_MAX).half()
    return (value.double() * 2.0**-exponent).clamp_(-HALF_MAX, HALF_MAX).half()


def grid_of_rows(rows: Tensor, layout: Layout, make: Callable[[Tensor], Grid]) -> Grid:
    """A grid for each block of rows float32 [rows, ...], in the order of the flattened grid shape.

    make  the grids of blocks float32 [blocks, length] of one length
    """
    rows = rows.flatten(1)
    parts = column_parts(rows.shape[1], layout.unit, layout.group_size)
    return beside([make(blocks_from_rows(rows[:, part], layout.unit, layout.group_size)) for part in parts], len(rows))


def beside(grids: list[Grid], rows: int) -> Grid:
    """The grids of consecutive columns of the same rows as one."""
    if len(grids) == 1:
        return grids[0]

    def joined(values: list[Tensor | None]) -> Tensor | None:
        found = [one.reshape(rows, one.numel() // max(rows, 1)) for one in values if one is not None]
        return torch.cat(found, 1).reshape(-1) if found else None

    scale = joined([grid.scale for grid in grids])
    assert scale is not None
    offset, zero_point = joined([grid.offset for grid in grids]), joined([grid.zero_point for grid in grids])
    return Grid(scale, offset=offset, zero_point=zero_point, convention=grids[0].convention)


def grid_parts(grid: Grid, rows: int, columns: int, layout: Layout) -> Iterator[tuple[slice, Grid]]:
    """The inverse of `beside` for a weight [rows, columns]: its parts of equally long groups, each with its grids."""
    parts = column_parts(columns, layout.unit, layout.group_size)
    if len(parts) == 1:
        yield parts[0], grid
        return
    groups = grid_shape((rows, columns), layout.unit, layout.group_size)[1]
    for part, own in zip(parts, (slice(0, groups - 1), slice(groups - 1, groups)), strict=True):

        def taken(values: Tensor | None, own: slice = own) -> Tensor | None:
            return None if values is None else values.reshape(rows, groups)[:, own].reshape(-1)

        scale = taken(grid.scale)
        assert scale is not None
        yield part, replace(grid, scale=scale, offset=taken(grid.offset), zero_point=taken(grid.zero_point))


def affine_from_grid(weight: Tensor, grid: Grid, layout: Layout, exponent: Exponent) -> Affine:
    """The weight float32 [rows, ...] in the nearest codes of its grids, one for each block, once they are held."""
    if isinstance(exponent, Tensor):
        alike = affine_from_grid(rows_alike(weight, exponent), grid, layout, COMMON_EXPONENT)
        return with_row_exponents(alike, exponent)
    rows, grid = weight.flatten(1), held_grid(grid, layout, exponent)
    codes = []
    for part, own in grid_parts(grid, len(rows), rows.shape[1], layout):
        blocks = blocks_from_rows(rows[:, part], layout.unit, layout.group_size)
        codes.append(nearest_codes(blocks, own, layout.bits, exponent).reshape(len(rows), part.stop - part.start))
    affine = affine_from_codes(codes[0] if len(codes) == 1 else torch.cat(codes, 1), grid, layout, exponent)
    return replace(affine, shape=tuple(weight.shape))


def affine_from_codes(codes: Tensor, grid: Grid, layout: Layout, exponent: Exponent) -> Affine:
    """Codes uint8 [rows, columns] on grids, one for each block, as a weight of that shape."""
    if isinstance(exponent, Tensor):
        return with_row_exponents(affine_from_codes(codes, grid, layout, COMMON_EXPONENT), exponent)
    shape = grid_shape(tuple(codes.shape), layout.unit, layout.group_size)
    return Affine(
        codes=codes,
        bits=layout.bits,
        scale=grid.scale.view(shape),
        exponent=exponent,
        shape=tuple(codes.shape),
        zero_point=None if grid.zero_point is None else grid.zero_point.view(shape),
        offset=None if grid.offset is None else grid.offset.view(shape),
        convention=grid.convention,
        group_size=layout.group_size if layout.unit == "group" else None,
    )
