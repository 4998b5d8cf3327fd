"""Quantizers hang on a live model while it is trained, and come off clean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.errors import TrainingError
from qcompress.methods.lsq import InputStep, LearnedStep
from qcompress.model.live import find_tensor
from qcompress.training.fake_quantize import (
    LEAST_SHARE,
    ActivationInit,
    adjusted_tensors,
    fake_quantized,
    places_of,
    train_grids,
    trained_weight,
)
from qcompress.training.loop import Trained
from qcompress.training.optimizers import make_optimizer
from qcompress.training.penalties import Penalties
from qcompress.types.encoded import ActivationGrid
from qcompress.types.settings import Sgd

from .small import tied


class Stub:
    """A trainer that does what it is told, and has no regularizers."""

    penalties = Penalties([])

    def __init__(self, teach: Callable[..., None]) -> None:
        self.teach = teach

    def attach(self, _: nn.Module) -> list[str]:
        return []

    def warn(self, lines: Iterable[str]) -> None:
        assert not [*lines]

    def __call__(self, *arguments: Any) -> Trained:
        self.teach(*arguments)
        return Trained(1, 0.0, 0.0, 1)


def test_tied_copies_follow_and_what_others_compressed_stays() -> None:
    found, own = tied()
    weights = {d.tensor.name: LearnedStep(find_tensor(found.quantized, d.tensor.name), d) for d in own}
    before = copy.deepcopy(found.quantized.state_dict())
    with fake_quantized(found, weights) as module:
        layers: Any = module
        assert torch.equal(layers.first.weight, layers.second.weight)
        assert len(layers.second.weight.unique()) <= 4 * 6
        assert not layers.last.weight.requires_grad and layers.last.bias.requires_grad
        optimizer = make_optimizer(Sgd(lr=0.1), module, [])
        module(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        moved = trained_weight(module, "first.weight")
    after = found.quantized.state_dict()
    assert after.keys() == before.keys()
    assert torch.equal(after["first.weight"], moved) and torch.equal(after["second.weight"], moved)
    assert found.quantized.first.weight is found.quantized.second.weight  # type: ignore[union-attr]
    assert torch.equal(after["last.weight"], before["last.weight"])
    assert not any(parameter.requires_grad for parameter in found.quantized.parameters())
    # The copy is stored once, so it is no tensor that was adjusted.
    assert set(adjusted_tensors(found, {"first.weight"})) == {"first.bias", "second.bias", "last.bias"}


def test_quantizers_come_off_after_an_error_too() -> None:
    found, own = tied()
    weights = {d.tensor.name: LearnedStep(find_tensor(found.quantized, d.tensor.name), d) for d in own}
    start = ActivationInit(ActivationGrid(2, 0.5, 0), 0.4, 0.0, 6, False)
    before = set(found.quantized.state_dict())
    with (
        pytest.raises(RuntimeError),
        fake_quantized(found, weights, {"first": InputStep(start, by_mean=True)}) as module,
    ):
        assert "first.qcompress_input.step" in module.state_dict()
        raise RuntimeError
    assert set(found.quantized.state_dict()) == before
    assert not [hook for one in found.quantized.modules() for hook in one._forward_pre_hooks]


def test_a_weight_that_is_no_number_is_named() -> None:
    found, own = tied()
    weights = {d.tensor.name: LearnedStep(find_tensor(found.quantized, d.tensor.name), d) for d in own}
    with fake_quantized(found, weights) as module:
        with torch.no_grad():
            module.first.parametrizations.weight.original[0, 0] = torch.inf  # type: ignore[union-attr]
        with pytest.raises(TrainingError, match=r"first\.weight"):
            trained_weight(module, "first.weight")


class Doubled(nn.Module):
    """Stands for a quantizer: what goes forward is twice the weight, or the input, times a learned step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.step * x


def test_what_goes_forward_is_what_the_quantizers_make() -> None:
    found, _ = tied()
    x = torch.randn(4, 6)
    before = found.quantized(x)
    with fake_quantized(found, {"last.weight": Doubled()}, {"first": Doubled()}) as module:
        layers: Any = module
        hidden = F.relu(F.linear(2 * x, layers.first.weight, layers.first.bias))
        hidden = F.relu(F.linear(hidden, layers.second.weight, layers.second.bias))
        wanted = F.linear(hidden, 2 * layers.last.parametrizations.weight.original, layers.last.bias)
        torch.testing.assert_close(module(x), wanted)
        assert not torch.equal(module(x), before)
    torch.testing.assert_close(found.quantized(x), before)


def test_a_parameter_that_a_step_leads_too_low_is_brought_back() -> None:
    found, _ = tied()
    quantizer, seen = Doubled(), []

    def teach(module: nn.Module, after_step: Callable[[float], None], groups: Sequence[Mapping[str, Any]]) -> None:
        with torch.no_grad():
            quantizer.step.fill_(-3.0)
        after_step(0.5)
        seen.append(float(quantizer.step.detach()))
        assert [*groups] == [{"params": [quantizer.step]}]
        with torch.no_grad():
            module.last.parametrizations.weight.original.add_(1.0)  # type: ignore[union-attr,operator]

    before = find_tensor(found.quantized, "last.weight").detach().clone()
    least = torch.tensor(LEAST_SHARE)
    groups = [{"params": [quantizer.step]}]
    trained: Any = Stub(teach)
    moved = train_grids(found, trained, {"last.weight": quantizer}, {}, [(quantizer.step, least)], groups)
    assert seen == [LEAST_SHARE] and list(moved) == ["last.weight"]
    torch.testing.assert_close(moved["last.weight"], before + 1)
    assert set(adjusted_tensors(found, set())) == {"last.weight"}
    assert not adjusted_tensors(found, {"last.weight"})


def test_every_name_of_a_parameter_is_found_its_own_first() -> None:
    found, _ = tied()
    assert places_of(found.module, "first.weight") == ["first.weight", "second.weight"]
    assert places_of(found.module, "second.weight") == ["second.weight", "first.weight"]
    assert places_of(found.module, "last.bias") == ["last.bias"]
