"""Grids under a Hessian: never worse than the grids they start from, and exactly what a layer's output error is."""

from __future__ import annotations

import itertools

import pytest
import torch

from qcompress.solvers.blocks import extremes
from qcompress.solvers.grids import Grid, minmax_grid, symmetric_grid
from qcompress.solvers.hessian import (
    SKETCH_COLUMNS,
    cholesky,
    choose_grid,
    damped,
    grid_exponent,
    hessian_grid,
    levels,
    output_error,
    row_levels,
)
from qcompress.solvers.ranges import least_squares_grid
from solvers.second_order import Options, correlated, moments, nearest, seeded, weights

EXPONENT = -8


def grid_error(rows: torch.Tensor, grid: Grid, hessian: torch.Tensor, bits: int) -> torch.Tensor:
    scale, low = row_levels(grid, Options(bits), EXPONENT, rows)
    return output_error(nearest(rows, scale, low, bits) * scale + low - rows, hessian)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_no_row_is_worse_than_on_the_grids_of_its_weights(bits: int, groups: int) -> None:
    rows, hessian = weights(16, 24), moments(correlated(24, groups=groups))
    raised = damped(hessian, 1e-4)
    found = hessian_grid(rows, hessian, Options(bits), EXPONENT, seeded(0))
    error = grid_error(rows, found, raised, bits)
    for other in (minmax_grid(rows, bits, EXPONENT), least_squares_grid(rows, bits, False, EXPONENT)):
        assert bool((error <= grid_error(rows, other, raised, bits) * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_symmetric_grids_keep_their_convention(bits: int) -> None:
    rows, hessian = weights(8, 12), moments(correlated(12))
    options = Options(bits, symmetric=True)
    found = hessian_grid(rows, hessian, options, EXPONENT, seeded(0))
    assert found.convention == options.stored_convention and found.offset is None
    low, high = extremes(rows)
    plain = symmetric_grid(low, high, bits, found.convention, EXPONENT)
    raised = damped(hessian, 1e-4)
    both = [grid_error(rows, one, raised, bits) for one in (found, plain)]
    assert bool((both[0] <= both[1] * (1 + 1e-4)).all())


def test_one_grid_for_a_tensor_counts_all_its_rows() -> None:
    rows, hessian = weights(8, 12) * torch.logspace(-1, 0, 8).unsqueeze(1), moments(correlated(12))
    found = hessian_grid(rows, hessian, Options(3, "tensor"), EXPONENT, seeded(0))
    assert found.scale.numel() == 1
    raised = damped(hessian, 1e-4)
    flat = rows.reshape(1, -1)
    for other in (minmax_grid(flat, 3, EXPONENT), least_squares_grid(flat, 3, False, EXPONENT)):
        assert grid_error(rows, found, raised, 3).sum() <= grid_error(rows, other, raised, 3).sum() * (1 + 1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_block_within_a_row_has_its_own_part_of_the_hessian(groups: int) -> None:
    """Cut by hand: each block as a layer of its own."""
    rows, hessian = weights(6, 8), moments(correlated(8, groups=groups))
    found = hessian_grid(rows, hessian, Options(2, "group", 4), EXPONENT, seeded(0))
    per_group = 6 // groups
    for row, block in itertools.product(range(6), range(2)):
        part = slice(4 * block, 4 * block + 4)
        own = hessian[row // per_group : row // per_group + 1, part, part]
        alone = hessian_grid(rows[row : row + 1, part].contiguous(), own, Options(2), EXPONENT, seeded(0))
        assert (alone.scale[0], alone.offset[0]) == (found.scale[2 * row + block], found.offset[2 * row + block])


def test_with_equal_inputs_the_grid_is_about_that_of_least_weight_error() -> None:
    rows, hessian = weights(32, 64), torch.eye(64, dtype=torch.float64).unsqueeze(0)
    found = grid_error(rows, hessian_grid(rows, hessian, Options(3), EXPONENT, seeded(0)), hessian, 3)
    plain = grid_error(rows, least_squares_grid(rows, 3, False, EXPONENT), hessian, 3)
    assert 0.97 < float(found.sum() / plain.sum()) <= 1.0001


def test_wide_layers_are_searched_through_projections() -> None:
    columns = SKETCH_COLUMNS + 128
    rows, hessian = weights(16, columns), moments(correlated(columns, positions=1500))
    found = grid_error(rows, hessian_grid(rows, hessian, Options(2), EXPONENT, seeded(0)), hessian, 2)
    plain = grid_error(rows, least_squares_grid(rows, 2, False, EXPONENT), hessian, 2)
    assert found.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_rows_come_back_finite(value: float, symmetric: bool) -> None:
    rows, hessian = torch.full((3, 8), value), moments(correlated(8))
    exponent = grid_exponent(rows, Options(4, symmetric=symmetric))
    grid = hessian_grid(rows, hessian, Options(4, symmetric=symmetric), exponent, seeded(0))
    scale, low = levels(grid, 4, exponent)
    assert bool(scale.isfinite().all() and low.isfinite().all() and (grid.scale != 0).all())
    codes = ((rows.double() - low.unsqueeze(1)) / scale.unsqueeze(1)).round().clamp(0, 15)
    torch.testing.assert_close((codes * scale.unsqueeze(1) + low.unsqueeze(1)).float(), rows, rtol=2e-2, atol=1e-4)


def test_columns_that_are_never_active_do_no_harm() -> None:
    x = correlated(12)
    x[:, :, 5] = 0
    factor, raised = cholesky(moments(x), 0.01)
    assert bool(factor.isfinite().all()) and raised[0, 5, 5] == moments(x)[0].diagonal().mean()
    grid = choose_grid(weights(4, 12), Options(3), "hessian", EXPONENT, moments(x), seeded(0))
    assert bool(grid.scale.isfinite().all())


def test_a_singular_hessian_is_damped_until_it_has_a_factor() -> None:
    one = torch.ones(1, 6, 6, dtype=torch.float64)
    factor, raised = cholesky(one, 0.0)
    torch.testing.assert_close(factor @ factor.transpose(1, 2), raised)


def test_what_is_no_sum_of_squares_is_refused_and_not_damped_for_ever() -> None:
    with pytest.raises(ValueError, match="no sum of squares"):
        cholesky(torch.tensor([[[-1.0, 5.0], [5.0, 1.0]]]).double(), 0.01)
