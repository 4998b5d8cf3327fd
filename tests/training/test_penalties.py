"""Regularizers on a live model: which weights, how strong, when, and what is learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from qcompress.errors import ModelError, RecipeError, Refusals
from qcompress.registry.regularizers import (
    REGULARIZERS,
    DsmmConfig,
    L2Config,
    LinfConfig,
    MinSquaredConfig,
    SineConfig,
)
from qcompress.training.penalties import Penalties, attach_penalties, strength_at
from qcompress.types.plan import Rule
from qcompress.types.settings import AdamW, Sgd


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3)
        self.fc = nn.Linear(6, 4)
        self.embed = nn.Embedding(10, 4)
        self.tied = nn.Linear(4, 10, bias=False)
        self.tied.weight = self.embed.weight


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def rule(name: str | None, config: Any = None, match: str = "*.weight", where: str = "r.yaml:1") -> Rule:
    return Rule(match, name, config, where)


def names(penalties: Penalties) -> list[str]:
    return [one.name for one in penalties.regularized]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ("all", ["conv.weight", "up.weight", "fc.weight", "embed.weight"]),
        ("conv", ["conv.weight", "up.weight"]),
        ("dense", ["fc.weight"]),
    ],
)
def test_rules_reach_convolutions_and_dense_layers(layers: Any, wanted: list[str]) -> None:
    """A tied weight that is also a dense layer's is known by its first name, which is the embedding's."""
    found = names(attach_penalties(net(), [rule("l2", L2Config(layers=layers))]))
    assert [name for name in found if name != "embed.weight"] == [name for name in wanted if name != "embed.weight"]
    assert len(found) == len(set(found))


def test_the_first_rule_decides_and_a_name_reaches_any_parameter() -> None:
    rules = [
        rule(None, match="conv.*", where="a"),
        rule("l2", L2Config(), "norm.weight", "b"),
        rule("linf", LinfConfig(), where="c"),
    ]
    found = attach_penalties(net(), rules)
    assert "conv.weight" not in names(found) and "norm.weight" in names(found)
    assert {one.name: one.where for one in found.regularized}["fc.weight"] == "c"


def test_a_role_reaches_every_parameter_that_has_it() -> None:
    module = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    rules = [rule("l2", L2Config(), "@embedding", "a"), rule("linf", LinfConfig(), "@norm", "b")]
    assert names(attach_penalties(module, rules)) == ["0.weight", "2.weight"]


def test_idle_rules_and_too_many_levels_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"match 'x\.\*' decides nothing"):
        attach_penalties(net(), [rule("l2", L2Config(), "x.*")])
    with pytest.raises(Refusals):
        attach_penalties(net(), [rule("l2", L2Config(), "x.*", "a"), rule("l2", L2Config(), "y.*", "b")])
    with pytest.raises(ModelError, match=r"fc.weight \[4, 6\]: 100 representatives for 24 weights"):
        attach_penalties(net(), [rule("min-squared", MinSquaredConfig(levels=100), "fc.weight")])


def test_strength_over_time() -> None:
    config = L2Config(strength=2.0, start=0.2, ramp=0.4, hold=0.2)
    wanted = {0.0: 0, 0.19: 0, 0.4: 1.0, 0.6: 2.0, 0.79: 2.0, 0.81: 0, 1.0: 0}
    for share, strength in wanted.items():
        assert strength_at(config, share) == pytest.approx(strength), share
    for shape in ("linear", "cosine", "tanh"):
        steps = [strength_at(L2Config(strength=1, ramp=1.0, shape=shape), t / 100) for t in range(101)]
        assert steps == sorted(steps) and steps[0] < 0.01 and steps[-1] > 0.99
        assert steps[50] == pytest.approx(0.5)


def test_coupled_gradients_join_those_of_the_loss() -> None:
    module = net()
    penalties = attach_penalties(module, [rule("l2", L2Config(strength=0.5))])
    module.conv.weight.grad = torch.ones_like(module.conv.weight)
    value = penalties.add(0, 10, 0.1)
    torch.testing.assert_close(module.conv.weight.grad, 1 + 0.5 * module.conv.weight.detach())
    torch.testing.assert_close(module.fc.weight.grad, 0.5 * module.fc.weight.detach())
    wanted = sum(0.25 * float(one.weight.detach().square().sum()) for one in penalties.regularized)
    assert value == pytest.approx(wanted, rel=1e-5)


def test_layers_may_be_averaged_and_steps_left_out() -> None:
    module = net()
    config = L2Config(strength=1.0, layer_reduction="mean", every=3)
    penalties = attach_penalties(module, [rule("l2", config)])
    count = len(penalties.regularized)
    for step in range(4):
        module.zero_grad()
        penalties.add(step, 10, 0.1)
        if step % 3:
            assert module.conv.weight.grad is None
        else:
            torch.testing.assert_close(module.conv.weight.grad, 3 / count * module.conv.weight.detach())


def test_channels_of_transposed_convolutions_are_their_outputs() -> None:
    module = net()
    penalties = attach_penalties(
        module, [rule("linf", LinfConfig(granularity="channel", reduction="sum"), "up.weight")]
    )
    penalties.add(0, 1, 0.1)
    grad = penalties.regularized[0].weight.grad
    assert grad is not None
    torch.testing.assert_close(grad.abs().sum((0, 2, 3)), torch.full((6,), 0.01))


def test_decoupled_and_proximal_penalties_take_steps_of_their_own() -> None:
    for coupling in ("decoupled", "proximal"):
        module = net()
        penalties = attach_penalties(module, [rule("l2", L2Config(strength=0.5, coupling=coupling), "fc.weight")])
        before = module.fc.weight.detach().clone()
        penalties.add(0, 10, 0.1)
        assert module.fc.weight.grad is None
        penalties.after(0, 10, 0.1)
        factor = 1 - 0.05 if coupling == "decoupled" else 1 / 1.05
        torch.testing.assert_close(module.fc.weight.detach(), before * factor)


def test_a_decoupled_step_is_of_the_weights_that_the_optimizer_s_is_of() -> None:
    """As AdamW's decay: whichever is taken first, both know the weights as they were."""
    module = net()
    penalties = attach_penalties(module, [rule("l2", L2Config(strength=0.5, coupling="decoupled"), "fc.weight")])
    before = module.fc.weight.detach().clone()
    optimizer = torch.optim.SGD([module.fc.weight], lr=0.1)
    module.fc.weight.grad = torch.ones_like(before)
    penalties.add(0, 10, 0.1)
    optimizer.step()
    penalties.after(0, 10, 0.1)
    torch.testing.assert_close(module.fc.weight.detach(), before - 0.1 * (1 + 0.5 * before))


