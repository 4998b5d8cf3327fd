"""Figures of weights, and what naive quantization and k-means of all of them give."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from artifact.examples import gaussian
from torch import Tensor, nn

from qcompress.compress.weight_stats import Trials, measure_weights
from qcompress.data.measurement import Measurement


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.fc = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.up(self.conv(x)).mean((2, 3)))
        return found


NAMES = ["conv.weight", "up.weight", "fc.weight"]


def rows_of(name: str, module: nn.Module) -> Tensor:
    """A weight with its output channels first."""
    weight = module.get_parameter(name).detach()
    return weight.transpose(0, 1) if name == "up.weight" else weight


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_spread_is_that_of_the_weights(net: Net, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("qcompress.compress.weight_stats.SUMMED_AT_ONCE", at_once)
    found = measure_weights(net, NAMES, Trials()).weights
    assert list(found) == NAMES
    for name, figures in found.items():
        weight = net.get_parameter(name).detach().double()
        deviation = float((weight - weight.mean()).square().mean().sqrt())
        assert figures.range == pytest.approx(float(weight.max() - weight.min()))
        assert figures.range_over_std == pytest.approx(figures.range / deviation)
        assert figures.kurtosis == pytest.approx(float(((weight - weight.mean()) / deviation).pow(4).mean()), rel=1e-4)
        assert figures.sqnr_db == {}


def test_a_constant_weight_has_no_spread_and_is_an_entry_of_its_codebook(net: Net) -> None:
    nn.init.constant_(net.fc.weight, 0.5)
    found = measure_weights(net, ["fc.weight"], Trials(kmeans=(1,)))
    figures = found.weights["fc.weight"]
    assert (figures.range, figures.range_over_std, figures.kurtosis) == (0, None, None)
    assert found.sqnr_db["k-means", 1] is None


def test_naive_quantization_is_of_each_channel_along_its_axis(net: Net) -> None:
    """A transposed convolution has its output channels second: grids along the first axis would be coarser."""
    with torch.no_grad():
        net.up.weight.mul_(torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1, 1))
    found = measure_weights(net, ["up.weight"], Trials(naive=(8,)))
    weight = net.up.weight.detach().double()
    low, high = weight.amin((0, 2, 3)).clamp_max(0), weight.amax((0, 2, 3)).clamp_min(0)
    largest = float(((high - low) / 255).square().sum() / 4 * weight[:, 0].numel())
    sqnr = found.weights["up.weight"].sqnr_db["8"]
    assert sqnr is not None and sqnr > 10 * math.log10(float(weight.square().sum()) / (1.1 * largest))
    assert found.sqnr_db["naive", 8] == sqnr


def test_more_bits_leave_less_error_and_kmeans_less_than_one_grid_of_as_many(net: Net) -> None:
    found = measure_weights(net, NAMES, Trials(naive=(2, 3, 4), kmeans=(1, 2, 4)))
    assert list(found.sqnr_db) == [*(("naive", b) for b in (2, 3, 4)), *(("k-means", b) for b in (1, 2, 4))]
    for kind, widths in (("naive", (2, 3, 4)), ("k-means", (1, 2, 4))):
        ratios = [found.sqnr_db[kind, bits] or math.inf for bits in widths]
        assert ratios == sorted(ratios)
    assert found.metrics == {}
    assert all(list(figures.sqnr_db) == ["2", "3", "4"] for figures in found.weights.values())


def test_each_trial_measures_all_weights_at_once_and_leaves_the_module_alone(net: Net) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    levels: list[dict[str, int]] = []
    copies: set[int] = set()

    def measure(module: nn.Module) -> Sequence[Measurement]:
        assert module is not net
        copies.add(id(module))
        weights = {name: rows_of(name, module) for name in NAMES}
        levels.append({name: len(rows.unique()) for name, rows in weights.items()})
        if len(levels) == 1:
            assert all(len(row.unique()) <= 2 for rows in weights.values() for row in rows)
        assert torch.equal(module.get_parameter("conv.bias"), before["conv.bias"])
        return [Measurement("top1", float(len(levels)), 1, 0, 1, True, np.ones(1), np.ones(1))]

    found = measure_weights(net, NAMES, Trials(naive=(1,), kmeans=(1, 2)), measure)
    assert found.metrics == {("naive", 1): 1.0, ("k-means", 1): 2.0, ("k-means", 2): 3.0}
    assert levels[1:] == [dict.fromkeys(NAMES, 2), dict.fromkeys(NAMES, 4)]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert len(copies) == 1, "one copy of the network serves all trials"


def test_kmeans_of_few_values_is_exact() -> None:
    module = nn.Linear(16, 8)
    with torch.no_grad():
        module.weight.copy_((gaussian(8, 16) > 0).float() - 0.5)
    assert measure_weights(module, ["weight"], Trials(kmeans=(1,))).sqnr_db == {("k-means", 1): None}
