"""Warnings say where a setting cannot work, or works otherwise than its name says."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompress.registry.regularizers import DsmmConfig, RepresentativesConfig
from qcompress.regularizers.dsmm import Dsmm
from qcompress.regularizers.representatives import ToRepresentatives
from qcompress.training.penalties import Penalties, Regularized
from qcompress.training.temperatures import sees_no_ends
from qcompress.types.plan import Rule
from qcompress.types.settings import AdamW, Training

WIDE = 1 / math.sqrt(2)
"""Standard deviation beyond which a learned temperature falls below zero: there dsmm would widen the range."""


def advise_before(penalties: Penalties, training: Training, rules: Sequence[Rule]) -> list[str]:
    """What is to be said before training begins, a line each."""
    found: list[str] = []
    wide = [one.name for one in penalties.regularized if isinstance(one.config, DsmmConfig) and _deviation(one) > WIDE]
    if wide:
        found.append(
            f"{_names(wide)}: the standard deviation is above {WIDE:.1f}, where dsmm widens the range: leave it out, "
            "or use alpha: auto"
        )
    ruled = [one.name for one in penalties.regularized if _rules_under_adam(one, training)]
    if ruled:
        found.append(
            f"{_names(ruled)}: adamw makes one step of the loss and a coupled dsmm whose alpha follows the weights, "
            "which then draws layers of small gradients to nothing: use coupling: decoupled"
        )
    found += [line for one in penalties.regularized if (line := _diverges(one, training)) is not None]
    affine = [rule.method for rule in rules if rule.method is not None]
    own = [one.name for one in penalties.regularized if one.config.levels is not None]
    if affine and own:
        found.append(
            f"{_names(own)}: pulled to representatives of their own, which the recipe's {affine[0]} does not use: an "
            "affine grid may lose more than without; use cluster, or sine with bits"
        )
    return found


def advise_after(penalties: Penalties) -> list[str]:
    """What showed while training ran, a line each."""
    found: list[str] = []
    soft = [one.name for one in penalties.regularized if _is_variance(one)]
    if soft:
        found.append(
            f"{_names(soft)}: alpha x range is below ln(weights), where dsmm is a penalty on the variance and hardly "
            "sees the ends of the range"
        )
    dead = [
        one.name
        for one in penalties.regularized
        if isinstance(one.penalty, ToRepresentatives) and one.penalty.representatives.dead
    ]
    if dead:
        found.append(f"{_names(dead)}: has representatives that no weight is nearest to")
    return found


def _diverges(one: Regularized, training: Training) -> str | None:
    """That the raw gradients of representatives lead them away, where they do."""
    config = one.config
    if not isinstance(config, RepresentativesConfig) or config.gradient != "none" or not config.learnable:
        return None
    rate = config.learning_rate or training.optimizer.lr
    cell = 2 * rate * (config.strength or 0.0) * one.weight.numel() / config.levels
    if config.reduction != "sum" or cell < 2:
        return None
    return (
        f"{one.name}: representatives diverge where learning rate x strength x weights of a cell is above "
        f"1 (here about {cell / 2:.2g}): use gradient: count, or a lower learning_rate"
    )


def _rules_under_adam(one: Regularized, training: Training) -> bool:
    """Whether the size of a step does not tell how weak the penalty is."""
    config = one.config
    follows = isinstance(config, DsmmConfig) and config.alpha == "auto" and config.coupling == "coupled"
    return follows and isinstance(training.optimizer, AdamW)


def _is_variance(one: Regularized) -> bool:
    """Whether dsmm's temperature is so low that both soft ends are averages over nearly all weights."""
    if not isinstance(one.penalty, Dsmm) or one.penalty.config.alpha == "auto":
        return False
    return sees_no_ends(one, float(one.penalty.temperature(one.seen()).mean()))


def _deviation(one: Regularized) -> float:
    return float(one.weight.detach().double().std(correction=0)) if one.weight.numel() > 1 else 0.0


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
