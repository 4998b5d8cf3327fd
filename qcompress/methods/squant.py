"""SQuant flips roundings until the errors of each kernel and of each channel sum to nearly nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.coding.grids import from_half, middle, round_offset, round_scale
from qcompress.coding.rows import blocks_from_rows, column_parts, spans
from qcompress.registry import SquantConfig
from qcompress.solvers.blocks import extremes, fold
from qcompress.solvers.grids import (
    Grid,
    affine_from_codes,
    beside,
    held_grid,
    minmax_grid,
    symmetric_grid,
    zero_point_grid,
)
from qcompress.solvers.ranges import least_squares_grid
from qcompress.types.encoded import Affine
from qcompress.types.run import EncodeContext

# A position is an integer number of 2**-16 steps: sums are exact in any order and for any cut into rows.
FRACTION_BITS = 16
STEP = 1 << FRACTION_BITS

# A weight farther outside the grid counts as this many steps outside: no error then overflows int32.
REACH = 511

# Up to this kernel size, comparing all pairs ranks faster than sorting.
PAIRWISE_MAX = 64

# The fraction bits dropped where positions are squared, so that squares in a unit of 2**15 weights sum in int64.
GAIN_SHIFT = 10
GAIN_MAX = 2.0

CHUNK_WEIGHTS = 1 << 17


@dataclass(frozen=True, slots=True)
class Cut:
    """How a weight of [rows, columns] is cut, in columns: a kernel, and a run that shares a grid within a row.

    length  of such a run; the last of a row may be shorter
    shared  one grid serves all rows
    """

    rows: int
    columns: int
    kernel: int
    length: int
    shared: bool

    @property
    def unit(self) -> int:
        """The run whose sum of weights the flips keep."""
        return self.kernel if self.kernel > 1 and self.length % self.kernel == 0 else self.length

    def chunks(self) -> Iterator[slice]:
        """Row blocks of bounded size."""
        step = max(1, CHUNK_WEIGHTS // max(self.columns, 1))
        return spans(self.rows if self.columns else 0, step)

    def grids_of(self, chunk: slice) -> slice:
        """The grids of some rows, where the runs of a row are equally long."""
        groups = self.columns // max(self.length, 1)
        return slice(None) if self.shared else slice(chunk.start * groups, chunk.stop * groups)


def encode(weight: Tensor, config: SquantConfig, context: EncodeContext) -> Affine:
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

    Range `minmax` spans the weights: with `preset: paper` on a grid with an integer zero point, as published, else with
    a real offset, which is ours. So is range `clip`: the grid of least squared error; in convolutions (three dimensions
    or more) weights and grid are then stretched about their means so that what is coded keeps the size of the weights,
    see `_gains`.

    Source: Guo et al. 2022, arXiv 2202.07471, sections 3.3 and 3.4. Differs from the published code, with the preset
    too: errors are counted after clamping, so that neighbours make up for clipped weights; a kernel whose errors sum to
    zero nominates nothing; a range with a zero point always holds zero, so that the zero point is a code; scale and
    offset are rounded to float16 before anything else; positions are rounded to 2**-16 of a step.
    """
    exponent = context.exponent
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    kernel = math.prod(weight.shape[2:])
    values = weight.reshape(rows, columns)
    parts = [
        _make_part(values[:, part], kernel, config, exponent, stretch=config.range == "clip" and weight.ndim > 2)
        for part in column_parts(columns, config.unit, config.group_size)
    ]
    cut = Cut(rows, columns, kernel, parts[0].cut.length, config.unit == "tensor")
    codes = weight.new_empty(rows, columns, dtype=torch.uint8)
    for chunk in cut.chunks():
        positions = torch.cat([part.positions(chunk, config.bits, exponent) for part in parts], 1)
        codes[chunk] = flipped_codes(positions, cut, config.bits, config.stages)
    affine = affine_from_codes(codes, beside([part.grid for part in parts], rows), config, exponent)
    return replace(affine, shape=tuple(weight.shape))


@dataclass(frozen=True, slots=True)
class _Part:
    """Columns of a weight whose groups are equally long: values float32 [rows, columns], their grids, and the gains
    float64 [grids] that stretch what is coded."""

    values: Tensor
    cut: Cut
    grid: Grid
    gains: Tensor | None

    def positions(self, chunk: slice, bits: int, exponent: int) -> Tensor:
        """Where some rows lie on their grids: int32 [rows, columns], in units of 2**-16 steps from code 0."""
        grids = self.cut.grids_of(chunk)
        found = _positions(self.values[chunk], self.grid, grids, bits, exponent)
        return found if self.gains is None else _inflated(found, self.cut, self.gains[grids], bits)


