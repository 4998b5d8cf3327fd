"""The error of a layer's output is a quadratic form of its weights; grids that keep it small are searched for here.

A layer is `groups` matrix products. With rows W, inputs x in the full-precision network and x^ in the quantized one,
the mean squared error of V x^ against W x is, for D = V - W and up to a constant,

    tr(D H D^T) + 2 tr(D C^T)    H = E x^ x^^T, C = W (H - E x x^^T)

and its least squares solution is V* = W E[x x^^T] H^-1. Rows are float32 [rows, columns], the rows of group g being the
g-th share of them; H and E x x^^T are float64 [groups, columns, columns].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from qcompress.coding.grids import (
    COMMON_EXPONENT,
    Exponent,
    exponent_for,
    from_half,
    middle,
    round_offset,
    round_scale,
    row_exponents,
    rows_alike,
    spread_too_far,
)
from qcompress.coding.rows import column_parts, row_slices
from qcompress.solvers.blocks import extremes
from qcompress.solvers.grids import (
    Grid,
    Layout,
    affine_from_codes,
    beside,
    grid_of_rows,
    held_grid,
    minmax_grid,
    symmetric_grid,
    zero_point_grid,
)
from qcompress.solvers.ranges import least_squares_grid, shrunken_grid, tf_enhanced_grid
from qcompress.types.config import Convention, Form
from qcompress.types.encoded import Affine

SKETCH_COLUMNS = 384
"""Wider Hessians are searched through so many random projections, which tell one range from another as well."""
SEARCH_DAMPING = 1e-4
SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
REFITS = 4
SLAB_VALUES = 1 << 22
LEAST_EXPONENT = -100


class GridOptions(Layout, Protocol):
    """What a method's config says of its grid."""

    @property
    def symmetric(self) -> bool | None: ...
    @property
    def stored_convention(self) -> Convention: ...
    @property
    def form(self) -> Form: ...


MOST_DAMPING = 1e100
"""A share of the mean diagonal beyond which no more helps."""


def damped(hessian: Tensor, share: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Hessian with `share` of its mean diagonal added to the diagonal; the mean itself where no input is active.

    hessian  float64 [groups, columns, columns]
    returns  a copy of it in `dtype`
    """
    raised = hessian.to(dtype, copy=True)
    raised.diagonal(dim1=1, dim2=2).copy_(_damped_diagonal(hessian.diagonal(dim1=1, dim2=2), share))
    return raised


def _damped_diagonal(diagonal: Tensor, share: float) -> Tensor:
    """What `damped` makes of a diagonal, [groups, columns]."""
    mean = diagonal.mean(1, keepdim=True)
    raised = diagonal + share * mean
    # In the unit of the others, since what steps and bits weigh is summed over columns and groups.
    mean = torch.where(mean > 0, mean, mean.mean())
    return torch.where(diagonal <= 0, torch.where(mean > 0, mean, 1.0), raised)


def cholesky(hessian: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of the damped Hessian, and the damped Hessian; ten times the damping while it fails.

    raises  ValueError for a Hessian that is not finite, or so far from any sum of squares that no damping helps
    """
    raised = hessian.clone()
    return factorize(raised, share), raised


def factorize(hessian: Tensor, share: float) -> Tensor:
    """The factor that `cholesky` gives of a Hessian whose diagonal is overwritten by the damped one.

    raises  as `cholesky`
    """
    if not all(bool(bound.isfinite()) for bound in hessian.aminmax()):
        raise ValueError("a Hessian holds NaN or Inf")
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    plain, share = diagonal.clone(), max(share, 1e-10)
    while share < MOST_DAMPING:
        diagonal.copy_(_damped_diagonal(plain, share))
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed.any()):
            return factor
        del factor
        share *= 10
    raise ValueError("a Hessian is no sum of squares")


def grouped(rows: Tensor, groups: int) -> Tensor:
    """Rows [rows, columns] as [groups, rows a group, columns]: a view."""
    return rows.reshape(groups, -1, rows.shape[-1])


def output_error(difference: Tensor, hessian: Tensor, linear: Tensor | None = None) -> Tensor:
    """Each row's share of tr(D H D^T) + 2 tr(D C^T), float64 [rows].

    difference  D [rows, columns]
    linear      C float64 [groups, rows a group, columns]; none where both networks see the same inputs
    """
    parts = grouped(difference.to(hessian.dtype), hessian.shape[0])
    error = ((parts @ hessian) * parts).sum(2, dtype=torch.float64)
    if linear is not None:
        error = error + 2 * (parts * linear).sum(2, dtype=torch.float64)
    return error.reshape(-1)


