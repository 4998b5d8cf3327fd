"""Grids are searched for here, the one of least error for each block, as the disk holds it.

Least squares refits a grid to its codes, the shrunken range tries shares of min-max under any norm, and AIMET's
tf_enhanced works on a histogram, where what is clipped counts threefold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.coding.grids import from_half, middle, round_offset, round_scale
from qcompress.coding.rows import row_slices
from qcompress.solvers.blocks import Chunk, extremes, walk
from qcompress.solvers.grids import (
    Grid,
    joined_grid,
    offset_grid,
    symmetric_grid,
    zero_point_grid,
)
from qcompress.solvers.least_squares import HIGH, Effort, fit_affine, fit_scale
from qcompress.types.config import Convention
from qcompress.types.plan import searched_convention

COARSE = tuple(-hundredths / 100 for hundredths in range(4, 81, 4))
FINE = tuple(hundredths / 100 for hundredths in (-3, -2, -1, 1, 2, 3))

BUCKETS = 512
CLIPPED_WEIGHT = 3.0
SYMMETRIC_SHARES = tuple((1 + hundredths) / 100 for hundredths in range(101))
SCALE_SHARES = tuple(sixteenths / 16 for sixteenths in range(1, 18))
OFFSET_SHARES = tuple(twentieths / 20 for twentieths in range(21))
SLAB_VALUES = 1 << 22


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


def tf_enhanced_grid(blocks: Tensor, bits: int, symmetric: bool, exponent: int) -> Grid:
    """The candidate grid of least cost of each block: squared error within the range, and three times that beyond it.

    The cost is counted on the mid-points of 512 buckets over the block's range (the `tf_enhanced` scheme of AIMET, and
    the candidates of its code). Symmetric: 101 scales up to 1.01 of the min-max one, on the `full` convention, so that
    2 bits reach -2, -1, 0 and 1. Else: 17 scales by 21 zero points, cut to the observed range, and the min-max grid.
    We differ from it in that no range is too small: it never goes below 0.01, and takes [-1, 1] for zeros.

    blocks   float32 [blocks, length]
    """
    steps = 2**bits - 1
    candidates = len(SYMMETRIC_SHARES) if symmetric else len(SCALE_SHARES) * len(OFFSET_SHARES) + 1
    values_each = max(candidates * min(steps + 3, BUCKETS), blocks.shape[1])
    search = _symmetric if symmetric else _asymmetric
    # In units of 2**exponent, where scales are what float16 holds.
    slabs = (
        blocks[rows].double() * 2.0**-exponent for rows in row_slices(max(1, len(blocks)), values_each, SLAB_VALUES)
    )
    return joined_grid(search(slab, steps, bits) for slab in slabs)


def _symmetric(blocks: Tensor, steps: int, bits: int) -> Grid:
    low, high = extremes(blocks)
    largest = torch.maximum(high, -low).unsqueeze(1) / (steps / 2)
    scales = round_scale(largest * torch.tensor(SYMMETRIC_SHARES, dtype=torch.float64, device=blocks.device), 0)
    zeros = torch.full_like(scales, 2.0 ** (bits - 1))
    best = _cheapest(blocks, from_half(scales, 0).double(), zeros.double(), steps)
    return Grid(scales.gather(1, best).squeeze(1), convention="full")


def _asymmetric(blocks: Tensor, steps: int, bits: int) -> Grid:
    low, high = (end.unsqueeze(1) for end in extremes(blocks))
    low, high = low.clamp(max=0), high.clamp(min=0)
    shares = torch.cartesian_prod(torch.tensor(SCALE_SHARES), torch.tensor(OFFSET_SHARES)).double().to(blocks.device)
    scale = (high - low) / steps * shares[:, 0]
    bottom = -(shares[:, 1] * steps).round() * scale
    ends = torch.maximum(bottom, low), torch.minimum(bottom + steps * scale, high)
    lows, highs = (torch.cat([end, plain], 1) for end, plain in zip(ends, (low, high), strict=True))
    scales = round_scale((highs - lows) / steps, 0)
    reals = from_half(scales, 0).double()
    zeros = (-lows / reals).round().clamp(0, steps)
    best = _cheapest(blocks, reals, zeros, steps)
    return Grid(scales.gather(1, best).squeeze(1), zero_point=zeros.gather(1, best).squeeze(1).to(torch.uint8))


def _cheapest(blocks: Tensor, scales: Tensor, zeros: Tensor, steps: int) -> Tensor:
    """The candidate of least cost, the first of equals: int64 [blocks, 1].

    scales, zeros  float64 [blocks, candidates]
    """
    buckets = _fill_buckets(blocks)
    # With few levels, sums over what is nearest to each cost less than a look at every bucket.
    cost = _cost_by_level if steps < BUCKETS // 8 else _cost_by_bucket
    return cost(buckets, scales.unsqueeze(2), zeros.unsqueeze(2), steps).argmin(1, keepdim=True)


@dataclass(frozen=True)
class _Buckets:
    """Counts and mid-points float64 [blocks, BUCKETS]; the low end and the width above 0 float64 [blocks, 1, 1]."""

    counts: Tensor
    centres: Tensor
    low: Tensor
    width: Tensor


def _fill_buckets(blocks: Tensor) -> _Buckets:
    low, high = (end.unsqueeze(1) for end in extremes(blocks))
    width = (high - low) / BUCKETS
    safe = torch.where(width > 0, width, 1.0)
    places = ((blocks - low) / safe).long().clamp_(0, BUCKETS - 1)
    counts = low.new_zeros(len(blocks), BUCKETS).scatter_add_(1, places, torch.ones_like(places, dtype=torch.float64))
    middles = torch.arange(BUCKETS, dtype=torch.float64, device=blocks.device) + 0.5
    return _Buckets(counts, low + middles * width, low.unsqueeze(2), safe.unsqueeze(2))


def _cost_by_bucket(buckets: _Buckets, scale: Tensor, zero: Tensor, steps: int) -> Tensor:
    """The cost of each candidate, [blocks, candidates]; scale and zero with a last dimension of 1."""
    scale, zero, x = scale.float(), zero.float(), buckets.centres.float().unsqueeze(1)
    rest = x / scale
    error = torch.round(rest).clamp_(-zero, steps - zero).sub_(rest).mul_(scale).square_()
    clipped = (rest < -zero).logical_or_(rest > steps - zero)
    weights = torch.where(clipped, CLIPPED_WEIGHT, 1.0).mul_(buckets.counts.float().unsqueeze(1))
    return error.mul_(weights).sum(2)


def _cost_by_level(buckets: _Buckets, scale: Tensor, zero: Tensor, steps: int) -> Tensor:
    """The same from the counts and the first two moments of what is nearest to each level."""
    levels = (torch.arange(steps + 1, dtype=torch.float64, device=scale.device) - zero) * scale
    # What lies below the first level or above the last is clipped to it, and apart from what is rounded to it.
    borders = torch.cat([levels[:, :, :1], (levels[:, :, 1:] + levels[:, :, :-1]) / 2, levels[:, :, -1:]], 2)
    values = F.pad(levels, (1, 1), mode="replicate")
    weights = torch.ones(steps + 3, dtype=torch.float64, device=scale.device)
    weights[[0, -1]] = CLIPPED_WEIGHT
    below = ((borders - buckets.low) / buckets.width - 0.5).ceil_().clamp_(0, BUCKETS).long()
    counts, x = buckets.counts, buckets.centres
    count, total, squares = (
        _between(moment, below).mul_(weights) for moment in (counts, counts * x, counts * x.square())
    )
    return (squares - 2 * values * total + values.square() * count).sum(2)


def _between(moment: Tensor, places: Tensor) -> Tensor:
    """The sums of a moment [blocks, BUCKETS] before the first place, from each to the next, and after the last."""
    running = F.pad(moment.cumsum(1), (1, 0))
    sums = running.gather(1, places.flatten(1)).view(places.shape)
    whole = running[:, -1:, None].expand(*places.shape[:2], 1)
    return torch.diff(sums, dim=2, prepend=torch.zeros_like(whole), append=whole)
