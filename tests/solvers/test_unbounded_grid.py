"""Steps and their factors: what the disk holds, what a factor is for, and when it does not pay."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompress.coding.grids import decode
from qcompress.solvers.unbounded import (
    OCTAVE,
    SIDE_BITS,
    WIDEST_FACTOR,
    bisect_rate,
    column_factors,
    eighths,
    grid_steps,
    unbounded_grid,
    with_codes,
    with_step,
)
from qcompress.types.encoded import Unbounded
from solvers.second_order import seeded

CPU = torch.device("cpu")


def plain(rows: int = 4, columns: int = 6) -> Unbounded:
    return unbounded_grid((rows, columns), (0,), "F32", rows=None, columns=None, size=(rows, columns))


@given(st.lists(st.floats(2**-3.9, 2**3.9), min_size=1, max_size=20))
def test_factors_are_within_a_sixteenth_of_an_octave_around_their_mean(values: list[float]) -> None:
    logs = torch.tensor(values, dtype=torch.float64).log2()
    found = eighths(logs.exp2())
    assert found.dtype == torch.int8
    inside = (logs - logs.mean()).abs() < WIDEST_FACTOR / OCTAVE
    away = (found.double() / OCTAVE - (logs - logs.mean())).abs()
    assert float(away[inside].max()) <= 0.5 / OCTAVE + 1e-9 if bool(inside.any()) else True
    assert torch.equal(found, eighths(64 * logs.exp2()))


def test_no_factor_is_wider_than_the_widest() -> None:
    found = eighths(torch.tensor([0.0, 1e-30, 1.0, 1e30]))
    assert int(found.abs().max()) == WIDEST_FACTOR
    assert found.tolist() == sorted(found.tolist())
    assert eighths(torch.full((5,), 3.0)).tolist() == [0] * 5


@given(st.floats(1e-25, 1e25))
def test_a_step_is_stored_to_float16_and_no_further(step: float) -> None:
    grid = with_step(plain(), step)
    held = float(grid.step) * 2.0**grid.exponent
    assert grid.step.dtype == torch.float16
    assert abs(held / step - 1) <= 2**-10
    assert grid_steps(grid, CPU).tolist() == [[held]]


@pytest.mark.parametrize("step", [0.0, 1e-300, 1e300, math.inf])
def test_a_step_that_no_weight_has_is_still_one_that_decodes(step: float) -> None:
    grid = with_codes(with_step(plain(), step), torch.ones(4, 6))
    assert float(grid.step) > 0
    values = decode(grid)
    assert bool(values.isfinite().all()) and bool((values > 0).all())


def test_codes_of_any_kind_are_stored_as_integers() -> None:
    codes = torch.tensor([[-1.0000001, 2.9999999], [1e6, 0.0]], dtype=torch.float64)
    grid = with_codes(with_step(plain(2, 2), 0.5), codes)
    assert grid.codes.dtype == torch.int32
    assert decode(grid).tolist() == [[-0.5, 1.5], [500_000.0, 0.0]]


def test_a_weight_is_code_times_step_times_the_factors_of_its_row_channel_and_place() -> None:
    rows, channels, taps = (torch.tensor(one, dtype=torch.int8) for one in ([0, 8, -8], [4, -4], [0, 2, -2]))
    grid = unbounded_grid((3, 2, 3), (0,), "F32", rows=rows, columns=(channels, taps), size=(3, 6))
    found = grid_steps(with_step(grid, 0.25), CPU)
    for row in range(3):
        for column in range(6):
            octaves = (int(rows[row]) + int(channels[column // 3]) + int(taps[column % 3])) / 8
            assert float(found[row, column]) == pytest.approx(0.25 * 2**octaves, rel=1e-6)


def lost_bits(energies: Tensor) -> float:
    """By how much equal steps lie above steps of equal error, in bits a weight, at high rate."""
    return 0.5 * math.log2(float(energies.mean()) / float(energies.log().mean().exp()))


@pytest.mark.parametrize("taps", [1, 9])
def test_factors_give_every_column_its_share_of_the_error(taps: int) -> None:
    """A channel's part and a place's, drawn apart: the factors undo both, to the width of an eighth of an octave."""
    generator = seeded(0)
    over_channels = torch.randn(16, 1, generator=generator, dtype=torch.float64)
    over_places = torch.randn(1, taps, generator=generator, dtype=torch.float64)
    energies = (2 * over_channels + over_places).exp2().reshape(1, -1)
    found = column_factors(energies, taps, rows=256)
    assert found is not None
    channels, places = found
    assert (channels.shape, places.shape, channels.dtype) == ((16,), (taps,), torch.int8)
    factors = torch.exp2((channels.double().unsqueeze(1) + places.double()) / OCTAVE).reshape(1, -1)
    weighed = factors.square() * energies
    assert lost_bits(weighed) < 0.01 < lost_bits(energies)
    assert float(factors.log2().mean()) == pytest.approx(0, abs=1 / OCTAVE)


def test_factors_that_cost_more_than_they_bring_are_left_out() -> None:
    generator = seeded(0)
    energies = torch.randn(1, 144, generator=generator, dtype=torch.float64).mul(0.3).reshape(1, 16, 9)
    energies = energies[:, :, :1].expand(1, 16, 9).exp2().reshape(1, -1).contiguous()
    bits = lost_bits(energies) * 144
    paying = math.ceil(SIDE_BITS * 25 / bits)
    assert column_factors(energies, 9, rows=paying // 2) is None
    assert column_factors(energies, 9, rows=2 * paying) is not None
    assert column_factors(torch.ones(1, 144, dtype=torch.float64), 9, rows=10**6) is None


@pytest.mark.parametrize("dead", [0.0, 1e-320])
def test_an_input_that_is_never_active_gets_a_factor_that_can_be_stored(dead: float) -> None:
    energies = torch.ones(1, 18, dtype=torch.float64)
    energies[0, 3] = dead
    found = column_factors(energies, 9, rows=10**6)
    assert found is None or all(int(part.abs().max()) <= WIDEST_FACTOR for part in found)


@given(st.floats(-13, 5), st.floats(0.1, 10))
def test_the_least_logarithm_at_which_a_falling_rate_is_low_enough(root: float, slope: float) -> None:
    found = bisect_rate(lambda log: slope * (root - log), 0.0, -14.0, 6.0)
    assert root <= found <= root + 1e-3


def test_bounds_of_a_rate_that_is_never_or_always_low_enough() -> None:
    assert bisect_rate(lambda log: 1.0, 0.0, -14.0, 6.0) == 6.0
    assert bisect_rate(lambda log: -1.0, 0.0, -14.0, 6.0) == pytest.approx(-14, abs=1e-3)