def linear_term(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """C = W (H - E x x^^T), float64 [groups, rows a group, columns]."""
    return grouped(weight.double(), hessian.shape[0]) @ (hessian - cross)


def least_squares_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, damping: float, more: Tensor | None = None
) -> Tensor:
    """The real weights whose outputs on quantized inputs come nearest to the full-precision outputs.

    They are held near the weights by `damping` times H's mean diagonal, which matters where inputs leave freedom.

    more     E[d x^^T] float64 [groups, rows a group, columns] of what else d the outputs are to give
    returns  float32 [rows, columns]
    """
    weights = grouped(weight.double(), hessian.shape[0])
    hold = damping * hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    held = hessian.clone()
    held.diagonal(dim1=1, dim2=2).add_(hold.unsqueeze(1))
    wanted = weights @ cross + hold.view(-1, 1, 1) * weights
    wanted = (wanted if more is None else wanted + more).transpose(1, 2)
    factor, failed = torch.linalg.cholesky_ex(held)
    if bool(failed.any()):
        factor, _ = cholesky(held, damping)
    solved: Tensor = torch.cholesky_solve(wanted, factor).transpose(1, 2)
    return solved.reshape(weight.shape).to(weight.dtype)


def choose_grid(
    rows: Tensor,
    options: GridOptions,
    range: str,
    exponent: Exponent,
    hessian: Tensor | None,
    generator: torch.Generator,
) -> Grid:
    """The grid of rows float32 [rows, columns] whose range is chosen as `range` says, and held; one for each block.

    exponent  see grid_exponent
    range  minmax; mse, with an integer zero point by a search over shrunken ranges (in the norm 2.4 of BRECQ and its
           successors), else by least squares; tf-enhanced; or hessian
    """
    bits, symmetric = options.bits, bool(options.symmetric)
    if isinstance(exponent, Tensor):
        rows, exponent = rows_alike(rows, exponent), COMMON_EXPONENT
    if range == "hessian":
        assert hessian is not None
        return held_grid(hessian_grid(rows, hessian, options, exponent, generator), options, exponent)

    def make(blocks: Tensor) -> Grid:
        if range == "tf-enhanced":
            return tf_enhanced_grid(blocks, bits, symmetric, exponent)
        if range == "mse" and options.form == "zero-point":
            return shrunken_grid(blocks, bits, symmetric, 2.4, exponent)
        if range == "mse":
            return least_squares_grid(blocks, bits, symmetric, exponent)
        if symmetric:
            return symmetric_grid(*extremes(blocks), bits, options.stored_convention, exponent)
        return zero_point_grid(*extremes(blocks), bits, exponent)

    return held_grid(grid_of_rows(rows, options, make), options, exponent)


def encoded_rows(codes: Tensor, grid: Grid, options: GridOptions, exponent: Exponent) -> Affine:
    """Codes [rows, columns] of any dtype, on a grid of these options."""
    return affine_from_codes(codes.to(torch.uint8), grid, options, exponent)


def grid_exponent(rows: Tensor, options: Layout) -> Exponent:
    """The exponent of the scales of rows float32 [rows, columns]: one, or one a row where they lie too far apart.

    None is smaller than that the least scale is a normal float32. Scales that are to be float16 numbers, and grids that
    rows share, have one in any case.
    """
    apart = options.unit != "tensor" and options.scales != "f16" and spread_too_far(rows.abs().amax(1), options.bits)
    if apart:
        return row_exponents(rows).clamp_min(LEAST_EXPONENT)
    return max(exponent_for(float(rows.abs().max())), LEAST_EXPONENT)


def levels(grid: Grid, bits: int, exponent: int) -> tuple[Tensor, Tensor]:
    """(scale, lowest level) of each block, float64: value = scale * code + lowest, as the disk holds it."""
    scale = from_half(grid.scale, exponent).double()
    if grid.offset is not None:
        return scale, from_half(grid.offset, exponent).double()
    if grid.zero_point is not None:
        return scale, -scale * grid.zero_point.double()
    assert grid.convention is not None
    return scale, -scale * middle(grid.convention, bits)


