"""Affine grids: rounding to the disk's float16, and decoding against a slow reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.coding.grids import (
    HALF_MAX,
    HALF_TINY,
    TORCH_DTYPES,
    decode,
    decode_into,
    decode_rows,
    exponent_for,
    from_half,
    middle,
    round_offset,
    round_scale,
    take_rows,
)
from qcompress.coding.rows import grid_shape, row_shape
from qcompress.types.config import Convention
from qcompress.types.encoded import Affine, Blocked, Kept, Unbounded

EXPONENTS = [-100, -12, 0, 3, 100]
CONVENTIONS: list[Convention] = ["narrow", "full", "mid-rise"]
positive = st.floats(2.0**-100, 2.0**100, width=32)


def all_halves() -> torch.Tensor:
    """Every finite float16 but zero."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return patterns[patterns.isfinite() & (patterns != 0)]


@given(positive)
def test_exponent_centres_the_largest_weight(largest: float) -> None:
    exponent = exponent_for(largest)
    assert 2**11 <= largest * 2.0**-exponent < 2**12
    spread = torch.tensor([15 * largest, largest, largest * 2.0**-12, largest * 2.0**-25], dtype=torch.float64)
    stored = round_scale(spread, exponent).double() * 2.0**exponent
    assert ((stored - spread).abs() <= spread * 2.0**-11).all()


def test_exponent_at_the_ends() -> None:
    # The least scale of all: a zero tensor on a grid without a zero decodes to zeros.
    assert float(np.float32(2.0 ** exponent_for(0.0)) * np.float32(2.0**-24)) == 0
    for largest in (1e-45, 3.4e38):
        exponent = exponent_for(largest)
        assert math.isfinite(float(np.float32(2.0**exponent)))
        assert 2.0**exponent >= 2.0**-126


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("up", [False, True])
def test_a_scale_of_the_grid_stays(exponent: int, up: bool) -> None:
    halves = all_halves()
    again = round_scale(from_half(halves, exponent), exponent, up=up)
    assert torch.equal(again.view(torch.int16), halves.view(torch.int16))


@pytest.mark.parametrize("levels", [1, 3, 15, 255])
def test_a_range_read_off_its_own_grid_gives_that_grid(levels: int) -> None:
    halves = all_halves()
    values = from_half(halves, -12)
    for measured in (values * levels / levels, values.nextafter(values * 2), values.nextafter(values * 0)):
        assert torch.equal(round_scale(measured, -12, up=True), halves)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_an_offset_of_the_grid_stays(exponent: int) -> None:
    halves = torch.cat([all_halves(), torch.zeros(1, dtype=torch.float16)])
    assert torch.equal(round_offset(from_half(halves, exponent), exponent), halves)


@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=50), st.sampled_from(EXPONENTS))
def test_rounding_is_to_nearest(values: list[float], exponent: int) -> None:
    real = torch.tensor(values, dtype=torch.float32) * 2.0**exponent
    nearest = (real.double() * 2.0**-exponent).numpy().astype(np.float16)
    assert np.array_equal(round_offset(real, exponent).numpy(), nearest)
    scale = round_scale(real, exponent).numpy()
    assert np.array_equal(scale[nearest != 0], nearest[nearest != 0])
    assert (scale[nearest == 0] == np.float16(HALF_TINY)).all()


@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=50), st.sampled_from(EXPONENTS))
@settings(max_examples=200)
def test_up_covers_and_is_never_zero(values: list[float], exponent: int) -> None:
    real = (torch.tensor(values, dtype=torch.float32) * 2.0**exponent).double()
    up = round_scale(real.float(), exponent, up=True)
    stored = up.double() * 2.0**exponent
    assert (up != 0).all()
    assert (stored.abs() >= real.abs() * (1 - 2.0**-20)).all()
    # It is one of the two neighbours: the next float16 towards zero would not cover.
    inner = torch.from_numpy(np.nextafter(up.numpy(), np.float16(0))).double() * 2.0**exponent
    assert (inner.abs() <= real.abs()).all()
    assert torch.equal(stored.sign()[real != 0], real.sign()[real != 0])


@pytest.mark.parametrize("up", [False, True])
def test_zero_becomes_the_least_scale(up: bool) -> None:
    assert round_scale(torch.zeros(3), 5, up=up).tolist() == [HALF_TINY] * 3


