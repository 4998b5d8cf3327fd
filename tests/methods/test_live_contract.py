"""What holds for every method that fits a live model, whatever it does with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contexts import ALONE, context_at
from methods.well_formed import assert_same, assert_well_formed
from model.networks import Mlp, Residual, Separable, Untraceable, batches, decisions, live, trained
from torch import nn
from training.small import make_trainer as trainer

from qcompress.artifact.entry import planned_entry
from qcompress.artifact.layout import make_slots
from qcompress.coding.grids import decode
from qcompress.coding.unbounded.lengths import coded_bits
from qcompress.errors import ModelError
from qcompress.model.live import LiveModel, find_tensor, make_live_model
from qcompress.registry import METHODS, ClusterConfig, GridConfig, RdConfig
from qcompress.registry.calibrated import LiveConfig
from qcompress.types.config import MethodConfig
from qcompress.types.encoded import Affine, Coded, Encoded, Fitted, Kept, Unbounded
from qcompress.types.plan import row_shape
from qcompress.types.run import FitContext
from qcompress.types.settings import ActivationSettings

FITTING = [name for name, method in METHODS.items() if method.fits]
UNTRAINED = [name for name in FITTING if METHODS[name].needs in ("graph", "calibration")]
RATED = [name for name in FITTING if METHODS[name].rates]
QUICK: dict[str, dict[str, Any]] = {
    "adaround": {"iterations": 20},
    "pdquant": {"iterations": 5, "correction_steps": 3},
}
"""What makes a method quick."""
OPTIONS: dict[type[MethodConfig], list[dict[str, Any]]] = {
    LiveConfig: [
        {"bits": 3},
        {"bits": 2, "granularity": "tensor"},
        {"bits": 4, "symmetric": True},
        {"bits": 3, "range": "mse"},
        {"bits": 4, "preset": "paper"},
        {"bits": 3, "group_size": 5},
        {"bits": 4, "group_size": 64, "symmetric": True},
    ],
    GridConfig: [{"bits": 3}, {"bits": 2, "granularity": "tensor"}, {"bits": 3, "group_size": 5}],
    ClusterConfig: [{"bits": 3}, {"bits": 2, "granularity": "channel"}, {"bits": 4, "codebook": "int8"}],
    RdConfig: [{"effort": "fast"}, {"effort": "high", "match": False}],
}
"""Configs of each kind; a kind of its own has a row to add here."""
RATE = 5.0


def options_of(method: str) -> list[dict[str, Any]]:
    return next(options for kind, options in OPTIONS.items() if issubclass(METHODS[method].config, kind))


CASES = [(method, options) for method in FITTING for options in options_of(method)]


def context_of(method: str, kind: type[nn.Module], rate: float = RATE) -> FitContext:
    """What the registry says that the method needs."""
    trains = METHODS[method].needs == "training"
    return FitContext(rate if METHODS[method].rates else None, trainer(kind) if trains else None)


def fitted(method: str, kind: type[nn.Module], rate: float = RATE, **options: Any) -> tuple[LiveModel, Fitted]:
    blocks = ("blocks.*",) if kind is Untraceable else ()
    options = {**QUICK.get(method, {}), **options}
    found = live(kind, method, blocks=blocks, **options)
    found.activations = ActivationSettings()
    context = context_of(method, kind, rate)
    return found, METHODS[method].load_fit()(found, decisions(found.module, method, **options), context)


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.parametrize("kind", [Residual, Separable])
def test_what_comes_back_is_well_formed_and_in_place(
    method: str, kind: type[nn.Module], options: dict[str, Any]
) -> None:
    found, result = fitted(method, kind, **options)
    if METHODS[method].needs == "training":
        # Nothing comes after training, which leaves it to the caller to put the weights in place.
        found.put(result.encoded)
    for decision in decisions(found.module, method, **QUICK.get(method, {}), **options):
        name, shape = decision.tensor.name, decision.tensor.shape
        encoded = result.encoded[name]
        assert isinstance(encoded, Coded)
        assert_well_formed(encoded, shape, decision.config, row_shape(shape, decision.axis))
        assert encoded.axis == decision.axis
        if isinstance(encoded, Affine):
            slots = {slot.name.removeprefix(f"{name}.qc."): slot.shape for slot in make_slots(decision, "packed")}
            for part in ("scale", "zero_point", "offset"):
                value = getattr(encoded, part)
                assert (None if value is None else tuple(value.shape)) == slots.get(part)
            placed = {True: "zero-point", False: "offset"}[encoded.zero_point is not None]
            assert planned_entry(decision).grid == (encoded.convention or placed)
        weight = find_tensor(found.quantized, name)
        assert bool(weight.isfinite().all())
        torch.testing.assert_close(decode(encoded), weight, rtol=0, atol=0)
    assert not any("parametrizations" in name for name in found.quantized.state_dict())
    assert set(result.activations) <= set(found.layers)
    assert METHODS[method].adjusts or not [one for one in result.encoded.values() if isinstance(one, Kept)]


@pytest.mark.parametrize("kind", [Residual, Separable])
@pytest.mark.parametrize("method", FITTING)
def test_the_network_as_it_was_stays_as_it_was(method: str, kind: type[nn.Module]) -> None:
    options = {**QUICK.get(method, {}), **options_of(method)[0]}
    found = live(kind, method, **options)
    found.activations = ActivationSettings()
    before = copy.deepcopy(found.module.state_dict())
    data = [batch.args[0].clone() for batch in found.calibration]
    wanted = decisions(found.module, method, **options)
    result = METHODS[method].load_fit()(found, wanted, context_of(method, kind))
    assert all(torch.equal(value, before[name]) for name, value in found.module.state_dict().items())
    assert all(torch.equal(one, batch.args[0]) for one, batch in zip(data, found.calibration, strict=True))
    assert not [hook for one in found.module.modules() for hook in (*one._forward_hooks, *one._forward_pre_hooks)]
    kept = {name for name, value in result.encoded.items() if isinstance(value, Kept)}
    weights = {decision.tensor.name for decision in wanted}
    changed = {
        name
        for name, value in found.quantized.state_dict().items()
        if name not in weights and value.is_floating_point() and not torch.equal(value, before[name])
    }
    assert changed <= kept
    assert METHODS[method].adjusts or not kept
    for name in kept:
        value = result.encoded[name]
        assert isinstance(value, Kept)
        assert torch.equal(value.value, found.quantized.state_dict()[name]), "an adjusted tensor is not in place"
        assert (value.value.shape, value.value.dtype) == (before[name].shape, before[name].dtype)


@pytest.mark.parametrize("kind", [Residual, Separable])
@pytest.mark.parametrize("method", RATED)
def test_a_method_with_rates_takes_about_what_it_is_told(method: str, kind: type[nn.Module]) -> None:
    """Near enough for a budget's search to come to it, and more for more; of so few weights the bits jump."""
    taken = []
    for rate in (4.0, 6.0):
        _, result = fitted(method, kind, rate, **options_of(method)[0])
        coded = [one for one in result.encoded.values() if isinstance(one, Unbounded)]
        taken.append(coded_bits(coded) / sum(one.codes.numel() for one in coded))
        assert taken[-1] == pytest.approx(rate, rel=0.15)
    assert taken[1] > taken[0]


