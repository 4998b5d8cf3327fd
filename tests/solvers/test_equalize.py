"""Equalized ranges: equal, of the same product, and reached from anywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompress.solvers.equalize import DEAD, Chain, Peaks, absorbable, equalize, equalizing_factors, live_channels


def free(channels: int) -> Tensor:
    return torch.full((channels,), math.inf, dtype=torch.float64)


def random_peaks(groups: int, height: int, width: int, seed: int) -> Peaks:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(groups, height, 1, generator=generator) + torch.randn(groups, 1, width, generator=generator)
    return Peaks(torch.rand(groups, height, width, generator=generator).double() * (2 * spread).exp())


def factors(ranges: Tensor) -> Tensor:
    return equalizing_factors(ranges, live_channels(ranges))


@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 100))
def test_all_ranges_of_a_channel_become_their_geometric_mean(layers: int, channels: int, seed: int) -> None:
    ranges = torch.rand(layers, channels, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    found = factors(ranges)
    expected = ranges.prod(0).pow(1 / layers).expand_as(ranges)
    torch.testing.assert_close(ranges * found, expected)
    torch.testing.assert_close(found.prod(0), torch.ones(channels).double())
    torch.testing.assert_close(factors(ranges * found), torch.ones_like(ranges))


def test_a_pair_is_scaled_by_the_root_of_its_ratio_and_a_triple_as_aimet_does() -> None:
    r1, r2, r3 = 8.0, 2.0, 0.5
    s = math.sqrt(r1 / r2)
    torch.testing.assert_close(factors(torch.tensor([[r1], [r2]])).flatten(), torch.tensor([1 / s, s]).double())
    g = (r1 * r2 * r3) ** (1 / 3)
    s12, s23 = r1 / g, g / r3
    expected = torch.tensor([1 / s12, s12 / s23, s23]).double()
    torch.testing.assert_close(factors(torch.tensor([[r1], [r2], [r3]])).flatten(), expected)


def test_a_channel_that_is_dead_in_one_layer_takes_the_median_of_the_others_elsewhere() -> None:
    ranges = torch.tensor([[4.0, 1.0, 9.0, 0.0], [1.0, 1.0, 1.0, 50.0], [2.0, 8.0, 3.0, 0.1]]).double()
    found = factors(ranges)
    levels = (ranges * found)[0, :3]
    assert torch.equal((ranges * found)[0, 3:], torch.zeros(1).double())
    torch.testing.assert_close((ranges * found)[1:, 3], levels.median().expand(2))
    torch.testing.assert_close(found.prod(0), torch.ones(4).double())


@pytest.mark.parametrize("ranges", [torch.zeros(2, 3), torch.tensor([[0.0, 1.0], [1.0, 0.0]])])
def test_where_no_channel_lives_in_all_layers_nothing_is_scaled(ranges: Tensor) -> None:
    assert torch.equal(factors(ranges), torch.ones_like(ranges).double())


def test_a_channel_lives_if_its_range_is_no_rounding_noise() -> None:
    ranges = torch.tensor([[1.0, DEAD / 2, DEAD * 2], [7.0, 7.0, 0.0]])
    assert live_channels(ranges).tolist() == [[True, False, True], [True, True, False]]


def scaled_ranges(peaks: list[Peaks], chain: Chain, scales: list[Tensor]) -> list[Tensor]:
    """The ranges of a chain's channels in each layer after scaling, from the weights themselves."""
    found = []
    last = len(chain.layers) - 1
    for place, layer in enumerate(chain.layers):
        values = peaks[layer].values
        groups, height, width = values.shape
        if place < last:
            values = values * scales[place].reshape(groups, height, 1)
        if place > 0:
            repeats = chain.repeats if place == last else 1
            values = values / scales[place - 1].repeat_interleave(repeats).reshape(groups, 1, width)
        rows = values.amax(2).flatten() if place < last else values.amax(1).flatten()
        found.append(rows.reshape(-1, chain.repeats).amax(1) if place == last else rows)
    return found


@pytest.mark.parametrize("repeats", [1, 4])
def test_a_pair(repeats: int) -> None:
    peaks = [random_peaks(1, 6, 3, 0), random_peaks(1, 5, 6 * repeats, 1)]
    chain = Chain((0, 1), (free(6),), repeats)
    (scales,) = equalize([chain], peaks, 1)
    first, second = scaled_ranges(peaks, chain, scales)
    torch.testing.assert_close(first, second)
    before = peaks[0].values.amax(2).flatten() * peaks[1].values.amax(1).reshape(6, repeats).amax(1)
    torch.testing.assert_close(first * second, before)


def test_a_row_with_depthwise_layers_and_a_grouped_end() -> None:
    peaks = [random_peaks(2, 3, 4, 0), random_peaks(6, 1, 1, 1), random_peaks(6, 1, 1, 2), random_peaks(3, 4, 2, 3)]
    chain = Chain((0, 1, 2, 3), (free(6),) * 3)
    (scales,) = equalize([chain], peaks, 1)
    ranges = scaled_ranges(peaks, chain, scales)
    for one in ranges[1:]:
        torch.testing.assert_close(one, ranges[0])


