"""Training ends well or not at all: what has run away is never written, and weights that would be are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qcompress.errors import TrainingError
from qcompress.methods.lsq import LearnedStep
from qcompress.methods.pact import SquashedWeight
from qcompress.registry import LsqConfig, PactConfig
from qcompress.registry.regularizers import DsmmConfig, KurtosisConfig, L2Config, RegularizerConfig
from qcompress.training.loop import Watch
from qcompress.training.penalties import Penalties, attach_penalties
from qcompress.training.runaway import growth_words, leave_out_tiny, refuse_runaway, sizes_of
from qcompress.training.state import last_good
from qcompress.types.plan import Decision, Rule, TensorInfo
from qcompress.types.settings import Sgd

from .small import assert_same, net, run, settings, weights

NONE = Penalties([])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 6e28])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "6.bias"])
def test_a_value_that_no_network_uses_is_refused(name: str, bad: float) -> None:
    module = net()
    # A variance is a square, so that what would be too large for a weight is not too large for it.
    bad = bad * 1e9 if name == "1.running_var" else bad
    refuse_runaway(module, NONE, 1)
    module.state_dict()[name].view(-1)[-1] = bad
    with pytest.raises(TrainingError, match=f"after step 7 '{name}'"):
        refuse_runaway(module, NONE, 7)


def test_what_a_regularizer_learns_is_looked_at_too() -> None:
    module = net()
    penalties = attach_penalties(module, [Rule("0.weight", "dsmm", DsmmConfig(preset="paper-dsmm"), "a")])
    refuse_runaway(module, penalties, 1)
    for term in penalties.regularized[0].penalty.terms.values():
        term.data.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"'0\.weight\.alpha'"):
        refuse_runaway(module, penalties, 1)


@pytest.mark.parametrize(("coupling", "strength"), [("decoupled", 1e10), ("proximal", 1e10), ("coupled", 1e40)])
def test_a_penalty_whose_steps_float32_cannot_hold_is_an_error(coupling: Any, strength: float) -> None:
    """A rate of 1e30 and a strength of 1e10 each lie in float32, and their product does not."""
    module = net()
    rule = Rule("0.weight", "l2", L2Config(strength=strength, coupling=coupling), "a")
    penalties = attach_penalties(module, [rule])
    module.get_parameter("0.weight").grad = torch.zeros_like(module.get_parameter("0.weight"))
    with pytest.raises(TrainingError, match=r"the penalty of '0\.weight' takes steps of 1e\+40 times its gradient"):
        penalties.add(0, 1, 1e30)
        penalties.after(0, 1, 1e30)


def test_a_mask_that_is_minus_infinity_is_none_of_trainings_business() -> None:
    module = net()
    module.register_buffer("mask", torch.full((2, 2), float("-inf")))
    refuse_runaway(module, NONE, 1)


def test_a_last_step_that_diverges_is_an_error_and_leaves_the_state_before(tmp_path: Path) -> None:
    """The loss of each step is looked at before the step: of the last one only its weights can tell."""
    state = tmp_path / "state.safetensors"
    good, steps = net(), []

    def stumble(share: float) -> None:
        steps.append(share)
        if share == 1:
            bad[6].weight.data.fill_(1e30)  # type: ignore[union-attr, operator]

    run(good, settings(save_steps=1), penalties=NONE)
    bad = net()
    with pytest.raises(TrainingError, match=r"after step 18 '6\.weight'"):
        run(bad, settings(save_steps=1), Watch(state=state), penalties=NONE, after_step=stumble)
    found = last_good(state)
    assert found is not None and found[1] == 17 == len(steps) - 1
    assert all(bool(value.isfinite().all()) for value in found[0].values())


def test_a_rate_beyond_reason_ends_in_an_error() -> None:
    with pytest.raises(TrainingError):
        run(net(), settings(optimizer=Sgd(lr=1e30)), penalties=NONE)


def penalized(module: nn.Module, name: str, config: RegularizerConfig) -> Penalties:
    return attach_penalties(module, [Rule("*.weight", name, config, "a")])


@pytest.mark.parametrize(
    ("name", "config"),
    [("kurtosis", KurtosisConfig(strength=0.01)), ("l2", L2Config(normalize="var")), ("l2", L2Config(normalize="std"))],
)
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-30])
def test_weights_that_a_penalty_would_throw_away_are_left_out_and_named(
    name: str, config: RegularizerConfig, size: float
) -> None:
    module = net()
    assert leave_out_tiny(penalized(module, name, config), 0.05)[1] == []
    module[0].weight.data.mul_(size)  # type: ignore[union-attr, operator]
    kept, lines = leave_out_tiny(penalized(module, name, config), 0.05)
    assert [one.name for one in kept.regularized] == ["6.weight"]
    assert len(lines) == 1 and lines[0].startswith("0.weight: ") and "left out" in lines[0]


def test_a_penalty_in_absolute_units_stays_on_weights_that_are_zero() -> None:
    module = net()
    nn.init.zeros_(module[0].weight)  # type: ignore[index, arg-type]
    penalties = penalized(module, "dsmm", DsmmConfig())
    assert leave_out_tiny(penalties, 0.05) == (penalties, [])


def test_growth_is_said_with_the_worst_weight_first() -> None:
    module = net()
    before = sizes_of(module)
    assert growth_words(before, before) == []
    with torch.no_grad():
        module[0].weight.mul_(20)  # type: ignore[union-attr, operator]
        module[6].weight.mul_(30)  # type: ignore[union-attr, operator]
    (line,) = growth_words(before, sizes_of(module))
    assert line.startswith("6.weight and 1 more: grew 30 times")


def decision(method: str, config: LsqConfig | PactConfig) -> Decision[LsqConfig | PactConfig]:
    return Decision(TensorInfo("w", (8, 16), "F32"), method, config, "a test")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_layer_that_starts_at_zero_can_leave_it(bits: int, granularity: str) -> None:
    """Weights of the size that layers are initialized with are told apart on the grid that a zero layer starts with."""
    zero, usual = torch.zeros(8, 16), torch.linspace(-0.25, 0.25, 128).view(8, 16)
    lsq, pact = (
        kind(zero, decision(name, config(bits=bits, granularity=granularity)))  # type: ignore[arg-type, operator]
        for kind, name, config in ((LearnedStep, "lsq", LsqConfig), (SquashedWeight, "pact", PactConfig))
    )
    with torch.no_grad():
        assert torch.equal(lsq(zero), zero)
        for found, wanted in ((lsq(usual), usual), (pact(usual), usual.tanh())):
            assert found.unique().numel() > 2 and float((found - wanted).norm()) < float(wanted.norm())


def test_a_channel_that_is_zero_starts_as_the_others_do() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    step = LearnedStep(weight, decision("lsq", LsqConfig(bits=4))).step.detach()  # type: ignore[arg-type]
    others = step[torch.arange(8) != 3]
    assert float(others.min()) <= float(step[3]) <= float(others.max())


def test_a_sound_run_is_as_it_was() -> None:
    one, other = net(), net()
    first = run(one, settings())
    assert first.warnings == ()
    run(other, settings())
    assert_same(weights(one), weights(other))
