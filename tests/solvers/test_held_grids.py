"""Scales and offsets that another tool stores are numbers of its dtype, the nearest ones, whatever the exponent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompress.coding.grids import HALF_MAX, HALF_TINY, from_half
from qcompress.solvers.grids import Grid, affine_from_grid, held_grid, minmax_grid
from solvers.second_order import Options

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
HALVES = st.lists(st.floats(-HALF_MAX, HALF_MAX, width=16).filter(lambda one: one != 0), min_size=1, max_size=8)


def is_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).to(values.dtype) == values


@given(HALVES, st.sampled_from(["f16", "bf16"]), st.integers(-40, 4))
def test_scales_are_the_nearest_numbers_of_the_dtype(scales: list[float], dtype: str, exponent: int) -> None:
    grid = Grid(torch.tensor(scales, dtype=torch.float16), convention="full")
    held = held_grid(grid, Options(bits=4, scales=dtype), exponent)
    before, after = (from_half(one.scale, exponent).double() for one in (grid, held))
    assert (held.scale != 0).all()
    nearest = before.to(DTYPES[dtype]).double()
    least = 2.0**-24 if dtype == "f16" else HALF_TINY * 2.0**exponent
    nearest = torch.where(nearest == 0, torch.full_like(nearest, least), nearest)
    # What neither float16 nor the exponent can have is as near as it can be.
    possible = (nearest.abs() <= HALF_MAX * min(1.0, 2.0**exponent)) & nearest.isfinite()
    assert torch.equal(after[possible], nearest[possible])
    assert is_of(after, DTYPES[dtype])[possible].all()
    again = held_grid(held, Options(bits=4, scales=dtype), exponent)
    assert torch.equal(again.scale, held.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_middle_of_a_grid_stays_where_it_is(bits: int, dtype: str) -> None:
    """By no more than half a step of the dtype at the offset, where the ends move by half a step at each."""
    blocks = torch.randn(64, 32, generator=torch.Generator().manual_seed(bits)) * 3e-5 + 1e-5
    exponent = -26
    grid = minmax_grid(blocks, bits, exponent)
    held = held_grid(grid, Options(bits=bits, scales=dtype), exponent)
    (before, start), (after, moved) = (
        (from_half(one.scale, exponent).double(), from_half(one.offset, exponent).double())
        for one in (grid, held)
        if one.offset is not None
    )
    assert is_of(after, DTYPES[dtype]).all()
    assert is_of(moved, DTYPES[dtype]).all()
    middle = (2**bits - 1) / 2
    off = (moved + middle * after - start - middle * before).abs()
    ulp = 2.0**-24 if dtype == "f16" else start.abs() * 2.0**-7
    assert (off <= ulp / 2 + start.abs() * 2.0**-11).all()


def test_codes_are_chosen_for_the_scale_that_is_held() -> None:
    """No code has a neighbour that would be nearer on the grid as it is stored."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3)) * 1e-6
    layout = Options(bits=4, scales="f16")
    encoded = affine_from_grid(weight, minmax_grid(weight, 4, -30), layout, -30)
    assert encoded.offset is not None
    scale, offset = (from_half(one, -30) for one in (encoded.scale, encoded.offset))
    assert is_of(scale, torch.float16).all()
    assert is_of(offset, torch.float16).all()
    levels = torch.arange(16) * scale.unsqueeze(-1) + offset.unsqueeze(-1)
    errors = (levels - weight.unsqueeze(-1)).abs()
    chosen = errors.gather(2, encoded.codes.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= errors.amin(2) * (1 + 1e-6)).all()


def test_a_grid_without_a_dtype_is_left_alone() -> None:
    grid = Grid(torch.tensor([0.1], dtype=torch.float16), convention="full")
    assert held_grid(grid, Options(bits=4), -20) is grid
