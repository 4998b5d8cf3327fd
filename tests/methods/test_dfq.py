"""Data-free quantization: the function kept, ranges equal, biases right."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from contexts import ALONE
from model.graph_networks import (
    Basic,
    Forked,
    Functional,
    Inverted,
    InvertedRelu,
    Joined,
    Plumbing,
    Unfolded,
    decisions,
    inputs,
    live_model,
    trained,
)
from model.networks import Untraceable
from model.networks import live as other_live
from torch import Tensor, nn

from qcompress.calibration.activations import attach_caps
from qcompress.coding.grids import decode
from qcompress.coding.rows import grid_shape
from qcompress.errors import DataError, ModelError
from qcompress.methods.dfq import fit
from qcompress.model.chains import equalization_links
from qcompress.model.fold import kernels
from qcompress.model.graph import batch_norm_of
from qcompress.model.live import LiveModel, find_tensor, put_tensors
from qcompress.model.runs import layer_inputs, run_stage
from qcompress.registry import METHODS, DfqConfig
from qcompress.solvers.equalize import DEAD
from qcompress.types.encoded import Affine, Fitted, Kept
from qcompress.types.plan import row_shape

EVERY = [Basic, Inverted, InvertedRelu, Functional, Plumbing, Joined, Forked, Unfolded]


def fitted(kind: type[nn.Module], calibration: bool = False, **options: object) -> tuple[LiveModel, Fitted]:
    """A float32 live model after the method, and what it gave."""
    x = inputs(kind, 32, 5).float()
    live = live_model(trained(kind).float(), inputs(kind, 2).float(), [x[:16], x[16:]] if calibration else None)
    return live, fit(live, decisions(live.module, **options), ALONE)


def in_floats(live: LiveModel, found: Fitted) -> nn.Module:
    """The network as the method prepared it, its weights not yet rounded."""
    module = copy.deepcopy(live.module)
    put_tensors(module, {name: one.value for name, one in found.encoded.items() if isinstance(one, Kept)})
    put_tensors(module, found.references)
    attach_caps(module, found.caps)
    return module


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("fold", [None, True, False])
@pytest.mark.parametrize("kind", EVERY)
def test_before_rounding_the_network_computes_what_it_did(kind: type[nn.Module], fold: bool | None) -> None:
    options = {"granularity": "tensor", "relu6": "caps", "bias_correction": "none", "fold": fold}
    live, found = fitted(kind, **options)
    x = inputs(kind, 16).float()
    expected = live.module(x)
    assert relative(in_floats(live, found)(x), expected) < 1e-5


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    "options", [{}, {"preset": "paper"}, {"granularity": "tensor", "relu6": "caps", "absorb": True}]
)
def test_what_is_given_is_what_stands_in_the_quantized_network(kind: type[nn.Module], options: dict[str, str]) -> None:
    live, found = fitted(kind, bits=4, **options)
    before = live.module.state_dict()
    for name, value in live.quantized.state_dict().items():
        if name in found.encoded:
            encoded = found.encoded[name]
            assert torch.equal(decode(encoded), value), name
            assert isinstance(encoded, Kept) == (not name.endswith("weight") or value.ndim == 1)
        else:
            assert torch.equal(value, before[name]), name
    wanted = decisions(live.module, bits=4, **options)
    for decision in wanted:
        affine = found.encoded[decision.tensor.name]
        assert isinstance(affine, Affine)
        assert (affine.shape, affine.axis, affine.dtype) == (decision.tensor.shape, decision.axis, "F32")
        rows = row_shape(affine.shape, affine.axis)
        assert affine.scale.shape == grid_shape(rows, decision.config.granularity, decision.config.group_size)
        assert affine.codes.shape == (rows[0], decision.tensor.numel // rows[0]) and int(affine.codes.max()) < 16


@pytest.mark.parametrize("kind", EVERY)
def test_eight_bits_change_little(kind: type[nn.Module]) -> None:
    live, _ = fitted(kind, granularity="tensor", relu6="caps")
    x = inputs(kind, 32).float()
    assert relative(live.quantized(x), live.module(x)) < 0.05


def test_the_same_again() -> None:
    (_, first), (_, second) = (fitted(Inverted, True, granularity="tensor", relu6="caps") for _ in range(2))
    assert first.notes == second.notes and first.encoded.keys() == second.encoded.keys()
    for name, one in first.encoded.items():
        assert torch.equal(decode(one), decode(second.encoded[name]))
    assert all(torch.equal(one, second.caps[name]) for name, one in first.caps.items()) and first.caps


def ranges(live: LiveModel, found: Fitted, first: str, second: str) -> tuple[Tensor, Tensor]:
    """The ranges of the channels between two layers, on either side."""
    weights = [found.references.get(f"{n}.weight", find_tensor(live.module, f"{n}.weight")) for n in (first, second)]
    one, other = (
        kernels(live.module.get_submodule(name), weight).abs().amax(3)
        for name, weight in zip((first, second), weights, strict=True)
    )
    outputs = one.amax(2).flatten()
    return outputs, other.amax(1).reshape(len(outputs), -1).amax(1)


@pytest.mark.parametrize("kind", [Basic, InvertedRelu, Plumbing])
def test_ranges_on_either_side_of_every_link_are_equal(kind: type[nn.Module]) -> None:
    live, found = fitted(kind, granularity="tensor")
    links = equalization_links(live, live.layers)
    assert links
    for link in links:
        one, other = ranges(live, found, link.first, link.second)
        alive = (one > DEAD * one.max()) & (other > DEAD * other.max())
        torch.testing.assert_close(one[alive], other[alive], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("kind", [Inverted, Functional])
def test_across_relu6_they_are_equal_but_for_one_factor_and_caps_hold(kind: type[nn.Module]) -> None:
    live, found = fitted(kind, granularity="tensor", relu6="caps", bias_correction="none")
    links = equalization_links(live, live.layers)
    assert len(found.caps) == len(links)
    for link in links:
        one, other = ranges(live, found, link.first, link.second)
        torch.testing.assert_close(one / other, (one / other)[:1].expand_as(one), rtol=1e-4, atol=0.0)
    for cap in found.caps.values():
        assert cap.dtype == torch.float32 and float(cap.min()) > 0 and float(cap.max()) == pytest.approx(6.0)
    # A network that is driven into its caps shows that they are needed, and that they are right.
    x = 20 * inputs(kind, 16).float()
    module = in_floats(live, found)
    assert relative(module(x), live.module(x)) < 1e-5
    bare = copy.deepcopy(live.module)
    put_tensors(bare, {name: find_tensor(module, name) for name in live.module.state_dict() if "num_b" not in name})
    assert relative(bare(x), live.module(x)) > 1e-3


def test_relaxed_relu6_needs_no_caps_and_lies_between_relu6_and_relu() -> None:
    live, found = fitted(Inverted, granularity="tensor", relu6="relax", bias_correction="none")
    assert not found.caps and any("equalized" in note for note in found.notes)
    x = inputs(Inverted, 16).float()
    # What never reaches 6 is what it was.
    assert relative(in_floats(live, found)(0.01 * x), live.module(0.01 * x)) < 1e-4


def test_relu6_is_skipped_by_default_and_said() -> None:
    _, found = fitted(Inverted, granularity="tensor")
    assert not found.caps and not found.references
    assert [note for note in found.notes if "ReLU6" in note and "features.0.0 -> features.1.conv.0.0" in note]


def test_the_official_preset() -> None:
    config = DfqConfig(bits=4, preset="paper")
    assert (config.granularity, config.symmetric, config.range) == ("tensor", True, "tf-enhanced")
    assert (config.fold, config.equalize, config.absorb, config.relu6) == (True, True, True, "relax")
    assert config.stored_convention == "full"
    _, found = fitted(Basic, preset="paper", bits=2)
    assert all(one.convention == "full" for one in found.encoded.values() if isinstance(one, Affine))
    assert {name for name in found.references if "downsample" in name}, "every batch norm is folded"


def test_the_official_way_goes_through_the_links_once_and_ours_until_nothing_moves() -> None:
    for options, settled in (({"preset": "paper"}, False), ({"granularity": "tensor"}, True)):
        live, found = fitted(Plumbing, bias_correction="none", **options)
        apart = []
        for link in equalization_links(live, live.layers):
            one, other = ranges(live, found, link.first, link.second)
            apart.append(float((one / other).log().abs().max()))
        assert apart[-1] < 1e-4
        assert (max(apart) < 1e-4) == settled


@pytest.mark.parametrize("kind", [Inverted, InvertedRelu])
def test_dead_channels_widen_no_grid_and_keep_what_they_give(kind: type[nn.Module]) -> None:
    module = trained(kind).float()
    norm, following = module.features[0][1], module.features[1].conv[0][0]
    norm.weight.data[:2] = 1e-9
    norm.bias.data[:2] = torch.tensor([-1.0, 0.3])
    following.weight.data[:2] *= 1e3
    live = live_model(module, inputs(kind, 2).float())
    x = inputs(kind, 16).float()
    expected = live.module(x)
    found = fit(live, decisions(live.module, granularity="tensor", relu6="caps", bias_correction="none"), ALONE)
    assert relative(in_floats(live, found)(x), expected) < 1e-5
    rows = found.references["features.1.conv.0.0.weight"].abs().amax((1, 2, 3))
    # The first gives nothing and may be scaled at will; the other is a constant that must not leave the others behind.
    assert float(rows[0]) <= float(rows[2:].max()) * (1 + 1e-5)
    assert float(rows[1]) < 1e3 * float(rows[2:].median())
    assert relative(live.quantized(x), expected) < 0.1


def test_only_what_is_equalized_is_folded_by_default() -> None:
    live, found = fitted(Basic, granularity="tensor", bias_correction="none")
    folded = {name for name in live.layers if (n := batch_norm_of(live, name)) and n.running_var in found.encoded}
    assert folded == {"layer1.0.conv1", "layer1.1.conv1"}
    _, channel = fitted(Basic, bias_correction="none")
    assert not channel.references and all(isinstance(one, Affine) for one in channel.encoded.values())


def test_tensors_of_layers_with_another_method_stay() -> None:
    live = live_model(trained(InvertedRelu).float(), inputs(InvertedRelu, 2).float())
    every = decisions(live.module, granularity="tensor")
    kept = "features.2.conv.1.0"
    found = fit(live, [one for one in every if one.tensor.name != f"{kept}.weight"], ALONE)
    norm = batch_norm_of(live, kept)
    assert norm is not None
    for name in (f"{kept}.weight", *norm.tensors):
        assert name not in found.encoded
        assert torch.equal(find_tensor(live.quantized, name), find_tensor(live.module, name))
    assert any(note.startswith("left alone") and kept in note for note in found.notes)
    expected = live.module(x := inputs(InvertedRelu, 8).float())
    assert relative(live.quantized(x), expected) < 0.05


def test_shared_layers_are_rounded_and_no_more() -> None:
    _, found = fitted(Forked)
    assert any("shared.weight" in note and "rounded and no more" in note for note in found.notes)
    assert isinstance(found.encoded["shared.weight"], Affine) and "shared.bias" not in found.encoded


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("options", [{"preset": "paper"}, {"granularity": "tensor", "relu6": "caps"}])
def test_adjusted_tensors_fit_the_checkpoint_s_dtype(dtype: str, options: dict[str, str]) -> None:
    _, found = fitted(Inverted, True, dtype=dtype, **options)
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    adjusted = [one.value for one in found.encoded.values() if isinstance(one, Kept)]
    assert adjusted
    for value in adjusted:
        assert value.dtype == torch.float32 and torch.equal(value, value.to(narrow).float())
    assert all(one.dtype == dtype for one in found.encoded.values() if isinstance(one, Affine))


def output_means(live: LiveModel, module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Each layer's mean output, or its batch norm's, over the calibration data."""
    states = [live.stages[0].begin(batch) for batch in live.calibration]
    means = {}
    for stage in live.stages:
        for name in (name for name in stage.layers if name in names):
            norm = batch_norm_of(live, name)
            y = torch.cat([module.get_submodule(name)(x) for x in layer_inputs(stage, module, states, [name])[name]])
            if norm is not None:
                mean, variance = (find_tensor(module, one) for one in (norm.running_mean, norm.running_var))
                shape = (1, -1, *[1] * (y.ndim - 2))
                y = (y - mean.view(shape)) / (variance + norm.eps).sqrt().view(shape)
            means[name] = y.double().movedim(1, -1).flatten(0, -2).mean(0)
        states = run_stage(stage, module, states)
    return means