def row_levels(grid: Grid, options: Layout, exponent: Exponent, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, lowest level) that broadcast over rows [rows, columns]: [1, 1], [rows, 1] or [rows, columns]; float64."""
    pair = []
    for values in levels(grid, options.bits, exponent if isinstance(exponent, int) else COMMON_EXPONENT):
        per_row = values.reshape(1, 1) if values.numel() == 1 else values.reshape(rows.shape[0], -1)
        if isinstance(exponent, Tensor):
            per_row = torch.ldexp(per_row, (exponent - COMMON_EXPONENT).unsqueeze(1))
        if per_row.shape[1] > 1:
            assert options.group_size is not None
            per_row = per_row.repeat_interleave(options.group_size, 1)[:, : rows.shape[1]]
        pair.append(per_row)
    return pair[0], pair[1]


def hessian_grid(
    rows: Tensor, hessian: Tensor, options: GridOptions, exponent: int, generator: torch.Generator
) -> Grid:
    """The grid of least output error tr(D H D^T) under rounding to nearest: a real offset, or the stored convention.

    Candidates are the min-max grid, the grid of least squared weight error, and the range shrunken at either end; the
    best is refitted by least squares under the Hessian while that helps. Of a grid that a whole tensor shares the
    errors of all rows are summed; a block within a row sees its own diagonal block of the Hessian.
    """
    if options.unit == "tensor" and len(rows) > 1:
        return _Search(rows, _factors(hessian, rows.shape[1], generator), options, exponent, shared=True).best()
    grids = []
    for part in column_parts(rows.shape[1], options.unit, options.group_size):
        length = min(options.group_size or rows.shape[1], part.stop - part.start)
        grids.append(_grid_of_blocks(rows[:, part], length, hessian[:, part, part], options, exponent, generator))
    return beside(grids, len(rows))


def _grid_of_blocks(
    rows: Tensor, length: int, hessian: Tensor, options: GridOptions, exponent: int, generator: torch.Generator
) -> Grid:
    factors = _factors(hessian, length, generator)
    # Blocks in the order [group, block within a row, row], so that those with one Hessian lie together.
    groups, per_row = hessian.shape[0], rows.shape[1] // length
    order = torch.arange(rows.shape[0] * per_row, device=rows.device).reshape(groups, -1, per_row).transpose(1, 2)
    blocks = rows.reshape(-1, length)[order.reshape(-1)]
    found = _Search(blocks, factors, options, exponent, shared=False).best()
    back = order.reshape(-1).argsort()
    offset = None if found.offset is None else found.offset[back]
    return replace(found, scale=found.scale[back], offset=offset)


def _factors(hessian: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """F float32 [groups * blocks, length, at most SKETCH_COLUMNS]; F F^T are the Hessian's diagonal blocks, nearly."""
    groups, columns = hessian.shape[:2]
    split = hessian.reshape(groups, columns // length, length, columns // length, length)
    own = split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, length, length)
    factor = cholesky(own, SEARCH_DAMPING)[0]
    if length > SKETCH_COLUMNS:
        shape = (length, SKETCH_COLUMNS)
        drawn = torch.randn(shape, generator=generator, device=hessian.device, dtype=torch.float32)
        sketch: Tensor = factor.float() @ (drawn / SKETCH_COLUMNS**0.5)
        return sketch
    return factor.float()


