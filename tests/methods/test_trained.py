"""What is true of lsq and pact, whose steps are trained with the network."""

from __future__ import annotations

from typing import Any

import pytest
from model.networks import Residual, decisions, live
from training.small import make_trainer

from qcompress.coding.grids import decode, from_half
from qcompress.errors import ModelError
from qcompress.methods.pact import InputClip
from qcompress.registry import METHODS, PactConfig
from qcompress.training.fake_quantize import ActivationInit, activation_inits
from qcompress.types.encoded import ActivationGrid, Affine
from qcompress.types.run import FitContext
from qcompress.types.settings import ActivationSettings


def test_one_bit_below_zero_is_refused() -> None:
    low = ActivationInit(ActivationGrid(1, 0.5, 1), 0.4, -1.0, 6, False)
    with pytest.raises(ModelError, match="use 2 bits or more"):
        InputClip("fc", low, PactConfig(bits=2))
    clip = InputClip("fc", ActivationInit(ActivationGrid(1, 0.5, 0), 0.4, 0.0, 6, False), PactConfig(bits=2, clip=6.0))
    assert clip.grid() == ActivationGrid(1, 6.0, 0)


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_a_rule_s_own_rate_is_that_of_its_steps(method: str) -> None:
    moved = []
    for rate in (1e-9, 10.0):
        found = live(Residual, method, bits=2)
        found.activations = ActivationSettings(bits=3, range="mse")
        teach = make_trainer(Residual)
        starts = activation_inits(found, teach)
        config: dict[str, Any] = {"bits": 2, "learning_rate": rate}
        result = METHODS[method].load_fit()(found, decisions(found.module, method, **config), FitContext(trainer=teach))
        grids = {name: grid for name, grid in result.activations.items() if not starts[name].fixed}
        moved.append(max(abs(grid.scale / starts[name].grid.scale - 1) for name, grid in grids.items()))
    assert moved[0] < 1e-6 and moved[1] > 1e-3


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_references_are_what_the_codes_round(method: str) -> None:
    found = live(Residual, method, bits=4)
    result = METHODS[method].load_fit()(
        found, decisions(found.module, method, bits=4), FitContext(trainer=make_trainer(Residual))
    )
    assert len(result.references) == len(found.layers)
    for name, reference in result.references.items():
        encoded = result.encoded[name]
        assert isinstance(encoded, Affine)
        steps = from_half(encoded.scale, encoded.exponent).reshape(-1, *[1] * (reference.ndim - 1))
        inside = (encoded.codes.view(reference.shape) > 0) & (encoded.codes.view(reference.shape) < 15)
        off = ((decode(encoded) - reference).abs() / steps)[inside]
        assert len(off) and float(off.max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_steps_stay_above_nothing_whatever_the_rate(method: str) -> None:
    """A rate that throws steps across zero leaves them positive, and the network finite."""
    found = live(Residual, method, bits=2)
    found.activations = ActivationSettings(bits=3)
    teach = make_trainer(Residual)
    config: dict[str, Any] = {"bits": 2, "learning_rate": 1e4}
    result = METHODS[method].load_fit()(found, decisions(found.module, method, **config), FitContext(trainer=teach))
    assert all(grid.scale > 0 for grid in result.activations.values())
    for name, encoded in result.encoded.items():
        if name in ("stem.weight", "conv1.weight"):
            assert bool((encoded.scale > 0).all()) and bool(encoded.scale.isfinite().all())
