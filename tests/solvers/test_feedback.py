"""Error feedback and coordinate descent: the losses they claim, the invariances they have, the bounds they keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.solvers.feedback import descend, feedback_codes
from qcompress.solvers.hessian import damped, output_error
from solvers.second_order import correlated, fitted, moments, nearest, weights


def losses(
    weight: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ as its algorithm stands, a column at a time on one matrix: (codes, sum of squared errors)."""
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rest, codes, total = weight.clone(), torch.zeros_like(weight), torch.zeros(())
    steps, lowest = scale.expand_as(weight), low.expand_as(weight)
    for column in range(weight.shape[1]):
        step, bottom = steps[:, column], lowest[:, column]
        code = ((rest[:, column] - bottom) / step).round().clamp(0, 2**bits - 1)
        error = (rest[:, column] - (code * step + bottom)) / upper[column, column]
        rest[:, column:] -= error.unsqueeze(1) * upper[column, column:]
        codes[:, column] = code
        total = total + error.square().sum()
    return codes, total


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_are_those_of_the_algorithm_and_its_losses_are_the_damped_error(bits: int) -> None:
    weight, hessian = weights(8, 20).double(), moments(correlated(20))
    _, scale, low = fitted(weight.float(), bits)
    raised = damped(hessian, 0.01)
    expected, loss = losses(weight, scale, low, bits, raised[0])
    codes = feedback_codes(weight, scale, low, bits, hessian, act_order=False)
    assert torch.equal(codes, expected)
    error = output_error(codes * scale + low - weight, raised).sum()
    torch.testing.assert_close(error, loss, rtol=1e-10, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_block_size_changes_nothing(act_order: bool, groups: int) -> None:
    weight, hessian = weights(9, 40).double(), moments(correlated(40, groups=groups))
    _, scale, low = fitted(weight.float(), 3)
    found = [feedback_codes(weight, scale, low, 3, hessian, act_order=act_order, block=block) for block in (1, 7, 128)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("diagonal", [torch.ones(10), torch.logspace(-3, 3, 10)])
def test_uncorrelated_inputs_give_nearest_rounding(diagonal: torch.Tensor) -> None:
    weight, hessian = weights(6, 10), torch.diag(diagonal.double()).unsqueeze(0)
    _, scale, low = fitted(weight, 3)
    codes = feedback_codes(weight.double(), scale, low, 3, hessian)
    assert torch.equal(codes, nearest(weight, scale, low, 3))


def test_one_column_is_nearest_rounding() -> None:
    weight = weights(6, 1).double()
    scale, low = torch.full((6, 1), 0.5, dtype=torch.float64), torch.full((6, 1), -1.0, dtype=torch.float64)
    codes = feedback_codes(weight, scale, low, 2, torch.full((1, 1, 1), 3.0, dtype=torch.float64))
    assert torch.equal(codes, nearest(weight, scale, low, 2))


def test_the_order_of_activity_is_a_permutation_of_the_problem() -> None:
    weight, hessian = weights(6, 16).double(), moments(correlated(16))
    _, scale, low = fitted(weight.float(), 3)
    order = hessian[0].diagonal().argsort(descending=True)
    permuted = feedback_codes(weight[:, order], scale, low, 3, hessian[:, order][:, :, order], act_order=False)
    assert torch.equal(feedback_codes(weight, scale, low, 3, hessian)[:, order], permuted)


def test_grids_that_vary_along_a_row_go_with_their_columns() -> None:
    weight, hessian = weights(6, 16).double(), moments(correlated(16))
    _, scale, low = fitted(weight.float(), 3)
    factors = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)
    scale, low = scale * factors, low * factors.flip(0)
    expected, _ = losses(weight, scale, low, 3, damped(hessian, 0.01)[0])
    assert torch.equal(feedback_codes(weight, scale, low, 3, hessian, act_order=False, block=5), expected)
    order = hessian[0].diagonal().argsort(descending=True)
    own = (one[:, order] for one in (weight, scale, low))
    permuted = feedback_codes(*own, 3, hessian[:, order][:, :, order], act_order=False)
    assert torch.equal(feedback_codes(weight, scale, low, 3, hessian)[:, order], permuted)


def test_groups_are_layers_of_their_own() -> None:
    weight, hessian = weights(8, 12).double(), moments(correlated(12, groups=4))
    _, scale, low = fitted(weight.float(), 3)
    together = feedback_codes(weight, scale, low, 3, hessian)
    for group in range(4):
        part = slice(2 * group, 2 * group + 2)
        alone = feedback_codes(weight[part], scale[part], low[part], 3, hessian[group : group + 1])
        assert torch.equal(together[part], alone)


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_many_rows_together_err_less_than_nearest_rounding(seed: int, bits: int) -> None:
    weight, hessian = weights(64, 12, seed), moments(correlated(12, positions=300, seed=seed))
    _, scale, low = fitted(weight, bits)
    codes = feedback_codes(weight.double(), scale, low, bits, hessian)
    assert float(codes.min()) >= 0 and float(codes.max()) < 2**bits
    errors = [
        float(output_error(one * scale + low - weight, hessian).sum())
        for one in (codes, nearest(weight, scale, low, bits))
    ]
    assert errors[0] <= errors[1]


def test_a_column_that_is_never_active_is_rounded_to_nearest() -> None:
    x = correlated(12)
    x[:, :, 5] = 0
    weight = weights(6, 12)
    _, scale, low = fitted(weight, 4)
    codes = feedback_codes(weight.double(), scale, low, 4, moments(x))
    assert torch.equal(codes[:, 5:6], nearest(weight, scale, low, 4)[:, 5:6])


@pytest.mark.parametrize("with_linear", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_descent_never_raises_the_error_and_ends_where_no_single_code_helps(with_linear: bool, groups: int) -> None:
    weight, hessian = weights(6, 10).double(), moments(correlated(10, groups=groups))
    _, scale, low = fitted(weight.float(), 3)
    linear = 0.05 * torch.randn(groups, 6 // groups, 10, dtype=torch.float64) if with_linear else None
    start = nearest(weight, scale, low, 3)
    before, codes = output_error(start * scale + low - weight, hessian, linear), start
    for _ in range(20):
        codes = descend(codes, weight, scale, low, hessian, lowest=0.0, highest=7.0, linear=linear, sweeps=1, block=4)
        after = output_error(codes * scale + low - weight, hessian, linear)
        assert bool((after <= before + 1e-12).all())
        before = after
    for column in range(10):
        for code in range(8):
            other = codes.clone()
            other[:, column] = code
            assert bool((output_error(other * scale + low - weight, hessian, linear) >= before - 1e-9).all())


def test_descent_stays_within_its_bounds() -> None:
    weight, hessian = weights(6, 10).double(), moments(correlated(10))
    _, scale, low = fitted(weight.float(), 4)
    floor = ((weight - low) / scale).floor().clamp(0, 15)
    ceiling = (floor + 1).clamp(max=15)
    codes = descend(floor, weight, scale, low, hessian, lowest=floor, highest=ceiling)
    assert bool(((codes == floor) | (codes == ceiling)).all())


def test_descent_does_not_depend_on_its_blocks() -> None:
    weight, hessian = weights(6, 30).double(), moments(correlated(30))
    _, scale, low = fitted(weight.float(), 2)
    start = nearest(weight, scale, low, 2)
    found = [descend(start, weight, scale, low, hessian, lowest=0.0, highest=3.0, block=block) for block in (1, 8, 128)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
