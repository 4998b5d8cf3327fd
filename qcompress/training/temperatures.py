"""Where the learned temperatures of dsmm will lead is foreseen here, and a strength is chosen that leads them there.

With weights as they are and no outliers in sight the soft range has the slope v = 2 variance in alpha. alpha is learned
by the gradient v - exp(-alpha), so that u = exp(alpha) follows du / dT = 1 - v u, where T adds up the learning rates of
all steps times the strength, over 1 - momentum:

    alpha(T) = ln(1 / v + (exp(alpha(0)) - 1 / v) exp(-v T))

In short runs that is ln(exp(alpha(0)) + T); in long ones alpha settles at -ln(v). Outliers hold it lower.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qcompress.errors import RecipeError
from qcompress.registry.regularizers import DsmmConfig
from qcompress.regularizers.dsmm import Dsmm
from qcompress.regularizers.penalty import groups_of, spread
from qcompress.training.optimizers import rate_at
from qcompress.training.penalties import Penalties, Regularized, shape_at
from qcompress.types.settings import AdamW, Sgd, Training

SETTLED = 3.0
"""v T of a strength that follows the schedule: alpha has gone 95 % of its way in exp(alpha)."""
MOST_PULL = 0.01
"""Share of a weight that one step takes away at most, at such a strength."""
MOST_RISE = 0.5
"""By how much one step raises alpha at most: larger ones throw it far beyond where it settles."""
PLACES = 1000
"""Of the schedule at which rates are added up."""


def set_strengths(penalties: Penalties, training: Training, steps: int) -> None:
    """Give every `strength: schedule` its number, in place.

    steps   of the optimizer, all told
    raises  RecipeError with an optimizer that alpha follows at the same pace whatever the strength
    """
    for one in penalties.regularized:
        config = one.config
        if not isinstance(config, DsmmConfig) or config.strength != "schedule":
            continue
        if isinstance(training.optimizer, AdamW):
            what = "strength: schedule needs sgd: adamw leads alpha by its learning rate, whatever the strength"
            raise RecipeError(one.where, what, "give a number, or use alpha: auto")
        one.penalty.config = replace(config, strength=1.0)
        one.penalty.config = replace(config, strength=_settling_strength(one, training, steps))


def foreseen_alpha(one: Regularized, training: Training, steps: int) -> float | None:
    """The mean alpha at the end of training, with weights as they are now; None where nothing learns one."""
    start = _learned(one)
    if start is None:
        return None
    way = _way(one, training, steps)
    slopes = _slopes(one)
    if isinstance(training.optimizer, AdamW):
        settled = -slopes.log()
        return float(
            torch.where(start < settled, (start + way).minimum(settled), (start - way).maximum(settled)).mean()
        )
    # Above 50 the push is nothing, and alpha falls by v T until it settles; exp(alpha) would leave float64 later.
    low = start.clamp_max(50.0)
    found = (1 / slopes + (low.exp() - 1 / slopes) * (-slopes * way).exp()).clamp_min(1e-300).log()
    found = torch.where(start > 50.0, (start - slopes * way).maximum(-slopes.log()), found)
    return float(found.clamp_min(_dsmm(one).alpha_min).mean())


def alpha_words(penalties: Penalties, training: Training, steps: int) -> list[str]:
    """A line on where the learned temperatures will lead, and one that warns where they will see no outliers."""
    found = {
        one.name: (one, alpha)
        for one in penalties.regularized
        if (alpha := foreseen_alpha(one, training, steps)) is not None
    }
    if not found:
        return []
    ends = sorted((alpha, name) for name, (_, alpha) in found.items())
    (low, lowest), (high, highest) = ends[0], ends[-1]
    words = f"dsmm: alpha will come to about {low:.3g} ({lowest})"
    lines = [words if lowest == highest else f"{words} to {high:.3g} ({highest})"]
    blind = [name for name, (one, alpha) in found.items() if sees_no_ends(one, alpha)]
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        one, alpha = found[blind[0]]
        settled = float(-_slopes(one).log().mean()) - alpha < 0.1
        hint = "no strength leads it further; use" if settled else "train longer, or use strength: schedule or"
        lines.append(
            f"warning: {blind[0]}{more}: with such an alpha dsmm is a penalty on the variance, and does not see "
            f"outliers: {hint} alpha: auto"
        )
    return lines


def sees_no_ends(one: Regularized, alpha: float) -> bool:
    """Whether alpha is so low that both soft ends are averages over nearly all weights."""
    low, high = groups_of(one.seen(), "tensor").ends()
    return alpha * float(high - low) < math.log(max(one.weight.numel(), 2))


def _settling_strength(one: Regularized, training: Training, steps: int) -> float:
    """The least strength at which alpha settles within the schedule, where single steps may be that large.

    one  with a strength of 1
    """
    assert isinstance(training.optimizer, Sgd)
    config, slope = _dsmm(one), float(_slopes(one).mean())
    settling = SETTLED / slope / max(_way(one, training, steps), 1e-300)
    settled = max(-math.log(slope), config.alpha_min)
    step = one.share * config.every / (1 - training.optimizer.momentum)
    # Where the soft range is one on the variance, the penalty is alpha / weights times twice the squared distances.
    pull = 2 * settled * step * training.optimizer.lr / one.weight.numel()
    rise = step * (config.learning_rate or training.optimizer.lr)
    return min(settling, MOST_PULL / pull, MOST_RISE / rise)


def _dsmm(one: Regularized) -> DsmmConfig:
    assert isinstance(one.config, DsmmConfig)
    return one.config


def _learned(one: Regularized) -> Tensor | None:
    """The alphas as they are, float64 [groups]; None where they are not learned."""
    if not isinstance(one.penalty, Dsmm) or not one.penalty.config.learnable:
        return None
    return one.penalty.alpha.detach().double().cpu().view(-1)


def _slopes(one: Regularized) -> Tensor:
    """v of every alpha, float64 [groups], above 0."""
    config, seen = _dsmm(one), one.seen()
    _, variance = groups_of(seen, config.granularity).moments()
    number = config.dim if config.dim > 1 and config.reduction == "sum" else 1
    return (2 * number * variance.cpu().view(-1) / spread(seen, config.normalize)).clamp_min(1e-300)


def _way(one: Regularized, training: Training, steps: int) -> float:
    """T: what all steps add up to. With AdamW, whose steps have the size of the rate, their sum."""
    config = _dsmm(one)
    shares = [(place + 0.5) / PLACES for place in range(PLACES)]
    rate = config.learning_rate or training.optimizer.lr
    rates = [rate * rate_at(training.schedule, training.warm_up, share) for share in shares]
    if isinstance(training.optimizer, AdamW):
        active = [one_rate for share, one_rate in zip(shares, rates, strict=True) if shape_at(config, share) > 0]
        return steps * sum(active) / PLACES / config.every
    grown = sum(one_rate * shape_at(config, share) for share, one_rate in zip(shares, rates, strict=True)) / PLACES
    assert not isinstance(config.strength, str) and config.strength is not None
    number = len(groups_of(one.seen(), config.granularity).zeros()) if config.reduction == "mean" else 1
    return steps * grown * config.strength * one.share / number / (1 - training.optimizer.momentum)
