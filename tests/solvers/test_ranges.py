"""Grids, nearest codes and the searches for the grid of least error, against slow references."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.coding.grids import exponent_for, from_half, middle
from qcompress.solvers import blocks as blocks_module
from qcompress.solvers import grids as grids_module
from qcompress.solvers import least_squares
from qcompress.solvers.blocks import PIECE_VALUES, fold, walk
from qcompress.solvers.grids import minmax_grid, nearest_codes, offset_grid, symmetric_grid, zero_point_grid
from qcompress.solvers.ranges import least_squares_grid, power, shrunken_grid


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def laplace(*shape):
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(1)).clamp(2.0**-24, 1 - 2.0**-24) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def levels_of(grid, bits, exponent):
    """Every level of every grid, float64 [blocks, 2**bits]."""
    codes = torch.arange(2**bits, dtype=torch.float64)
    scale = from_half(grid.scale, exponent).double().unsqueeze(1)
    if grid.offset is not None:
        return codes * scale + from_half(grid.offset, exponent).double().unsqueeze(1)
    zero = grid.zero_point.unsqueeze(1) if grid.zero_point is not None else middle(grid.convention, bits)
    return (codes - zero) * scale


def distances(blocks, grid, bits, exponent):
    """From each value to the nearest level, by trying them all: float64 [blocks, length]."""
    levels = levels_of(grid, bits, exponent)
    return (blocks.double().unsqueeze(2) - levels.unsqueeze(1)).abs().amin(2)


def error_of(blocks, grid, bits, exponent, norm=2.0):
    """The least sum of |error|**norm of each block on its grid, float64 [blocks]."""
    return distances(blocks, grid, bits, exponent).pow(norm).sum(1)


def exponent_of(blocks):
    return exponent_for(float(blocks.abs().max()))


def assert_same_grid(first, second):
    assert first.convention == second.convention
    for name in ("scale", "offset", "zero_point"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_folded_sums_are_exact_to_rounding_and_the_same_either_way():
    for length in (*range(1, 40), 64, 1000):
        values = gaussian(5, length)
        across, down = fold(values.clone(), 1), fold(values.t().clone(), 0)
        assert torch.equal(across, down)
        exact = [float(sum(Fraction(float(x)) for x in row)) for row in values]
        assert across.tolist() == pytest.approx(exact, abs=1e-6 * length)


GRIDS = ("offset", "zero-point", "narrow", "full", "mid-rise")


def grid_of_form(form, blocks, bits, exponent):
    low, high = blocks.amin(1), blocks.amax(1)
    if form == "offset":
        return offset_grid(low, high, bits, exponent)
    if form == "zero-point":
        return zero_point_grid(low, high, bits, exponent)
    return symmetric_grid(low, high, bits, form, exponent)


@pytest.mark.parametrize("form", GRIDS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", [2.0**-124, 1.0, 2.0**60])
def test_codes_are_the_nearest_of_all(form, bits, size):
    if form == "narrow" and bits == 1:
        return
    blocks = gaussian(7, 60) * size
    exponent = exponent_of(blocks)
    # A range too small by far: what lies outside must stop at the last code, not wrap round.
    grid = grid_of_form(form, blocks / (1 + torch.arange(7.0)).unsqueeze(1) ** 3, bits, exponent)
    codes = nearest_codes(blocks, grid, bits, exponent)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    chosen = levels_of(grid, bits, exponent).gather(1, codes.long())
    error = (chosen - blocks.double()).abs()
    assert (error <= distances(blocks, grid, bits, exponent) + blocks.double().abs() * 2.0**-22).all()


def test_far_values_take_the_last_code():
    grid = minmax_grid(torch.tensor([[-1.0, 1.0]]), 8, -12)
    assert nearest_codes(torch.tensor([[-3e38, -1e6, 1e6, 3e38]]), grid, 8, -12).tolist() == [[0, 0, 255, 255]]


@given(
    st.floats(-1e4, 1e4, width=32), st.floats(0, 1e4, width=32), st.integers(1, 8), st.sampled_from([1.0, 1e-3, 1e-30])
)
def test_minmax_levels_span_the_range_and_hardly_more(low, reach, bits, size):
    ends = (torch.tensor([low * size]), torch.tensor([low * size]) + torch.tensor([reach * size]))
    exponent = exponent_for(float(torch.stack(ends).abs().max()))
    levels = levels_of(offset_grid(*ends, bits, exponent), bits, exponent)[0]
    first, last = (float(end) for end in ends)
    least = 2.0 ** (exponent - 24)
    slack = (abs(first) + abs(last)) * 2.0**-10 + least * 2**bits
    # Scale and offset are float32 when they decode, which near its smallest number has few bits.
    coarse = 2.0**-149 * 2**bits
    assert first - slack <= float(levels[0]) <= first + coarse
    short = (last - first) * 2.0**-19 + abs(first) * 2.0**-30 + coarse
    assert last - short <= float(levels[-1]) <= last + slack


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 700])
def test_least_squares_is_never_worse_than_the_range(symmetric, bits, length):
    blocks = torch.cat([gaussian(40, length), laplace(40, length), gaussian(20, length).abs() + 3])
    blocks[:10] *= 0.01
    blocks[10:15] = 0
    blocks[15:20] = blocks[15:20, :1]
    blocks[20:25] = 0.7 + blocks[20:25] * 1e-6
    blocks[25:30, 0] = 4000.0
    exponent = exponent_of(blocks)
    low, high = blocks.amin(1), blocks.amax(1)
    fitted = least_squares_grid(blocks, bits, symmetric, exponent)
    plain = (
        symmetric_grid(low, high, bits, fitted.convention, exponent)
        if symmetric
        else minmax_grid(blocks, bits, exponent)
    )
    error, bound = (error_of(blocks, grid, bits, exponent) for grid in (fitted, plain))
    # The search measures in float32.
    assert (error <= bound * (1 + 1e-5) + blocks.double().square().sum(1) * 1e-13).all()
    assert (error[10:15] <= 1e-9).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_least_squares_on_blocks_longer_than_a_piece(symmetric):
    blocks = gaussian(3, PIECE_VALUES + 1234) * torch.tensor([[1.0], [0.1], [5.0]])
    blocks[1, 77] = -30
    exponent = exponent_of(blocks)
    # Max (1960): what the best uniform quantizers of a Gaussian reach, in decibels.
    for bits, decibels in ((1, 4.40), (2, 9.25), (4, 19.38)):
        error = error_of(blocks, least_squares_grid(blocks, bits, symmetric, exponent), bits, exponent)
        reached = 10 * torch.log10(blocks.double().square().sum(1) / error)
        # A symmetric grid of 4 bits has a level to spare on one side.
        assert reached[[0, 2]].tolist() == pytest.approx([decibels, decibels], abs=0.2)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [700, 20000])
def test_beside_one_huge_value_the_rest_is_not_split(bits, length):
    blocks = gaussian(4, length)
    blocks[:, 33] = torch.tensor([300.0, -300.0, 200.0, -250.0])
    exponent = exponent_of(blocks)
    error = error_of(blocks, least_squares_grid(blocks, bits, False, exponent), bits, exponent)
    rest = blocks.double().square().sum(1) - blocks[:, 33].double().square()
    # What it costs to hold the rest as one level, as far as float16 places it beside the huge value.
    assert (error <= rest + length * (blocks[:, 33].double() * 2.0**-11).square()).all()


def test_one_bit_is_the_best_split_in_two():
    blocks = torch.cat([gaussian(60, 30), laplace(60, 30), gaussian(20, 30).exp()])
    exponent = exponent_of(blocks)
    error = error_of(blocks, least_squares_grid(blocks, 1, False, exponent), 1, exponent)
    best = [
        min(sum(((part - part.mean()) ** 2).sum() for part in np.split(row, [cut])) for cut in range(1, row.size))
        for row in np.sort(blocks.double().numpy(), axis=1)
    ]
    assert error.tolist() == pytest.approx(best, rel=1e-4)


def test_two_bits_come_close_to_the_best_of_all_assignments():
    blocks = gaussian(200, 5)
    exponent = exponent_of(blocks)
    error = error_of(blocks, least_squares_grid(blocks, 2, False, exponent), 2, exponent)
    codes = np.array(list(product(range(4), repeat=5)), dtype=float)
    codes -= codes.mean(1, keepdims=True)
    length = np.sqrt((codes**2).sum(1, keepdims=True))
    directions = np.divide(codes, length, out=np.zeros_like(codes), where=length > 0)
    rows = blocks.double().numpy()
    rows -= rows.mean(1, keepdims=True)
    best = torch.from_numpy((rows**2).sum(1) - ((rows @ directions.T) ** 2).max(1))
    power = blocks.double().square().sum(1)
    assert (error >= best - power * 1e-9).all()
    assert float(error.sum()) <= 2.0 * float(best.sum())
    assert ((error - best) <= 1e-4 * power).double().mean() > 0.6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_line_through_the_codes_fits_better(bits):
    blocks = torch.cat([gaussian(30, 64), laplace(30, 64)])
    exponent = exponent_of(blocks)
    grid = least_squares_grid(blocks, bits, False, exponent)
    codes = nearest_codes(blocks, grid, bits, exponent)
    error = error_of(blocks, grid, bits, exponent)
    lines = [
        np.polyfit(code, row, 1, full=True)[1][0]
        for code, row in zip(codes.numpy(), blocks.double().numpy(), strict=True)
    ]
    # Float16 and rounds that have not quite settled cost a little.
    assert float(error.sum()) <= sum(lines) * (1.005 if bits < 8 else 1.008)
    assert (error >= torch.tensor(lines) * (1 - 1e-6)).all()


def test_more_rounds_are_never_worse():
    (chunk,) = walk(laplace(300, 64) * 1000, 0)
    low, high = (end.double() for end in chunk.extremes())
    centred, mean = chunk.centred()
    errors = []
    for rounds in (0, 1, 2, 4, 8):
        effort = replace(least_squares.HIGH, rounds=rounds)
        scale, mean_code = least_squares.fit_affine(centred, low - mean, high - mean, 3, effort)
        levels = (torch.arange(8.0, dtype=torch.float64) - mean_code.unsqueeze(1)) * scale.unsqueeze(
            1
        ) + mean.unsqueeze(1)
        errors.append((chunk.blocks.double().unsqueeze(2) - levels.unsqueeze(1)).abs().amin(2).square().sum(1))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert float(errors[-1].sum()) < float(errors[0].sum()) * 0.995


@pytest.mark.parametrize(
    ("source", "bits", "decibels"),
    [(gaussian, 2, 9.85), (gaussian, 3, 15.63), (gaussian, 4, 21.69), (laplace, 2, 8.26), (laplace, 3, 13.81)],
)
def test_quality_on_known_sources(source, bits, decibels):
    blocks = source(4096, 64)
    exponent = exponent_of(blocks)
    grid = least_squares_grid(blocks, bits, False, exponent)
    codes = nearest_codes(blocks, grid, bits, exponent)
    error = (levels_of(grid, bits, exponent).gather(1, codes.long()) - blocks.double()).square().sum()
    assert 10 * math.log10(float(blocks.double().square().sum() / error)) > decibels - 0.02


SEARCHES = {
    "affine": lambda blocks, bits, exponent: least_squares_grid(blocks, bits, False, exponent),
    "symmetric": lambda blocks, bits, exponent: least_squares_grid(blocks, bits, True, exponent),
    "shrunken": lambda blocks, bits, exponent: shrunken_grid(blocks, bits, False, 2.4, exponent),
    "shrunken symmetric": lambda blocks, bits, exponent: shrunken_grid(blocks, bits, True, 2.0, exponent),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize(("rows", "length"), [(100, 3), (100, 64), (70, 513), (2, PIECE_VALUES + 7)])
def test_cuts_and_threads_change_no_bit(search, rows, length):
    blocks = laplace(rows, length)
    exponent = exponent_of(blocks)
    whole = search(blocks, 3, exponent)
    for cut in {1, rows // 3 or 1}:
        parts = [search(part, 3, exponent) for part in (blocks[:cut], blocks[cut:])]
        for name in ("scale", "offset", "zero_point"):
            if getattr(whole, name) is not None:
                assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert_same_grid(search(blocks, 3, exponent), whole)
    finally:
        torch.set_num_threads(threads)


def test_powers_do_not_depend_on_the_place_of_a_value():
    values = gaussian(1009).abs()
    whole = power(values.clone(), 2.4)
    assert torch.allclose(whole.double(), values.double() ** 2.4, rtol=1e-6)
    for start in range(0, 1000, 7):
        assert torch.equal(power(values[start : start + 40].clone(), 2.4), whole[start : start + 40])


@pytest.mark.parametrize("bits", [1, 4])
def test_the_size_of_a_chunk_changes_no_bit(monkeypatch, bits):
    blocks = laplace(60, 50)
    exponent = exponent_of(blocks)

    def everything():
        grids = [search(blocks, bits, exponent) for search in SEARCHES.values()]
        return grids, [nearest_codes(blocks, grid, bits, exponent) for grid in grids]

    grids, codes = everything()
    monkeypatch.setattr(blocks_module, "CHUNK_VALUES", 350)
    monkeypatch.setattr(grids_module, "CHUNK_VALUES", 35)
    for first, second in zip(everything()[0], grids, strict=True):
        assert_same_grid(first, second)
    assert all(torch.equal(first, second) for first, second in zip(everything()[1], codes, strict=True))


@settings(max_examples=30)
@given(st.integers(-80, 60), st.sampled_from(sorted(SEARCHES)), st.integers(1, 8))
def test_a_power_of_two_changes_no_bit(power, name, bits):
    blocks = laplace(6, 40)
    exponent = exponent_of(blocks)
    search = SEARCHES[name]
    assert_same_grid(search(blocks, bits, exponent), search(blocks * 2.0**power, bits, exponent + power))


@pytest.mark.parametrize("norm", [0.7, 1.0, 2.0, 2.4])
@pytest.mark.parametrize("bits", [2, 4])
def test_shrinking_finds_about_what_trying_every_hundredth_finds(bits, norm):
    blocks = laplace(60, 64)
    exponent = exponent_of(blocks)
    low, high = blocks.amin(1), blocks.amax(1)
    every = [
        error_of(blocks, zero_point_grid(low * factor, high * factor, bits, exponent), bits, exponent, norm)
        for factor in (hundredth / 100 for hundredth in range(100, 19, -1))
    ]
    found = error_of(blocks, shrunken_grid(blocks, bits, False, norm, exponent), bits, exponent, norm)
    assert (found <= every[0] * (1 + 1e-5)).all()
    assert (found >= torch.stack(every).amin(0) * (1 - 1e-3)).all()
    assert float(found.sum()) <= 1.02 * float(torch.stack(every).amin(0).sum())


def test_a_high_norm_bounds_the_largest_error():
    blocks = laplace(20, 64) * 1000
    exponent = exponent_of(blocks)
    found = shrunken_grid(blocks, 3, False, 60.0, exponent)
    plain = zero_point_grid(blocks.amin(1), blocks.amax(1), 3, exponent)
    largest = [distances(blocks, grid, 3, exponent).amax(1) for grid in (found, plain)]
    # 64 values at the largest error weigh as much as one that is larger by this.
    assert (largest[0] <= largest[1] * 64 ** (1 / 60)).all()
    assert (largest[0] < largest[1] * 0.99).any()


@pytest.mark.parametrize("source", [gaussian, laplace])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_effort_is_close_to_high(source, bits):
    blocks = source(512, 64)
    high = error_of(blocks, least_squares_grid(blocks, bits, False, -8), bits, -8).sum()
    normal = error_of(blocks, least_squares_grid(blocks, bits, False, -8, least_squares.NORMAL), bits, -8).sum()
    assert float(10 * (normal / high).log10()) < 0.2