@pytest.mark.parametrize("up", [False, True])
def test_what_does_not_fit_becomes_the_largest(up: bool) -> None:
    huge = torch.tensor([1e30, -1e30])
    assert round_scale(huge, 0, up=up).tolist() == [HALF_MAX, -HALF_MAX]


def test_an_offset_that_does_not_fit_becomes_the_largest() -> None:
    assert round_offset(torch.tensor([1e30, -1e30]), 0).tolist() == [HALF_MAX, -HALF_MAX]


@pytest.mark.parametrize("bits", range(1, 9))
def test_middles(bits: int) -> None:
    last = 2**bits - 1
    assert middle("mid-rise", bits) - 0 == last - middle("mid-rise", bits)
    assert middle("full", bits) - 0 == (last - middle("full", bits)) + 1
    assert middle("narrow", bits) - 0 == (last - 1) - middle("narrow", bits)


def make_encoded(
    shape, axis, granularity, group_size, form: str, bits: int, convention: Convention, seed: int
) -> Affine:
    draw = torch.Generator().manual_seed(seed)
    rows = row_shape(shape, axis)
    columns = math.prod(rows[1:])
    grids = grid_shape(rows, granularity, group_size)
    scale = (torch.rand(grids, generator=draw) + 0.5).half()
    return Affine(
        codes=torch.randint(0, 2**bits, (rows[0], columns), generator=draw, dtype=torch.uint8),
        bits=bits,
        scale=scale,
        exponent=-7,
        shape=shape,
        zero_point=torch.randint(0, 2**bits, grids, generator=draw, dtype=torch.uint8)
        if form == "zero-point"
        else None,
        offset=torch.randn(grids, generator=draw).half() if form == "offset" else None,
        convention=convention if form == "symmetric" else None,
        axis=axis,
    )


def slow_value(encoded: Affine, row: int, column: int) -> float:
    """One weight by the formulas of types.Affine, in Python's float64."""
    grid_rows, groups = encoded.scale.shape
    grid = (row if grid_rows > 1 else 0, column * groups // encoded.codes.shape[1])
    code = int(encoded.codes[row, column])
    scale = float(encoded.scale[grid]) * 2.0**encoded.exponent
    if encoded.zero_point is not None:
        return scale * (code - int(encoded.zero_point[grid]))
    if encoded.offset is not None:
        return scale * code + float(encoded.offset[grid]) * 2.0**encoded.exponent
    half = 2 ** (encoded.bits - 1)
    return scale * (code - {"narrow": half - 1, "full": half, "mid-rise": half - 0.5}[encoded.convention])


@pytest.mark.parametrize(("granularity", "group_size"), [("tensor", None), ("channel", None), ("group", 3)])
@pytest.mark.parametrize("form", ["symmetric", "zero-point", "offset"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 6), (0,)), ((3, 5), (1,)), ((3, 6, 2), (0, 2)), ((6,), (0,)), ((), (0,))]
)
def test_decode_against_the_slow_reference(shape, axis, form: str, granularity, group_size: int | None) -> None:
    if group_size and math.prod(row_shape(shape, axis)[1:]) % group_size:
        group_size = 1
    for seed, bits in enumerate((1, 2, 5, 8)):
        for convention in CONVENTIONS if form == "symmetric" else CONVENTIONS[:1]:
            encoded = make_encoded(shape, axis, granularity, group_size, form, bits, convention, seed)
            weight = decode(encoded)
            assert weight.shape == shape
            assert weight.dtype == torch.float32
            rest = [index for index in range(len(shape)) if index not in axis] if len(shape) > 1 else [0]
            channels = list(axis) if len(shape) > 1 else []
            for where in np.ndindex(*shape):
                row = (
                    int(np.ravel_multi_index([where[i] for i in channels], [shape[i] for i in channels]))
                    if channels
                    else 0
                )
                inner = [where[i] for i in rest] if shape else []
                column = int(np.ravel_multi_index(inner, [shape[i] for i in rest])) if inner else 0
                expected = slow_value(encoded, row, column)
                # Two roundings to float32, of terms no larger than 256 scales and an offset.
                assert float(weight[where]) == pytest.approx(expected, rel=2.0**-22, abs=2.0**-22 * 4)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_decode_gives_the_weights_dtype(dtype: str) -> None:
    encoded = make_encoded((4, 6), (1,), "channel", None, "zero-point", 4, "full", 0)
    as_dtype = Affine(**{name: getattr(encoded, name) for name in encoded.__slots__} | {"dtype": dtype})
    weight = decode(as_dtype)
    assert weight.dtype == TORCH_DTYPES[dtype]
    assert torch.equal(weight, decode(encoded).to(TORCH_DTYPES[dtype]))


