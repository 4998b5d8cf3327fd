"""Warnings on settings that cannot work."""

from __future__ import annotations

import pytest
import torch

from qcompress.registry.regularizers import (
    DsmmConfig,
    ExponentialConfig,
    L2Config,
)
from qcompress.training.penalties import attach_penalties
from qcompress.training.warnings import advise_after, advise_before
from qcompress.types.settings import AdamW, Sgd, Training

from .test_penalties import net, rule


def test_advice_on_settings_that_cannot_work() -> None:
    module = net()
    training = Training(optimizer=Sgd(lr=0.1))
    with torch.no_grad():
        module.fc.weight.mul_(20)
    rules = [
        rule("dsmm", DsmmConfig(preset="paper-dsmm"), "fc.weight", "a"),
        rule("exponential", ExponentialConfig(preset="paper-qar", levels=4, strength=1.0), "conv.weight", "b"),
    ]
    penalties = attach_penalties(module, rules)
    said = advise_before(penalties, training, [rule("squant", None)])
    assert len(said) == 3
    assert "widens the range" in said[0] and "diverge" in said[1] and "affine grid" in said[2]
    assert not advise_before(attach_penalties(net(), [rule("l2", L2Config())]), training, [rule("squant", None)])
    after = advise_after(penalties)
    assert any("variance" in line for line in after) and not any("nan" in line.split() for line in after)


@pytest.mark.parametrize(
    ("optimizer", "config", "warns"),
    [
        (AdamW(lr=0.001), DsmmConfig(), True),
        (AdamW(lr=0.001), DsmmConfig(coupling="decoupled"), False),
        (AdamW(lr=0.001), DsmmConfig(alpha=10.0), False),
        (Sgd(lr=0.1), DsmmConfig(), False),
    ],
    ids=["coupled", "decoupled", "alpha stays", "sgd"],
)
def test_advice_on_a_dsmm_that_adamw_makes_strong(optimizer: Sgd | AdamW, config: DsmmConfig, warns: bool) -> None:
    penalties = attach_penalties(net(), [rule("dsmm", config)])
    said = advise_before(penalties, Training(optimizer=optimizer), [])
    assert any("coupling: decoupled" in line for line in said) is warns