def test_a_frozen_weight_takes_no_step() -> None:
    module = net()
    module.fc.weight.requires_grad_(False)
    penalties = attach_penalties(module, [rule("l2", L2Config(strength=0.5, coupling="decoupled"), "fc.weight")])
    before = module.fc.weight.clone()
    penalties.add(0, 10, 0.1)
    penalties.after(0, 10, 0.1)
    assert torch.equal(module.fc.weight, before)


def test_representatives_are_shared_as_asked_and_step_towards_their_means() -> None:
    module = net()
    config = MinSquaredConfig(levels=4, share="type", start=0.0, ramp=0.0)
    penalties = attach_penalties(module, [rule("min-squared", config, "[cuf]*.weight")])
    sets = {one.name: one.penalty.representatives for one in penalties.regularized}  # type: ignore[attr-defined]
    assert sets["conv.weight"] is sets["up.weight"] and sets["conv.weight"] is not sets["fc.weight"]
    groups = penalties.learned(Sgd(lr=0.01))
    assert len(groups) == 2 and all(group["lr"] == 0.1 and group["momentum"] == 0 for group in groups)
    assert all("lr" not in group for group in penalties.learned(AdamW(lr=0.01)))
    penalties.add(0, 10, 0.1)
    weights = torch.cat([module.conv.weight.detach().flatten(), module.up.weight.detach().flatten()])
    values = sets["conv.weight"].values
    cells = (weights.view(-1, 1) - values.detach()).abs().argmin(1)
    means = torch.stack([weights[cells == place].mean() for place in range(4)])
    torch.testing.assert_close(values.grad, 2 * (values.detach() - means), rtol=1e-3, atol=1e-5)


def test_raw_gradients_of_representatives_diverge_where_counted_ones_do_not() -> None:
    ends = {}
    for kind in ("none", "count"):
        module = net()
        config = MinSquaredConfig(
            levels=2, gradient=kind, start=0.0, ramp=0.0, strength=1.0, reseed=False, learning_rate=0.1
        )
        penalties = attach_penalties(module, [rule("min-squared", config, "conv.weight")])
        values = penalties.regularized[0].penalty.representatives.values  # type: ignore[attr-defined]
        optimizer = torch.optim.SGD([values], lr=0.1)
        for _ in range(20):
            penalties.add(0, 1, 0.1)
            optimizer.step()
            penalties.after(0, 1, 0.0)
        ends[kind] = float(values.detach().abs().max())
    assert ends["none"] > 100 and ends["count"] < 1


