"""SQuant: roundings flipped until the errors of each kernel and of each channel sum to nearly nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompress.coding.affine import from_half, middle
from qcompress.coding.rows import blocks_from_rows, grid_shape
from qcompress.registry import SquantConfig
from qcompress.solvers.ranges import Grid, least_squares_grid, minmax_grid
from qcompress.types import Affine

# A position is an integer number of 2**-16 steps: sums are exact in any order and for any cut into rows.
FRACTION_BITS = 16
STEP = 1 << FRACTION_BITS

# A weight farther outside the grid counts as this many steps outside, so that 64 errors sum in int32.
REACH = 511

# Up to this kernel size, comparing all pairs ranks faster than sorting.
PAIRWISE_MAX = 64

CHUNK_WEIGHTS = 1 << 17


def encode(weight: Tensor, config: SquantConfig, exponent: int) -> Affine:
    """Codes whose errors cancel, for weight float32 [rows, inputs, ...]; the trailing dimensions are kernels.

    With e = code - position in grid steps, three stages:
      E  round to nearest, ties to even, within the grid;
      K  in each kernel flip the round(|sum e|) largest e of the sum's sign to their other neighbour, so that
         |sum e| <= 1/2, and nominate the one flip that would cost least next (or, overshot, be best taken back);
      C  in each channel flip the round(|sum e|) best nominees of the sum's sign; without stage K, or where kernels
         hold one weight, every weight is a nominee.
    A weight outside the grid counts with its whole error and never moves; where too few can move, all of them do.
    Of equal errors the first flips first. Under group granularity sums never mix scales: stage C works on each group,
    stage K on each part of a kernel that lies within one group.

    Source: Guo et al. 2022, arXiv 2202.07471, sections 3.3 and 3.4. Differs from the published code: errors are
    counted after clamping, so that neighbours make up for clipped weights; a kernel whose errors sum to zero nominates
    nothing; the offset is a real number, and scale and offset are rounded to float16 before anything else; positions
    are rounded to 2**-16 of a step. The range `clip` is not in the paper.
    """
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    granularity = config.granularity or "channel"
    grid_rows, groups = grid_shape(tuple(weight.shape), granularity, config.group_size)
    grid = _make_grid(blocks_from_rows(weight, granularity, config.group_size), config, exponent)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    kernel, length = math.prod(weight.shape[2:]), columns // max(groups, 1)
    values = weight.reshape(rows, columns)
    step = max(1, CHUNK_WEIGHTS // max(columns, 1))
    for start in range(0, rows if columns else 0, step):
        chunk = slice(start, start + step)
        grids = slice(None) if grid_rows == 1 else slice(start * groups, (start + step) * groups)
        positions = _positions(values[chunk].reshape(-1, length), grid, grids, config.bits, exponent)
        codes[chunk] = flipped_codes(positions.reshape(-1, columns), config.bits, kernel, length, config.stages)
    return Affine(
        codes=codes,
        bits=config.bits,
        scale=grid.scale.reshape(grid_rows, groups),
        exponent=exponent,
        shape=tuple(weight.shape),
        offset=None if grid.offset is None else grid.offset.reshape(grid_rows, groups),
        convention=grid.convention,
    )


def _make_grid(blocks: Tensor, config: SquantConfig, exponent: int) -> Grid:
    if config.range == "clip":
        return least_squares_grid(blocks, config.bits, config.symmetric, exponent)
    return minmax_grid(blocks, config.bits, exponent)


def _positions(blocks: Tensor, grid: Grid, part: slice, bits: int, exponent: int) -> Tensor:
    """Where blocks float32 [blocks, length] lie on the grid: int32, in units of 2**-16 steps from code 0."""
    steps = blocks * 2.0**-exponent
    if grid.offset is not None:
        steps.sub_(from_half(grid.offset[part], 0).unsqueeze(1))
    steps.div_(from_half(grid.scale[part], 0).unsqueeze(1))
    if grid.convention is not None:
        steps.add_(middle(grid.convention, bits))
    steps.clamp_(-REACH, 2**bits - 1 + REACH)
    return steps.mul_(STEP).round_().to(torch.int32)


def flipped_codes(positions: Tensor, bits: int, kernel: int, length: int, stages: str) -> Tensor:
    """The codes uint8 [rows, columns] after the named stages.

    positions  int32 [rows, columns], in units of 2**-16 steps from code 0
    kernel     columns of one kernel, in a row
    length     columns that share a grid, in a row; stage C works on each such run
    """
    codes = _nearest(positions).clamp_(0, 2**bits - 1)
    error = (codes << FRACTION_BITS).sub_(positions)
    free = error * _within(positions, bits)
    if "K" in stages and kernel > 1:
        move, free = _kernel_moves(error, free, kernel, length)
        codes -= move
        error -= move << FRACTION_BITS
    if "C" in stages:
        codes -= _flip_channels(error.reshape(-1, length), free.reshape(-1, length)).reshape(codes.shape)
    return codes.to(torch.uint8)


def _nearest(positions: Tensor) -> Tensor:
    """Whole steps, ties to even, in the integer dtype of the positions."""
    return (positions + (STEP // 2 - 1) + ((positions >> FRACTION_BITS) & 1)) >> FRACTION_BITS


def _within(positions: Tensor, bits: int) -> Tensor:
    """1 where a position lies within the grid: only there does the other neighbour exist."""
    return ((positions >= 0) & (positions <= (2**bits - 1) << FRACTION_BITS)).to(torch.int32)


def _kernel_moves(error: Tensor, free: Tensor, kernel: int, length: int) -> tuple[Tensor, Tensor]:
    """Stage K: the moves int32 [rows, columns] to take off the codes, and the errors of the nominees, elsewhere 0.

    A kernel that crosses from one grid to the next is worked on part by part, the rest of it hidden as zeros.
    """
    rows, columns = error.shape
    error, free = (_planes(values, kernel) for values in (error, free))
    if length % kernel == 0:
        move, nominee = _flip_kernels(error, free)
    else:
        column = torch.arange(columns)
        part = (column // length - column // kernel * kernel // length).reshape(-1, kernel).t()
        move, nominee = torch.zeros_like(error), torch.zeros_like(error)
        for number in range(int(part.max()) + 1):
            shown = (part == number).to(torch.int32).repeat(1, rows)
            for total, one in zip((move, nominee), _flip_kernels(error * shown, free * shown), strict=True):
                total += one
    return _rows_from_planes(move, columns), _rows_from_planes(nominee, columns)


def _planes(values: Tensor, kernel: int) -> Tensor:
    """[rows, columns] as [kernel, kernels]: what is done within a kernel is then done on whole vectors."""
    return values.reshape(-1, kernel).t().contiguous()


def _rows_from_planes(planes: Tensor, columns: int) -> Tensor:
    return planes.t().reshape(-1, columns)


def _flip_kernels(error: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Stage K on int32 [kernel, kernels]: the moves, and the errors of the nominees after them, elsewhere 0."""
    total = error.sum(0, dtype=torch.int32)
    sign, excess = total.sign(), total.abs()
    wanted = free * sign
    rank = _ranks(wanted)
    available = (wanted > 0).sum(0, dtype=torch.int32)
    flips = torch.minimum(_nearest(excess), available)
    move = (rank < flips.to(rank.dtype)).to(torch.int32).mul_(sign)
    overshot = (flips << FRACTION_BITS) >= excess
    # A sum of zero has no flip to take back, and where all have moved none is left: rank -1, which nobody has.
    nominee = torch.where(overshot, flips - 1, torch.where(flips < available, flips, -1))
    after = free.sub_(move << FRACTION_BITS)
    return move, after.mul_(rank == nominee.to(rank.dtype))


