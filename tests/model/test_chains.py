"""What is between two layers of a link lets any factor through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model.graph_networks import (
    SHAPES,
    Basic,
    Forked,
    Functional,
    Inverted,
    InvertedRelu,
    Joined,
    Plumbing,
    Unfolded,
    inputs,
    live_model,
    live_of,
)
from qcompress.model.chains import Link, cap_module, equalization_links, join_links
from qcompress.model.fold import fold_layer, read_layer
from qcompress.model.graph import batch_norm_of
from qcompress.model.live import LiveModel, put_tensors


def links_of(live: LiveModel) -> list[Link]:
    return equalization_links(live, live.layers)


LINKS = {
    Basic: [
        Link("layer1.0.conv1", "layer1.0.conv2", True, None, False, 1),
        Link("layer1.1.conv1", "layer1.1.conv2", True, None, False, 1),
    ],
    Inverted: [
        Link("features.0.0", "features.1.conv.0.0", True, 6.0, True, 1),
        Link("features.1.conv.0.0", "features.1.conv.1", True, 6.0, False, 1),
        Link("features.2.conv.0.0", "features.2.conv.1.0", True, 6.0, True, 1),
        Link("features.2.conv.1.0", "features.2.conv.2", True, 6.0, False, 1),
        Link("features.3.0", "classifier.1", True, 6.0, False, 1),
    ],
    Functional: [
        Link("stem", "dw", True, 6.0, True, 1),
        Link("dw", "pw", True, 6.0, False, 1),
        Link("pw", "head", True, 6.0, False, 1),
    ],
    Plumbing: [
        Link("grouped", "up", True, None, True, 1),
        Link("up", "up_grouped", True, None, True, 1),
        Link("up_grouped", "wide", True, None, False, 1),
        Link("wide", "plain", True, None, False, 1),
        Link("plain", "last", False, None, False, 4),
        Link("last", "out", True, None, False, 1),
    ],
    Joined: [],
    Unfolded: [Link("third", "fourth", True, None, False, 1)],
    Forked: [],
}


@pytest.mark.parametrize("kind", LINKS)
def test_the_links_of_a_network(kind: type[nn.Module]) -> None:
    assert links_of(live_of(kind)) == LINKS[kind]


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind not in (Inverted, Functional, Unfolded)])
def test_what_one_layer_gives_times_s_and_the_next_takes_by_s_is_the_same_network(kind: type[nn.Module]) -> None:
    live = live_of(kind)
    x = inputs(kind, 4)
    expected = live.module(x)
    for link in links_of(live):
        norm = batch_norm_of(live, link.first)
        first = read_layer(live, link.first) if norm is None else fold_layer(live, link.first, norm)
        second = read_layer(live, link.second)
        channels = first.kernels.shape[0] * first.kernels.shape[1]
        factor = torch.empty(channels, dtype=torch.float64).uniform_(0.1, 10.0)
        module = copy.deepcopy(live.module)
        put_tensors(module, first.scaled_outputs(factor).tensors(torch.float64))
        put_tensors(module, second.scaled_inputs(1 / factor.repeat_interleave(link.repeats)).tensors(torch.float64))
        assert not torch.equal(module.get_submodule(link.second).weight, live.module.get_submodule(link.second).weight)
        torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)


def test_layers_that_are_not_asked_for_have_no_links() -> None:
    live = live_of(InvertedRelu)
    some = equalization_links(live, ["features.0.0", "features.1.conv.1", "features.2.conv.0.0", "features.2.conv.1.0"])
    assert [(link.first, link.second) for link in some] == [("features.2.conv.0.0", "features.2.conv.1.0")]


def test_links_through_depthwise_layers_are_one_row() -> None:
    live = live_of(Inverted)
    rows = join_links(live, links_of(live))
    assert [[row[0].first, *(link.second for link in row)] for row in rows] == [
        ["features.0.0", "features.1.conv.0.0", "features.1.conv.1"],
        ["features.2.conv.0.0", "features.2.conv.1.0", "features.2.conv.2"],
        ["features.3.0", "classifier.1"],
    ]


def test_a_row_ends_where_a_channel_becomes_several() -> None:
    module = Between(nn.Sequential(Call(lambda x: x.reshape(x.shape[0], 16, 4, 1)), nn.Conv2d(16, 16, 1, groups=16)))
    module.second = nn.Conv2d(16, 2, 1)
    live = live_model(module.double().eval(), torch.randn(2, 2, 4, 4).double())
    rows = join_links(live, links_of(live))
    assert [[(link.first, link.second, link.repeats) for link in row] for row in rows] == [
        [("first", "middle.1", 4)],
        [("middle.1", "second", 1)],
    ]


def test_a_cap_stays_behind_another_activation() -> None:
    live = live_model(Between(nn.Sequential(nn.ReLU6(), nn.ReLU())).double().eval(), torch.randn(2, 2, 4, 4).double())
    assert [link.cap for link in links_of(live)] == [6.0]


def test_a_row_of_plain_layers_is_cut_at_each() -> None:
    live = live_of(Plumbing)
    assert [len(row) for row in join_links(live, links_of(live))] == [1] * 6


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.second = nn.Conv2d(2, 4, 1), middle, nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.middle(self.first(x)))


class Call(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    "middle",
    [
        nn.GELU(),
        nn.Hardtanh(-1, 1),
        nn.ConstantPad2d(1, 0.5),
        nn.Sequential(nn.AvgPool2d(2), nn.ReLU6()),
        nn.Softmax(1),
        nn.PixelShuffle(1),
        nn.LayerNorm(4),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        Call(lambda x: x + 1),
        Call(lambda x: x.transpose(2, 3)),
        Call(lambda x: x.mean(1, keepdim=True).expand_as(x)),
        Call(lambda x: x[:, [1, 0, 3, 2]]),
        Call(lambda x: torch.nn.functional.pad(x, (0, 0, 0, 0, 1, -1))),
        Call(lambda x: x.view(x.shape[0], 2, 2, 16).transpose(1, 2).reshape(x.shape)),
        Call(lambda x: torch.dropout(x, 0.0, True)),
    ],
)
def test_nothing_goes_through_what_mixes_channels_or_is_not_homogeneous(middle: nn.Module) -> None:
    live = live_model(Between(middle).double().eval(), torch.randn(2, 2, 4, 4).double())
    assert links_of(live) == []


@pytest.mark.parametrize(
    ("middle", "second"),
    [
        (nn.Identity(), nn.Linear(4, 2)),
        (Call(lambda x: x.mean(1).flatten(1)), nn.Linear(16, 2)),
        (Call(lambda x: x.flatten(2)), nn.Linear(16, 2)),
        (Call(lambda x: x.mean((2, 3)).unsqueeze(1)), nn.Linear(4, 2)),
    ],
)
def test_a_linear_layer_that_sees_something_else_than_the_channels_has_no_link(
    middle: nn.Module, second: nn.Module
) -> None:
    module = Between(middle)
    module.second = second
    live = live_model(module.double().eval(), torch.randn(2, 2, 4, 4).double())
    assert links_of(live) == []


@pytest.mark.parametrize(
    ("middle", "padded"),
    [
        (nn.AvgPool2d(3, 1, 1), True),
        (nn.MaxPool2d(3, 1, 1), False),
        (nn.ZeroPad2d(1), True),
        (nn.ReflectionPad2d(1), False),
        (nn.ReplicationPad2d(1), False),
        (nn.Upsample(scale_factor=2, mode="bilinear"), False),
        (nn.Dropout2d(), False),
    ],
)
def test_a_link_says_whether_zeros_join_in(middle: nn.Module, padded: bool) -> None:
    live = live_model(Between(middle).double().eval(), torch.randn(2, 2, 4, 4).double())
    assert [link.padded for link in links_of(live)] == [padded]


def test_linear_layers_over_positions_are_linked_by_their_last_axis() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.PReLU(), nn.Linear(5, 2)).double().eval()
    live = live_model(module, torch.randn(2, 7, 3).double())
    assert [(link.first, link.second, link.repeats) for link in links_of(live)] == [("0", "2", 1)]


def test_a_cap_across_positions_or_on_a_layer_that_does_not_own_it_is_no_link() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU6(), nn.Linear(5, 2)).double().eval()
    assert links_of(live_model(module, torch.randn(2, 7, 3).double())) == []
    assert [link.cap for link in links_of(live_model(module, torch.randn(2, 3).double()))] == [6.0]


def test_a_cap_is_held_by_a_module_that_the_traced_network_calls() -> None:
    live = live_of(Functional)
    assert [cap_module(live, link) for link in links_of(live)] == ["bn1.act", "bn2.act", "bn3.act"]
    live = live_of(Inverted)
    assert cap_module(live, links_of(live)[0]) == "features.0.1"
    assert live_of(Plumbing).traced and cap_module(live_of(Plumbing), links_of(live_of(Plumbing))[3]) == "wide"
