"""Moments of clipped normals, and what batch norms tell of the layers behind them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model.graph_networks import (
    Basic,
    Functional,
    Inverted,
    InvertedRelu,
    Joined,
    decisions,
    inputs,
    live_model,
    live_of,
)
from qcompress.calibration.activations import batch_norm_grids
from qcompress.model.fold import fold_batch_norms
from qcompress.model.graph import batch_norm_of, input_layers
from qcompress.model.moments import clipped_moments, convolution_moments, input_moments, normal

INFINITE = math.inf


def moments(mean: float, deviation: float, low: float, high: float) -> tuple[float, float]:
    first, second = clipped_moments(*(torch.tensor([x], dtype=torch.float64) for x in (mean, deviation, low, high)))
    return float(first), float(second)


@pytest.mark.parametrize(
    ("mean", "deviation", "low", "high", "expected"),
    [
        (0.0, 1.0, 0.0, INFINITE, 0.398942),
        (1.0, 2.0, 0.0, INFINITE, 1.395593),
        (-1.0, 0.5, 0.0, INFINITE, 0.004245),
        (3.0, 4.0, 0.0, 6.0, 3.000000),
        (5.0, 2.0, 0.0, 6.0, 4.608415),
    ],
)
def test_means_of_the_table(mean: float, deviation: float, low: float, high: float, expected: float) -> None:
    assert moments(mean, deviation, low, high)[0] == pytest.approx(expected, abs=1e-6)
    assert moments(mean, -deviation, low, high)[0] == pytest.approx(expected, abs=1e-6)


reals = st.floats(-5, 5)


@given(reals, st.floats(0.01, 5), reals, st.floats(0, 8))
def test_moments_are_those_of_the_integral(mean: float, deviation: float, low: float, width: float) -> None:
    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z.square())
    values = (mean + deviation * z).clamp(low, low + width)
    first = float((values * weight).sum() / weight.sum())
    second = float((values.square() * weight).sum() / weight.sum())
    found = moments(mean, deviation, low, low + width)
    assert found == pytest.approx((first, second - first**2), abs=2e-4)


def test_limits() -> None:
    assert moments(2.0, 3.0, -INFINITE, INFINITE) == pytest.approx((2.0, 9.0))
    assert moments(2.0, 3.0, 0.0, 1e9) == pytest.approx(moments(2.0, 3.0, 0.0, INFINITE))
    assert moments(2.0, 0.0, 0.0, INFINITE) == (2.0, 0.0)
    assert moments(-2.0, 0.0, 0.0, INFINITE) == (0.0, 0.0)
    assert moments(9.0, 0.0, -INFINITE, 6.0) == (6.0, 0.0)
    assert moments(2.0, 1e-9, 0.0, 6.0) == pytest.approx((2.0, 1e-18), abs=1e-12)
    assert moments(100.0, 1.0, 0.0, 6.0) == pytest.approx((6.0, 0.0), abs=1e-12)


@given(reals, st.floats(0.0, 3), st.floats(0, 2))
def test_a_slope_below_zero(mean: float, deviation: float, slope: float) -> None:
    one = normal(*(torch.tensor([x], dtype=torch.float64) for x in (mean, deviation)))
    bent = one.bent(torch.tensor(slope, dtype=torch.float64))
    z = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z.square())
    x = mean + deviation * z
    values = x.clamp(min=0) + slope * x.clamp(max=0)
    first = float((values * weight).sum() / weight.sum())
    variance = float((values.square() * weight).sum() / weight.sum()) - first**2
    assert float(bent.mean) == pytest.approx(first, abs=1e-4)
    assert float(bent.deviation**2) == pytest.approx(variance, abs=1e-3)


def test_a_range_holds_six_deviations_within_the_bounds() -> None:
    one = normal(torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 0.1]).double())
    assert one.range == pytest.approx((-2.6, 4.0))
    assert one.clipped(low=0.0).range == pytest.approx((0.0, 4.0))
    assert one.clipped(0.0, 3.0).range == pytest.approx((0.0, 3.0))
    assert one.clipped(high=torch.tensor([2.0, -2.2]).double()).range == pytest.approx((-2.6, 2.0))


class Pointwise(nn.Module):
    """On normal inputs what the batch norms say is what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.b, self.b_bn = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.sum, self.capped, self.bent = (nn.Conv2d(6, 2, 1) for _ in range(3))
        self.prelu = nn.PReLU(6)
        self.joint = nn.Conv2d(12, 2, 1)
        self.wide = nn.Conv2d(10, 2, 1)
        self.pooled = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        f = nn.functional
        a, b = self.a_bn(self.a(x[:, :4])), self.b_bn(self.b(x[:, 4:]))
        return (
            self.sum(f.relu(f.relu(a) + b)),
            self.capped(f.relu6(a)),
            self.bent(self.prelu(b)),
            self.joint(torch.cat([f.relu(a), b], 1)),
            self.wide(f.pad(a.clamp(min=0)[:, :, 1:], (0, 0, 0, 0, 1, 3))),
            self.pooled(f.relu(a).mean((2, 3))),
        )