def _make_part(values: Tensor, kernel: int, config: SquantConfig, exponent: int, *, stretch: bool) -> _Part:
    blocks = blocks_from_rows(values, config.unit, config.group_size)
    grid = _make_grid(blocks, config, exponent)
    shared = config.unit == "tensor"
    columns = values.shape[1]
    cut = Cut(len(values), columns, kernel, columns if shared else blocks.shape[1], shared)
    if not (stretch and values.numel()):
        return _Part(values, cut, held_grid(grid, config, exponent), None)
    gains, centre = _gains(values, cut, grid, config.bits, exponent)
    return _Part(values, cut, held_grid(_stretched(grid, gains, centre), config, exponent), gains)


def _make_grid(blocks: Tensor, config: SquantConfig, exponent: int) -> Grid:
    if config.range == "clip":
        return least_squares_grid(blocks, config.bits, bool(config.symmetric), exponent)
    if config.symmetric:
        return symmetric_grid(*extremes(blocks), config.bits, config.stored_convention, exponent)
    if config.form == "zero-point":
        return zero_point_grid(*extremes(blocks), config.bits, exponent)
    return minmax_grid(blocks, config.bits, exponent)


def _gains(values: Tensor, cut: Cut, grid: Grid, bits: int, exponent: int) -> tuple[Tensor, Tensor]:
    """What makes up for the shrinking of weights on a clipped grid, and where the weights of a grid have their mean.

    With w and v the weights and their nearest levels, both less their means in each kernel (in each channel where
    kernels hold one weight), the gain is sum w w / sum w v: scaled by it, v has all of w in it. The least-squares grid
    gives less than 1 of it, at 2 bits some 0.85, layer upon layer; batch norms with stored statistics do not rescale.

    returns  gains float64 [grids] in [1, 2], mean positions float64 [grids] in steps
    """
    powers = values.new_zeros(3, grid.scale.numel(), dtype=torch.float64)
    unit = cut.unit
    for chunk in cut.chunks():
        grids = cut.grids_of(chunk)
        positions = _positions(values[chunk], grid, grids, bits, exponent)
        codes = _nearest(positions).clamp_(0, 2**bits - 1).reshape(-1, unit).long()
        places = (positions >> GAIN_SHIFT).reshape(-1, unit).long()
        total = places.sum(1)
        own = unit * places.square().sum(1) - total.square()
        both = unit * (places * codes).sum(1) - total * codes.sum(1)
        sums = torch.stack((own, both, total)).double()
        powers[:, grids] += fold(sums.reshape(3, powers[:, grids].shape[1], -1), 2)
    own, both, total = powers
    places_a_step = 2.0 ** (FRACTION_BITS - GAIN_SHIFT)
    gains = torch.where(both > 0, own / (both * places_a_step), 1.0).clamp(1, GAIN_MAX)
    return gains, total / (places_a_step * (values.numel() // max(gains.numel(), 1)))


def _stretched(grid: Grid, gains: Tensor, centre: Tensor) -> Grid:
    """The grid times its gain, about the position `centre` where it has an offset, about zero where it has none."""
    before = from_half(grid.scale, 0).double()
    scale = round_scale(before * gains, 0)
    if grid.offset is None:
        return replace(grid, scale=scale)
    offset = from_half(grid.offset, 0).double() + (before - from_half(scale, 0).double()) * centre
    return replace(grid, scale=scale, offset=round_offset(offset, 0))


def _inflated(positions: Tensor, cut: Cut, gains: Tensor, bits: int) -> Tensor:
    """The positions moved away from their mean in each unit by the gain: sums stay what they are."""
    units = positions.reshape(gains.numel(), -1, cut.unit)
    mean = (units.sum(2, dtype=torch.int64).double() / cut.unit).float().unsqueeze(2)
    more = (units - mean).mul_((gains - 1).float().view(-1, 1, 1)).round_().to(torch.int32)
    return more.add_(units).clamp_(-REACH * STEP, (2**bits - 1 + REACH) * STEP).reshape(positions.shape)


def _positions(values: Tensor, grid: Grid, grids: slice, bits: int, exponent: int) -> Tensor:
    """Where values float32 [rows, columns] lie on their grids: int32, in units of 2**-16 steps from code 0."""
    scale = from_half(grid.scale[grids], 0).unsqueeze(1)
    steps = (values * 2.0**-exponent).reshape(scale.numel(), -1)
    if grid.offset is not None:
        steps.sub_(from_half(grid.offset[grids], 0).unsqueeze(1))
    steps.div_(scale)
    if grid.zero_point is not None:
        steps.add_(grid.zero_point[grids].unsqueeze(1))
    if grid.convention is not None:
        steps.add_(middle(grid.convention, bits))
    steps.clamp_(-REACH, 2**bits - 1 + REACH)
    return steps.mul_(STEP).round_().to(torch.int32).reshape(values.shape)


def flipped_codes(positions: Tensor, cut: Cut, bits: int, stages: str) -> Tensor:
    """The codes uint8 [rows, columns] after the named stages, for positions int32 in units of 2**-16 steps."""
    codes = _nearest(positions).clamp_(0, 2**bits - 1)
    error = (codes << FRACTION_BITS).sub_(positions)
    free = error * _within(positions, bits)
    if "K" in stages and cut.kernel > 1:
        move, free = _kernel_moves(error, free, cut)
        codes -= move
        error -= move << FRACTION_BITS
    if "C" in stages:
        for part in column_parts(cut.columns, "group", cut.length):
            length = min(cut.length, part.stop - part.start)
            own = (values[:, part].reshape(-1, length) for values in (error, free))
            codes[:, part] -= _flip_channels(*own).reshape(len(codes), -1)
    return codes.to(torch.uint8)


def _nearest(positions: Tensor) -> Tensor:
    """Whole steps, ties to even, in the integer dtype of the positions."""
    odd = (positions >> FRACTION_BITS) & 1
    return odd.add_(positions).add_(STEP // 2 - 1) >> FRACTION_BITS


def _within(positions: Tensor, bits: int) -> Tensor:
    """1 where a position lies on the grid, which is where both its neighbours exist, else 0."""
    inside: Tensor = (positions >= 0) & (positions <= (2**bits - 1) << FRACTION_BITS)
    return inside.to(torch.int32)


def _kernel_moves(error: Tensor, free: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """Stage K: the moves int32 [rows, columns] to take off the codes, and the errors of the nominees, elsewhere 0.

    A kernel that crosses from one grid to the next is worked on part by part, the rest of it hidden as zeros.
    """
    rows, columns = error.shape
    kernel, length = cut.kernel, cut.length
    error, free = (_planes(values, kernel) for values in (error, free))
    if length % kernel == 0:
        move, nominee = _flip_kernels(error, free)
    else:
        column = torch.arange(columns, device=error.device)
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
    total = error.sum(0)
    sign, excess = total.sign().to(torch.int32), total.abs()
    wanted = free * sign
    rank = _ranks(wanted)
    available = (wanted > 0).sum(0, dtype=torch.int32)
    flips = torch.minimum(_nearest(excess), available)
    move = (rank < flips.to(rank.dtype)).to(torch.int32).mul_(sign)
    # Of an overshot sum the last flipped, else the next: where that one lies outside the grid, its zero is no nominee.
    nominee = flips - ((flips << FRACTION_BITS) >= excess).to(torch.int32)
    after = free.sub_(move << FRACTION_BITS)
    return move, after.mul_(rank == nominee.to(rank.dtype))


def _ranks(values: Tensor) -> Tensor:
    """How many in its column are larger, or equal and earlier: int8 or int64, shaped like values [kernel, kernels]."""
    kernel = values.shape[0]
    if kernel > PAIRWISE_MAX:
        order = values.argsort(dim=0, descending=True, stable=True)
        places = torch.arange(kernel, device=values.device).unsqueeze(1)
        return torch.empty_like(order).scatter_(0, order, places.expand_as(order))
    ranks = torch.arange(kernel - 1, -1, -1, dtype=torch.int8, device=values.device).unsqueeze(1)
    ranks = ranks.repeat(1, values.shape[1])
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
    key = (key * length).sub_(torch.arange(length, dtype=key.dtype, device=key.device))
    last = key.topk(most).values.gather(1, (flips - 1).clamp_min(0).unsqueeze(1))
    return (key >= last).to(torch.int32).mul_(sign * (flips > 0).unsqueeze(1))
