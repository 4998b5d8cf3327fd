"""Codes of an unbounded uniform quantizer are chosen by error feedback and coordinate descent against their bits.

With rows w, an input Hessian H and steps s, both lower tr(D H D^T) + lambda * bits for D = code * s - w. Error feedback
is GPTQ's (solvers.feedback) without a largest code; lambda follows CERWU (arXiv 2505.18758) in that a decision weighs
its bits, and WaterSIC (arXiv 2603.04956) in its unit: a lambda of 1 is one bit against step**2 times the conditional
energy of a column, for which theory asks 2 ln 2 / 12 = 0.1155 where errors do not propagate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.coding.grids import exponent_for, round_scale, steps
from qcompress.solvers.feedback import BLOCK_COLUMNS, make_feedback, on_tensors, sweep_columns
from qcompress.solvers.hessian import damped, grouped
from qcompress.types.config import Shape
from qcompress.types.encoded import Unbounded

OCTAVE = 8
"""Factors are powers of two in eighths of an octave."""
WIDEST_FACTOR = 4 * OCTAVE
"""Rows and columns change a step by no more than this, either way."""
LEAST_STEP, MOST_STEP = 2.0**-140, 2.0**127
"""Steps that leave something of every weight that float32 has."""
SCALARS_AT_ONCE = 1 << 15
ZERO_MARGIN = 0.01
"""More than float32 loses of errors beside bits."""
SIDE_BITS = 5.0
"""What one factor costs, about."""


def eighths(factors: Tensor) -> Tensor:
    """Positive factors as int8 in eighths of an octave, around their geometric mean."""
    logs = factors.double().clamp_min(1e-30).log2()
    return ((logs - logs.mean()) * OCTAVE).round().clamp(-WIDEST_FACTOR, WIDEST_FACTOR).to(torch.int8)


def column_factors(energies: Tensor, taps: int, rows: int) -> tuple[Tensor, Tensor] | None:
    """(channels int8, taps int8) that give every column an equal share of the error, or None where they do not pay.

    At high rate every column should have the step that makes its conditional energy count alike: reverse water-filling.
    The logarithms of steps are split into a part of the input channel and one of the place in the kernel.

    energies  float64 [groups, columns], columns in the order [channel, tap]
    rows      of the weight, over all groups
    """
    logs = -0.5 * energies.clamp_min(1e-300).log2().mean(0).reshape(-1, taps)
    mean = logs.mean()
    channels = ((logs.mean(1) - mean) * OCTAVE).round().clamp(-WIDEST_FACTOR, WIDEST_FACTOR)
    places = ((logs.mean(0) - mean) * OCTAVE).round().clamp(-WIDEST_FACTOR, WIDEST_FACTOR)
    factors = torch.exp2((channels.unsqueeze(1) + places) / OCTAVE).reshape(1, -1)
    weighed = factors.square() * energies
    # Bits that equal steps would lose: half the logarithm of arithmetic over geometric mean, before against after.
    gain = 0.5 * (_spread(energies) - _spread(weighed)) * energies.shape[1] * rows
    if gain <= SIDE_BITS * (channels.numel() + places.numel()):
        return None
    return channels.to(torch.int8), places.to(torch.int8)


def _spread(energies: Tensor) -> float:
    return float(energies.mean(1).log2().mean() - energies.clamp_min(1e-300).log2().mean())


def root_mean_square(weight: Tensor) -> float:
    """The deviation of weights from zero; 0 of none. In float64: squares leave the range of float32."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(max(1, weight.numel()))


def unbounded_grid(
    shape: Shape,
    axis: tuple[int, ...],
    dtype: str,
    *,
    rows: Tensor | None,
    columns: tuple[Tensor, Tensor] | None,
    size: tuple[int, int],
) -> Unbounded:
    """A grid without codes and with a step of one, for a weight of rows and columns `size`."""
    empty = torch.zeros(1, 1, dtype=torch.int32).expand(size)
    channels, taps = columns if columns is not None else (None, None)
    one = torch.ones((), dtype=torch.float16)
    return Unbounded(empty, one, 0, shape, rows=rows, channels=channels, taps=taps, axis=axis, dtype=dtype)


def with_step(grid: Unbounded, step: float) -> Unbounded:
    """The grid with another step, as the disk holds it."""
    step = min(max(step, LEAST_STEP), MOST_STEP)
    exponent = exponent_for(step)
    half = round_scale(torch.tensor(step, dtype=torch.float64), exponent)
    return replace(grid, step=half.cpu(), exponent=exponent)


def grid_steps(grid: Unbounded, device: torch.device) -> Tensor:
    """The step of every weight, float32 [rows or 1, columns or 1]."""
    return steps(grid).to(device)