@dataclass(frozen=True)
class _Search:
    """Blocks [sets * members, length] and the factors [sets, length, k] of the Hessian that each set of them has.

    shared  whether all blocks have one grid
    """

    blocks: Tensor
    factors: Tensor
    options: GridOptions
    exponent: int
    shared: bool

    def best(self) -> Grid:
        return self._search_symmetric() if self.options.symmetric else self._search_offset()

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """Whole sets of blocks, a cacheful or so at a time, with their factors."""
        sets = len(self.factors)
        members = len(self.blocks) // sets
        for span in row_slices(sets, members * self.blocks.shape[1], SLAB_VALUES):
            yield slice(span.start * members, span.stop * members), self.factors[span]

    def _project(self, values: Tensor, factors: Tensor) -> Tensor:
        """values [blocks, length] times their set's factor: [blocks, k]."""
        projected: Tensor = values.reshape(len(factors), -1, values.shape[1]) @ factors
        return projected.reshape(len(values), -1)

    def _errors(self, scale: Tensor, low: Tensor) -> Tensor:
        """The output error of every block, float64 [blocks]; of a shared grid, their sum [1]."""
        parts = []
        for rows, factors in self._slabs():
            step, bottom = (one if self.shared else one[rows] for one in (scale, low))
            error = self._codes(rows, step, bottom).mul_(step.float().unsqueeze(1)).add_(bottom.float().unsqueeze(1))
            error.sub_(self.blocks[rows])
            parts.append(self._project(error, factors).square().sum(1, dtype=torch.float64))
        total = torch.cat(parts)
        return total.sum().reshape(1) if self.shared else total

    def _codes(self, rows: slice, scale: Tensor, low: Tensor) -> Tensor:
        codes = self.blocks[rows].sub(low.float().unsqueeze(1)).div_(scale.float().unsqueeze(1))
        return codes.round_().clamp_(0, 2**self.options.bits - 1)

    def _stored(self, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and lowest level as the disk holds them."""
        halves = round_scale(scale, self.exponent), round_offset(low, self.exponent)
        step, bottom = (from_half(half, self.exponent).double() for half in halves)
        return step, bottom

    @property
    def _flat(self) -> Tensor:
        """float32 [grids, values on a grid]."""
        return self.blocks.reshape(1, -1) if self.shared else self.blocks

    def _search_offset(self) -> Grid:
        bits, steps = self.options.bits, 2**self.options.bits - 1
        low, high = (end.double() for end in extremes(self._flat))
        mean = self._flat.double().mean(1)
        grids = minmax_grid(self._flat, bits, self.exponent), least_squares_grid(self._flat, bits, False, self.exponent)
        starts = [levels(grid, bits, self.exponent) for grid in grids]
        for lower, upper in product(SHRINKS, SHRINKS):
            bottom, top = mean + (low - mean) * lower, mean + (high - mean) * upper
            starts.append(self._stored((top - bottom) / steps, bottom))
        scale, lowest = self._descend(starts)
        return Grid(round_scale(scale, self.exponent), offset=round_offset(lowest, self.exponent))

    def _search_symmetric(self) -> Grid:
        bits, convention = self.options.bits, self.options.stored_convention
        zero = middle(convention, bits)
        low, high = extremes(self._flat)
        absmax = torch.maximum(high, -low).double()
        grids = [symmetric_grid(low, high, bits, convention, self.exponent)]
        if convention != "narrow":
            grids.append(least_squares_grid(self._flat, bits, True, self.exponent))
        starts = [levels(grid, bits, self.exponent) for grid in grids]
        for shrink in SHRINKS:
            for sign in (1.0, -1.0) if convention == "full" else (1.0,):
                scale = round_scale(absmax * (sign * shrink * 2 / (2**bits - 1)), self.exponent)
                value = from_half(scale, self.exponent).double()
                starts.append((value, -value * zero))
        scale, _ = self._descend(starts, zero)
        return Grid(round_scale(scale, self.exponent), convention=convention)

    def _descend(self, starts: list[tuple[Tensor, Tensor]], zero: float | None = None) -> tuple[Tensor, Tensor]:
        """The best start, refitted to its own codes while any block gains."""
        scale, low = starts[0]
        least = self._errors(scale, low)
        for start in starts[1:]:
            scale, low, least, _ = self._better(scale, low, least, start)
        for _ in range(REFITS):
            scale, low, least, gained = self._better(scale, low, least, self._refit(scale, low, zero))
            if not gained:
                break
        return scale, low

    def _better(
        self, scale: Tensor, low: Tensor, least: Tensor, other: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, bool]:
        error = self._errors(*other)
        better = error < least
        chosen = (torch.where(better, new, old) for new, old in ((other[0], scale), (other[1], low), (error, least)))
        return (*chosen, bool(better.any()))  # type: ignore[return-value]

    def _refit(self, scale: Tensor, low: Tensor, zero: float | None) -> tuple[Tensor, Tensor]:
        """Scale and lowest level of least output error for the codes that they give: two normal equations a grid."""
        sums = []
        for rows, factors in self._slabs():
            step, bottom = (one if self.shared else one[rows] for one in (scale, low))
            codes = self._codes(rows, step, bottom)
            q = self._project(codes if zero is None else codes - zero, factors).double()
            w = self._project(self.blocks[rows], factors).double()
            ones = self._project(torch.ones_like(self.blocks[rows]), factors).double()
            sums.append(torch.stack([(a * b).sum(1) for a, b in ((q, q), (q, ones), (ones, ones), (q, w), (ones, w))]))
        qq, q1, one, qw, w1 = torch.cat(sums, 1).sum(1, keepdim=True) if self.shared else torch.cat(sums, 1)
        if zero is not None:
            fitted = torch.where(qq > 0, qw / qq, scale)
            value = from_half(round_scale(fitted, self.exponent), self.exponent).double()
            return value, -value * zero
        determinant = qq * one - q1 * q1
        solvable = determinant > 1e-9 * qq * one
        fitted = torch.where(solvable, (qw * one - w1 * q1) / determinant, scale)
        value = from_half(round_scale(fitted, self.exponent), self.exponent).double()
        # The lowest level is fitted to the scale that the disk holds.
        lowest = torch.where(one > 0, (w1 - value * q1) / one, low)
        return self._stored(value, lowest)
