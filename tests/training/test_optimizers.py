"""Optimizers and learning rates: what decays, what has settings of its own, and known rates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcompress.training.optimizers import make_optimizer, rate_at, refuse_decay
from qcompress.types.settings import AdamW, Constant, Cosine, Sgd, Step


@given(st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1))
def test_rates_stay_between_nothing_and_the_highest(warm_up: float, final: float, share: float) -> None:
    for schedule in (Constant(), Cosine(final=final), Step(at=(0.3, 0.6), factor=0.5)):
        assert 0 <= rate_at(schedule, warm_up, share) <= 1
        assert rate_at(schedule, warm_up, warm_up) == 1 or isinstance(schedule, Step)


def test_known_rates() -> None:
    assert rate_at(Constant(), 0.2, 0.1) == pytest.approx(0.5)
    assert rate_at(Cosine(), 0.0, 0.5) == pytest.approx(0.5)
    assert rate_at(Cosine(final=0.1), 0.0, 1.0) == pytest.approx(0.1)
    assert [rate_at(Step(at=(0.5, 0.75), factor=0.1), 0.0, t) for t in (0.4, 0.5, 0.8)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("settings", [Sgd(lr=0.1, weight_decay=0.01, nesterov=True), AdamW(lr=0.1, weight_decay=0.01)])
def test_only_matrices_decay(settings: Sgd | AdamW) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    term = torch.ones(1, requires_grad=True)
    optimizer = make_optimizer(settings, module, [{"params": [term], "lr": 0.5, "momentum": 0.0}])
    assert optimizer.param_groups[-1]["lr"] == 0.5
    before = {id(p): p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decayed = not torch.equal(parameter, before[id(parameter)])
            assert decayed == (parameter.ndim >= 2)


def test_what_is_learned_must_not_be_in_a_decaying_group() -> None:
    term = torch.ones(1)
    with pytest.raises(ValueError, match="decays"):
        refuse_decay([{"params": [term], "weight_decay": 0.1}], [term])
    refuse_decay([{"params": [term], "weight_decay": 0.0}], [term])


def test_groups_of_their_own_are_in_no_other() -> None:
    module = nn.Linear(3, 4)
    optimizer = make_optimizer(
        Sgd(lr=0.1, weight_decay=0.5), module, [], [{"params": [module.weight], "weight_decay": 0.25, "lr": 0.2}]
    )
    found = {id(p): (group["weight_decay"], group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    assert found == {id(module.weight): (0.25, 0.2), id(module.bias): (0.0, 0.1)}


@pytest.mark.parametrize("settings", [Sgd(lr=0.1, nesterov=True), AdamW(lr=0.1, betas=(0.8, 0.9), epsilon=1e-6)])
def test_what_is_learned_is_stepped_as_its_group_says(settings: Sgd | AdamW) -> None:
    """A group without momentum takes plain steps even where the others have Nesterov's."""
    term = torch.ones(1, requires_grad=True)
    optimizer = make_optimizer(settings, nn.Linear(2, 2), [{"params": [term], "lr": 0.5, "momentum": 0.0}])
    for _ in range(3):
        term.grad = torch.ones(1)
        before = float(term.detach())
        optimizer.step()
        assert before - float(term.detach()) == pytest.approx(0.5, rel=1e-4)


def test_frozen_parameters_are_in_no_group() -> None:
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    optimizer = make_optimizer(Sgd(lr=0.1), module, [])
    assert [p for group in optimizer.param_groups for p in group["params"]] == [module.bias]


@pytest.mark.parametrize("laid", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("settings", [Sgd(lr=0.1, momentum=0.8), Sgd(lr=0.1, nesterov=True), AdamW(lr=0.1)], ids=str)
def test_steps_are_those_of_the_library_s_plain_optimizer(settings: Sgd | AdamW, laid: torch.memory_format) -> None:
    """However weights and gradients lie in memory, which need not be alike."""
    settings = dataclasses.replace(settings, weight_decay=0.01)
    modules = [nn.Conv2d(4, 6, 3, bias=False) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    modules[0].to(memory_format=laid)
    ours, theirs = make_optimizer(settings, modules[0], []), plain(settings, modules[1])
    for seed in range(3):
        gradient = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        for module, optimizer in zip(modules, (ours, theirs), strict=True):
            module.weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(modules[0].weight, modules[1].weight, rtol=1e-5, atol=1e-6)


def plain(settings: Sgd | AdamW, module: nn.Module) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if isinstance(settings, AdamW):
        return torch.optim.AdamW(module.parameters(), settings.lr, weight_decay=decay, fused=False)
    momentum, nesterov = settings.momentum, settings.nesterov
    return torch.optim.SGD(module.parameters(), settings.lr, momentum, 0, decay, nesterov, fused=False)