@pytest.mark.parametrize("method", FITTING)
def test_the_same_run_gives_the_same_codes(method: str) -> None:
    (_, one), (_, other) = (fitted(method, Residual, **options_of(method)[0]) for _ in range(2))
    assert one.encoded.keys() == other.encoded.keys()
    for name, value in one.encoded.items():
        twin = other.encoded[name]
        if isinstance(value, Kept):
            assert isinstance(twin, Kept) and torch.equal(value.value, twin.value)
        else:
            assert_same(value, twin)
    assert one.activations == other.activations


@pytest.mark.parametrize("kind", [Residual, Separable, Mlp])
@pytest.mark.parametrize("method", UNTRAINED)
def test_eight_bits_change_the_outputs_little(method: str, kind: type[nn.Module]) -> None:
    found, _ = fitted(method, kind, bits=8, granularity="channel")
    x = found.calibration[0].args[0]
    plain, quantized = found.module(x), found.quantized(x)
    assert float((plain - quantized).square().mean() / plain.square().mean()) < 2e-3


SPREAD = [
    *(("gptq", {}), ("gptq", {"preset": "paper", "symmetric": True}), ("gptq", {"group_size": 24})),
    *(("adaround", {}), ("adaround", {"preset": "paper", "granularity": "channel"})),
    *(("pdquant", {}), ("dfq", {"granularity": "channel"}), ("dfq", {"granularity": "channel", "symmetric": True})),
]


@pytest.mark.parametrize(("method", "options"), SPREAD, ids=str)
def test_rows_that_lie_too_far_apart_for_one_exponent_keep_their_bits(method: str, options: dict[str, Any]) -> None:
    """A channel 2**-40 as large as the others is rounded as finely as they are, and has an exponent of its own."""
    options = {"bits": 6, **QUICK.get(method, {}), **options}
    module = trained(Residual)
    with torch.no_grad():
        module.get_parameter("conv1.weight")[2] *= 2.0**-40
    data = batches(Residual)
    wanted = decisions(module, method, **options)
    found = make_live_model(module, wanted, data, data[0].first(2), device=torch.device("cpu"), blocks=())
    result = METHODS[method].load_fit()(found, wanted, ALONE)
    encoded = result.encoded["conv1.weight"]
    assert isinstance(encoded, Affine) and encoded.row_exponents is not None
    reference = result.references.get("conv1.weight", find_tensor(module, "conv1.weight")).detach().double()
    assert float(reference[2].abs().max()) < 2.0**-20 * float(reference.abs().max())
    errors = (decode(encoded).double() - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    assert float(errors[2]) < 3 * float(errors.median())
    assert not [name for name, one in result.encoded.items() if name != "conv1.weight" and _has_row_exponents(one)]


def _has_row_exponents(encoded: Encoded) -> bool:
    return isinstance(encoded, Affine) and encoded.row_exponents is not None


@pytest.mark.parametrize("method", [name for name in UNTRAINED if METHODS[name].needs == "calibration"])
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
        METHODS[method].load_fit()(found, decisions(found.module, method, bits=4), ALONE)


@pytest.mark.parametrize("method", [name for name in UNTRAINED if METHODS[name].needs == "calibration"])
def test_calibrated_methods_beat_rounding_on_their_data(method: str) -> None:
    naive = live(Residual, "rtn", bits=2)
    encode = METHODS["rtn"].load_encode()
    for decision in decisions(naive.module, "rtn", bits=2):
        weight = find_tensor(naive.module, decision.tensor.name)
        naive.put({decision.tensor.name: encode(weight, decision.config, context_at(-8))})
    found, _ = fitted(method, Residual, bits=2)
    x = torch.cat([batch.args[0] for batch in found.calibration])
    plain = found.module(x)
    errors = [float((plain - one.quantized(x)).square().mean()) for one in (found, naive)]
    assert errors[0] < 0.5 * errors[1]