def test_what_is_saved_is_enough_to_go_on() -> None:
    rules = [
        rule("dsmm", DsmmConfig(preset="paper-dsmm"), "conv.weight", "a"),
        rule("min-squared", MinSquaredConfig(levels=3, learnable=False, start=0.0, ramp=0.0), "fc.weight", "b"),
        rule("sine", SineConfig(levels=4, start=0.0, ramp=0.0), "up.weight", "c"),
    ]
    first = attach_penalties(net(), rules)
    first.add(0, 4, 0.1)
    with torch.no_grad():
        first.regularized[0].penalty.terms["alpha"].fill_(0.7)
    tensors, values = first.state()
    later = net()
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.mul_(3)
    second = attach_penalties(later, rules)
    second.load({name: value.clone() for name, value in tensors.items()}, values)
    for one, other in zip(first.regularized, second.regularized, strict=True):
        weight = one.seen()
        assert other.started
        assert float(other.penalty.accumulate(weight, None, 1.0).value) == float(
            one.penalty.accumulate(weight, None, 1.0).value
        )
    assert set(first.saved()) == {"conv.weight.alpha", "fc.weight.representatives", "up.weight.representatives"}


OPTIONS: dict[str, dict[str, Any]] = {"sine": {"levels": 4}, "cosine": {"levels": 4}}


def always(name: str, **options: Any) -> Any:
    """The config of a regularizer that acts from the first step at strength 0.5."""
    return REGULARIZERS[name].config(strength=0.5, start=0.0, ramp=0.0, **OPTIONS.get(name, {}), **options)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regularizer_adds_its_gradient_to_a_weight_whose_channels_lie_second(name: str) -> None:
    module = net()
    penalties = attach_penalties(module, [rule(name, always(name), "up.weight")])
    value = penalties.add(0, 10, 0.1)
    (one,) = penalties.regularized
    weight = module.up.weight.detach().transpose(0, 1).contiguous()
    gradient = torch.zeros_like(weight)
    found = one.penalty.accumulate(weight, gradient, 0.5)
    assert value == pytest.approx(0.5 * float(found.value))
    assert module.up.weight.grad is not None
    torch.testing.assert_close(module.up.weight.grad, gradient.transpose(0, 1))
    for key, term in one.penalty.terms.items():
        slope = found.terms[key]
        if one.counted:
            assert found.counts is not None
            slope = 2 * slope / found.counts.clamp_min(1)
        torch.testing.assert_close(term.grad, (0.5 * slope).to(term.dtype))
    penalties.zero_grad()
    assert all(term.grad is None for term in one.penalty.terms.values())


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regularizer_goes_on_from_its_saved_state(name: str) -> None:
    first, later = net(), net()
    penalties = attach_penalties(first, [rule(name, always(name), "[cf]*.weight")])
    penalties.add(0, 10, 0.1)
    with torch.no_grad():
        for one in penalties.regularized:
            for term in one.penalty.terms.values():
                term.mul_(1.1)
        for parameter in later.parameters():
            parameter.mul_(3)
    resumed = attach_penalties(later, [rule(name, always(name), "[cf]*.weight")])
    tensors, values = penalties.state()
    resumed.load({key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(values)))
    later.load_state_dict(first.state_dict())
    assert resumed.add(1, 10, 0.1) == penalties.add(1, 10, 0.1)
    assert resumed.saved().keys() == penalties.saved().keys()
    assert all(torch.equal(value, penalties.saved()[key]) for key, value in resumed.saved().items())
    assert resumed.facts() == penalties.facts()
    with pytest.raises(KeyError):
        resumed.load(tensors, {})


@pytest.mark.parametrize("name", REGULARIZERS)
def test_facts_name_the_regularizer_and_its_penalty_once_it_acts(name: str) -> None:
    penalties = attach_penalties(net(), [rule(name, always(name), "fc.weight")])
    before = penalties.facts()["fc.weight"]
    assert (before["regularizer"], before["strength"], before["penalty"]) == (name, 0.5, None)
    value = penalties.add(0, 10, 0.1)
    assert penalties.facts()["fc.weight"]["penalty"] == pytest.approx(2 * value)


@pytest.mark.parametrize("gradient", ["count", "none"])
def test_a_counted_step_does_not_know_sum_from_mean(gradient: str) -> None:
    """Divided by its weights, a representative's gradient is that of one weight, whatever the penalty is divided by."""
    slopes = []
    for reduction in ("sum", "mean"):
        # From even steps the representatives have a way to go; from k-means they have none.
        config = always("min-squared", levels=4, init="linear", reduction=reduction, gradient=gradient)
        penalties = attach_penalties(net(), [rule("min-squared", config, "fc.weight")])
        penalties.add(0, 10, 0.1)
        (term,) = penalties.regularized[0].penalty.terms.values()
        assert term.grad is not None
        slopes.append(term.grad)
    factor = 1 if gradient == "count" else 24
    torch.testing.assert_close(slopes[0], factor * slopes[1], rtol=1e-4, atol=1e-6)
    assert float(slopes[0].abs().max()) > 1e-3
