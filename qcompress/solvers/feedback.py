"""Columns are rounded one by one, and those still to come make up for each error: error feedback (GPTQ).

Frantar et al. 2022, arXiv 2210.17323, in the notation of its algorithm 1. Differences from the official code: columns
that calibration never excites are rounded to nearest instead of zeroed, layers with groups have a Hessian for each, and
grids within a row are fixed before the first column, so that any order of columns can be taken. Which code a column
takes is the caller's choice: the nearest of a grid here, the cheapest without a bound in solvers.unbounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.solvers.hessian import cholesky, damped, grouped

BLOCK_COLUMNS = 128

Choose = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(column, values [groups, rows] that it should have) -> its codes and what they stand for, each [groups, rows]."""
ChooseAgain = Callable[[int, Tensor, Tensor], Tensor]
"""(column, codes of least error, which it may overwrite, codes as they are) -> its new codes, each [groups, rows]."""


def feedback_codes(
    weight: Tensor,
    scale: Tensor,
    low: Tensor,
    bits: int,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = BLOCK_COLUMNS,
) -> Tensor:
    """The codes [rows, columns] in the weight's dtype, integers in [0, 2**bits).

    weight      float32 or float64 [rows, columns], and so is all arithmetic but the Hessian's
    scale, low  value = scale * code + low, broadcast over the weight
    hessian     float64 [groups, columns, columns]
    damping     share of the Hessian's mean diagonal that is added to its diagonal
    act_order   columns in the order of falling activity
    block       columns between two updates of all others; changes nothing but the speed
    """
    feedback = make_feedback(hessian, damping, weight.dtype, act_order=act_order)
    scales, lows = (feedback.ordered(one.to(weight.dtype).expand(weight.shape)).unbind(2) for one in (scale, low))
    most = 2**bits - 1

    def nearest(column: int, w: Tensor) -> tuple[Tensor, Tensor]:
        step, bottom = scales[column], lows[column]
        q = ((w - bottom) / step).round_().clamp_(0, most)
        return q, q * step + bottom

    return feedback.codes(weight, nearest, block)


def descend(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    low: Tensor,
    hessian: Tensor,
    *,
    lowest: Tensor | float,
    highest: Tensor | float,
    linear: Tensor | None = None,
    sweeps: int = 4,
    damping: float = 0.0,
    block: int = BLOCK_COLUMNS,
) -> Tensor:
    """The codes after coordinate descent on tr(D H D^T) + 2 tr(D C^T), D = scale * code + low - weight.

    Column by column every row takes the code that is best given all its others, from `lowest` to `highest`; no step
    raises the error.

    codes            [rows, columns], integers in the weight's dtype; returned alike
    lowest, highest  bounds of the codes, broadcast over them
    linear           C [groups, rows a group, columns]
    """
    groups, dtype = hessian.shape[0], weight.dtype
    quadratic = damped(hessian, damping).to(dtype)
    scales, lows, bottoms, tops = (
        grouped(torch.as_tensor(one, dtype=dtype, device=weight.device).expand(weight.shape), groups)
        for one in (scale, low, lowest, highest)
    )
    start = grouped(codes.to(dtype), groups)
    gradient = (start * scales + lows - grouped(weight, groups)) @ quadratic
    if linear is not None:
        gradient = gradient + linear.to(dtype)

    floors, ceilings = bottoms.unbind(2), tops.unbind(2)

    def nearest(column: int, target: Tensor, _: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(target.round_(), floors[column]), ceilings[column])

    return sweep_columns(start, scales, gradient, quadratic, nearest, sweeps, block).reshape(weight.shape)