@pytest.mark.parametrize("shape", [(0, 6), (6, 0), (0,), (3, 0, 2)])
@pytest.mark.parametrize("form", ["symmetric", "zero-point", "offset"])
def test_decode_of_nothing(shape: tuple[int, ...], form: str) -> None:
    weight = decode(make_encoded(shape, (0,), "channel", None, form, 4, "full", 0))
    assert weight.shape == shape
    assert weight.dtype == torch.float32


def test_a_zero_point_is_exactly_zero() -> None:
    encoded = make_encoded((4, 6), (0,), "group", 3, "zero-point", 4, "full", 1)
    assert encoded.zero_point is not None
    encoded.codes.copy_(encoded.zero_point.repeat_interleave(3, dim=1))
    assert not decode_rows(encoded).any()


def test_decode_leaves_its_input_alone() -> None:
    encoded = make_encoded((4, 6), (0,), "channel", None, "offset", 8, "full", 2)
    before = encoded.codes.clone()
    assert torch.equal(decode(encoded), decode(encoded))
    assert torch.equal(encoded.codes, before)


@pytest.mark.parametrize(("granularity", "group_size"), [("tensor", None), ("channel", None), ("group", 3)])
@pytest.mark.parametrize("form", ["symmetric", "zero-point", "offset"])
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 3), (3, 4), (2, 2)])
def test_rows_taken_decode_to_rows(start: int, stop: int, form: str, granularity, group_size: int | None) -> None:
    encoded = make_encoded((6, 4), (1,), granularity, group_size, form, 4, "full", 3)
    taken = take_rows(encoded, start, stop)
    assert torch.equal(decode(taken), decode_rows(encoded)[start:stop])


def test_kept_is_itself() -> None:
    value = torch.arange(3)
    assert decode(Kept(value)) is value


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("exponent", [-126, -12, 48, 49, 92, 94, 95, 104, 112])
@pytest.mark.parametrize("form", ["affine", "rows", "blocked", "unbounded", "trellis"])
def test_decoding_into_a_tensor_gives_what_decoding_does(form: str, exponent: int, dtype: str) -> None:
    """Also with the largest scales and codes, which reach beyond the dtype."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 10), generator=generator).to(torch.uint8)
    codes[0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    halves = torch.tensor([[HALF_MAX, 1.0], [0.1, 2.0**-24], [-HALF_MAX, 700.0]]).half()
    bytes_ = torch.tensor([[255, 0], [1, 2], [255, 255]], dtype=torch.uint8)
    about = {"exponent": exponent, "shape": (3, 10), "axis": (0,), "dtype": dtype}
    encoded: Affine | Blocked | Unbounded
    if form in ("affine", "rows"):
        rows = torch.tensor([exponent, -5, exponent], dtype=torch.int8) if form == "rows" else None
        grid = {"scale": halves, "offset": halves.flip(0), "group_size": 5, "row_exponents": rows}
        encoded = Affine(codes=codes, bits=8, **grid, **about)
    elif form == "blocked":
        grid = {"scale": halves[:, :1], "offset": halves[:, 1:], "subscale": bytes_, "suboffset": bytes_}
        encoded = Blocked(codes=codes, bits=8, group_size=5, sub_blocks=2, **grid, **about)
    else:
        wide = torch.tensor([[2**31 - 1, 1 - 2**31, 0, 1, 5]] * 3, dtype=torch.int32)
        grid = {"rows": torch.tensor([127, -127, 0], dtype=torch.int32), "trellis": form == "trellis"}
        encoded = Unbounded(codes=wide, step=torch.tensor(HALF_MAX).half(), **grid, **{**about, "shape": (3, 5)})
    expected = decode(encoded)
    into = torch.full((3, 12), 7.0, dtype=expected.dtype)
    decode_into(encoded, into[:, 1 : 1 + expected.shape[1]])
    assert torch.equal(into[:, 1 : 1 + expected.shape[1]].nan_to_num(7), expected.nan_to_num(7))
    assert torch.isfinite(expected).all() or form == "blocked", "whose numbers may leave float32 on the way"
    assert (into[:, 0] == 7).all() and (into[:, 1 + expected.shape[1] :] == 7).all()