def test_means_are_those_of_the_inputs() -> None:
    torch.manual_seed(0)
    module = Pointwise().double().eval()
    for conv, norm in ((module.a, module.a_bn), (module.b, module.b_bn)):
        nn.init.normal_(norm.weight, std=2.0)
        nn.init.normal_(norm.bias, std=2.0)
        norm.running_var.data = conv.weight.flatten(1).square().sum(1)
    nn.init.uniform_(module.prelu.weight, 0.0, 0.5)
    live = live_model(module, torch.randn(2, 8, 3, 3).double())
    models = input_moments(live, module)
    assert set(models) == {"sum", "capped", "bent", "joint", "wide", "pooled"}
    seen: dict[str, Tensor] = {}
    for name in models:
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].movedim(1, -1).flatten(0, -2))
        )
    module(torch.randn(4000, 8, 6, 6, generator=torch.Generator().manual_seed(1)).double())
    for name, model in models.items():
        rows = seen[name]
        # Sums of two are taken for normal before they are cut off, and are not.
        allowed = 0.1 if name == "sum" else 0.02
        scale = rows.std(0) + 0.1
        assert float(((model.moments[0] - rows.mean(0)) / scale).abs().max()) < allowed, name
        low, high = model.range
        assert low <= float(rows.min()) + 1e-9 and high >= float(rows.max()) - 1e-9, name


def test_what_no_statistics_reach_is_left_out() -> None:
    live = live_of(Basic)
    models = input_moments(live, live.module)
    assert "conv1" not in models
    assert set(models) == set(live.layers) - {"conv1"}
    # Behind a max-pool the range is known, the mean is not; a batch norm ends that.
    unknown = {name for name, model in models.items() if not model.mean_known}
    assert unknown == {"layer1.0.conv1", "layer1.0.downsample.0"}


def test_folding_changes_no_model() -> None:
    for kind in (Basic, Functional, Inverted, Joined):
        live = live_of(kind)
        before = input_moments(live, live.module)
        fold_batch_norms(live, decisions(live.module, "F64"))
        after = input_moments(live, live.quantized)
        assert before.keys() == after.keys()
        for name, model in before.items():
            for one, other in zip(model.moments, after[name].moments, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_caps_cut_a_model() -> None:
    live = live_of(Inverted)
    caps = {"features.0.1": torch.full((6,), 0.25)}
    assert float(input_moments(live, live.module, caps)["features.1.conv.0.0"].high.max()) == 0.25
    assert float(input_moments(live, live.module)["features.1.conv.0.0"].high.max()) == 6.0


def test_grids_span_what_the_batch_norms_let_through() -> None:
    live = live_of(InvertedRelu)
    grids = batch_norm_grids(live, 4, input_layers(live), live.layers)
    assert list(grids) == list(live.layers)
    assert {name for name, grid in grids.items() if grid.bits == 8} == {"features.0.0"}
    norm = batch_norm_of(live, "features.0.0")
    assert norm is not None
    beta, gamma = (live.module.get_submodule(norm.owner).get_parameter(name) for name in ("bias", "weight"))
    grid = grids["features.1.conv.0.0"]
    assert grid.zero_point == 0
    assert grid.scale * 15 == pytest.approx(float((beta + 6 * gamma.abs()).max()), rel=1e-4)


def test_relu6_ends_a_grid_at_six() -> None:
    live = live_of(Inverted)
    module = live.quantized
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.weight.data.fill_(3.0)
    grids = batch_norm_grids(live, 8, input_layers(live), live.layers)
    assert grids["features.1.conv.0.0"].scale * 255 == pytest.approx(6.0, rel=1e-6)


def test_the_network_s_input_spans_the_example() -> None:
    live = live_of(Basic)
    x = live.example.args[0]
    grid = batch_norm_grids(live, 4, input_layers(live), live.layers)["conv1"]
    assert grid.scale * 255 == pytest.approx(float(x.max() - x.min()), rel=1e-6)
    assert inputs(Basic, 2).equal(x)


def test_convolutions_have_the_moments_of_the_norms_before_them_group_by_group() -> None:
    live = live_of(InvertedRelu)
    found, models = convolution_moments(live), input_moments(live, live.module)
    convolutions = {n: m for n, m in live.module.named_modules() if isinstance(m, nn.Conv2d)}
    first, *others = convolutions
    assert {f"{name}.weight" for name in others} == {*found}
    for name in others:
        known, module = found[f"{name}.weight"], convolutions[name]
        assert known.mean.shape == known.variance.shape == (module.groups, module.in_channels // module.groups)
        mean, variance = models[name].moments
        assert torch.equal(known.mean.flatten(), mean) and torch.equal(known.variance.flatten(), variance)
    assert first not in models


def test_nothing_is_known_of_convolutions_without_norms_or_whose_inputs_are_all_zero() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    nn.init.zeros_(module[3].weight)
    assert not convolution_moments(live_model(module.double().eval(), torch.randn(2, 3, 2, 2).double()))
