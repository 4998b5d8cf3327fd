"""What is true of the regularizers that pull weights to representatives."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompress.errors import ModelError
from qcompress.registry.regularizers import CosineConfig, ExponentialConfig, MinSquaredConfig, SineConfig
from qcompress.regularizers.cosine import Cosine
from qcompress.regularizers.exponential import Exponential
from qcompress.regularizers.min_squared import MinSquared
from qcompress.regularizers.representatives import COMPARED
from qcompress.regularizers.sine import Sine


def gaussian(count: int = 500, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("levels", [2, 3, COMPARED, COMPARED + 1, 40])
def test_cells_are_those_of_the_nearest_representatives(levels: int) -> None:
    """Against all distances, one by one; a weight half-way belongs to the lower one."""
    centres = torch.arange(levels, dtype=torch.float64)
    weight = torch.cat((levels * gaussian(2000), centres, centres + 0.5)).view(1, -1)
    penalty = MinSquared(MinSquaredConfig(levels=levels, init="linear", range=(0.0, 1.0)), weight)
    with torch.no_grad():
        penalty.representatives.values.copy_(centres.flip(0))
    gradient = torch.zeros_like(weight)
    found = penalty.accumulate(weight, gradient, 1.0)
    distances = weight.view(-1, 1) - centres
    nearest = distances.abs().argmin(1)
    left = distances.gather(1, nearest.view(-1, 1)).flatten()
    pulls = torch.zeros(levels, dtype=torch.float64).index_add(0, nearest, -2 * left)
    assert float(found.value) == pytest.approx(float(left.square().sum()))
    assert torch.equal(gradient.flatten(), 2 * left)
    assert found.counts is not None
    assert torch.equal(found.counts.flip(0), torch.bincount(nearest, minlength=levels).double())
    torch.testing.assert_close(found.terms["representatives"].flip(0), pulls, rtol=0, atol=1e-8)


def value_of(penalty: Sine | Cosine, x: float) -> float:
    return float(penalty.accumulate(torch.tensor([x], dtype=torch.float64), None, 1.0).value)


def test_minima_and_maxima_of_sine_and_cosine() -> None:
    ends = (-0.5, 0.5)
    weight = gaussian()
    waves = Sine(SineConfig(levels=4, range=ends), weight)
    cosines = Cosine(CosineConfig(levels=4, range=ends), weight)
    places = {waves: (-0.5, -1 / 6, 1 / 6, 0.5), cosines: (-0.375, -0.125, 0.125, 0.375)}
    for penalty, minima in places.items():
        saved = penalty.saved(weight)["representatives"].tolist()
        assert saved == pytest.approx(minima)
        assert [value_of(penalty, x) for x in minima] == pytest.approx([0] * 4, abs=1e-12)
        between = [(low + high) / 2 for low, high in pairwise(minima)]
        assert [value_of(penalty, x) for x in between] == pytest.approx([1] * 3)


@pytest.mark.parametrize("make", ["sine", "cosine"])
def test_beyond_the_range(make: str) -> None:
    """Periodic has more minima there, hinge rises with the steepest slope, clamp stays at zero."""
    config, build = {"sine": (SineConfig, Sine), "cosine": (CosineConfig, Cosine)}[make]
    weight = gaussian()
    found = {
        kind: build(config(levels=3, range=(0.0, 1.0), outside=kind), weight) for kind in ("periodic", "hinge", "clamp")
    }
    outer = found["hinge"].saved(weight)["representatives"][-1].item()
    step = 0.5 if make == "sine" else 1 / 3
    assert value_of(found["periodic"], outer + step) == pytest.approx(0, abs=1e-6)
    assert value_of(found["clamp"], outer + step) == pytest.approx(0, abs=1e-6)
    assert value_of(found["hinge"], outer + step) == pytest.approx(math.pi, rel=1e-5)
    gradients = {}
    for kind, penalty in found.items():
        x = torch.tensor([outer + 0.4 * step], dtype=torch.float64)
        gradients[kind] = torch.zeros_like(x)
        penalty.accumulate(x, gradients[kind], 1.0)
    assert gradients["clamp"].item() == 0
    assert gradients["hinge"].item() == pytest.approx(math.pi / step, rel=1e-5)


def test_square_of_the_cosine_is_a_plain_cosine() -> None:
    """|cos x|^2 = (1 + cos 2x) / 2."""
    weight = gaussian()
    penalty = Cosine(CosineConfig(levels=4, range=(-1.0, 1.0), power=2, outside="periodic"), weight)
    wanted = ((1 + torch.cos(2 * math.pi * 4 * (weight + 1) / 2)) / 2).sum()
    assert float(penalty.accumulate(weight, None, 1.0).value) == pytest.approx(float(wanted))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_sine_on_the_grid_is_zero_exactly_on_what_round_to_nearest_gives(granularity: str) -> None:
    from contexts import context_at

    from qcompress.coding.grids import decode
    from qcompress.methods import rtn
    from qcompress.registry import RtnConfig

    weight = gaussian(40 * 30).view(40, 30).float()
    affine = rtn.encode(weight, RtnConfig(bits=3, granularity=granularity), context_at(0))
    rounded = decode(affine).double()
    penalty = Sine(SineConfig(bits=3, granularity=granularity), weight)
    per_weight = SineConfig(bits=3, granularity=granularity, reduction="mean")
    # Scales are stored in half precision: a step is off by up to 2^-11 of itself.
    assert float(Sine(per_weight, weight).accumulate(rounded, None, 1.0).value) < 0.01
    assert float(Sine(per_weight, weight).accumulate(weight.double(), None, 1.0).value) > 0.3
    levels = penalty.saved(weight)["representatives"]
    assert levels.shape == (40 if granularity == "channel" else 1, 8)
    distance = (rounded.unsqueeze(2) - levels.double().unsqueeze(1)).abs().min(2).values
    assert float(distance.max()) < 3e-3 * float(weight.abs().max())


@given(st.integers(2, 9), st.integers(0, 500), st.sampled_from(["min-squared", "exponential"]))
def test_sorted_search_is_the_comparison_with_every_representative(levels: int, seed: int, kind: str) -> None:
    weight = gaussian(60, seed)
    config = (MinSquaredConfig if kind == "min-squared" else ExponentialConfig)(levels=levels)
    penalty = (MinSquared if kind == "min-squared" else Exponential)(config, weight)
    order = torch.randperm(levels, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        penalty.representatives.values.copy_(gaussian(levels, seed + 1)[order])
    centres = penalty.representatives.values.detach().clone().requires_grad_(True)
    plain = weight.clone().requires_grad_(True)
    distance = (plain.view(-1, 1) - centres).abs().min(1).values
    wanted = (distance.square() if kind == "min-squared" else 1 - torch.exp(-distance)).sum()
    wanted.backward()
    gradient = torch.zeros_like(weight)
    found = penalty.accumulate(weight, gradient, 1.0)
    assert float(found.value) == pytest.approx(float(wanted), rel=1e-10)
    torch.testing.assert_close(gradient, plain.grad)
    torch.testing.assert_close(found.terms["representatives"], centres.grad)


def test_one_step_of_the_right_length_is_one_of_lloyd() -> None:
    weight = gaussian(300)
    penalty = MinSquared(MinSquaredConfig(levels=5, init="quantile"), weight)
    before = penalty.representatives.values.detach().clone()
    found = penalty.accumulate(weight, None, 1.0)
    assert found.counts is not None
    moved = before - found.terms["representatives"] / (2 * found.counts)
    cells = (weight.view(-1, 1) - before).abs().argmin(1)
    means = torch.stack([weight[cells == j].mean() for j in range(5)])
    torch.testing.assert_close(moved, means)
    torch.testing.assert_close(found.terms["representatives"], 2 * found.counts * (before - means))


def test_exponential_is_bounded_and_has_both_limits() -> None:
    weight = gaussian(100)

    def value(scale: float) -> float:
        penalty = Exponential(ExponentialConfig(levels=4, scale=scale, init="linear"), weight)
        return float(penalty.accumulate(weight, None, 1.0).value)

    penalty = MinSquared(MinSquaredConfig(levels=4, init="linear"), weight)
    plain = (weight.view(-1, 1) - penalty.representatives.values.detach()).abs().min(1).values
    assert 0 <= value(1.0) < 100
    assert value(1e-6) / 1e-6 == pytest.approx(float(plain.sum()), rel=1e-4)
    # The two weights at the ends lie on representatives.
    assert value(1e9) == pytest.approx(98)


def test_proximal_steps_end_on_the_representatives_without_passing_them() -> None:
    weight = gaussian(400)
    for config, member in ((MinSquaredConfig(levels=4), MinSquared), (ExponentialConfig(levels=4), Exponential)):
        penalty = member(config, weight)
        centres = penalty.representatives.values.detach()
        nearest = centres[(weight.view(-1, 1) - centres).abs().argmin(1)]
        moved = weight.clone()
        penalty.shrink(moved, 0.3)
        share = (moved - nearest) / (weight - nearest)
        assert bool(((share >= 0) & (share <= 1)).all())
        for _ in range(400):
            penalty.shrink(moved, 0.3)
        assert len((moved * 1e6).round().unique()) <= 4
    quadratic = MinSquared(MinSquaredConfig(levels=4), weight)
    centres = quadratic.representatives.values.detach()
    nearest = centres[(weight.view(-1, 1) - centres).abs().argmin(1)]
    moved = weight.clone()
    quadratic.shrink(moved, 0.3)
    # The minimum of |x - w|^2 / 2 + rate |x - c|^2.
    torch.testing.assert_close(moved - weight + 2 * 0.3 * (moved - nearest), torch.zeros_like(weight))


def test_dead_representatives_get_a_new_place_unless_told_otherwise() -> None:
    weight = gaussian(300)
    for reseed in (True, False):
        penalty = MinSquared(MinSquaredConfig(levels=4, reseed=reseed), weight)
        with torch.no_grad():
            penalty.representatives.values[0] = 1e6
        found = penalty.accumulate(weight, None, 1.0)
        assert penalty.representatives.dead == 1
        penalty.settle(weight, found)
        assert (float(penalty.representatives.values.max()) < 10) is reseed


def test_kmeans_start_is_a_local_optimum_and_no_worse_than_quantiles() -> None:
    weight = gaussian(2000)

    def value(start: str) -> float:
        return float(MinSquared(MinSquaredConfig(levels=6, init=start), weight).accumulate(weight, None, 1.0).value)

    assert value("kmeans") <= value("quantile")
    penalty = MinSquared(MinSquaredConfig(levels=6), weight)
    found = penalty.accumulate(weight, None, 1.0)
    assert float((found.terms["representatives"] / found.counts).abs().max()) < 1e-2


@pytest.mark.parametrize("distinct", [1, 3])
def test_more_representatives_than_distinct_weights_are_refused(distinct: int) -> None:
    weight = torch.arange(60.0).remainder(distinct).view(6, 10)
    with pytest.raises(ModelError, match=f"4 representatives for {distinct} distinct weights"):
        MinSquared(MinSquaredConfig(levels=4), weight)


def test_a_constant_weight_has_no_range() -> None:
    with pytest.raises(ModelError, match="constant"):
        Sine(SineConfig(levels=4), torch.ones(3, 4))
