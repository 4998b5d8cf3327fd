"""Each layer's batch norm and activation, the network's input layers, its blocks."""

from __future__ import annotations

from pathlib import Path

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
    inputs,
    live_model,
    live_of,
)
from qcompress.data.batches import Batch
from qcompress.data.user_code import import_package
from qcompress.errors import UsageError
from qcompress.model.build import build_model
from qcompress.model.chains import equalization_links
from qcompress.model.graph import (
    Activation,
    activation_after,
    batch_norm_of,
    input_layers,
    layer_call,
    make_blocks,
    read_once,
    single_consumer,
)
from qcompress.model.live import LiveModel
from qcompress.model.stages import last_output
from qcompress.types.settings import ModelSettings

RELU, NOTHING = Activation("relu"), Activation("identity")


def norms(live: LiveModel) -> dict[str, str | None]:
    found = {name: batch_norm_of(live, name) for name in live.layers}
    return {name: None if norm is None else norm.owner for name, norm in found.items()}


def test_each_layer_has_the_batch_norm_that_reads_it() -> None:
    live = live_of(Basic)
    assert norms(live) == {
        "conv1": "bn1",
        "layer1.0.conv1": "layer1.0.bn1",
        "layer1.0.conv2": "layer1.0.bn2",
        "layer1.0.downsample.0": "layer1.0.downsample.1",
        "layer1.1.conv1": "layer1.1.bn1",
        "layer1.1.conv2": "layer1.1.bn2",
        "fc": None,
    }


def test_a_batch_norm_that_is_a_function_is_one_with_names_and_eps() -> None:
    live = live_of(Functional)
    norm = batch_norm_of(live, "dw")
    assert norm is not None
    assert norm.tensors == ("bn2.running_mean", "bn2.running_var", "bn2.weight", "bn2.bias")
    assert (norm.eps, norm.affine, norm.owner) == (1e-3, True, "bn2")
    assert set(norm.tensors) <= set(live.module.state_dict())


def test_linear_and_transposed_layers_have_theirs() -> None:
    found = norms(live_of(Plumbing))
    assert {name for name, owner in found.items() if owner} == {"grouped", "up", "up_grouped", "last"}
    assert found["last"] == "last_bn"


def test_a_batch_norm_of_two_layers_or_of_its_batch_belongs_to_none() -> None:
    live = live_of(Unfolded)
    assert norms(live) == {"first": None, "second": None, "third": "bare", "fourth": None}
    bare = batch_norm_of(live, "third")
    assert bare is not None and not bare.affine


def test_a_batch_norm_over_another_axis_than_the_channels_is_not_the_layer_s() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double().eval()
    assert batch_norm_of(live_model(module, torch.randn(2, 6).double()), "0") is not None
    assert batch_norm_of(live_model(module, torch.randn(2, 5, 6).double()), "0") is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            Basic,
            {"conv1": RELU, "layer1.0.conv1": RELU, "layer1.0.conv2": NOTHING, "layer1.0.downsample.0": NOTHING},
        ),
        (Inverted, {"features.0.0": Activation("capped", 6.0), "features.2.conv.2": NOTHING}),
        (Functional, {"stem": Activation("capped", 6.0), "head": NOTHING}),
        (
            Plumbing,
            {
                "grouped": Activation("slope"),
                "up": Activation("slope"),
                "up_grouped": RELU,
                "wide": RELU,
                "plain": NOTHING,
                "last": RELU,
            },
        ),
        (Forked, {"a": None, "shared": None, "gate": Activation("other"), "bounded": Activation("other")}),
    ],
)
def test_what_follows_each_layer(kind: type[nn.Module], expected: dict[str, Activation | None]) -> None:
    live = live_of(kind)
    assert {name: activation_after(live, name) for name in expected} == expected


def test_only_the_layer_itself_may_be_asked_for_what_follows() -> None:
    live = live_of(Basic)
    assert activation_after(live, "conv1", through_batch_norm=False) == NOTHING


