"""What is true of the grids of least error, as a method; the searches have their own tests."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from contexts import context_at
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.awkward_weights import (
    AWKWARD,
    assert_cut_does_not_matter,
    assert_same,
    encode,
    gaussian,
    sqnr,
    squared_error,
)

from qcompress.coding.grids import decode, decode_rows, exponent_for
from qcompress.methods import mse, rtn
from qcompress.registry import MseConfig, RtnConfig

CONFIGS = [
    MseConfig(bits=bits, search=search, symmetric=symmetric, group_size=group)
    for bits, search, symmetric, group in (
        (1, "als", False, 64),
        (2, "als", False, 64),
        (4, "als", False, None),
        (8, "als", False, 32),
        (2, "als", True, None),
        (4, "als", True, 64),
        (3, "grid", False, 64),
        (4, "grid", True, None),
    )
]


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_awkward_weights(name, config):
    weight = AWKWARD[name]
    encoded = encode(mse.encode, weight, config)
    decoded = decode_rows(encoded)
    assert torch.isfinite(decoded).all()
    assert int(encoded.codes.max()) < 2**config.bits
    assert (encoded.scale != 0).all()
    assert (encoded.offset is not None) == (config.form == "offset")
    assert (encoded.zero_point is not None) == (config.form == "zero-point")
    dead = (weight == 0).all(1)
    # A mid-rise grid has no zero, only two levels as near to it as float16 allows.
    assert (decoded[dead].abs() <= 2.0 ** (encoded.exponent - 25)).all()
    if encoded.convention != "mid-rise":
        assert (decoded[dead] == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_constant_and_two_values_cost_only_float16(bits):
    for name in ("constant", "two values", "closer than float16"):
        weight = AWKWARD[name]
        decoded = decode(encode(mse.encode, weight, MseConfig(bits=bits, granularity="channel")))
        assert float((decoded - weight).abs().max()) <= 2.0**-11 * float(weight.abs().max())


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_search_is_never_worse_than_rounding_to_nearest(name, symmetric, bits):
    weight = AWKWARD[name]
    searched = encode(mse.encode, weight, MseConfig(bits=bits, search="grid", norm=2.0, symmetric=symmetric))
    convention = None
    if symmetric:
        convention = {"full": "full-range", "mid-rise": "mid-rise"}[searched.convention]
    plain = encode(rtn.encode, weight, RtnConfig(bits=bits, symmetric=symmetric, convention=convention))
    slack = float(weight.double().square().sum()) * 1e-12
    assert squared_error(weight, searched) <= squared_error(weight, plain) * (1 + 1e-5) + slack


@settings(max_examples=25)
@given(st.integers(-60, 60), st.sampled_from(CONFIGS))
def test_a_power_of_two_moves_the_exponent_alone(power, config):
    weight = gaussian(3, 64)
    exponent = exponent_for(float(weight.abs().max()))
    assert_same(
        mse.encode(weight, config, context_at(exponent)),
        mse.encode(weight * 2.0**power, config, context_at(exponent + power)),
    )


@settings(max_examples=25)
@given(st.integers(0, 6), st.sampled_from(CONFIGS), st.sampled_from(sorted(AWKWARD)))
def test_rows_may_be_cut_anywhere(cut, config, name):
    assert_cut_does_not_matter(mse.encode, AWKWARD[name], config, cut)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_permuted_rows_give_permuted_codes(config):
    weight, order = gaussian(), torch.tensor([3, 0, 5, 1, 4, 2])
    plain, permuted = (encode(mse.encode, w.contiguous(), config) for w in (weight, weight[order]))
    assert torch.equal(permuted.codes, plain.codes[order])
    assert torch.equal(permuted.scale, plain.scale[order])


def test_finer_grids_fit_better():
    weight = gaussian(40, 256)
    reached = [
        [
            sqnr(weight, encode(mse.encode, weight, MseConfig(bits=bits, granularity=g)))
            for g in ("tensor", "channel", "group")
        ]
        for bits in range(1, 9)
    ]
    for fewer, more in pairwise(reached):
        assert all(b > a + 3 for a, b in zip(fewer, more, strict=True))
    assert all(row == sorted(row) for row in reached)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 2, 3, 3)])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("search", ["als", "grid"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_weights(shape, granularity, search, symmetric):
    config = MseConfig(bits=4, granularity=granularity, search=search, symmetric=symmetric)
    encoded = mse.encode(torch.zeros(shape), config, context_at(0))
    assert decode(encoded).shape == shape
    assert encoded.scale.shape == ((1, 1) if granularity == "tensor" else (shape[0], 1))


def test_the_shape_of_a_convolution_and_the_input_untouched():
    weight = gaussian(8, 2 * 3 * 3).reshape(8, 2, 3, 3)
    before = weight.clone()
    encoded = encode(mse.encode, weight, MseConfig(bits=8, granularity="tensor"))
    assert torch.equal(weight, before)
    assert encoded.codes.shape == (8, 18)
    assert decode(encoded).shape == weight.shape
    assert sqnr(weight, encoded) > 40
