"""Every regularizer against its formula: values, gradients, pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompress.registry.regularizers import (
    CosineConfig,
    DsmmConfig,
    ExponentialConfig,
    KurtosisConfig,
    L2Config,
    LinfConfig,
    MarginConfig,
    MinSquaredConfig,
    SineConfig,
)
from qcompress.regularizers import penalty as penalties
from qcompress.regularizers.penalty import as_loss, make_penalty

from . import plain

ENDS = (-1.3, 1.7)
CASES: dict[str, tuple[str, Any]] = {
    "dsmm": ("dsmm", DsmmConfig(alpha=0.7)),
    "dsmm-paper": ("dsmm", DsmmConfig(preset="paper-dsmm")),
    "dsmm-auto": ("dsmm", DsmmConfig()),
    "dsmm-std": ("dsmm", DsmmConfig(alpha=2.0, normalize="std")),
    "dsmm-channel": ("dsmm", DsmmConfig(alpha=1.5, granularity="channel")),
    "dsmm-channel-sum": ("dsmm", DsmmConfig(alpha=1.5, granularity="channel", reduction="sum")),
    "dsmm-channel-auto": ("dsmm", DsmmConfig(granularity="channel")),
    "dsmm-dim2": ("dsmm", DsmmConfig(alpha=1.1, dim=2)),
    "dsmm-dim4-sum": ("dsmm", DsmmConfig(alpha=1.1, dim=4, reduction="sum")),
    "sine": ("sine", SineConfig(levels=5, range=ENDS, outside="periodic")),
    "sine-mean-square": ("sine", SineConfig(levels=4, range=ENDS, outside="periodic", power=2, reduction="mean")),
    "sine-grid": ("sine", SineConfig(bits=2)),
    "sine-grid-tensor": ("sine", SineConfig(bits=3, granularity="tensor", power=2)),
    "sine-grid-gap": ("sine", SineConfig(bits=2, height="gap")),
    "cosine": ("cosine", CosineConfig(levels=4, range=ENDS, outside="periodic")),
    "cosine-gap": ("cosine", CosineConfig(levels=4, range=ENDS, outside="periodic", height="gap", power=2)),
    "min-squared": ("min-squared", MinSquaredConfig(levels=4)),
    "min-squared-mean": ("min-squared", MinSquaredConfig(levels=5, init="linear", reduction="mean")),
    "exponential": ("exponential", ExponentialConfig(levels=4)),
    "exponential-sharp": ("exponential", ExponentialConfig(levels=3, scale=5.0, init="quantile")),
    "l2": ("l2", L2Config()),
    "l2-mean": ("l2", L2Config(reduction="mean")),
    "linf": ("linf", LinfConfig()),
    "linf-channel": ("linf", LinfConfig(granularity="channel")),
    "margin": ("margin", MarginConfig(margin=0.8)),
    "margin-tail": ("margin", MarginConfig(margin=0.9, tail_fraction=0.2, granularity="channel")),
    "kurtosis": ("kurtosis", KurtosisConfig()),
    "kurtosis-channel": ("kurtosis", KurtosisConfig(granularity="channel", reduction="sum")),
}
PERIODIC = [name for name in CASES if name.startswith(("sine", "cosine"))]


def weights(shape: tuple[int, ...] = (6, 3, 2, 2), dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(case: str, weight: Tensor) -> Any:
    name, config = CASES[case]
    return make_penalty(name, config, weight.detach())


def formula(case: str, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    name, config = CASES[case]
    value: Tensor = getattr(plain, name.replace("-", "_"))(config, weight, terms)
    return value


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_formula(case: str) -> None:
    weight = weights()
    penalty = make(case, weight)
    terms = {name: term.detach().clone().requires_grad_(True) for name, term in penalty.terms.items()}
    plain_weight = weight.clone().requires_grad_(True)
    wanted = formula(case, plain_weight, terms)
    wanted.backward()
    gradient = torch.full_like(weight, 0.25)
    found = penalty.accumulate(weight, gradient, 3.0)
    torch.testing.assert_close(found.value, wanted.detach().double(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, 0.25 + 3.0 * plain_weight.grad, rtol=1e-10, atol=1e-12)
    assert set(found.terms) == set(terms)
    for name, slope in found.terms.items():
        torch.testing.assert_close(slope, terms[name].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [name for name in CASES if not name.endswith("auto") and "grid" not in name])
def test_gradcheck(case: str) -> None:
    if CASES[case][1].normalize != "none":
        pytest.skip("the divisor counts as a constant, which differences do not know")
    weight = weights((4, 6), seed=3).requires_grad_(True)
    penalty = make(case, weight)
    assert torch.autograd.gradcheck(
        lambda w, *_: as_loss(penalty, w), (weight, *penalty.terms.values()), eps=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [1, 7, 12, 40])
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, case: str, tile: int) -> None:
    weight = weights()
    penalty = make(case, weight)
    whole = torch.zeros_like(weight)
    at_once = penalty.accumulate(weight, whole, 1.0)
    monkeypatch.setattr(penalties, "TILE_VALUES", tile)
    parts = torch.zeros_like(weight)
    in_parts = penalty.accumulate(weight, parts, 1.0)
    torch.testing.assert_close(in_parts.value, at_once.value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-13)
    for name in at_once.terms:
        torch.testing.assert_close(in_parts.terms[name], at_once.terms[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_single_precision_is_close_to_double(case: str) -> None:
    weight = weights((32, 16, 3, 3), seed=5) * 0.3
    penalty = make(case, weight)
    exact, close = torch.zeros_like(weight), torch.zeros(weight.shape)
    wanted = penalty.accumulate(weight, exact, 1.0)
    found = penalty.accumulate(weight.float(), close, 1.0)
    torch.testing.assert_close(found.value, wanted.value, rtol=1e-5, atol=1e-7)
    if case not in ("linf", "linf-channel") and case not in PERIODIC:
        # At a kink single and double precision may stand on different sides.
        different = (close.double() - exact).abs() > 1e-4 * exact.abs().max()
        assert float(different.double().mean()) < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_value_alone_and_zero_factor(case: str) -> None:
    weight = weights()
    penalty = make(case, weight)
    before = weight.clone()
    gradient = torch.zeros_like(weight)
    value = penalty.accumulate(weight, None, 1.0).value
    assert penalty.accumulate(weight, gradient, 0.0).value == value
    assert not gradient.any() and torch.equal(weight, before)


DEGENERATE = {
    "zero": torch.zeros(4, 6),
    "constant": torch.full((4, 6), 0.3),
    "one huge": torch.cat((torch.full((1, 6), 1e-3), torch.full((3, 6), -1e-3))).index_put(
        (torch.tensor([0]), torch.tensor([0])), torch.tensor([1e4])
    ),
    "one weight": torch.tensor([[0.5]]),
}


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("dsmm", "linf", "margin", "kurt", "l2"))])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_weights_give_finite_gradients(case: str, kind: str) -> None:
    weight = DEGENERATE[kind]
    if "dim" in case and len(weight) < 4:
        pytest.skip("no whole vector")
    penalty = make(case, weight)
    gradient = torch.zeros_like(weight)
    found = penalty.accumulate(weight, gradient, 1.0)
    assert bool(torch.isfinite(found.value)) and bool(torch.isfinite(gradient).all())
    assert all(bool(torch.isfinite(slope).all()) for slope in found.terms.values())
    if kind == "constant" and case.startswith(("dsmm", "kurt")):
        assert float(gradient.abs().max()) < 1e-6


def test_a_loss_keeps_one_number_a_weight() -> None:
    kept: list[int] = []
    weight = weights((64, 64)).requires_grad_(True)
    penalty = make("dsmm", weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        loss = as_loss(penalty, weight)
    assert sum(kept) <= weight.numel() + 8
    (2 * loss).backward()
    gradient = torch.zeros_like(weight)
    found = penalty.accumulate(weight.detach(), gradient, 2.0)
    torch.testing.assert_close(weight.grad, gradient)
    torch.testing.assert_close(penalty.terms["alpha"].grad, 2 * found.terms["alpha"])
