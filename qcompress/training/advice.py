"""Warnings where a setting cannot work, or works otherwise than its name says."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompress.registry.regularizers import DsmmConfig
from qcompress.regularizers.dsmm import Dsmm
from qcompress.regularizers.penalty import Groups, matrix_of
from qcompress.settings import Training
from qcompress.training.penalties import Penalties, Regularized
from qcompress.types import Rule

WIDE = 1 / math.sqrt(2)
"""Standard deviation beyond which a learned temperature falls below zero: there dsmm would widen the range."""
OWN_CODEBOOK = ("cosine", "min-squared", "exponential")


def advise_before(penalties: Penalties, training: Training, rules: Sequence[Rule]) -> list[str]:
    """What is to be said before training begins, a line each."""
    found: list[str] = []
    wide = [one.name for one in penalties.regularized if isinstance(one.config, DsmmConfig) and _deviation(one) > WIDE]
    if wide:
        found.append(
            f"{_names(wide)}: the standard deviation is above {WIDE:.1f}, where dsmm widens the range: leave it out, "
            "or use alpha: auto"
        )
    for one in penalties.regularized:
        if getattr(one.config, "gradient", None) == "none" and one.config.learnable:
            rate = one.config.learning_rate or training.optimizer.lr
            cell = 2 * rate * one.config.strength * one.weight.numel() / one.config.levels
            if one.config.reduction == "sum" and cell >= 2:
                found.append(
                    f"{one.name}: representatives diverge where learning rate x strength x weights of a cell is above "
                    f"1 (here about {cell / 2:.2g}): use gradient: count, or a lower learning_rate"
                )
    affine = [rule.method for rule in rules if rule.method is not None]
    own = [
        one.name for one in penalties.regularized if _kind(one) in OWN_CODEBOOK or getattr(one.config, "levels", None)
    ]
    if affine and own:
        found.append(
            f"{_names(own)}: pulled to representatives of their own, which the recipe's {affine[0]} does not use: an "
            "affine grid may lose more than without; use cluster, or sine with bits"
        )
    return found


def advise_after(penalties: Penalties) -> list[str]:
    """What showed while training ran, a line each."""
    found: list[str] = []
    soft = [one.name for one in penalties.regularized if isinstance(one.penalty, Dsmm) and _is_variance(one)]
    if soft:
        found.append(
            f"{_names(soft)}: alpha x range is below ln(weights), where dsmm is a penalty on the variance and hardly "
            "sees the ends of the range"
        )
    dead = [one.name for one in penalties.regularized if getattr(one.penalty, "representatives", None) is not None]
    dead = [name for name in dead if _dead(penalties, name)]
    if dead:
        found.append(f"{_names(dead)}: has representatives that no weight is nearest to")
    return found


def _is_variance(one: Regularized) -> bool:
    assert isinstance(one.penalty, Dsmm)
    if one.config.alpha == "auto":
        return False
    low, high = Groups(matrix_of(one.seen()), False).ends()
    alpha = float(one.penalty.temperature(one.seen()).mean())
    return alpha * float(high - low) < math.log(max(one.weight.numel(), 2))


def _dead(penalties: Penalties, name: str) -> int:
    one = next(one for one in penalties.regularized if one.name == name)
    return int(one.penalty.representatives.dead)  # type: ignore[attr-defined]


def _deviation(one: Regularized) -> float:
    return float(one.weight.detach().double().std(correction=0)) if one.weight.numel() > 1 else 0.0


def _kind(one: Regularized) -> str:
    return type(one.penalty).__module__.rpartition(".")[2].replace("_", "-")


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
