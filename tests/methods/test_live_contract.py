"""What holds for every method on a live model, whatever it does with it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from model.networks import Mlp, Residual, Separable, Untraceable, decisions, live
from torch import nn

from qcompress.artifact.layout import grid_of, make_slots
from qcompress.coding.affine import decode
from qcompress.encoded import Affine, Fitted, Kept
from qcompress.errors import ModelError
from qcompress.model.live import LiveModel, find_tensor
from qcompress.registry import METHODS
from qcompress.settings import ActivationSettings

LIVE_METHODS = [name for name, method in METHODS.items() if method.needs in ("graph", "calibration")]
QUICK: dict[str, dict[str, Any]] = {
    "adaround": {"iterations": 20},
    "pdquant": {"iterations": 5, "correction_steps": 3},
}
"""What makes a method quick."""

GRIDS: list[dict[str, Any]] = [
    {"bits": 3},
    {"bits": 2, "granularity": "tensor"},
    {"bits": 4, "symmetric": True},
    {"bits": 3, "range": "mse"},
    {"bits": 4, "preset": "paper"},
]


def fitted(method: str, kind: type[nn.Module], **options: Any) -> tuple[LiveModel, Fitted]:
    blocks = ("blocks.*",) if kind is Untraceable else ()
    found = live(kind, method, blocks=blocks, **QUICK.get(method, {}), **options)
    found.activations = ActivationSettings()
    return found, METHODS[method].load()(found, decisions(found.module, method, **QUICK.get(method, {}), **options))


@pytest.mark.parametrize("options", GRIDS, ids=str)
@pytest.mark.parametrize("kind", [Residual, Separable])
@pytest.mark.parametrize("method", LIVE_METHODS)
def test_what_comes_back_is_well_formed_and_in_place(
    method: str, kind: type[nn.Module], options: dict[str, Any]
) -> None:
    found, result = fitted(method, kind, **options)
    for decision in decisions(found.module, method, **options):
        name, shape = decision.tensor.name, decision.tensor.shape
        encoded = result.encoded[name]
        assert isinstance(encoded, Affine)
        assert (encoded.shape, encoded.axis, encoded.dtype) == (shape, decision.axis, "F32")
        assert encoded.codes.dtype == torch.uint8 and encoded.codes.shape == (shape[0], math.prod(shape[1:]))
        assert int(encoded.codes.max()) < 2**decision.config.bits
        slots = {slot.name.removeprefix(f"{name}.qc."): slot.shape for slot in make_slots(decision, "packed")}
        for part in ("scale", "zero_point", "offset"):
            value = getattr(encoded, part)
            assert (None if value is None else tuple(value.shape)) == slots.get(part)
        placed = {True: "zero-point", False: "offset"}[encoded.zero_point is not None]
        assert grid_of(decision) == (encoded.convention or placed)
        weight = find_tensor(found.quantized, name)
        assert bool(weight.isfinite().all())
        torch.testing.assert_close(decode(encoded), weight, rtol=0, atol=0)
    assert not any("parametrizations" in name for name in found.quantized.state_dict())
    assert set(result.activations) <= set(found.layers)


@pytest.mark.parametrize("kind", [Residual, Separable])
@pytest.mark.parametrize("method", LIVE_METHODS)
def test_the_network_as_it_was_stays_as_it_was(method: str, kind: type[nn.Module]) -> None:
    found = live(kind, method, **QUICK.get(method, {}), bits=4)
    before = copy.deepcopy(found.module.state_dict())
    data = [batch.args[0].clone() for batch in found.calibration]
    result = METHODS[method].load()(found, decisions(found.module, method, **QUICK.get(method, {}), bits=4))
    assert all(torch.equal(value, before[name]) for name, value in found.module.state_dict().items())
    assert all(torch.equal(one, batch.args[0]) for one, batch in zip(data, found.calibration, strict=True))
    assert not [hook for one in found.module.modules() for hook in (*one._forward_hooks, *one._forward_pre_hooks)]
    kept = {name for name, value in result.encoded.items() if isinstance(value, Kept)}
    weights = {name for name, value in before.items() if value.ndim >= 2}
    changed = {
        name
        for name, value in found.quantized.state_dict().items()
        if name not in weights and not torch.equal(value, before[name])
    }
    assert changed <= kept
    assert METHODS[method].adjusts or not kept


@pytest.mark.parametrize("method", LIVE_METHODS)
def test_the_same_run_gives_the_same_codes(method: str) -> None:
    (_, one), (_, other) = (fitted(method, Residual, bits=3) for _ in range(2))
    assert one.encoded.keys() == other.encoded.keys()
    for name, value in one.encoded.items():
        twin = other.encoded[name]
        if isinstance(value, Affine) and isinstance(twin, Affine):
            assert torch.equal(value.codes, twin.codes) and torch.equal(value.scale, twin.scale)
    assert one.activations == other.activations


@pytest.mark.parametrize("kind", [Residual, Separable, Mlp])
@pytest.mark.parametrize("method", LIVE_METHODS)
def test_eight_bits_change_the_outputs_little(method: str, kind: type[nn.Module]) -> None:
    found, _ = fitted(method, kind, bits=8, granularity="channel")
    x = found.calibration[0].args[0]
    plain, quantized = found.module(x), found.quantized(x)
    assert float((plain - quantized).square().mean() / plain.square().mean()) < 2e-3


@pytest.mark.parametrize("method", [name for name in LIVE_METHODS if METHODS[name].needs == "calibration"])
def test_networks_that_cannot_be_traced_run_by_their_blocks(method: str) -> None:
    found, result = fitted(method, Untraceable, bits=4)
    assert len([one for one in result.encoded.values() if isinstance(one, Affine)]) == len(found.layers)
    x = found.calibration[0].args[0]
    plain, quantized = found.module(x), found.quantized(x)
    assert float((plain - quantized).square().mean() / plain.square().mean()) < 0.1


@pytest.mark.parametrize("method", ["dfq", "pdquant"])
def test_what_needs_a_graph_or_blocks_says_so(method: str) -> None:
    found = live(Untraceable, method, bits=4)
    with pytest.raises(ModelError, match=r"model\.blocks"):
        METHODS[method].load()(found, decisions(found.module, method, bits=4))


@pytest.mark.parametrize("method", ["adaround", "gptq", "pdquant"])
def test_calibrated_methods_beat_rounding_on_their_data(method: str) -> None:
    naive = live(Residual, "rtn", bits=2)
    encode = METHODS["rtn"].load()
    for decision in decisions(naive.module, "rtn", bits=2):
        weight = find_tensor(naive.module, decision.tensor.name)
        naive.put({decision.tensor.name: encode(weight, decision.config, -8)})
    found, _ = fitted(method, Residual, bits=2)
    x = torch.cat([batch.args[0] for batch in found.calibration])
    plain = found.module(x)
    errors = [float((plain - one.quantized(x)).square().mean()) for one in (found, naive)]
    assert errors[0] < 0.5 * errors[1]
