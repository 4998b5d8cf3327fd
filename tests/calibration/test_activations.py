"""Activation quantizers: their grids, their ranges, and that they come off clean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model.networks import Mlp, Residual, inputs, live

from qcompress.calibration.activations import (
    BINS,
    activation_grid,
    attach_activations,
    attach_caps,
    batch_norm_grids,
    least_error_range,
    measure_activations,
    percentile_range,
    quantize_activation,
)
from qcompress.data.batches import Batch
from qcompress.errors import DataError
from qcompress.types.encoded import ActivationGrid
from qcompress.types.settings import ActivationSettings

ends = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(ends, ends, st.integers(2, 8))
def test_a_grid_holds_zero_and_reaches_its_ends(one: float, other: float, bits: int) -> None:
    low, high = sorted((one, other))
    grid = activation_grid(low, high, bits)
    assert grid.scale > 0 and 0 <= grid.zero_point < 2**bits
    assert float(torch.tensor(grid.scale, dtype=torch.float32)) == grid.scale
    assert float(quantize_activation(torch.zeros(1), grid)) == 0.0
    x = torch.tensor([min(low, 0.0), max(high, 0.0)])
    assert (quantize_activation(x, grid) - x).abs().max() <= 0.51 * grid.scale + 1e-6 * x.abs().max()


@given(st.integers(2, 8), st.integers(0, 255), st.floats(0.0078125, 8, width=32))
def test_quantized_values_are_the_formula(bits: int, zero_point: int, scale: float) -> None:
    grid = ActivationGrid(bits, scale, zero_point % 2**bits)
    x = torch.linspace(-300 * scale, 300 * scale, 999)
    codes = (torch.round(x * (1 / torch.tensor(scale))) + grid.zero_point).clamp(0, 2**bits - 1)
    torch.testing.assert_close(quantize_activation(x, grid), (codes - grid.zero_point) * scale)


def histogram(x: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    low, high = float(x.min()), float(x.max())
    bins = ((x - low) * (BINS / (high - low))).long().clamp(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS).double(), low, high


def error(x: torch.Tensor, low: float, high: float, bits: int) -> float:
    return float((quantize_activation(x, activation_grid(low, high, bits)) - x).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "relu", "heavy", "shifted"])
def test_the_least_error_range_is_as_good_as_any_shrunken_one(shape: str, bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000)
    x = {"normal": x, "relu": x.clamp(min=0), "heavy": x**3, "shifted": x * 0.2 + 0.5}[shape]
    found = error(x, *least_error_range(*histogram(x), bits), bits)
    low, high = min(float(x.min()), 0.0), float(x.max())
    for shrink in (k / 50 for k in range(1, 51)):
        assert found <= error(x, low * shrink, high * shrink, bits) * 1.03


def test_a_percentile_leaves_its_share_beyond() -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000)
    low, high = percentile_range(*histogram(x), 0.98)
    assert float((x < low).float().mean()) == pytest.approx(0.01, abs=0.002)
    assert float((x > high).float().mean()) == pytest.approx(0.01, abs=0.002)
    low, high = percentile_range(*histogram(x.abs()), 0.98)
    assert low == pytest.approx(0, abs=1e-3)
    assert float((x.abs() > high).float().mean()) == pytest.approx(0.02, abs=0.002)


def test_the_whole_range_is_the_hundredth_percentile() -> None:
    counts, low, high = histogram(torch.randn(1000))
    assert percentile_range(counts, low, high, 1.0) == pytest.approx((low, high), abs=(high - low) / BINS)


@pytest.mark.parametrize("kind", ["minmax", "mse", "percentile", "noise"])
def test_every_layer_has_a_quantizer_and_the_input_has_8_bits(kind: str) -> None:
    found = live(Residual)
    grids = measure_activations(found, ActivationSettings(bits=4, range=kind), {found.layers[0]}, found.layers)
    assert [grids[name].bits for name in found.layers] == [8, 4, 4, 4]
    # Behind a ReLU nothing is negative.
    assert all(grids[name].zero_point == 0 for name in found.layers[1:])


@pytest.mark.parametrize("kind", ["batch-norm", "noise"])
def test_without_data_the_networks_own_input_keeps_its_sign_and_its_size(kind: str) -> None:
    """Its range is what the example shows: no statistics reach it, and noise is not like it."""
    found = live(Residual)
    settings, first = ActivationSettings(bits=4, range=kind), found.layers[0]
    if kind == "noise":
        grids = measure_activations(found, settings, {first}, found.layers)
    else:
        grids = batch_norm_grids(found, 4, {first}, found.layers)
    x = found.example.args[0]
    assert float(x.min()) < 0
    assert grids[first] == activation_grid(float(x.min()), float(x.max()), 8)
    assert set(grids) == set(found.layers)


def test_minmax_is_the_range_of_what_flows() -> None:
    found = live(Mlp)
    name = found.layers[1]
    grid = measure_activations(found, ActivationSettings(range="minmax"), (), [name])[name]
    highest = max(float(found.module.layers[:2](batch.args[0]).max()) for batch in found.calibration)
    assert grid == activation_grid(0.0, highest, 8)


def test_quantizers_sit_on_inputs_and_come_off_clean() -> None:
    found = live(Mlp)
    x = inputs(Mlp, 4)
    plain = found.module(x)
    grid = ActivationGrid(2, 0.5, 1)
    handles = attach_activations(found.module, {"layers.2": grid})
    first = found.module.layers[:2](x)
    torch.testing.assert_close(found.module(x), found.module.layers[2:](first))
    assert not torch.equal(found.module(x), plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(found.module(x), plain)


def test_caps_bound_each_channel() -> None:
    found = live(Residual)
    caps = torch.linspace(0.1, 0.8, 8)
    handles = attach_caps(found.module, {"bn1": caps})
    seen = []
    found.module.bn1.register_forward_hook(lambda *args: seen.append(args[2]))
    found.module(inputs(Residual, 4))
    torch.testing.assert_close(
        seen[0].amax((0, 2, 3)).clamp(min=-math.inf, max=None).minimum(caps), seen[0].amax((0, 2, 3))
    )
    assert bool((seen[0].amax((0, 2, 3)) == caps).any())
    handles[0].remove()


def test_inputs_that_are_not_finite_are_named() -> None:
    found = live(Mlp)
    found.calibration = [Batch((torch.full((2, 6), math.nan),))]
    with pytest.raises(DataError, match=r"layers\.0.*NaN"):
        measure_activations(found, ActivationSettings(range="minmax"), (), found.layers)
