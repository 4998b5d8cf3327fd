"""Soft rounding: its formulas, its limits, and that what it learns is never worse than nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompress.coding.rows import rows_from_weight
from qcompress.solvers.grids import minmax_grid
from qcompress.solvers.hessian import damped, linear_term, output_error, row_levels
from qcompress.solvers.rounding import (
    GRAM_DAMPING,
    SoftRounding,
    beta_at,
    make_neighbours,
    round_by_gram,
    round_by_samples,
    rounding_penalty,
    soft,
    start_from,
    undecided,
)
from solvers.second_order import Options, correlated, fitted, moments, nearest, seeded, weights

SETTINGS = {"iterations": 300, "learning_rate": 3e-2, "strength": 0.1, "warm_up": 0.2}


@given(st.floats(0, 1))
def test_the_start_gives_back_the_rest(rest: float) -> None:
    r = torch.tensor([rest], dtype=torch.float64)
    torch.testing.assert_close(soft(start_from(r)), r, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_beta_falls_from_20_to_2_after_the_warm_up(schedule: str) -> None:
    assert beta_at(0.199, 0.2, schedule) is None
    values = [beta_at(0.2 + 0.8 * k / 100, 0.2, schedule) for k in range(101)]
    assert values[0] == pytest.approx(20) and values[-1] == pytest.approx(2)
    assert all(one > other for one, other in itertools.pairwise(values))
    assert beta_at(0.6, 0.2, schedule) == pytest.approx(11)


def test_the_penalty_is_nothing_at_the_ends_and_most_in_the_middle() -> None:
    h = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    for beta in (2.0, 7.0, 20.0):
        single = torch.stack([rounding_penalty(one, beta) for one in h.detach()])
        assert float(single[0]) == float(single[-1]) == 0
        assert float(single.max()) == float(single[50]) == 1
        (slope,) = torch.autograd.grad(rounding_penalty(h, beta), h)
        assert bool((slope[1:50] >= 0).all() and (slope[51:-1] <= 0).all())


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 10)])
@pytest.mark.parametrize("axis", [(0,), (1,)])
def test_the_soft_weight_starts_as_the_weight_clipped_to_its_grid(
    shape: tuple[int, ...], axis: tuple[int, ...]
) -> None:
    weight = torch.randn(shape, generator=seeded(0), dtype=torch.float64)
    rows = rows_from_weight(weight, axis).flatten(1)
    _, scale, low = fitted(rows.float(), 2)
    rounding = SoftRounding(make_neighbours(rows, scale, low, 2), tuple(weight.shape), axis)
    clipped = rows.clamp(min=low, max=low + 3 * scale)
    torch.testing.assert_close(
        rows_from_weight(rounding(torch.empty(0)), axis).flatten(1), clipped, rtol=1e-6, atol=1e-9
    )
    at_rest = rounding.neighbours.rest
    decided = (at_rest - 0.5).abs() > 1e-6
    expected = nearest(rows, scale, low, 2)
    assert torch.equal(rounding.codes()[decided], expected[decided])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 4])
def test_codes_are_neighbours_and_no_row_is_worse_than_nearest(bits: int, groups: int) -> None:
    weight = weights(16, 24)
    noisy = correlated(24, groups=groups)
    clean = noisy + 0.1 * torch.randn(noisy.shape, generator=seeded(5), dtype=torch.float64)
    hessian, cross = moments(noisy), clean.transpose(1, 2) @ noisy / noisy.shape[1]
    _, scale, low = fitted(weight, bits)
    neighbours = make_neighbours(weight, scale, low, bits)
    codes = round_by_gram(weight, neighbours, hessian, cross, **SETTINGS)
    assert bool(((codes == neighbours.floor) | (codes == neighbours.ceiling)).all())
    quadratic, linear = damped(hessian, GRAM_DAMPING), linear_term(weight, hessian, cross)
    errors = [
        output_error(one * scale + low - weight, quadratic, linear)
        for one in (codes.double(), nearest(weight, scale, low, bits))
    ]
    assert bool((errors[0] <= errors[1] + 1e-5 * errors[1].abs()).all())
    assert float(errors[0].sum()) < float(errors[1].sum())


def test_correlated_inputs_gain_on_data_that_was_not_seen() -> None:
    x = correlated(64, positions=6000)
    weight = weights(32, 64)
    scale, low = row_levels(minmax_grid(weight, 4, -8), Options(4), -8, weight)
    codes = round_by_gram(weight, make_neighbours(weight, scale, low, 4), moments(x[:, :2000]), None, **SETTINGS)
    held_out = moments(x[:, 2000:])
    errors = [
        float(output_error(one * scale + low - weight, held_out).sum())
        for one in (codes.double(), nearest(weight, scale, low, 4))
    ]
    assert errors[0] < 0.6 * errors[1]


def test_uncorrelated_inputs_of_no_mean_give_nearest_rounding() -> None:
    weight = weights(16, 32)
    _, scale, low = fitted(weight, 3)
    neighbours = make_neighbours(weight, scale, low, 3)
    codes = round_by_gram(weight, neighbours, torch.eye(32, dtype=torch.float64).unsqueeze(0), None, **SETTINGS)
    clear = (neighbours.rest - 0.5).abs() > 0.05
    assert float((codes == nearest(weight, scale, low, 3))[clear].double().mean()) >= 0.99


def test_small_layers_come_near_the_best_of_all_roundings() -> None:
    """Every one of the 2**12 roundings of a row, tried."""
    near = 0
    for seed in range(8):
        weight, hessian = weights(1, 12, seed), moments(correlated(12, positions=60, seed=seed))
        _, scale, low = fitted(weight, 3)
        neighbours = make_neighbours(weight, scale, low, 3)
        quadratic = damped(hessian, GRAM_DAMPING)
        ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=12)))
        every = neighbours.floor + ups * (neighbours.ceiling - neighbours.floor)
        best = float(output_error(every * scale + low - weight, quadratic).min())
        codes = round_by_gram(weight, neighbours, hessian, None, **SETTINGS)
        found = float(output_error(codes * scale + low - weight, quadratic))
        assert found >= best * (1 - 1e-6)
        near += found <= best * 1.01
    assert near >= 5


def test_sampled_rounding_on_all_samples_minimises_what_the_gram_does() -> None:
    x = correlated(16, positions=256).float()
    weight = weights(8, 16)
    scale, low = row_levels(minmax_grid(weight, 3, -8), Options(3), -8, weight)
    neighbours = make_neighbours(weight, scale, low, 3)
    rounding = SoftRounding(neighbours, (8, 16), (0,))

    def error(found: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return ((x[0][chosen] @ (found - weight).T).square()).sum(1).mean()

    with torch.no_grad():
        soft_rows = rounding.soft_rows()
        everything = torch.arange(256)
        by_gram = float(output_error(soft_rows - weight, moments(x.double())).sum())
        assert float(error(soft_rows, everything)) == pytest.approx(by_gram, rel=1e-5)
    codes = round_by_samples(
        rounding,
        error,
        256,
        iterations=800,
        batch_size=32,
        learning_rate=3e-2,
        strength=0.5,
        warm_up=0.2,
        schedule="linear",
        generator=seeded(0),
    )
    errors = [
        float(output_error(one * scale + low - weight, moments(x.double())).sum())
        for one in (codes.double(), nearest(weight, scale, low, 3))
    ]
    assert errors[0] < 0.8 * errors[1]
    assert undecided(rounding.h()) < 0.2


def test_the_same_generator_gives_the_same_codes() -> None:
    weight, hessian = weights(4, 12), moments(correlated(12))
    _, scale, low = fitted(weight, 2)
    neighbours = make_neighbours(weight, scale, low, 2)
    one, other = (round_by_gram(weight, neighbours, hessian, None, **SETTINGS) for _ in range(2))
    assert torch.equal(one, other)