def with_codes(grid: Unbounded, codes: Tensor) -> Unbounded:
    """The grid with its codes, of any dtype."""
    return replace(grid, codes=codes.cpu().round().to(torch.int32))


def bisect_rate(rate_at: Callable[[float], float], wanted: float, low: float, high: float, tries: int = 40) -> float:
    """The least logarithm in [low, high] at which a falling rate is at most what is wanted."""
    for _ in range(tries):
        middle = (low + high) / 2
        if rate_at(middle) > wanted:
            low = middle
        else:
            high = middle
        if math.isclose(low, high, rel_tol=0, abs_tol=1e-4):
            break
    return high


@dataclass(frozen=True)
class BitCosts:
    """What codes cost.

    classes  integers [rows, columns]: of each code
    bits     float32 [contexts, 2 * span + 1]: of the codes -span to span; codes beyond cost what these do. The context
             of a code is its class; on a trellis, see coding.unbounded.lengths.class_costs
    lam      the Lagrange multiplier of a bit, in units of step**2 times conditional energy
    """

    classes: Tensor
    bits: Tensor
    lam: float

    @property
    def span(self) -> int:
        return self.bits.shape[-1] // 2

    def of(self, contexts: Tensor, codes: Tensor) -> Tensor:
        """The bits of codes [..., rows] in the contexts [rows] of their rows."""
        span = self.span
        at = contexts.long() * (2 * span + 1) + span
        return self.bits.reshape(-1)[(codes.clamp(-span, span) + at).long()]

    def weighed(self, classes: Tensor, units: Tensor) -> Weighed:
        """The costs in a layer whose codes are of these classes and whose errors are counted in these units.

        classes  int64 [groups, rows, columns]
        units    step**2 times conditional energy, alike
        """
        return Weighed(self, classes, self.lam * units.mean(2))


@dataclass(frozen=True)
class Weighed:
    """Costs in the unit of the errors that they are weighed against.

    classes      int64 [groups, rows, columns]
    multipliers  [groups, rows], what a bit costs
    """

    bit_costs: BitCosts
    classes: Tensor
    multipliers: Tensor

    def costs(self, contexts: Tensor, codes: Tensor) -> Tensor:
        """Of codes [..., groups, rows] in contexts that broadcast over them."""
        return self.multipliers * self.bit_costs.of(contexts, codes)

    def cheapest(self, column: int, candidates: Tensor, errors: Tensor) -> Tensor:
        """Of candidates [candidates, groups, rows] those of least error and bits; the errors are overwritten."""
        errors += self.costs(self.classes[:, :, column], candidates)
        (best, *others), (least, *rest) = candidates.unbind(0), errors.unbind(0)
        for code, error in zip(others, rest, strict=True):
            best, least = torch.where(error < least, code, best), torch.minimum(error, least)
        return best


def conditional_energies(hessian: Tensor, damping: float, *, act_order: bool = True) -> Tensor:
    """1 / U_jj**2 for H**-1 = U^T U, float64 [groups, columns], columns in their own order.

    The energy of what a column's input adds to those of the columns after it: with an error e_j in column j, feedback
    leaves sum_j e_j**2 / U_jj**2 of the output error.

    hessian  float64 [groups, columns, columns]
    """
    feedback = make_feedback(hessian, damping, hessian.dtype, act_order=act_order)
    energies = feedback.pivots.squeeze(1).square().reciprocal()
    return energies.gather(1, feedback.order.argsort(1))


