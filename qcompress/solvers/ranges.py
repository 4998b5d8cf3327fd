"""Searches for the grid of least error of each block; every error is that of the grid as the disk holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qcompress.coding.affine import middle
from qcompress.coding.half import from_half, round_offset, round_scale
from qcompress.solvers.blocks import Chunk, walk
from qcompress.solvers.grids import (
    Grid,
    joined_grid,
    minmax_grid,
    nearest_codes,
    offset_grid,
    symmetric_grid,
    zero_point_grid,
)
from qcompress.solvers.least_squares import HIGH, Effort, fit_affine, fit_scale
from qcompress.types import Convention, searched_convention

__all__ = ["Grid", "least_squares_grid", "minmax_grid", "nearest_codes", "shrunken_grid"]

COARSE = tuple(-hundredths / 100 for hundredths in range(4, 81, 4))
FINE = tuple(hundredths / 100 for hundredths in (-3, -2, -1, 1, 2, 3))


def least_squares_grid(blocks: Tensor, bits: int, symmetric: bool, exponent: int, effort: Effort = HIGH) -> Grid:
    """The grid of least squared error that alternating least squares finds: real offset, or `searched_convention`.

    blocks   float32 [blocks, length]
    returns  for no block worse than the min-max grid of the same form
    """
    fit = _fit_symmetric if symmetric else _fit_offset
    return joined_grid(fit(chunk, bits, effort) for chunk in walk(blocks, exponent))


def _fit_offset(chunk: Chunk, bits: int, effort: Effort) -> Grid:
    low, high = chunk.extremes()
    centred, mean = chunk.centred()
    scale, mean_code = fit_affine(centred, low.double() - mean, high.double() - mean, bits, effort)
    rounded = round_scale(scale, 0)
    fitted = Grid(rounded, offset=round_offset(mean - rounded.double() * mean_code, 0))
    return _best(chunk, [offset_grid(low, high, bits, 0), fitted], bits)


def _fit_symmetric(chunk: Chunk, bits: int, effort: Effort) -> Grid:
    low, high = chunk.extremes()
    convention = searched_convention(bits)
    absmax = torch.maximum(high, -low).double()
    scale = fit_scale(chunk, absmax, bits, middle(convention, bits), effort, signed=convention == "full")
    fitted = Grid(round_scale(scale, 0), convention=convention)
    return _best(chunk, [symmetric_grid(low, high, bits, convention, 0), fitted], bits)


def shrunken_grid(blocks: Tensor, bits: int, symmetric: bool, norm: float, exponent: int) -> Grid:
    """The min-max grid of the block's range times the factor that leaves the least sum of |error|**norm.

    The factors are the hundredths from 1.00 down to 0.20 (Li et al. 2021, arXiv 2102.05426, whose code tries each): we
    try every fourth, then those about the best. Integer zero point, or `searched_convention`.

    blocks   float32 [blocks, length]
    returns  for no block worse in that norm than the min-max grid of the same form
    """
    convention = searched_convention(bits) if symmetric else None
    return joined_grid(_shrink(chunk, bits, convention, norm) for chunk in walk(blocks, exponent))


def _shrink(chunk: Chunk, bits: int, convention: Convention | None, norm: float) -> Grid:
    low, high = chunk.extremes()

    def shrunken(factor: Tensor) -> Grid:
        ends = (low * factor, high * factor)
        return zero_point_grid(*ends, bits, 0) if convention is None else symmetric_grid(*ends, bits, convention, 0)

    factor = torch.ones_like(low)
    whole = shrunken(factor)
    # Counted in steps of the whole range: a high power of a large number would overflow.
    steps = from_half(whole.scale, 0).abs()
    least = grid_error(chunk, whole, bits, norm, steps)
    for changes in (COARSE, FINE):
        start = factor
        for change in changes:
            candidate = (start + change).clamp(0.2, 1)
            error = grid_error(chunk, shrunken(candidate), bits, norm, steps)
            factor = torch.where(error < least, candidate, factor)
            least = torch.minimum(error, least)
    return shrunken(factor)


def grid_error(chunk: Chunk, grid: Grid, bits: int, norm: float = 2.0, per: Tensor | None = None) -> Tensor:
    """The sum of |error / per|**norm of each block on its grid, float64 [blocks], in units of 2**exponent.

    per  float32 [blocks]; 1 where absent
    """
    share = None if per is None else chunk.spread(1 / per)
    value = from_half(grid.scale, 0)
    scale, rate = chunk.spread(value), chunk.spread(1 / value)
    offset = None if grid.offset is None else chunk.spread(from_half(grid.offset, 0))
    zero: Tensor | float | None = None
    if grid.zero_point is not None:
        zero = chunk.spread(grid.zero_point)
    elif grid.convention is not None:
        zero = middle(grid.convention, bits)

    def powers(x: Tensor, room: Tensor) -> None:
        decoded = room[0]
        if offset is None:
            torch.mul(x, rate, out=decoded)
        else:
            torch.sub(x, offset, out=decoded).mul_(rate)
        if zero is not None:
            decoded.add_(zero)
        decoded.round_().clamp_(0, 2**bits - 1)
        if zero is not None:
            decoded.sub_(zero)
        decoded.mul_(scale)
        if offset is not None:
            decoded.add_(offset)
        decoded.sub_(x).abs_()
        power(decoded if share is None else decoded.mul_(share), norm)

    return chunk.totals(1, powers)[0]


def power(values: Tensor, exponent: float) -> Tensor:
    """values**exponent in place, float32 and not negative."""
    if exponent == 2.0:
        return values.mul_(values)
    if exponent != 1.0 and values.device.type != "cpu":
        values.pow_(exponent)
    elif exponent != 1.0:
        # torch's power rounds differently where a row does not fill a vector register; numpy's does not.
        array = values.numpy()
        with np.errstate(over="ignore", under="ignore"):
            np.power(array, np.float32(exponent), out=array)
    return values


def _best(chunk: Chunk, grids: Sequence[Grid], bits: int) -> Grid:
    """For each block the grid of least squared error, the first of equals; all of one form."""
    best = grids[0]
    least = grid_error(chunk, best, bits)
    for grid in grids[1:]:
        error = grid_error(chunk, grid, bits)
        better = error < least
        least = torch.minimum(error, least)
        best = replace(best, scale=torch.where(better, grid.scale, best.scale))
        if best.offset is not None and grid.offset is not None:
            best = replace(best, offset=torch.where(better, grid.offset, best.offset))
    return best