def test_a_second_time_changes_nothing() -> None:
    peaks = [random_peaks(1, 6, 3, 0), random_peaks(1, 5, 6, 1), random_peaks(1, 4, 5, 2)]
    chains = [Chain((0, 1), (free(6),)), Chain((1, 2), (free(5),))]
    (first,), (second,) = equalize(chains, peaks, 200)
    done = [
        Peaks(peaks[0].values * first.reshape(1, 6, 1)),
        Peaks(peaks[1].values / first.reshape(1, 1, 6) * second.reshape(1, 5, 1)),
        Peaks(peaks[2].values / second.reshape(1, 1, 5)),
    ]
    for again in equalize(chains, done, 1):
        torch.testing.assert_close(again[0], torch.ones_like(again[0]), rtol=1e-5, atol=0.0)


def test_layers_in_a_row_end_where_pairs_in_turn_do() -> None:
    """The published iteration: one pair after another, until nothing moves."""
    peaks = [random_peaks(1, 6, 3, 0), random_peaks(1, 5, 6, 1), random_peaks(1, 4, 5, 2)]
    weights = [one.values[0].clone() for one in peaks]
    for _ in range(500):
        for first, second in ((0, 1), (1, 2)):
            s = (weights[first].amax(1) / weights[second].amax(0)).sqrt()
            weights[first] /= s[:, None]
            weights[second] *= s
    chains = [Chain((0, 1), (free(6),)), Chain((1, 2), (free(5),))]
    (first_scale,), (second_scale,) = equalize(chains, peaks, 500)
    torch.testing.assert_close(peaks[0].values[0] * first_scale[:, None], weights[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(peaks[2].values[0] / second_scale, weights[2], rtol=1e-5, atol=0.0)


def test_depthwise_layers_at_once_end_where_pairs_in_turn_do() -> None:
    peaks = [random_peaks(1, 6, 3, 0), random_peaks(6, 1, 1, 1), random_peaks(1, 4, 6, 2)]
    together = Chain((0, 1, 2), (free(6),) * 2)
    (scales,) = equalize([together], peaks, 1)
    pairs = equalize([Chain((0, 1), (free(6),)), Chain((1, 2), (free(6),))], peaks, 200)
    for one, (other,) in zip(scales, pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0.0)


def test_on_a_limited_link_nothing_grows_and_ranges_are_equal_but_for_one_factor() -> None:
    peaks = [random_peaks(1, 6, 3, 0), random_peaks(6, 1, 1, 1), random_peaks(1, 4, 6, 2)]
    limit = torch.ones(6).double()
    chain = Chain((0, 1, 2), (limit, limit))
    (scales,) = equalize([chain], peaks, 40)
    for scale in scales:
        assert float(scale.max()) == pytest.approx(1.0, abs=1e-12)
    ranges = scaled_ranges(peaks, chain, scales)
    for one in ranges[1:]:
        ratio = one / ranges[0]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_dead_channels_never_widen_a_layer_and_going_on_leads_nowhere(limit: float) -> None:
    peaks = [random_peaks(1, 8, 3, 0), random_peaks(8, 1, 1, 1), random_peaks(1, 4, 8, 2)]
    # Dead at the front, in the middle, at the end, and in two places at once, each with a huge range elsewhere.
    peaks[0].values[0, :2] *= 1e-12
    peaks[1].values[:2] *= 1e4
    peaks[1].values[2] = 0
    peaks[0].values[0, 2] *= 1e4
    peaks[2].values[:, :, 3] = 0
    peaks[1].values[3] *= 1e4
    peaks[0].values[0, 4] = 0
    peaks[1].values[4] = 0
    limits = torch.full((8,), limit, dtype=torch.float64)
    limits[:5] = math.inf
    chain = Chain((0, 1, 2), (limits, limits))
    results = [equalize([chain], peaks, sweeps)[0] for sweeps in (1, 60)]
    ranges = scaled_ranges(peaks, chain, results[0])
    for one in ranges:
        assert float(one[:5].max()) <= float(one[5:].max()) * (1 + 1e-9)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)


def test_a_dead_channel_stops_at_its_limit() -> None:
    peaks = [random_peaks(1, 4, 3, 0), random_peaks(1, 4, 4, 1)]
    peaks[0].values[0, 0] = 0
    peaks[1].values[:, :, 0] *= 1e3
    limits = free(4)
    limits[0] = 2.5
    (scales,) = equalize([Chain((0, 1), (limits,))], peaks, 10)
    assert float(scales[0][0]) == pytest.approx(2.5)


def test_what_is_absorbed() -> None:
    mean, deviation = torch.tensor([5.0, 2.0, -1.0, 9.0]).double(), torch.tensor([1.0, -1.0, 0.1, 0.5]).double()
    assert absorbable(mean, deviation, rectified=True).tolist() == [2.0, 0.0, 0.0, 7.5]
    assert absorbable(mean, deviation, rectified=True, cap=torch.full((4,), 6.0)).tolist() == [2.0, 0.0, 0.0, 6.0]
    assert torch.equal(absorbable(mean, deviation, rectified=False), mean)