@dataclass(frozen=True)
class Feedback:
    """How the error of each column is made up for by those that follow.

    order  int64 [groups, columns], the columns as they are rounded
    upper  [groups, columns, columns] in that order, U of H**-1 = U^T U
    """

    order: Tensor
    upper: Tensor

    @property
    def pivots(self) -> Tensor:
        """U_jj, [groups, 1, columns] in the order of rounding."""
        return self.upper.diagonal(dim1=1, dim2=2).unsqueeze(1)

    def ordered(self, values: Tensor) -> Tensor:
        """values [rows, columns] as [groups, rows a group, columns in the order of rounding], a copy."""
        return _take_columns(grouped(values, len(self.order)), self.order)

    def codes(self, target: Tensor, choose: Choose, block: int) -> Tensor:
        """The codes [rows, columns] that `choose` gives, called with places in the order of rounding."""
        rest, upper, pivots = self.ordered(target), self.upper, self.pivots.unbind(2)
        columns = rest.shape[2]
        codes = torch.empty_like(rest)
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            work = rest[:, :, start:stop].clone()
            errors = torch.empty_like(work)
            inner = upper[:, start:stop, start:stop]
            for column in range(stop - start):
                here, w = start + column, work[:, :, column]
                codes[:, :, here], values = choose(here, w)
                error = (w - values) / pivots[here]
                errors[:, :, column] = error
                work[:, :, column:] -= error.unsqueeze(2) * inner[:, column : column + 1, column:]
            rest[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
        return _take_columns(codes, self.order.argsort(1)).reshape(target.shape)


def make_feedback(hessian: Tensor, damping: float, dtype: torch.dtype, *, act_order: bool = True) -> Feedback:
    """The feedback under Hessians float64 [groups, columns, columns], in the order of falling activity or as it is."""
    order = _column_order(hessian, act_order)
    return Feedback(order, inverse_factor(_permuted(hessian, order), damping).to(dtype))


def sweep_columns(
    codes: Tensor,
    scales: Tensor,
    gradient: Tensor,
    quadratic: Tensor,
    choose: ChooseAgain,
    sweeps: int,
    block: int = BLOCK_COLUMNS,
) -> Tensor:
    """The codes after so many sweeps in which column by column takes what `choose` gives. Ends when nothing changes.

    codes, scales  [groups, rows, columns]
    gradient       of half the error by the values that the codes stand for, alike; overwritten
    quadratic      [groups, columns, columns]
    """
    columns = codes.shape[2]
    found = codes.clone()
    steps, bends = scales.unbind(2), quadratic.diagonal(dim1=1, dim2=2).unsqueeze(1).unbind(2)
    for _ in range(sweeps):
        before = found.clone()
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            inner = quadratic[:, start:stop, start:stop]
            slope = gradient[:, :, start:stop].clone()
            moves = torch.zeros_like(slope)
            for column in range(stop - start):
                here = start + column
                step, old = steps[here], found[:, :, here]
                target = old - slope[:, :, column] / (bends[here] * step)
                new = choose(here, target, old)
                move = (new - old) * step
                found[:, :, here] = new
                moves[:, :, column] = move
                slope += move.unsqueeze(2) * inner[:, column : column + 1, :]
            gradient += moves @ quadratic[:, start:stop, :]
        if torch.equal(before, found):
            break
    return found


def _column_order(hessian: Tensor, act_order: bool) -> Tensor:
    """The columns in the order in which they are rounded, int64 [groups, columns]."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if act_order:
        return diagonal.argsort(dim=1, descending=True, stable=True)
    return torch.arange(diagonal.shape[1], device=hessian.device).expand(diagonal.shape)


def _take_columns(values: Tensor, order: Tensor) -> Tensor:
    """The values [groups, rows, columns] with the columns of each group in the given order, int64 [groups, columns]."""
    return values.gather(2, order.unsqueeze(1).expand_as(values))


def _permuted(hessian: Tensor, order: Tensor) -> Tensor:
    """The Hessians with rows and columns in the given order."""
    rows = hessian.gather(1, order.unsqueeze(2).expand_as(hessian))
    return rows.gather(2, order.unsqueeze(1).expand_as(hessian))


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    # With J the reversal, J H J = L L^T gives H^-1 = U^T U for U = J L^-1 J: one factorization, one triangular solve.
    factor, _ = cholesky(hessian.flip(1, 2), damping)
    identity = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False).flip(1, 2)
    return inverse
