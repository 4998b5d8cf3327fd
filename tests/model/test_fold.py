"""A folded batch norm computes the same, and goes on to tell what comes out of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from model.graph_networks import (
    SHAPES,
    Basic,
    Forked,
    Functional,
    Inverted,
    Joined,
    Plumbing,
    Unfolded,
    decisions,
    inputs,
    live_model,
    live_of,
    trained,
)
from qcompress.model.fold import fold_batch_norms, fold_layer, is_free, is_plain, kernels, read_layer
from qcompress.model.graph import batch_norm_of
from qcompress.model.live import LiveModel, find_tensor, put_tensors
from qcompress.types.encoded import Fitted, Kept
from qcompress.types.plan import Decision, TensorInfo

FOLDABLE = [Basic, Inverted, Functional, Plumbing, Joined]


def folded(live: LiveModel, dtype: str = "F32") -> Fitted:
    return fold_batch_norms(live, decisions(live.module, dtype))


def applied(live: LiveModel, fitted: Fitted) -> nn.Module:
    """The network with what was folded: adjusted tensors and float weights."""
    module = copy.deepcopy(live.module)
    put_tensors(module, {name: one.value for name, one in fitted.encoded.items() if isinstance(one, Kept)})
    put_tensors(module, fitted.references)
    return module


@pytest.mark.parametrize("kind", FOLDABLE)
def test_folding_keeps_what_the_network_computes(kind: type[nn.Module]) -> None:
    live = live_of(kind)
    x = inputs(kind, 8)
    expected = live.module(x)
    found = applied(live, folded(live, "F64"))(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", FOLDABLE)
def test_in_float32_too(kind: type[nn.Module]) -> None:
    module, x = trained(kind).float().requires_grad_(False), inputs(kind, 8).float()
    expected = module(x)
    live = live_model(module, x[:2])
    fitted = folded(live)
    found = applied(live, fitted)(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(live.quantized(x), found)
    assert all(one.value.dtype == torch.float32 for one in fitted.encoded.values() if isinstance(one, Kept))


@pytest.mark.parametrize("kind", FOLDABLE)
def test_every_affine_batch_norm_becomes_a_shift_and_nothing_else_changes(kind: type[nn.Module]) -> None:
    live = live_of(kind)
    fitted = folded(live, "F64")
    norms = {name: batch_norm_of(live, name) for name in live.layers}
    owned = {name: norm for name, norm in norms.items() if norm is not None}
    assert set(fitted.references) == {f"{name}.weight" for name in owned}
    biases = {f"{name}.bias" for name in owned if live.module.get_submodule(name).bias is not None}
    assert set(fitted.encoded) == biases | {tensor for norm in owned.values() for tensor in norm.tensors}
    for norm in owned.values():
        variance, weight = (find_tensor(live.quantized, name) for name in (norm.running_var, norm.weight or ""))
        torch.testing.assert_close(weight / (variance + norm.eps).sqrt(), torch.ones_like(weight), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("kind", FOLDABLE)
def test_the_statistics_are_those_of_the_folded_layer(kind: type[nn.Module]) -> None:
    live = live_of(kind)
    # What the batch norms saw when they were trained.
    x = inputs(kind, 64, 0)
    folded(live, "F64")
    outputs: dict[str, Tensor] = {}
    for name in live.layers:
        live.quantized.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: outputs.__setitem__(name, y.movedim(1, -1).flatten(0, -2))
        )
    before = {name: batch_norm_of(live, name) for name in live.layers}
    first = next(name for name in live.layers if before[name] is not None)
    live.quantized(x)
    norm = before[first]
    assert norm is not None
    rows = outputs[first]
    torch.testing.assert_close(find_tensor(live.quantized, norm.running_mean), rows.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(find_tensor(live.quantized, norm.running_var), rows.var(0), rtol=1e-2, atol=1e-9)
    assert torch.equal(find_tensor(live.quantized, norm.bias or ""), find_tensor(live.module, norm.bias or ""))


def test_a_channel_without_weight_or_variance_gives_its_bias() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).double().eval()
    norm = module[1]
    norm.weight.data = torch.tensor([0.0, 1e-20, -3.0, 1.0]).double()
    norm.bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    norm.running_var.data = torch.tensor([1.0, 1.0, 2.0, 0.0]).double()
    x = torch.randn(3, 2, 2, 2).double()
    live = live_model(module, x)
    expected = module(x)
    fitted = folded(live, "F64")
    torch.testing.assert_close(applied(live, fitted)(x), expected, rtol=1e-12, atol=1e-12)
    assert bool((fitted.references["0.weight"][0] == 0).all())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("kind", FOLDABLE)
def test_what_a_narrow_dtype_makes_of_a_batch_norm_the_weight_takes_back(kind: type[nn.Module], dtype: str) -> None:
    live = live_of(kind)
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    module = applied(live, folded(live, dtype))
    for name in live.layers:
        norm = batch_norm_of(live, name)
        if norm is None:
            continue
        for tensor in norm.tensors:
            value = find_tensor(module, tensor)
            assert torch.equal(value, value.to(narrow).double()), f"{tensor} does not fit {dtype}"
        own = fold_layer(live, name, norm)
        variance, weight = (find_tensor(module, one) for one in (norm.running_var, norm.weight or ""))
        gain = weight / (variance + norm.eps).sqrt()
        stored = kernels(own.module, module.get_submodule(name).weight)
        view = gain.reshape(own.kernels.shape[0], -1, 1, 1)
        torch.testing.assert_close(stored * view, own.kernels, rtol=1e-12, atol=1e-15)
        assert own.statistics is not None
        moved = find_tensor(module, norm.running_mean) * gain
        half_a_step = torch.finfo(narrow).eps / 2
        torch.testing.assert_close(moved, own.statistics.before, rtol=1.01 * half_a_step, atol=1e-6)


def test_a_huge_variance_is_cut_to_the_dtype_and_the_function_stays() -> None:
    module = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).double().eval()
    module[1].weight.data.fill_(1e4)
    x = torch.randn(3, 2, 2, 2).double()
    live = live_model(module, x)
    expected = module(x)
    found = applied(live, folded(live, "F16"))
    assert bool(found[1].running_var.isfinite().all())
    torch.testing.assert_close(found(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_what_cannot_be_folded_stays_and_is_named() -> None:
    live = live_of(Unfolded)
    fitted = folded(live)
    assert not fitted.encoded and not fitted.references
    assert [note.split(":")[0] for note in fitted.notes] == ["third"]
    assert torch.equal(live.quantized(x := inputs(Unfolded, 2)), live.module(x))


def test_a_layer_is_free_if_nothing_else_holds_on_to_it() -> None:
    live = live_of(Forked)
    assert {name for name in live.layers if not is_free(live, name)} == {"shared", "tied1", "tied2"}


def test_a_class_that_computes_more_is_not_plain() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Named(nn.Conv2d):
        pass

    assert not is_plain(Standardized(2, 2, 1)) and not is_plain(nn.Embedding(2, 2))
    assert is_plain(Named(2, 2, 1)) and is_plain(nn.ConvTranspose1d(2, 2, 1))


@pytest.mark.parametrize("kind", SHAPES)
def test_scaled_and_moved_layers_are_what_they_say(kind: type[nn.Module]) -> None:
    live = live_of(kind)
    for name in live.layers:
        if not is_free(live, name):
            continue
        layer = read_layer(live, name)
        rank = layer.weight.ndim
        x = torch.randn(3, layer.kernels.shape[0] * layer.kernels.shape[2], *[5] * (rank - 2)).double()
        expected = layer.module(x)
        outputs, inputs_ = (torch.rand(n).double() + 0.5 for n in (expected.shape[1], x.shape[1]))
        shape = (1, -1, *[1] * (rank - 2))
        module = copy.deepcopy(layer.module)
        put = layer.scaled_outputs(outputs).scaled_inputs(inputs_).tensors(torch.float64)
        put_tensors(module, {tensor.rpartition(".")[2]: value for tensor, value in put.items()})
        torch.testing.assert_close(module(x / inputs_.view(shape)), expected * outputs.view(shape))
        if layer.bias is not None:
            put_tensors(
                module, {"weight": layer.weight, "bias": layer.moved(outputs).tensors(torch.float64)[f"{name}.bias"]}
            )
            torch.testing.assert_close(module(x), expected + outputs.view(shape))


@pytest.mark.parametrize("kind", [Basic, Plumbing, Functional])
def test_the_response_to_constants_is_what_the_layer_gives_on_average(kind: type[nn.Module]) -> None:
    live = live_of(kind)
    for name in live.layers:
        layer = read_layer(live, name)
        if layer.weight.ndim < 4:
            continue
        module = copy.deepcopy(layer.module)
        module.padding = tuple(size - 1 for size in module.kernel_size) if isinstance(module, nn.ConvTranspose2d) else 0
        module.bias = None
        value = torch.randn(layer.kernels.shape[0] * layer.kernels.shape[2]).double()
        # As many places of each kind as there are strides.
        y = module(value.view(1, -1, 1, 1).expand(1, -1, 13, 13))[:, :, :12, :12]
        torch.testing.assert_close(y.mean((0, 2, 3)), layer.response(value), rtol=1e-9, atol=1e-9)


def test_a_correction_moves_what_comes_out_and_no_statistics_of_it() -> None:
    live = live_of(Basic)
    norm = batch_norm_of(live, "conv1")
    assert norm is not None
    x = inputs(Basic, 4)
    for layer in (read_layer(live, "conv1", norm), fold_layer(live, "conv1", norm)):
        shift = torch.arange(6.0).double()
        tensors = [one.tensors(torch.float64) for one in (layer, layer.moved(shift))]
        changed = {name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}
        assert changed == {"bn1.running_mean"}
        outputs = []
        for one in tensors:
            module = copy.deepcopy(live.module)
            put_tensors(module, one)
            outputs.append(module.bn1(module.conv1(x)))
        gain = torch.ones(6).double() if layer.folded else norm_gain(live)
        torch.testing.assert_close(outputs[1] - outputs[0], (shift * gain).view(1, -1, 1, 1).expand_as(outputs[0]))


def norm_gain(live: LiveModel) -> Tensor:
    norm = live.module.bn1
    return norm.weight / (norm.running_var + norm.eps).sqrt()


def test_a_decision_of_another_tensor_than_a_weight_is_left_alone() -> None:
    live = live_of(Basic)
    other = Decision(TensorInfo("bn1.weight", (6,), "F32"), "dfq", None, "test")
    assert fold_batch_norms(live, [other]) == Fitted({}, references={}, notes=())
