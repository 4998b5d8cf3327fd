"""Quantizers of inputs start from the network as it was."""

from __future__ import annotations

import pytest
import torch
from model.networks import Residual, Untraceable, live

from qcompress.errors import DataError
from qcompress.methods.lsq import InputStep
from qcompress.training.fake_quantize import activation_inits
from qcompress.types.settings import ActivationSettings

from .small import make_trainer


def test_starts_are_those_of_the_network_as_it_was() -> None:
    found = live(Residual, "lsq", bits=2)
    found.activations = ActivationSettings(bits=3)
    teach = make_trainer(Residual)
    starts = activation_inits(found, teach)
    assert set(starts) == set(found.layers)
    assert {name for name, one in starts.items() if one.fixed} == {"stem"}
    assert {name: one.grid.bits for name, one in starts.items()} == {"stem": 8, "conv1": 3, "conv2": 3, "fc": 3}
    assert starts["stem"].middle == 128 and starts["conv1"].middle == 0
    x = torch.cat([batch.args[0] for batch in teach.first_batches(torch.device("cpu"))])
    assert starts["stem"].mean == pytest.approx(float(x.abs().mean()), rel=1e-5)
    assert starts["stem"].features == 3 * 8 * 8 and starts["fc"].features == 8
    low, high = float(x.min()), float(x.max())
    assert starts["stem"].grid.scale == pytest.approx((high - low) / 255, rel=1e-5)
    step = InputStep(starts["conv1"], by_mean=True)
    assert float(step.step.detach()) == pytest.approx(2 * starts["conv1"].mean / 7**0.5, rel=1e-5)
    assert not InputStep(starts["stem"], by_mean=True).step.requires_grad
    found.activations = None
    assert activation_inits(found, teach) == {}


def test_a_range_in_the_recipe_is_where_inputs_start() -> None:
    found = live(Residual, "pact", bits=2)
    grids = {}
    for name in ("minmax", "mse"):
        found.activations = ActivationSettings(bits=2, range=name)  # type: ignore[arg-type]
        grids[name] = activation_inits(found, make_trainer(Residual))["conv1"].grid.scale
    assert grids["mse"] < grids["minmax"]


def test_networks_that_cannot_be_traced_begin_with_the_first_layer() -> None:
    found = live(Untraceable, "lsq", blocks=("blocks.*",), bits=2)
    found.activations = ActivationSettings(bits=4)
    starts = activation_inits(found, make_trainer(Untraceable))
    assert {name for name, one in starts.items() if one.fixed} == {"embed"}


def test_too_few_samples_are_refused_before_anything_is_measured() -> None:
    found = live(Residual, "lsq", bits=2)
    found.activations = ActivationSettings(bits=3)
    with pytest.raises(DataError, match="fewer than"):
        activation_inits(found, make_trainer(Residual, size=64))
