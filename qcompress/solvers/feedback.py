"""Columns are rounded one by one, and those still to come make up for each error: error feedback (GPTQ).

Frantar et al. 2022, arXiv 2210.17323, in the notation of its algorithm 1. Differences from the official code: columns
that calibration never excites are rounded to nearest instead of zeroed, layers with groups have a Hessian for each, and
grids within a row are fixed before the first column, so that any order of columns can be taken. Which code a column
takes is the caller's choice: the nearest of a grid here, the cheapest without a bound in solvers.unbounded.

A column is small and the loop is long: on the CPU columns are numpy arrays, whose operations take a third of the time
that torch's take on a few hundred numbers, and give the same; elsewhere they are tensors. Each lies in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from qcompress.solvers.hessian import damped, factorize, grouped

BLOCK_COLUMNS = 128

Array: TypeAlias = Any
"""A numpy array on the CPU, a tensor elsewhere: what both have is used of it."""
Choose = Callable[[int, Array], tuple[Array, Array]]
"""(column, values [groups, rows] that it should have) -> its codes and what they stand for, each [groups, rows]."""
ChooseAgain = Callable[[int, Array, Array], Array]
"""(column, codes of least error, codes as they are) -> its new codes, each [groups, rows]."""


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
    return nearest_codes(
        make_feedback(hessian, damping, weight.dtype, act_order=act_order), weight, scale, low, bits, block
    )


def nearest_codes(
    feedback: Feedback, weight: Tensor, scale: Tensor, low: Tensor, bits: int, block: int = BLOCK_COLUMNS
) -> Tensor:
    """What `feedback_codes` gives, by a feedback that weights of the same inputs have in common."""
    scales, lows = (
        array_of(by_columns(feedback.ordered(one.to(weight.dtype).expand(weight.shape)))) for one in (scale, low)
    )
    most = 2**bits - 1

    def nearest(column: int, w: Array) -> tuple[Array, Array]:
        step, bottom = scales[:, column], lows[:, column]
        q = ((w - bottom) / step).round().clip(0, most)
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
    quadratic = damped(hessian, damping, dtype)
    scales, lows, bottoms, tops = (
        grouped(torch.as_tensor(one, dtype=dtype, device=weight.device).expand(weight.shape), groups)
        for one in (scale, low, lowest, highest)
    )
    start = grouped(codes.to(dtype), groups)
    gradient = (start * scales + lows - grouped(weight, groups)) @ quadratic
    if linear is not None:
        gradient = gradient + linear.to(dtype)

    floors, ceilings = (array_of(by_columns(one)) for one in (bottoms, tops))

    def nearest(column: int, wanted: Array, _: Array) -> Array:
        return wanted.round().clip(floors[:, column], ceilings[:, column])

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
        rest, upper = self.ordered(target), self.upper
        pivots = array_of(by_columns(self.pivots))
        columns = rest.shape[2]
        codes = torch.empty_like(by_columns(rest))
        found = array_of(codes)
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            work = by_columns(rest[:, :, start:stop])
            errors = torch.empty_like(work)
            self._codes_of_block(start, array_of(work), array_of(errors), found, pivots, choose)
            rest[:, :, stop:] -= by_columns(errors) @ upper[:, start:stop, stop:]
        return _take_columns(by_columns(codes), self.order.argsort(1)).reshape(target.shape)

    def _codes_of_block(
        self, start: int, work: Array, errors: Array, found: Array, pivots: Array, choose: Choose
    ) -> None:
        """Codes of the columns from `start` on, and their errors, each times what the rest of the row makes up for.

        work  what they should stand for, [groups, columns, rows]; overwritten, as `errors` and `found` are
        """
        stop = start + work.shape[1]
        later = array_of(by_columns(self.upper[:, start:stop, start:stop]))
        for column in range(work.shape[1]):
            here, w = start + column, work[:, column]
            found[:, here], values = choose(here, w)
            error = (w - values) / pivots[:, here]
            errors[:, column] = error
            work[:, column + 1 :] -= later[:, column + 1 :, column, None] * error[:, None]


def make_feedback(hessian: Tensor, damping: float, dtype: torch.dtype, *, act_order: bool = True) -> Feedback:
    """The feedback under Hessians float64 [groups, columns, columns], in the order of falling activity or as it is."""
    order = _column_order(hessian, act_order)
    return Feedback(order, inverse_factor(hessian, order, damping, dtype))


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
    found, steps = by_columns(codes), by_columns(scales)
    bends = array_of(by_columns(quadratic.diagonal(dim1=1, dim2=2).unsqueeze(1)))
    for _ in range(sweeps):
        before = found.clone()
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            slope = by_columns(gradient[:, :, start:stop])
            moves = torch.zeros_like(slope)
            inner = array_of(by_columns(quadratic[:, start:stop, start:stop]))
            of_block = array_of(slope), array_of(moves), inner
            _sweep_block(start, array_of(found), array_of(steps), *of_block, bends, choose)
            gradient += by_columns(moves) @ quadratic[:, start:stop, :]
        if torch.equal(before, found):
            break
    return by_columns(found)


def _sweep_block(
    start: int, found: Array, steps: Array, slope: Array, moves: Array, inner: Array, bends: Array, choose: ChooseAgain
) -> None:
    """Let the columns from `start` on take new codes in turn.

    found, steps  [groups, all columns, rows], codes and steps; `found` is overwritten
    slope, moves  [groups, columns, rows], the gradient by each value as it is, and by how much it moves; overwritten
    inner         [groups, columns, columns], the quadratic of these columns
    """
    for column in range(slope.shape[1]):
        here = start + column
        step, old = steps[:, here], found[:, here]
        wanted = old - slope[:, column] / (bends[:, here] * step)
        new = choose(here, wanted, old)
        move = (new - old) * step
        found[:, here] = new
        moves[:, column] = move
        slope += inner[:, :, column, None] * move[:, None]


def by_columns(values: Tensor) -> Tensor:
    """values [groups, rows, columns] as [groups, columns, rows], each column in one piece, or back; a copy."""
    return values.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def array_of(values: Tensor) -> Array:
    """The same numbers as numpy's array where they lie on the CPU, else the tensor."""
    return values.numpy() if values.device.type == "cpu" else values


