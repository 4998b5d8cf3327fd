"""Every weight learns whether to go up or down by soft rounding (AdaRound).

Nagel et al. 2020, arXiv 2004.10568: between floor and ceiling a weight is at h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1),
and the regularizer sum of 1 - |2h - 1|^beta drives h to 0 or 1 while beta falls from 20 to 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qcompress.coding.rows import weight_from_rows
from qcompress.solvers.feedback import descend
from qcompress.solvers.hessian import damped, grouped, linear_term, output_error
from qcompress.types.config import Shape

Schedule = Literal["cosine", "linear"]

ZETA, GAMMA = 1.1, -0.1
BETA_START, BETA_END = 20.0, 2.0
GRAM_DAMPING = 0.01
DESCENT_SWEEPS = 4


def soft(v: Tensor) -> Tensor:
    """h(V) of equation 23, in [0, 1]."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def start_from(rest: Tensor) -> Tensor:
    """The V at which h(V) is `rest`, which lies in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)


def beta_at(share: float, warm_up: float, schedule: Schedule) -> float | None:
    """The regularizer's exponent after `share` of the steps; None during the warm-up, when it is off.

    AIMET lets it fall along a cosine, BRECQ and its successors on a line.
    """
    if share < warm_up:
        return None
    left = 1 - (share - warm_up) / (1 - warm_up)
    along = (1 - math.cos(math.pi * left)) / 2 if schedule == "cosine" else left
    return BETA_END + (BETA_START - BETA_END) * along


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """The sum of 1 - |2h - 1|^beta: nothing where every h is 0 or 1, most at one half (equation 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def undecided(h: Tensor) -> float:
    """The share of h that lies strictly inside (0.01, 0.99)."""
    return float(((h > 0.01) & (h < 0.99)).float().mean())


@dataclass(frozen=True)
class Neighbours:
    """Where each weight may go: the level below it and the one above.

    floor       codes [rows, columns], integers in the weight's dtype, clamped to [0, 2**bits - 1]
    ceiling     floor + 1, clamped likewise
    rest        how far the weight lies from floor to floor + 1, in [0, 1]
    scale, low  value = scale * code + low, broadcast over the codes
    """

    floor: Tensor
    ceiling: Tensor
    rest: Tensor
    scale: Tensor
    low: Tensor

    def values(self, codes: Tensor) -> Tensor:
        return codes * self.scale + self.low


def make_neighbours(weight: Tensor, scale: Tensor, low: Tensor, bits: int) -> Neighbours:
    """The two neighbours of each weight [rows, columns]; `scale` and `low` as in Neighbours."""
    scale, low = scale.to(weight.dtype), low.to(weight.dtype)
    place = (weight - low) / scale
    below = place.floor()
    most = 2**bits - 1
    return Neighbours(below.clamp(0, most), (below + 1).clamp(0, most), (place - below).clamp(0, 1), scale, low)


class SoftRounding(nn.Module):
    """A weight between its two neighbours on the grid, as a torch parametrization: forward gives the soft weight.

    `v` is what is learned. The weight that is passed in is not looked at.
    """

    def __init__(self, neighbours: Neighbours, shape: Shape, axis: tuple[int, ...]) -> None:
        super().__init__()
        self.v = nn.Parameter(start_from(neighbours.rest))
        self.neighbours, self.shape, self.axis = neighbours, shape, axis

    def h(self) -> Tensor:
        return soft(self.v)

    def soft_rows(self) -> Tensor:
        """The soft weight's rows [rows, columns]; beyond the grid's ends nothing moves."""
        floor, ceiling = self.neighbours.floor, self.neighbours.ceiling
        return self.neighbours.values(floor + (ceiling - floor) * self.h())

    def codes(self) -> Tensor:
        """Hard codes [rows, columns]."""
        return torch.where(self.v >= 0, self.neighbours.ceiling, self.neighbours.floor)

    def penalty(self, beta: float) -> Tensor:
        """The rounding penalty of the weights that have a choice."""
        choice = self.neighbours.ceiling > self.neighbours.floor
        return rounding_penalty(self.h()[choice], beta)

    def forward(self, _: Tensor) -> Tensor:
        return weight_from_rows(self.soft_rows(), self.shape, self.axis)


def round_by_gram(
    weight: Tensor,
    neighbours: Neighbours,
    hessian: Tensor,
    cross: Tensor | None,
    *,
    iterations: int,
    learning_rate: float,
    strength: float,
    warm_up: float,
) -> Tensor:
    """Codes between floor and ceiling by full-batch Adam on the output error itself, then coordinate descent.

    The error of all positions is a quadratic form of the weights (solvers.hessian), so that a step costs one product
    with H instead of a pass over data. Each row's error is divided by its output's energy, which makes `strength` and
    the learning rate mean the same for every layer. Rows that end no better than nearest rounding take nearest.

    weight  float32 [rows, columns]
    """
    # As raised as the Cholesky factors are elsewhere: columns that were seldom active must not move at random.
    quadratic = damped(hessian, GRAM_DAMPING, weight.dtype)
    linear = None if cross is None else linear_term(weight, hessian, cross).to(weight.dtype)
    v = _adam_on_gram(weight, neighbours, quadratic, linear, iterations, learning_rate, strength, warm_up)
    learned = torch.where(v >= 0, neighbours.ceiling, neighbours.floor)
    nearest = torch.where(neighbours.rest > 0.5, neighbours.ceiling, neighbours.floor)
    descended = descend(
        learned,
        weight,
        neighbours.scale,
        neighbours.low,
        quadratic,
        lowest=neighbours.floor,
        highest=neighbours.ceiling,
        linear=linear,
        sweeps=DESCENT_SWEEPS,
    )
    errors = [output_error(neighbours.values(codes) - weight, quadratic, linear) for codes in (descended, nearest)]
    return torch.where((errors[0] < errors[1]).unsqueeze(1), descended, nearest)


def _adam_on_gram(
    weight: Tensor,
    neighbours: Neighbours,
    quadratic: Tensor,
    linear: Tensor | None,
    iterations: int,
    learning_rate: float,
    strength: float,
    warm_up: float,
) -> Tensor:
    """V after Adam; gradients are written out, since autograd would keep several copies of the weights."""
    groups, columns = quadratic.shape[:2]
    form = quadratic.to(weight.dtype)
    pull = None if linear is None else linear.to(weight.dtype)
    energy = output_error(weight, quadratic).clamp_min(torch.finfo(torch.float64).tiny).to(weight.dtype).unsqueeze(1)
    width = (neighbours.ceiling - neighbours.floor) * neighbours.scale
    v = start_from(neighbours.rest)
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(iterations):
        s = torch.sigmoid(v)
        h = s * (ZETA - GAMMA) + GAMMA
        free = (h > 0) & (h < 1)
        h = h.clamp_(0, 1)
        slope = grouped(neighbours.values(neighbours.floor).add(width * h).sub_(weight), groups) @ form
        if pull is not None:
            slope += pull
        gradient = slope.reshape(weight.shape).mul_(2 * width / energy)
        beta = beta_at(step / iterations, warm_up, "cosine")
        if beta is not None:
            centred = 2 * h - 1
            gradient -= (20 * strength / columns * beta) * centred.abs().pow_(beta - 1).mul_(centred.sign())
        gradient.mul_(free).mul_(s * (1 - s) * (ZETA - GAMMA))
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square_(), 0.001)
        mean, spread = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        v.sub_(mean.div_(spread.sqrt_().add_(1e-12)), alpha=learning_rate)
    return v


def round_by_samples(
    rounding: SoftRounding,
    error: Callable[[Tensor, Tensor], Tensor],
    samples: int,
    *,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    strength: float,
    warm_up: float,
    schedule: Schedule,
    generator: torch.Generator,
) -> Tensor:
    """Codes between floor and ceiling by Adam on random batches, as published.

    error  (soft weight in its own shape, int64 indices of the samples) -> the reconstruction error, a scalar
    """
    optimizer = torch.optim.Adam([rounding.v], lr=learning_rate)
    nothing = torch.empty(0)
    for step in range(iterations):
        device = rounding.v.device
        chosen = torch.randint(samples, (min(batch_size, samples),), generator=generator, device=device)
        loss = error(rounding(nothing), chosen)
        beta = beta_at(step / iterations, warm_up, schedule)
        if beta is not None:
            loss = loss + strength * rounding.penalty(beta)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return rounding.codes()