def feedback_unbounded(
    target: Tensor,
    steps: Tensor,
    hessian: Tensor,
    bit_costs: BitCosts | None = None,
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
    if bit_costs is not None and bit_costs.lam > 0:
        weighed = bit_costs.weighed(feedback.ordered(bit_costs.classes), (scales / feedback.pivots).square())
    each_step, each_pivot = scales.unbind(2), feedback.pivots.unbind(2)

    def cheapest(column: int, w: Tensor) -> tuple[Tensor, Tensor]:
        step = each_step[column]
        wanted = w / step
        q = wanted.round()
        if weighed is not None:
            candidates = _near(q)
            q = weighed.cheapest(column, candidates, ((wanted - candidates) * (step / each_pivot[column])).square_())
        return q, q * step

    return feedback.codes(target, on_tensors(cheapest), block)


class Prices:
    """Chooses codes whose errors do not spread: the nearest, the next one towards zero, or zero.

    bits  float32 [contexts, 2 * span + 1], as those of BitCosts
    """

    def __init__(self, bits: Tensor) -> None:
        # The last of the codes stand for all beyond.
        span = bits.shape[-1] // 2
        self._most = most = span + 1
        every = torch.arange(-most, most + 1, device=bits.device)
        price = bits[:, every.clamp(-span, span) + span]
        self._to_next = (price - price[:, every - every.sign() + most]).reshape(-1)
        to_zero = price - price[:, most : most + 1]
        # Zero can be the best of all only where it saves more than its error is larger, half a step towards it.
        sizes = every.abs()
        least = (sizes * (sizes - 1) - ZERO_MARGIN) / to_zero.clamp_min(1e-6)
        self._zero_wins_from = float(least[:, sizes > 1].min())
        self._to_zero, self._bits = to_zero.reshape(-1), price.reshape(-1)

    def cheapest(self, wanted: Tensor, classes: Tensor, lam: float, old: Tensor | None = None) -> Tensor:
        """The code of least squared error and bits of each weight in steps, integers in its dtype.

        wanted   [weights]
        classes  integers [weights]: the context of each
        lam      what a bit counts against a squared step
        old      codes that are kept where all others are worse
        """
        near = wanted.round()
        at = self._places(near, classes)
        sign = near.sign()
        # By how much the error of the next code is larger, against what it saves.
        larger, saved = (wanted - near).mul_(sign).mul_(2.0).add_(1.0), self._to_next.index_select(0, at).mul_(lam)
        if lam > self._zero_wins_from:
            by_zero = (wanted + wanted).sub_(near).mul_(near).neg_().add_(self._to_zero.index_select(0, at).mul_(lam))
            near.masked_fill_((by_zero > 0) & (by_zero > saved - larger), 0.0)
            sign = near.sign()
        near.sub_(sign.mul_(larger < saved))
        if old is None:
            return near
        costs = [
            (wanted - code).square_().add_(self._bits.index_select(0, self._places(code, classes)), alpha=lam)
            for code in (near, old)
        ]
        return torch.where(costs[1] < costs[0], old, near)

    def _places(self, codes: Tensor, classes: Tensor) -> Tensor:
        most = self._most
        return codes.clamp(-most, most).add_(most).int().add_(classes.int() * (2 * most + 1))


def scalar_unbounded(target: Tensor, bit_costs: BitCosts | None) -> Tensor:
    """The codes where every weight is a layer for itself: what feedback and descent give under a Hessian of one.

    target   float32 weights in steps [rows, columns]
    returns  integers alike
    """
    if bit_costs is None or bit_costs.lam <= 0:
        return target.round()
    prices, codes = Prices(bit_costs.bits), torch.empty_like(target)
    flat, found, classes = target.reshape(-1), codes.reshape(-1), bit_costs.classes.reshape(-1)
    for start in range(0, len(flat), SCALARS_AT_ONCE):
        here = slice(start, start + SCALARS_AT_ONCE)
        found[here] = prices.cheapest(flat[here], classes[here], bit_costs.lam)
    return codes


def descend_unbounded(
    codes: Tensor,
    target: Tensor,
    steps: Tensor,
    hessian: Tensor,
    bit_costs: BitCosts | None = None,
    *,
    sweeps: int = 2,
    damping: float = 1e-4,
    block: int = BLOCK_COLUMNS,
) -> Tensor:
    """The codes after coordinate descent on the same cost: no step raises it. Ends early when nothing changes.

    The unit of lambda is that of `feedback_unbounded`, so that both weigh a bit alike.

    codes  [rows, columns], integers in the target's dtype; returned alike
    """
    groups, dtype = hessian.shape[0], target.dtype
    quadratic = damped(hessian, damping, dtype)
    scales = grouped(steps.to(dtype).expand(target.shape), groups)
    weighed = None
    if bit_costs is not None and bit_costs.lam > 0:
        energies = conditional_energies(hessian, max(damping, 0.01)).to(dtype).unsqueeze(1)
        weighed = bit_costs.weighed(grouped(bit_costs.classes, groups), scales.square() * energies)
    start = grouped(codes, groups)
    gradient = (start * scales - grouped(target, groups)) @ quadratic
    each_step, each_bend = scales.unbind(2), quadratic.diagonal(dim1=1, dim2=2).unsqueeze(1).unbind(2)

    def cheapest(column: int, wanted: Tensor, old: Tensor) -> Tensor:
        new = wanted.round()
        if weighed is None:
            return new
        candidates = _near(new, old)
        errors = ((wanted - candidates) * each_step[column]).square_() * each_bend[column]
        return weighed.cheapest(column, candidates, errors)

    choose = on_tensors(cheapest)
    return sweep_columns(start, scales, gradient, quadratic, choose, sweeps, block).reshape(target.shape)


def _near(codes: Tensor, *others: Tensor) -> Tensor:
    """[candidates, groups, rows]: the codes, those next to them towards zero, zero, and others."""
    return torch.stack((codes, codes - codes.sign(), torch.zeros_like(codes), *others))
