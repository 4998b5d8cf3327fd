"""Error feedback: columns are rounded one by one, and those still to come make up for each error (GPTQ).

Frantar et al. 2022, arXiv 2210.17323, in the notation of its algorithm 1. Differences from the official code: columns
that calibration never excites are rounded to nearest instead of zeroed, layers with groups have a Hessian for each, and
grids within a row are fixed before the first column, so that any order of columns can be taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.solvers.hessian import cholesky, damped, grouped

BLOCK_COLUMNS = 128


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
    groups, columns = hessian.shape[:2]
    order = column_order(hessian, act_order)
    upper = inverse_factor(permuted(hessian, order), damping).to(weight.dtype)
    rest = take_columns(grouped(weight, groups), order).clone()
    scales, lows = (
        take_columns(grouped(one.to(weight.dtype).expand(weight.shape), groups), order) for one in (scale, low)
    )
    codes = torch.empty_like(rest)
    most = 2**bits - 1
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        work = rest[:, :, start:stop].clone()
        errors = torch.empty_like(work)
        inner = upper[:, start:stop, start:stop]
        for column in range(stop - start):
            here = start + column
            step, bottom, w = scales[:, :, here], lows[:, :, here], work[:, :, column]
            q = ((w - bottom) / step).round_().clamp_(0, most)
            codes[:, :, here] = q
            error = (w - (q * step + bottom)) / inner[:, column, column].unsqueeze(1)
            errors[:, :, column] = error
            work[:, :, column:] -= error.unsqueeze(2) * inner[:, column : column + 1, column:]
        rest[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return take_columns(codes, order.argsort(1)).reshape(weight.shape)


def column_order(hessian: Tensor, act_order: bool) -> Tensor:
    """The columns in the order in which they are rounded, int64 [groups, columns]."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if act_order:
        return diagonal.argsort(dim=1, descending=True, stable=True)
    return torch.arange(diagonal.shape[1], device=hessian.device).expand(diagonal.shape)


def take_columns(values: Tensor, order: Tensor) -> Tensor:
    """The values [groups, rows, columns] with the columns of each group in the given order, int64 [groups, columns]."""
    return values.gather(2, order.unsqueeze(1).expand_as(values))


def permuted(hessian: Tensor, order: Tensor) -> Tensor:
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
    raises the error. Ends early when a sweep changes nothing.

    codes            [rows, columns], integers in the weight's dtype; returned alike
    lowest, highest  bounds of the codes, broadcast over them
    linear           C [groups, rows a group, columns]
    """
    groups, columns = hessian.shape[:2]
    dtype = weight.dtype
    quadratic = damped(hessian, damping).to(dtype)
    scales, lows, bottoms, tops = (
        grouped(torch.as_tensor(one, dtype=dtype, device=weight.device).expand(weight.shape), groups)
        for one in (scale, low, lowest, highest)
    )
    weights = grouped(weight, groups)
    found = grouped(codes.to(dtype), groups).clone()
    gradient = (found * scales + lows - weights) @ quadratic
    if linear is not None:
        gradient = gradient + linear.to(dtype)
    curvature = quadratic.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        before = found.clone()
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            inner = quadratic[:, start:stop, start:stop]
            slope = gradient[:, :, start:stop].clone()
            steps = torch.zeros_like(slope)
            for column in range(stop - start):
                here = start + column
                s, old = scales[:, :, here], found[:, :, here]
                wish = old - slope[:, :, column] / (curvature[:, here].unsqueeze(1) * s)
                new = torch.minimum(torch.maximum(wish.round_(), bottoms[:, :, here]), tops[:, :, here])
                step = (new - old) * s
                found[:, :, here] = new
                steps[:, :, column] = step
                slope += step.unsqueeze(2) * inner[:, column : column + 1, :]
            gradient += steps @ quadratic[:, start:stop, :]
        if torch.equal(before, found):
            break
    return found.reshape(weight.shape)