def _ranks(values: Tensor) -> Tensor:
    """How many in its column are larger, or equal and earlier: int8 or int64, shaped like values [kernel, kernels]."""
    kernel = values.shape[0]
    if kernel > PAIRWISE_MAX:
        order = values.argsort(dim=0, descending=True, stable=True)
        return torch.empty_like(order).scatter_(0, order, torch.arange(kernel).unsqueeze(1).expand_as(order))
    ranks = torch.arange(kernel - 1, -1, -1, dtype=torch.int8).unsqueeze(1).repeat(1, values.shape[1])
    for first in range(kernel - 1):
        ahead = (values[first] >= values[first + 1 :]).view(torch.int8)
        ranks[first + 1 :] += ahead
        ranks[first] -= ahead.sum(0, dtype=torch.int8)
    return ranks


def _flip_channels(error: Tensor, free: Tensor) -> Tensor:
    """Stage C on int32 [blocks, length]: the moves, given what may move and the error that it has."""
    total = error.sum(1)
    sign = total.sign().to(torch.int32).unsqueeze(1)
    wanted = free * sign
    flips = torch.minimum(_nearest(total.abs()), (wanted > 0).sum(1))
    most = int(flips.max())
    if most == 0:
        return torch.zeros_like(error)
    # The place in the row makes every key its own, so that the last flip's key alone tells who flips.
    length = error.shape[1]
    key = wanted if length <= 2 ** (31 - FRACTION_BITS) else wanted.long()
    key = (key * length).sub_(torch.arange(length, dtype=key.dtype))
    last = key.topk(most).values.gather(1, (flips - 1).clamp_min(0).unsqueeze(1))
    return (key >= last).to(torch.int32).mul_(sign * (flips > 0).unsqueeze(1))