def on_tensors(choose: Callable[..., Any]) -> Callable[..., Any]:
    """A choice that computes on tensors, for columns of either kind."""

    def chosen(column: int, *values: Array) -> Any:
        found = choose(column, *map(torch.as_tensor, values))
        if not isinstance(values[0], np.ndarray):
            return found
        return found.numpy() if isinstance(found, Tensor) else tuple(one.numpy() for one in found)

    return chosen


def _column_order(hessian: Tensor, act_order: bool) -> Tensor:
    """The columns in the order in which they are rounded, int64 [groups, columns]."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if act_order:
        return diagonal.argsort(dim=1, descending=True, stable=True)
    return torch.arange(diagonal.shape[1], device=hessian.device).expand(diagonal.shape)


def _take_columns(values: Tensor, order: Tensor) -> Tensor:
    """The values [groups, rows, columns] with the columns of each group in the given order, int64 [groups, columns]."""
    return values.gather(2, order.unsqueeze(1).expand_as(values))


def inverse_factor(hessian: Tensor, order: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """The upper Cholesky factor of the inverse of damped Hessians whose rows and columns are in the given order.

    hessian  float64 [groups, columns, columns]
    order    int64 [groups, columns]
    """
    # With J the reversal, J H J = L L^T gives H^-1 = U^T U for U = J L^-1 J: one factorization, one triangular solve.
    # Of a wide layer each of these squares is large: no more than two are there at once beside the Hessian.
    back = order.flip(1)
    groups = torch.arange(len(order), device=order.device).reshape(-1, 1, 1)
    reversed_hessian = hessian[groups, back.unsqueeze(2), back.unsqueeze(1)]
    factor = factorize(reversed_hessian, damping)
    inverse = reversed_hessian.zero_()
    inverse.diagonal(dim1=1, dim2=2).fill_(1.0)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    return inverse.to(dtype).flip(1, 2)
