"""Codes on an unbounded lattice: error feedback and coordinate descent, both with a price on the bits of each code.

With rows w, an input Hessian H and steps s, both lower tr(D H D^T) + rate * bits for D = code * s - w. Error feedback
is GPTQ's (solvers.feedback) without a largest code; the price follows CERWU (arXiv 2505.18758) in that a decision
weighs its bits, and WaterSIC (arXiv 2603.04956) in its unit: a rate of 1 is one bit against step**2 times the
conditional energy of a column, for which theory asks 2 ln 2 / 12 = 0.1155 where errors do not propagate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.solvers.feedback import BLOCK_COLUMNS, column_order, inverse_factor, permuted, take_columns
from qcompress.solvers.hessian import damped, grouped


@dataclass(frozen=True)
class Prices:
    """What codes cost.

    classes  int64 [rows, columns]: of each code
    bits     float32 [contexts, 2 * span + 1]: of the codes -span to span; codes beyond cost what these do. The context
             of a code is its class; on a trellis, see coding.lengths.class_costs
    rate     in units of step**2 times conditional energy a bit
    """

    classes: Tensor
    bits: Tensor
    rate: float

    @property
    def span(self) -> int:
        return self.bits.shape[-1] // 2

    def of(self, contexts: Tensor, codes: Tensor) -> Tensor:
        """The bits of codes [..., rows] in the contexts [rows] of their rows."""
        span = self.span
        at = contexts * (2 * span + 1) + span
        return self.bits.reshape(-1)[(codes.clamp(-span, span) + at).long()]


def conditional_energies(hessian: Tensor, damping: float, *, act_order: bool = True) -> Tensor:
    """1 / U_jj**2 for H**-1 = U^T U, float64 [groups, columns], columns in their own order.

    The energy of what a column's input adds to those of the columns after it: with an error e_j in column j, feedback
    leaves sum_j e_j**2 / U_jj**2 of the output error.

    hessian  float64 [groups, columns, columns]
    """
    order = column_order(hessian, act_order)
    upper = inverse_factor(permuted(hessian, order), damping)
    energies = upper.diagonal(dim1=1, dim2=2).square().reciprocal()
    return energies.gather(1, order.argsort(1))


def feedback_lattice(
    target: Tensor,
    steps: Tensor,
    hessian: Tensor,
    prices: Prices | None = None,
    *,
    damping: float = 0.01,
    block: int = BLOCK_COLUMNS,
) -> Tensor:
    """The codes [rows, columns] of the target's rows in its dtype, integers without bound.

    target   float32 or float64 [rows, columns]
    steps    broadcast over the target, above 0
    hessian  float64 [groups, columns, columns]
    """
    groups, columns = hessian.shape[:2]
    order = column_order(hessian, True)
    upper = inverse_factor(permuted(hessian, order), damping).to(target.dtype)
    rest = take_columns(grouped(target, groups), order).clone()
    scales = take_columns(grouped(steps.to(target.dtype).expand(target.shape), groups), order)
    diagonal = upper.diagonal(dim1=1, dim2=2).unsqueeze(1)
    classes = multipliers = None
    if prices is not None and prices.rate > 0:
        classes = take_columns(grouped(prices.classes, groups), order)
        multipliers = prices.rate * (scales / diagonal).square().mean(2)
    codes = torch.empty_like(rest)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        work = rest[:, :, start:stop].clone()
        errors = torch.empty_like(work)
        inner = upper[:, start:stop, start:stop]
        for column in range(stop - start):
            here = start + column
            step, w, pivot = scales[:, :, here], work[:, :, column], diagonal[:, :, here]
            wish = w / step
            q = wish.round()
            if prices is not None and classes is not None and multipliers is not None:
                candidates = torch.stack((q, q - q.sign(), torch.zeros_like(q)))
                cost = ((wish - candidates) * (step / pivot)).square_()
                cost += multipliers * prices.of(classes[:, :, here], candidates)
                q = candidates.gather(0, cost.argmin(0, keepdim=True))[0]
            codes[:, :, here] = q
            error = (w - q * step) / pivot
            errors[:, :, column] = error
            work[:, :, column:] -= error.unsqueeze(2) * inner[:, column : column + 1, column:]
        rest[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return take_columns(codes, order.argsort(1)).reshape(target.shape)


def descend_lattice(
    codes: Tensor,
    target: Tensor,
    steps: Tensor,
    hessian: Tensor,
    prices: Prices | None = None,
    *,
    sweeps: int = 2,
    damping: float = 1e-4,
    block: int = BLOCK_COLUMNS,
) -> Tensor:
    """The codes after coordinate descent on the same cost: no step raises it. Ends early when nothing changes.

    The unit of a rate is that of `feedback_lattice`, so that both weigh a bit alike.

    codes  [rows, columns], integers in the target's dtype; returned alike
    """
    groups, columns = hessian.shape[:2]
    dtype = target.dtype
    quadratic = damped(hessian, damping).to(dtype)
    scales = grouped(steps.to(dtype).expand(target.shape), groups)
    found = grouped(codes, groups).clone()
    classes = multipliers = None
    if prices is not None and prices.rate > 0:
        classes = grouped(prices.classes, groups)
        energies = conditional_energies(hessian, max(damping, 0.01)).to(dtype).unsqueeze(1)
        multipliers = prices.rate * (scales.square() * energies).mean(2)
    gradient = (found * scales - grouped(target, groups)) @ quadratic
    curvature = quadratic.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        before = found.clone()
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            inner = quadratic[:, start:stop, start:stop]
            slope = gradient[:, :, start:stop].clone()
            moves = torch.zeros_like(slope)
            for column in range(stop - start):
                here = start + column
                step, old, bend = scales[:, :, here], found[:, :, here], curvature[:, here].unsqueeze(1)
                wish = old - slope[:, :, column] / (bend * step)
                new = wish.round()
                if prices is not None and classes is not None and multipliers is not None:
                    candidates = torch.stack((new, new - new.sign(), torch.zeros_like(new), old))
                    cost = ((wish - candidates) * step).square_() * bend
                    cost += multipliers * prices.of(classes[:, :, here], candidates)
                    new = candidates.gather(0, cost.argmin(0, keepdim=True))[0]
                move = (new - old) * step
                found[:, :, here] = new
                moves[:, :, column] = move
                slope += move.unsqueeze(2) * inner[:, column : column + 1, :]
            gradient += moves @ quadratic[:, start:stop, :]
        if torch.equal(before, found):
            break
    return found.reshape(target.shape)