@pytest.mark.parametrize(
    "options",
    [{}, {"fold": True}, {"granularity": "tensor", "relu6": "caps"}, {"preset": "paper", "range": "minmax"}],
)
@pytest.mark.parametrize("kind", [Basic, Inverted, Functional, Plumbing, Joined])
def test_empirical_correction_leaves_no_mean_error(kind: type[nn.Module], options: dict[str, object]) -> None:
    none = fitted(kind, True, bits=3, bias_correction="none", **options)
    live, found = fitted(kind, True, bits=3, bias_correction="empirical", **options)
    # Of the same weights, not yet rounded and without corrections.
    before = output_means(live, in_floats(*none), live.layers)
    for quantized, allowed in ((live.quantized, 2e-5), (none[0].quantized, None)):
        after = output_means(live, quantized, live.layers)
        errors = {name: float((after[name] - before[name]).abs().max()) for name in before}
        scale = 1 + max(float(mean.abs().max()) for mean in before.values())
        if allowed is None:
            assert max(errors.values()) > 1e-2
        else:
            homeless = {name for name in errors if any(name in note for note in found.notes if "there is none" in note)}
            assert max(error for name, error in errors.items() if name not in homeless) < allowed * scale


class Tail(nn.Module):
    """A normal channel each, a batch norm that knows it, an activation, and the layer that is compressed."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)
        self.activation = activation
        self.layer = nn.Conv2d(16, 12, 3, bias=False)
        self.layer_norm = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(self.layer(self.activation(self.norm(x))))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.LeakyReLU(0.2), nn.PReLU(16)])
def test_analytic_correction_takes_the_mean_error_away(activation: nn.Module) -> None:
    torch.manual_seed(0)
    module = Tail(activation).eval().requires_grad_(False)
    nn.init.normal_(module.norm.weight, std=1.5)
    nn.init.normal_(module.norm.bias, std=1.0)
    x = torch.randn(3000, 16, 5, 5)
    expected = module(x).mean((0, 2, 3))
    errors = []
    for way in ("none", "analytic"):
        live = live_model(copy.deepcopy(module), x[:2])
        fit(live, decisions(live.module, bits=2, bias_correction=way), ALONE)
        errors.append(float((live.quantized(x).mean((0, 2, 3)) - expected).abs().max()))
    assert errors[1] < errors[0] / 20


def test_without_data_the_analytic_way_is_taken_and_with_data_the_empirical() -> None:
    for calibration, way in ((False, "analytic"), (True, "empirical")):
        (_, open_), (_, asked) = (fitted(Basic, calibration, bits=3, **more) for more in ({}, {"bias_correction": way}))
        assert open_.encoded.keys() == asked.encoded.keys()
        assert all(torch.equal(decode(one), decode(asked.encoded[name])) for name, one in open_.encoded.items())


def test_layers_that_no_statistics_reach_are_named() -> None:
    _, found = fitted(Basic, bias_correction="analytic")
    (note,) = [note for note in found.notes if "no statistics" in note]
    # Behind the max-pool; the first layer's input counts as zero.
    assert note.endswith("layer1.0.conv1, layer1.0.downsample.0")


class Pointwise(nn.Module):
    """Two layers without padding, the first with high biases."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.act = activation()
        self.second, self.second_norm = nn.Conv2d(6, 3, 3, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second_norm(self.second(self.act(self.norm(self.first(x)))))


@pytest.mark.parametrize("fold", [None, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Identity, nn.PReLU])
def test_what_is_absorbed_comes_back_as_long_as_outputs_exceed_it(
    activation: type[nn.Module], fold: bool | None
) -> None:
    torch.manual_seed(0)
    module = Pointwise(activation).eval()
    module.norm.bias.data = torch.tensor([5.5, 4.0, 3.5, 2.0, -1.0, 0.0])
    module.norm.weight.data.uniform_(0.6, 1.0)
    # Outputs stay within two deviations of their means.
    module.first.weight.data = nn.functional.normalize(module.first.weight.data, dim=1)
    x = nn.functional.normalize(torch.randn(64, 4, 5, 5), dim=1) * 2
    live = live_model(module, x[:2])
    options = {"granularity": "tensor", "relu6": "caps", "absorb": True, "bias_correction": "none", "fold": fold}
    found = fit(live, decisions(module, **options), ALONE)
    prepared = in_floats(live, found)
    assert relative(prepared(x), module(x)) < 1e-5
    mean_before, mean_after = (one.norm(one.first(x)).mean((0, 2, 3)) for one in (module, prepared))
    assert float(mean_after[0]) < float(mean_before[0]) * 0.7 or activation is nn.Identity
    if activation is nn.Identity:
        torch.testing.assert_close(prepared.norm.bias, torch.zeros(6), rtol=0.0, atol=1e-6)


def test_nothing_is_absorbed_where_zeros_join_in_but_by_the_official_way() -> None:
    _, found = fitted(InvertedRelu, granularity="tensor", absorb=True)
    assert any("not absorbed" in note and "features.0.0 -> features.1.conv.0.0" in note for note in found.notes)
    _, official = fitted(InvertedRelu, preset="paper")
    assert not any("features.0.0 -> " in note for note in official.notes if "not absorbed" in note)


def test_empirical_correction_without_data_is_refused() -> None:
    with pytest.raises(DataError, match="no calibration data"):
        fitted(Basic, bias_correction="empirical")


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    live = other_live(Untraceable)
    with pytest.raises(ModelError, match="cannot be traced"):
        fit(live, decisions(live.module), ALONE)


def test_the_hessian_s_range_is_refused() -> None:
    with pytest.raises(ValueError, match="hessian"):
        DfqConfig(bits=4, range="hessian")


def test_a_batch_norm_without_weights_cannot_be_folded_and_is_named() -> None:
    live, found = fitted(Unfolded, granularity="tensor")
    assert any("not folded" in note and "third" in note for note in found.notes)
    assert relative(live.quantized(x := inputs(Unfolded, 16).float()), live.module(x)) < 0.05


def test_it_declares_that_it_adjusts() -> None:
    method = METHODS["dfq"]
    assert method.adjusts and method.needs == "graph" and method.load_fit() is fit


DATA = os.environ.get("QCOMPRESS_DATA")


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="QCOMPRESS_DATA names no folder of data")
def test_mobilenet_with_one_grid_a_tensor() -> None:
    """Folded and rounded it is lost; equalized it is as good as new."""
    networks = pytest.importorskip("benchmarks.networks", reason="needs pillow")
    case = networks.CASES["mobilenet"]
    batches = case.batches(Path(DATA or ""), 100)
    network, _ = case.network(Path(DATA or ""))
    scores = {}
    for name, options in (
        ("naive", {"equalize": False, "bias_correction": "none"}),
        ("dfq", {"relu6": "caps", "equalize": True}),
    ):
        live = live_model(copy.deepcopy(network), batches[0][0][:1])
        fit(live, decisions(live.module, granularity="tensor", symmetric=True, fold=True, **options), ALONE)
        scores[name] = networks.top1(live.quantized, batches)
    assert scores["naive"] < 0.5
    assert scores["dfq"] > networks.top1(network, batches) - 0.05
