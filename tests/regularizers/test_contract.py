"""Every regularizer of the registry keeps one contract; a new one fails here until it is whole."""

from __future__ import annotations

import importlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompress.regularizers
from qcompress.registry.regularizers import REGULARIZERS, RegularizerConfig
from qcompress.regularizers.penalty import Penalty, as_loss, make_penalty

from . import plain
from .test_penalties import CASES

SHARED_FILES = {"__init__", "penalty", "periodic", "representatives"}
"""What members share; every other file of the folder is a member."""

OPTIONS: dict[str, dict[str, Any]] = {
    # A temperature that follows the weight counts as a constant, which differences do not know.
    "dsmm": {"alpha": 1.5},
    "sine": {"levels": 4},
    "cosine": {"levels": 4},
}
"""What a config cannot do without, or what the gradient needs."""

SHAPES = [(24,), (4, 6), (4, 3, 2, 2)]


@pytest.fixture(params=REGULARIZERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config_of(name: str) -> RegularizerConfig:
    return REGULARIZERS[name].config(**OPTIONS.get(name, {}))


def weights(shape: tuple[int, ...] = (4, 6), seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str, weight: Tensor) -> Penalty[RegularizerConfig]:
    return make_penalty(name, config_of(name), weight)


def value_and_gradient(penalty: Penalty[RegularizerConfig], weight: Tensor) -> tuple[Tensor, Tensor]:
    gradient = torch.zeros_like(weight)
    return penalty.accumulate(weight, gradient, 1.0).value, gradient


def test_the_registry_and_the_folder_agree() -> None:
    files = {path.stem for path in Path(qcompress.regularizers.__file__).parent.glob("*.py")}
    assert files - SHARED_FILES == {name.replace("-", "_") for name in REGULARIZERS}
    assert files >= SHARED_FILES


def test_a_member_is_a_class_in_the_file_of_its_name_with_a_formula_to_be_held_against(name: str) -> None:
    entry = REGULARIZERS[name]
    module, _, member = entry.target.partition(":")
    kind = getattr(importlib.import_module(module), member)
    assert entry.name == name and module == f"qcompress.regularizers.{name.replace('-', '_')}"
    assert issubclass(kind, Penalty) and kind.__module__ == module
    assert entry.config.__name__ == f"{member}Config" and entry.config.__doc__
    assert callable(getattr(plain, name.replace("-", "_"))), "its formula by autograd, for test_penalties"
    assert name in {regularizer for regularizer, _ in CASES.values()}


def test_a_config_fills_what_is_left_open(name: str) -> None:
    config = config_of(name)
    assert None not in (config.strength, config.start, config.ramp)
    assert config.levels is None or config.levels >= 2
    assert REGULARIZERS[name].config(**OPTIONS.get(name, {})) == config


@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_is_a_finite_number_that_is_not_negative(name: str, shape: tuple[int, ...]) -> None:
    if config_of(name).levels is not None and weights(shape).numel() < 2 * (config_of(name).levels or 0):
        shape = (8, *shape)
    weight = weights(shape)
    value, gradient = value_and_gradient(make(name, weight), weight)
    assert value.shape == () and value.dtype == torch.float64 and 0 <= float(value) < float("inf")
    assert gradient.shape == weight.shape and bool(gradient.isfinite().all()) and bool(gradient.any())


def test_the_same_call_gives_the_same_and_changes_no_input(name: str) -> None:
    weight = weights((8, 6))
    penalty, other = make(name, weight), make(name, weight)
    before, terms = weight.clone(), {key: term.detach().clone() for key, term in penalty.terms.items()}
    results = [value_and_gradient(one, weight) for one in (penalty, penalty, other)]
    assert torch.equal(weight, before)
    assert all(torch.equal(term, terms[key]) for key, term in penalty.terms.items())
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])


def test_the_factor_multiplies_what_is_added_and_not_the_value(name: str) -> None:
    weight = weights((8, 6))
    penalty = make(name, weight)
    value, gradient = value_and_gradient(penalty, weight)
    added = torch.full_like(weight, 0.5)
    found = penalty.accumulate(weight, added, -3.0)
    assert torch.equal(found.value, value)
    torch.testing.assert_close(added, 0.5 - 3 * gradient, rtol=1e-12, atol=1e-12)
    assert torch.equal(penalty.accumulate(weight, None, 1.0).value, value)


def test_gradients_are_those_of_finite_differences(name: str) -> None:
    # Of another weight's representatives none lies on a weight, where there is a kink.
    penalty, weight = make(name, weights((8, 6), seed=4)), weights((8, 6)).requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x, *_: as_loss(penalty, x), (weight, *penalty.terms.values()), eps=1e-7, atol=1e-6
    )


