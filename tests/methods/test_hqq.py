"""What is true of half-quadratic quantization."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from contexts import context_at
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.awkward_weights import AWKWARD, assert_cut_does_not_matter, assert_same, encode, gaussian

from qcompress.coding.grids import decode, decode_rows, exponent_for, from_half
from qcompress.methods import hqq
from qcompress.registry import HqqConfig
from qcompress.solvers.blocks import walk
from qcompress.solvers.grids import minmax_grid

CONFIGS = [
    HqqConfig(bits=1, granularity="channel"),
    HqqConfig(bits=2, group_size=64),
    HqqConfig(bits=3, granularity="channel", norm=0.4),
    HqqConfig(bits=4, group_size=64),
    HqqConfig(bits=8, granularity="tensor", norm=1.0),
]


def start_of(weight, config, exponent):
    """The min-max grid of a weight with one grid a row, in float64: (scale, offset), with `round_zero` applied."""
    grid = minmax_grid(weight, config.bits, exponent)
    scale = from_half(grid.scale, exponent).double().unsqueeze(1)
    offset = from_half(grid.offset, exponent).double().unsqueeze(1)
    return scale, (offset / scale).round() * scale if config.round_zero else offset


def error_on(weight, scale, offset, config):
    """(codes, error) of the nearest codes, float64."""
    codes = ((weight.double() - offset) / scale).round().clamp(0, 2**config.bits - 1)
    return codes, weight.double() - (codes * scale + offset)


def literal_step(weight, scale, offset, config):
    """(error, next offset) of one published step in its own letters, float64 [rows, 1]."""
    rate, zero, wanted = 1 / scale, -offset / scale, weight.double()
    codes = (wanted * rate + zero).round().clamp(0, 2**config.bits - 1)
    error = wanted - (codes - zero) / rate
    size = error.abs()
    sparse = error.sign() * (size - size.pow(config.norm - 1) / config.beta).clamp(min=0)
    zero = (codes - (wanted - sparse) * rate).mean(1, keepdim=True)
    return size.pow(config.norm).sum(1, keepdim=True), -zero * scale


def literal_hqq(weight, config, exponent):
    """The published loop, float64, best iterate kept, nothing rounded: the offset of every row."""
    scale, offset = start_of(weight, config, exponent)
    best, least = offset, torch.full_like(offset, torch.inf)
    for _ in range(config.iterations + 1):
        total, following = literal_step(weight, scale, offset, config)
        best, least = torch.where(total < least, offset, best), torch.minimum(total, least)
        offset = following
    return best


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", [1.0, 0.05])
def test_one_step_is_the_published_one(bits, norm, size):
    weight = gaussian(40, 64, seed=3) * size
    config = HqqConfig(bits=bits, granularity="channel", norm=norm)
    exponent = exponent_for(float(weight.abs().max()))
    unit = 2.0**exponent
    scale, offset = start_of(weight, config, exponent)
    (chunk,) = walk(weight, exponent)
    strength = unit ** (norm - 2) / config.beta
    ends = ((scale / unit).squeeze(1).float(), (offset / unit).squeeze(1).float())
    error, following = hqq._step(chunk, *ends, config, strength)
    expected_error, expected = literal_step(weight, scale, offset, config)
    assert torch.allclose(error * unit**norm, expected_error.squeeze(1), rtol=1e-4)
    assert torch.allclose(following * unit, expected.squeeze(1), rtol=1e-5, atol=1e-5 * size)
    assert ((expected - offset).abs() > 1e-3 * scale).double().mean() > 0.5


def test_norm_one_is_soft_thresholding():
    error = torch.tensor([[-2.0, -0.05, 0.05, 0.3, 2.0]])
    config = HqqConfig(bits=8, granularity="channel", norm=1.0, beta=10.0)
    (chunk,) = walk(error, 0)
    # A step so long that every code is 0 leaves the weights themselves as the errors.
    total, following = hqq._step(chunk, torch.tensor([1e9]), torch.zeros(1), config, 1 / config.beta)
    assert float(total) == pytest.approx(4.4)
    left = [-0.1, -0.05, 0.05, 0.1, 0.1]
    assert float(following) == pytest.approx(sum(left) / 5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_whole_loop_ends_as_well_as_the_published_one(bits):
    weight = gaussian(200, 64, seed=5)
    config = HqqConfig(bits=bits, granularity="channel")
    exponent = exponent_for(float(weight.abs().max()))
    scale, _ = start_of(weight, config, exponent)
    encoded = hqq.encode(weight, config, context_at(exponent))
    totals = [
        float(error_on(weight, scale, offset, config)[1].abs().pow(0.7).sum())
        for offset in (from_half(encoded.offset, exponent).double(), literal_hqq(weight, config, exponent))
    ]
    assert totals[0] == pytest.approx(totals[1], rel=2e-3)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_block_is_worse_than_its_start(name, config):
    weight = AWKWARD[name]
    exponent = exponent_for(float(weight.abs().max()))
    encoded = hqq.encode(weight, config, context_at(exponent))
    assert torch.isfinite(decode_rows(encoded)).all()
    blocks = weight.reshape(encoded.scale.numel(), -1)
    grid = minmax_grid(blocks, config.bits, exponent)
    assert torch.equal(grid.scale, encoded.scale.reshape(-1))
    if exponent < -100:
        return
    scale, start = start_of(blocks, config, exponent)
    fitted = from_half(encoded.offset, exponent).double().reshape(-1, 1)
    start = (start * 2.0**-exponent).half().double() * 2.0**exponent
    unit = 2.0**exponent
    after, before = (
        (error_on(blocks, scale, offset, config)[1] / unit).abs().pow(config.norm).sum(1) for offset in (fitted, start)
    )
    assert (after <= before * (1 + 1e-3) + 1e-3 * blocks.shape[1]).all()


def test_zero_stays_zero_and_a_constant_costs_only_float16():
    for config in CONFIGS:
        assert (decode(encode(hqq.encode, AWKWARD["zero"], config)) == 0).all()
        for name in ("constant", "closer than float16"):
            weight = AWKWARD[name]
            error = (decode(encode(hqq.encode, weight, config)) - weight).abs().max()
            assert float(error) <= 2.0**-10 * float(weight.abs().max())


def test_a_huge_beta_moves_nothing_and_a_tiny_one_takes_the_mean():
    weight = gaussian(50, 64)
    exponent = exponent_for(float(weight.abs().max()))
    grid = minmax_grid(weight, 3, exponent)
    still = hqq.encode(weight, HqqConfig(bits=3, granularity="channel", beta=1e30), context_at(exponent))
    assert torch.equal(still.offset.reshape(-1), grid.offset)
    config = HqqConfig(bits=3, granularity="channel", beta=1e-30, iterations=1)
    moved = from_half(hqq.encode(weight, config, context_at(exponent)).offset, exponent).double()
    scale, start = start_of(weight, config, exponent)
    codes, _ = error_on(weight, scale, start, config)
    mean = weight.double().mean(1, keepdim=True) - scale * codes.mean(1, keepdim=True)
    away = (moved - start).abs() > 1e-9
    assert away.double().mean() > 0.3
    assert torch.allclose(moved[away], mean[away], rtol=2.0**-11)


def test_more_iterations_are_never_worse():
    weight = gaussian(50, 64, seed=9)
    exponent = exponent_for(float(weight.abs().max()))
    totals = []
    for iterations in (1, 2, 5, 20):
        config = HqqConfig(bits=2, granularity="channel", iterations=iterations)
        encoded = hqq.encode(weight, config, context_at(exponent))
        totals.append((decode_rows(encoded).double() - weight.double()).abs().pow(0.7).sum(1))
    for before, after in pairwise(totals):
        assert (after <= before * (1 + 1e-5)).all()
    assert float(totals[-1].sum()) < float(totals[0].sum()) * 0.999


def test_the_shrinkage_counts_in_the_weights_own_units():
    weight = gaussian(50, 64)
    config = HqqConfig(bits=2, granularity="channel", norm=0.7)
    exponent = exponent_for(float(weight.abs().max()))
    stretched = HqqConfig(bits=2, granularity="channel", norm=0.7, beta=10.0 * 2.0 ** (10 * (0.7 - 2)))
    plain = hqq.encode(weight, config, context_at(exponent))
    assert_same(plain, hqq.encode(weight * 2.0**10, stretched, context_at(exponent + 10)))
    assert not torch.equal(plain.offset, hqq.encode(weight * 2.0**10, config, context_at(exponent + 10)).offset)


@settings(max_examples=25)
@given(
    st.integers(0, 6),
    st.sampled_from([c for c in CONFIGS if c.granularity != "tensor"]),
    st.sampled_from(sorted(AWKWARD)),
)
def test_rows_may_be_cut_anywhere(cut, config, name):
    assert_cut_does_not_matter(hqq.encode, AWKWARD[name], config, cut)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 2, 3, 3)])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_no_weights(shape, granularity):
    encoded = hqq.encode(torch.zeros(shape), HqqConfig(bits=4, granularity=granularity), context_at(0))
    assert decode(encoded).shape == shape
    assert encoded.scale.shape == encoded.offset.shape == ((1, 1) if granularity == "tensor" else (shape[0], 1))
