"""What is true of rounding to nearest on the min-max range."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from contexts import context_at
from hypothesis import given
from hypothesis import strategies as st
from methods.awkward_weights import AWKWARD, assert_cut_does_not_matter, assert_same, encode, gaussian, sqnr

from qcompress.coding.grids import decode, decode_rows, exponent_for, from_half
from qcompress.methods import rtn
from qcompress.registry import RtnConfig

CONVENTIONS = ("full-range", "narrow", "aimet", "gptq", "mid-rise")
CONFIGS = [RtnConfig(bits=bits, group_size=64) for bits in (1, 2, 3, 4, 8)] + [
    RtnConfig(bits=bits, symmetric=True, convention=convention, granularity="channel")
    for bits, convention in product((2, 3, 4, 8), CONVENTIONS)
]


def step_of(encoded):
    """The scale of every weight, float64 [rows, columns]."""
    value = from_half(encoded.scale, encoded.exponent).double().abs()
    return value.repeat_interleave(encoded.codes.shape[1] // value.shape[1], dim=1)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_value_is_off_by_more_than_half_a_step(name, config):
    weight = AWKWARD[name]
    encoded = encode(rtn.encode, weight, config)
    error = (decode_rows(encoded).double() - weight.double()).abs()
    # full-range has no code for its nearer end where both ends are alike.
    steps = 1 if config.convention == "full-range" else 0.5
    assert torch.isfinite(error).all()
    # A scale below the normal float32 decodes with an error of its own.
    rounding = weight.double().abs() * 2.0**-22 + 256 * 2.0**-149
    assert (error <= steps * step_of(encoded) * (1 + 1e-4) + rounding).all()


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_stays_zero_and_the_step_is_the_range_over_the_codes(name, bits):
    weight = AWKWARD[name].clone()
    weight[:, ::7] = 0
    encoded = encode(rtn.encode, weight, RtnConfig(bits=bits, granularity="channel"))
    assert (decode_rows(encoded)[:, ::7] == 0).all()
    reach = weight.amax(1).clamp(min=0).double() - weight.amin(1).clamp(max=0).double()
    exact = reach / (2**bits - 1)
    step = step_of(encoded)[:, 0]
    held = exact > 2.0**encoded.exponent * 2.0**-14
    assert (step >= exact * (1 - 2.0**-20)).all()
    assert (step[held] <= exact[held] * (1 + 2.0**-10)).all()


def test_worked_example():
    weight = torch.tensor([[-1.0, 0.0, 0.4, 2.0], [0.5, 1.5, 2.5, 3.0]])
    encoded = rtn.encode(weight, RtnConfig(bits=2), context_at(0))
    assert encoded.scale.tolist() == [[1.0], [1.0]]
    assert encoded.zero_point.tolist() == [[1], [0]]
    assert encoded.codes.tolist() == [[0, 1, 1, 3], [0, 2, 2, 3]]


@pytest.mark.parametrize(
    ("convention", "scale", "levels"),
    [
        ("full-range", -3.5, [-3.5, 0.0, 7.0]),
        ("narrow", 7.0, [-7.0, 0.0, 7.0]),
        ("aimet", 7.0, [-7.0, 0.0, 7.0]),
        ("gptq", 14 / 3, [-14 / 3, 14 / 3, 14 / 3]),
        ("mid-rise", 14 / 3, [-7.0, 7 / 3, 7.0]),
    ],
)
def test_conventions_on_one_row(convention, scale, levels):
    weight = torch.tensor([[-5.0, 2.5 if convention == "gptq" else 1.0, 7.0]])
    encoded = rtn.encode(weight, RtnConfig(bits=2, symmetric=True, convention=convention), context_at(0))
    assert float(encoded.scale) == pytest.approx(scale, rel=2.0**-10)
    assert decode(encoded).tolist()[0] == pytest.approx(levels, rel=2.0**-10)


def test_one_bit_symmetric_is_the_sign_times_the_largest():
    weight = gaussian()
    encoded = encode(rtn.encode, weight, RtnConfig(bits=1, symmetric=True))
    expected = weight.sign() * weight.abs().amax(1, keepdim=True)
    assert torch.allclose(decode(encoded), expected, rtol=2.0**-10)


@pytest.mark.parametrize("convention", ["full-range", "narrow", "aimet", "mid-rise"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_was_decoded_encodes_to_itself(bits, convention):
    weight = gaussian()
    config = RtnConfig(bits=bits, symmetric=True, convention=convention)
    once = encode(rtn.encode, weight, config)
    again = rtn.encode(decode(once), config, context_at(once.exponent))
    assert_same(once, again)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_was_decoded_encodes_to_itself_with_a_zero_point(bits):
    weight = gaussian(40)
    once = encode(rtn.encode, weight, RtnConfig(bits=bits))
    again = rtn.encode(decode(once), RtnConfig(bits=bits), context_at(once.exponent))
    # Where rounding the zero point leaves a code unreached, the range that is read back is a step smaller.
    whole = (once.codes.amin(1) == 0) & (once.codes.amax(1) == 2**bits - 1)
    assert whole.sum() > 20
    assert torch.equal(again.codes[whole], once.codes[whole])
    assert torch.equal(again.scale[whole], once.scale[whole])


@given(st.integers(-60, 60), st.sampled_from(CONFIGS))
def test_a_power_of_two_moves_the_exponent_alone(power, config):
    weight = gaussian(3, 64)
    exponent = exponent_for(float(weight.abs().max()))
    assert_same(
        rtn.encode(weight, config, context_at(exponent)),
        rtn.encode(weight * 2.0**power, config, context_at(exponent + power)),
    )


@given(st.integers(0, 6), st.sampled_from(CONFIGS), st.sampled_from(sorted(AWKWARD)))
def test_rows_may_be_cut_anywhere(cut, config, name):
    assert_cut_does_not_matter(rtn.encode, AWKWARD[name], config, cut)


def test_permuted_rows_give_permuted_codes():
    weight, order = gaussian(), torch.tensor([3, 0, 5, 1, 4, 2])
    config = RtnConfig(bits=3, group_size=32)
    plain, permuted = (encode(rtn.encode, w.contiguous(), config) for w in (weight, weight[order]))
    assert torch.equal(permuted.codes, plain.codes[order])
    assert torch.equal(permuted.scale, plain.scale[order])


def test_the_shape_of_a_convolution_and_a_grid_for_the_whole_tensor():
    weight = gaussian(8, 2 * 3 * 3).reshape(8, 2, 3, 3)
    encoded = encode(rtn.encode, weight, RtnConfig(bits=8, granularity="tensor"))
    assert encoded.codes.shape == (8, 18)
    assert encoded.scale.shape == encoded.zero_point.shape == (1, 1)
    assert decode(encoded).shape == weight.shape
    assert sqnr(weight, encoded) > 35


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 2, 3, 3)])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_no_weights(shape, granularity):
    encoded = rtn.encode(torch.zeros(shape), RtnConfig(bits=4, granularity=granularity), context_at(0))
    assert decode(encoded).shape == shape
    assert encoded.scale.shape == ((1, 1) if granularity == "tensor" else (shape[0], 1))
    assert (encoded.scale != 0).all()