def test_gradients_are_those_of_the_formula_by_autograd(name: str) -> None:
    for case, (regularizer, config) in CASES.items():
        if regularizer != name:
            continue
        weight = weights((8, 6))
        penalty = make_penalty(name, config, weight)
        terms = {key: term.detach().clone() for key, term in penalty.terms.items()}
        x = weight.clone().requires_grad_(True)
        wanted = getattr(plain, name.replace("-", "_"))(config, x, terms)
        wanted.backward()
        value, gradient = value_and_gradient(penalty, weight)
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-10, atol=1e-12, msg=case)
        torch.testing.assert_close(gradient, x.grad, rtol=1e-9, atol=1e-11, msg=case)


def test_what_is_learned_is_a_leaf_with_a_gradient_and_is_saved(name: str) -> None:
    weight = weights((8, 6))
    penalty = make(name, weight)
    found, saved = penalty.accumulate(weight, None, 1.0), penalty.saved(weight)
    assert found.terms.keys() == penalty.terms.keys() <= saved.keys()
    for key, term in penalty.terms.items():
        assert term.is_leaf and term.requires_grad
        assert found.terms[key].shape == term.shape and found.terms[key].dtype == term.dtype
    for value in saved.values():
        assert value.dtype == torch.float32 and value.device.type == "cpu" and not value.requires_grad
        assert bool(value.isfinite().all())
    if config_of(name).levels is not None:
        assert saved["representatives"].shape[-1] == config_of(name).levels


def test_beginning_anew_forgets_the_first_weight(name: str) -> None:
    first, weight = weights((8, 6)), 3 * weights((8, 6), seed=4)
    moved = make(name, first)
    moved.begin(weight)
    fresh = make(name, weight)
    for found, wanted in zip(value_and_gradient(moved, weight), value_and_gradient(fresh, weight), strict=True):
        assert torch.equal(found, wanted)


def test_what_is_settled_stays(name: str) -> None:
    """Terms that a step has thrown far off come back to where they may be, and once is enough."""
    weight = weights((8, 6))
    penalty = make(name, weight)
    with torch.no_grad():
        for term in penalty.terms.values():
            term.sub_(100)
    penalty.settle(weight, penalty.accumulate(weight, None, 1.0))
    settled = {key: term.detach().clone() for key, term in penalty.terms.items()}
    found = penalty.accumulate(weight, None, 1.0)
    assert 0 <= float(found.value) < float("inf")
    if found.counts is None:
        penalty.settle(weight, found)
        assert all(torch.equal(term, settled[key]) for key, term in penalty.terms.items())


@pytest.mark.parametrize("learnable", [True, False])
def test_a_saved_state_is_enough_to_go_on(name: str, learnable: bool) -> None:
    config = config_of(name)
    if not learnable:
        if "learnable" not in {option.name for option in fields(config)}:
            pytest.skip("has nothing to be learned")
        config = replace(config, learnable=False)  # type: ignore[call-arg]
    weight, other = weights((8, 6)), 5 * weights((8, 6), seed=9)
    penalty, resumed = make_penalty(name, config, weight), make_penalty(name, config, other)
    assert learnable or not penalty.terms
    with torch.no_grad():
        for term in penalty.terms.values():
            term.mul_(1.25)
        for key, value in penalty.state().items():
            resumed.state()[key].copy_(value)
    resumed.ends = penalty.ends
    assert penalty.terms.keys() <= penalty.state().keys()
    for found, wanted in zip(value_and_gradient(resumed, weight), value_and_gradient(penalty, weight), strict=True):
        assert torch.equal(found, wanted)
    for key, value in penalty.saved(weight).items():
        assert torch.equal(resumed.saved(weight)[key], value)


def test_a_proximal_step_lowers_the_penalty_and_begins_along_its_gradient(name: str) -> None:
    penalty, weight = make(name, weights((8, 6), seed=4)), weights((8, 6))
    if not config_of(name).has_proximal:
        with pytest.raises(ValueError, match="no closed proximal form"):
            REGULARIZERS[name].config(**OPTIONS.get(name, {}), coupling="proximal")
        with pytest.raises(NotImplementedError):
            penalty.shrink(weight, 0.1)
        return
    value, gradient = value_and_gradient(penalty, weight)
    little, far = weight.clone(), weight.clone()
    penalty.shrink(little, 1e-6)
    penalty.shrink(far, 0.3)
    torch.testing.assert_close((weight - little) / 1e-6, gradient, rtol=1e-4, atol=1e-6)
    assert float(penalty.accumulate(far, None, 1.0).value) < float(value)


def test_a_penalty_holds_nothing_together_unless_it_is_told_to(name: str) -> None:
    one, other = make(name, weights((8, 6))), make(name, weights((8, 6)))
    assert one.shared is one.shared and one.shared is not other.shared
