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

from qcompress.solvers.feedback import BLOCK_COLUMNS, make_feedback, sweep_columns
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

    def weighed(self, classes: Tensor, units: Tensor) -> Weighed:
        """The prices of a layer whose codes are of these classes and whose errors are counted in these units.

        classes  int64 [groups, rows, columns]
        units    step**2 times conditional energy, alike
        """
        return Weighed(self, classes, self.rate * units.mean(2))


@dataclass(frozen=True)
class Weighed:
    """Prices in the unit of the errors that they are weighed against.

    classes      int64 [groups, rows, columns]
    multipliers  [groups, rows], what a bit costs
    """

    prices: Prices
    classes: Tensor
    multipliers: Tensor

    def costs(self, contexts: Tensor, codes: Tensor) -> Tensor:
        """Of codes [..., groups, rows] in contexts that broadcast over them."""
        return self.multipliers * self.prices.of(contexts, codes)

    def cheapest(self, column: int, candidates: Tensor, errors: Tensor) -> Tensor:
        """Of candidates [candidates, groups, rows] those of least error and bits; the errors are overwritten."""
        errors += self.costs(self.classes[:, :, column], candidates)
        return candidates.gather(0, errors.argmin(0, keepdim=True))[0]


def conditional_energies(hessian: Tensor, damping: float, *, act_order: bool = True) -> Tensor:
    """1 / U_jj**2 for H**-1 = U^T U, float64 [groups, columns], columns in their own order.

    The energy of what a column's input adds to those of the columns after it: with an error e_j in column j, feedback
    leaves sum_j e_j**2 / U_jj**2 of the output error.

    hessian  float64 [groups, columns, columns]
    """
    feedback = make_feedback(hessian, damping, hessian.dtype, act_order=act_order)
    energies = feedback.pivots.squeeze(1).square().reciprocal()
    return energies.gather(1, feedback.order.argsort(1))


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
    feedback = make_feedback(hessian, damping, target.dtype)
    scales = feedback.ordered(steps.to(target.dtype).expand(target.shape))
    weighed = None
    if prices is not None and prices.rate > 0:
        weighed = prices.weighed(feedback.ordered(prices.classes), (scales / feedback.pivots).square())
    each_step, each_pivot = scales.unbind(2), feedback.pivots.unbind(2)

    def cheapest(column: int, w: Tensor) -> tuple[Tensor, Tensor]:
        step = each_step[column]
        wish = w / step
        q = wish.round()
        if weighed is not None:
            candidates = _near(q)
            q = weighed.cheapest(column, candidates, ((wish - candidates) * (step / each_pivot[column])).square_())
        return q, q * step

    return feedback.codes(target, cheapest, block)


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
    groups, dtype = hessian.shape[0], target.dtype
    quadratic = damped(hessian, damping).to(dtype)
    scales = grouped(steps.to(dtype).expand(target.shape), groups)
    weighed = None
    if prices is not None and prices.rate > 0:
        energies = conditional_energies(hessian, max(damping, 0.01)).to(dtype).unsqueeze(1)
        weighed = prices.weighed(grouped(prices.classes, groups), scales.square() * energies)
    start = grouped(codes, groups)
    gradient = (start * scales - grouped(target, groups)) @ quadratic
    each_step, each_bend = scales.unbind(2), quadratic.diagonal(dim1=1, dim2=2).unsqueeze(1).unbind(2)

    def cheapest(column: int, wish: Tensor, old: Tensor) -> Tensor:
        new = wish.round()
        if weighed is None:
            return new
        candidates = _near(new, old)
        errors = ((wish - candidates) * each_step[column]).square_() * each_bend[column]
        return weighed.cheapest(column, candidates, errors)

    return sweep_columns(start, scales, gradient, quadratic, cheapest, sweeps, block).reshape(target.shape)


def _near(codes: Tensor, *others: Tensor) -> Tensor:
    """[candidates, groups, rows]: the codes, those next to them towards zero, zero, and others."""
    return torch.stack((codes, codes - codes.sign(), torch.zeros_like(codes), *others))
