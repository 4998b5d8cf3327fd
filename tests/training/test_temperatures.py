"""Where learned temperatures will lead is foreseen as training then leads them, and a strength leads them there."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from qcompress.errors import RecipeError
from qcompress.registry.regularizers import DsmmConfig, L2Config
from qcompress.training.loop import Data, train
from qcompress.training.losses import make_loss
from qcompress.training.penalties import Penalties, attach_penalties
from qcompress.training.temperatures import alpha_words, foreseen_alpha, set_strengths
from qcompress.types.settings import AdamW, Classification, Cosine, Sgd, Training

from .small import batches
from .test_penalties import rule

EPOCHS = 20
STEPS = EPOCHS * 6
STILL = Sgd(lr=1e-9, momentum=0.9, nesterov=True)
"""Weights stay as they are; alpha has a rate of its own."""


def dense(deviation: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 64))
    with torch.no_grad():
        module[1].weight.normal_(0, deviation)
    return module


def attached(module: nn.Module, **options: Any) -> Penalties:
    return attach_penalties(module, [rule("dsmm", DsmmConfig(preset="paper-dsmm", **options))])


def alpha_after(module: nn.Module, penalties: Penalties, training: Training) -> float:
    train(module, Data(batches()), make_loss(Classification()), training, penalties, seed=1)
    (found,) = penalties.facts().values()
    return float(found["temperature"])


@pytest.mark.parametrize("deviation", [0.05, 0.2, 0.6])
@pytest.mark.parametrize(
    ("rate", "optimizer", "options"),
    [
        (0.002, STILL, {}),
        (0.02, STILL, {}),
        (0.2, replace(STILL, momentum=0.0, nesterov=False), {"start": 0.2, "ramp": 0.5, "shape": "cosine"}),
        (0.5, STILL, {"granularity": "channel", "every": 2}),
        (0.02, STILL, {"normalize": "std", "alpha": 2.0}),
        (0.02, STILL, {"dim": 2, "reduction": "sum", "hold": 0.5}),
        (0.01, AdamW(lr=1e-9), {}),
    ],
)
def test_alpha_ends_where_it_was_foreseen(
    deviation: float, rate: float, optimizer: Any, options: dict[str, Any]
) -> None:
    module = dense(deviation)
    penalties = attached(module, strength=0.5, learning_rate=rate, **options)
    training = Training(epochs=EPOCHS, optimizer=optimizer, schedule=Cosine(), warm_up=0.1)
    (one,) = penalties.regularized
    foreseen = foreseen_alpha(one, training, STEPS)
    assert foreseen is not None
    # So few steps are coarse ones; gradients that fall make Adam's steps shorter than the rate.
    near = 0.25 if isinstance(optimizer, AdamW) else 0.15
    assert alpha_after(module, penalties, training) == pytest.approx(foreseen, rel=near, abs=0.05)


@pytest.mark.parametrize("deviation", [0.2, 0.5])
def test_the_strength_of_a_schedule_is_the_least_that_settles(deviation: float) -> None:
    """alpha comes to -ln(2 variance), and with a tenth of that strength stays far from it."""
    training = Training(epochs=EPOCHS, optimizer=STILL, schedule=Cosine())
    module = dense(deviation)
    penalties = attached(module, strength="schedule", learning_rate=0.05)
    set_strengths(penalties, training, STEPS)
    (one,) = penalties.regularized
    strength = one.config.strength
    assert isinstance(strength, float)
    settled = -math.log(2 * float(module[1].weight.detach().double().var(correction=0)))
    assert alpha_after(module, penalties, training) == pytest.approx(settled, abs=0.15)
    weak = attached(module, strength=strength / 10, learning_rate=0.05)
    assert abs(alpha_after(module, weak, training) - settled) > 0.3


def test_a_schedule_of_few_steps_throws_no_alpha_beyond_where_it_belongs() -> None:
    training = Training(epochs=EPOCHS, optimizer=STILL, schedule=Cosine())
    module = dense(0.01)
    penalties = attached(module, strength="schedule", learning_rate=0.05)
    set_strengths(penalties, training, STEPS)
    settled = -math.log(2 * float(module[1].weight.detach().double().var(correction=0)))
    assert 2 < alpha_after(module, penalties, training) < settled


def test_the_strength_of_tiny_weights_takes_little_away() -> None:
    training = Training(epochs=1, optimizer=Sgd(lr=0.1, momentum=0.9), schedule=Cosine())
    module = dense(1e-6)
    penalties = attached(module, strength="schedule")
    set_strengths(penalties, training, 6)
    before = float(module[1].weight.detach().double().std())
    pull = torch.zeros_like(module[1].weight)
    (one,) = penalties.regularized
    one.penalty.alpha.data.fill_(-math.log(2 * before**2))
    one.accumulate(pull, 0.1 / (1 - 0.9) * one.factor(0, 6))
    assert 0 < float(pull.double().norm()) < 0.02 * float(module[1].weight.detach().double().norm())


def test_words_name_where_alpha_comes_to_and_what_it_does_not_see() -> None:
    training = Training(epochs=1, optimizer=Sgd(lr=0.01), schedule=Cosine())
    said = alpha_words(attached(dense()), training, 6)
    assert said[0].startswith("dsmm: alpha will come to about 0.1") and "does not see outliers" in said[1]
    assert "train longer" in said[1]
    settled = alpha_words(attached(dense(), alpha=2.5), training, 6)
    assert "no strength leads it further" in settled[1]
    assert len(alpha_words(attached(dense(), alpha=30.0), training, 6)) == 1
    none = attach_penalties(dense(), [rule("dsmm", DsmmConfig())])
    assert not alpha_words(none, training, 6)
    assert not alpha_words(attach_penalties(dense(), [rule("l2", L2Config())]), training, 6)


def test_a_schedule_without_a_learned_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match="leads a learned alpha"):
        DsmmConfig(strength="schedule")
    training = Training(epochs=1, optimizer=AdamW(lr=0.01))
    with pytest.raises(RecipeError, match="needs sgd"):
        set_strengths(attached(dense(), strength="schedule"), training, 6)
