"""A sweep hands on the inputs of each layer, and refuses those that no statistics can be made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompress.calibration.activations import measure_activations
from qcompress.data.batches import Batch
from qcompress.errors import DataError
from qcompress.model.live import LiveModel
from qcompress.model.sweep import LARGEST_INPUT, refuse_unusable, sweep
from qcompress.registry import METHODS
from qcompress.types.run import FitContext
from qcompress.types.settings import ActivationSettings

from .networks import Residual, decisions, live

REFUSED = r"layer .*: its inputs hold NaN, Inf or values beyond 1e\+18"


def spoilt(method: str, value: float) -> LiveModel:
    """A live model with one such value in the last batch of its calibration data."""
    found = live(Residual, method, bits=3) if method != "rd" else live(Residual, method)
    *others, last = found.calibration
    x = last.args[0].clone()
    x.view(-1)[-1] = value
    found.calibration = [*others, Batch((x,))]
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20, -1e20])
def test_inputs_that_no_statistics_can_be_made_of_are_refused_with_the_layer(value: float) -> None:
    found = spoilt("gptq", value)
    with pytest.raises(DataError, match=REFUSED):
        for step in sweep(found, found.weights):
            step.gram()
    with pytest.raises(DataError, match=REFUSED):
        measure_activations(found, ActivationSettings(range="minmax"), [], [*found.layers])


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.fits and one.needs == "calibration"])
def test_no_method_takes_them(method: str) -> None:
    found = spoilt(method, 1e20)
    options = {} if METHODS[method].rates else {"bits": 3}
    with pytest.raises(DataError, match=REFUSED):
        METHODS[method].load_fit()(found, decisions(found.module, method, **options), FitContext(rate=3.0))


@pytest.mark.parametrize("x", [torch.tensor([LARGEST_INPUT, -LARGEST_INPUT]), torch.tensor([2**62]), torch.zeros(0)])
def test_what_can_be_squared_or_is_an_index_passes(x: Tensor) -> None:
    refuse_unusable("a", x)