class Spellings(nn.Module):
    """The same activation in every form in which it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
        self.tail = nn.ModuleList([nn.Hardtanh(0.0, 2.0), nn.Hardtanh(), nn.LeakyReLU()])

    def forward(self, x: Tensor) -> Tensor:
        f = nn.functional
        for layer, function in zip(
            self.layers,
            (
                f.relu_,
                lambda y: y.relu_(),
                lambda y: y.clamp_min(0),
                lambda y: torch.clamp(y, min=0.0),
                lambda y: y.clamp(0, 2),
                lambda y: f.hardtanh(y, 0.0, 2.0),
                self.tail[0],
                lambda y: y.clip(0.0, max=2.0),
                self.tail[1],
                lambda y: y.clamp(max=1.0),
                self.tail[2],
                lambda y: torch.clamp(y, y.mean(), 4.0),
            ),
            strict=True,
        ):
            x = function(layer(x))
        return x


def test_an_activation_is_known_in_every_spelling() -> None:
    live = live_model(Spellings().double().eval(), torch.randn(2, 3).double())
    kinds = [activation_after(live, f"layers.{index}") for index in range(12)]
    capped, other = Activation("capped", 2.0), Activation("other")
    # The last one reads its input twice.
    assert kinds == [RELU] * 4 + [capped] * 4 + [other, other, Activation("slope"), None]


def test_input_layers_are_those_with_no_layer_before_them() -> None:
    assert input_layers(live_of(Basic)) == {"conv1"}
    assert input_layers(live_of(Joined)) == {"left", "right"}
    assert input_layers(live_of(Forked)) == {"a"}


def test_a_layer_that_is_called_twice_or_tied_is_not_read_once() -> None:
    live = live_of(Forked)
    assert layer_call(live, "shared") is None and layer_call(live, "a") is not None
    assert not read_once(live, "tied1.weight") and not read_once(live, "shared.weight")
    assert read_once(live, "gate.weight")


def test_a_reader_of_the_shape_alone_does_not_count() -> None:
    live = live_of(Plumbing)
    pooled = next(node for node in live.graph.nodes if "adaptive" in str(node.target))
    assert len(pooled.users) == 2
    reader = single_consumer(live.module, pooled)
    assert reader is not None and reader.target == "view"


BLOCKS = {
    Basic: [
        ("conv1",),
        ("layer1.0.conv1", "layer1.0.conv2", "layer1.0.downsample.0"),
        ("layer1.1.conv1", "layer1.1.conv2"),
        ("fc",),
    ],
    Inverted: [
        ("features.0.0",),
        ("features.1.conv.0.0", "features.1.conv.1"),
        ("features.2.conv.0.0", "features.2.conv.1.0", "features.2.conv.2"),
        ("features.3.0",),
        ("classifier.1",),
    ],
    Functional: [("stem",), ("dw",), ("pw",), ("head",)],
    Joined: [("left", "right"), ("joint",), ("end",)],
    Forked: [
        ("a",),
        ("b",),
        ("shared",),
        ("tied1",),
        ("tied2",),
        ("gate",),
        ("smooth",),
        ("bounded",),
        ("turned",),
        ("end",),
    ],
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_residual_parts_and_modules_of_their_own(kind: type[nn.Module]) -> None:
    live = live_of(kind)
    found = [tuple(sorted(block.layers)) for block in make_blocks(live)]
    assert found == [tuple(sorted(layers)) for layers in BLOCKS[kind]]


@pytest.mark.parametrize("kind", SHAPES)
def test_blocks_run_one_after_another_give_the_network(kind: type[nn.Module]) -> None:
    live = live_of(kind)
    blocks = make_blocks(live)
    x = inputs(kind, 3)
    state = blocks[0].begin(Batch((x,)))
    for index, block in enumerate(blocks):
        state = block.run(live.module, state)
        tensors = [value for node, value in state.items() if isinstance(value, Tensor) and node.op != "get_attr"]
        assert len(tensors) == 1, f"what block {index} hands on is no single value"
    assert torch.equal(last_output(state), live.module(x))
    assert sorted(name for block in blocks for name in block.layers) == sorted(live.layers)
    assert [node for block in blocks for node in block.nodes] == [n for n in live.graph.nodes if n.op != "placeholder"]


def test_a_long_module_of_the_network_s_own_is_no_block() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Chained()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    live = live_model(Wrapped().double().eval(), torch.randn(2, 3).double())
    assert [block.layers for block in make_blocks(live)] == [(f"net.layers.{index}",) for index in range(9)]


def built(factory: str, **args: object) -> nn.Module:
    """A network of one of the libraries of the extra `vision`."""
    try:
        import_package(factory.partition(":")[0])
    except UsageError as missing:
        pytest.skip(str(missing))
    return build_model(ModelSettings(factory=factory, args=dict(args)), Path())


@pytest.mark.parametrize(
    ("factory", "args", "blocks", "with_norm", "links"),
    [
        ("torchvision.models:resnet18", {}, 10, 20, 8),
        ("torchvision.models:resnet50", {}, 18, 53, 32),
        ("torchvision.models:mobilenet_v2", {}, 20, 52, 37),
        ("timm:create_model", {"model_name": "mobilenetv1_100"}, 15, 27, 27),
    ],
)
def test_networks_of_the_libraries(factory: str, args: dict[str, str], blocks: int, with_norm: int, links: int) -> None:
    live = live_model(built(factory, **args), torch.randn(2, 3, 32, 32))
    found = make_blocks(live)
    assert len(found) == blocks
    assert max(len(block.layers) for block in found) <= 4
    assert sum(owner is not None for owner in norms(live).values()) == with_norm
    assert len(input_layers(live)) == 1
    assert len(equalization_links(live, live.layers)) == links
