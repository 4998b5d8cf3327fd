"""Codes without bounds: the losses they claim, the invariances they have, and what lambda does to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompress.solvers.feedback import feedback_codes
from qcompress.solvers.hessian import damped, output_error
from qcompress.solvers.unbounded import (
    BitCosts,
    conditional_energies,
    descend_unbounded,
    feedback_unbounded,
    scalar_unbounded,
)
from solvers.second_order import correlated, moments, seeded, weights

SPAN = 40
DAMPING = 0.01


def laplace(lam: float, rows: int, columns: int, *, slope: float = 1.5) -> BitCosts:
    """Two classes in turn, whose bits rise by `slope` and by half of it with every magnitude."""
    magnitudes = torch.arange(-SPAN, SPAN + 1).abs().float()
    bits = torch.stack((0.5 + slope * magnitudes, 1.0 + slope / 2 * magnitudes))
    classes = (torch.arange(rows).unsqueeze(1) + torch.arange(columns)) % 2
    return BitCosts(classes, bits, lam)


def bits_of(codes: Tensor, bit_costs: BitCosts) -> Tensor:
    """The bits of every code, one by one."""
    found = torch.zeros(codes.shape, dtype=torch.float64)
    for row, values in enumerate(codes.tolist()):
        for column, code in enumerate(values):
            near = max(-SPAN, min(SPAN, int(code)))
            found[row, column] = float(bit_costs.bits[int(bit_costs.classes[row, column]), near + SPAN])
    return found


def multipliers(steps: Tensor, hessian: Tensor, lam: float) -> Tensor:
    """What a bit weighs in each row: lambda times the mean over columns of step**2 times conditional energy."""
    energies = conditional_energies(hessian, DAMPING)
    parts = steps.double().reshape(len(hessian), -1, hessian.shape[1])
    return lam * (parts.square() * energies.unsqueeze(1)).mean(2).reshape(-1)


def reference(target: Tensor, steps: Tensor, hessian: Tensor, bit_costs: BitCosts | None) -> tuple[Tensor, Tensor]:
    """One matrix, a column and a row at a time, all codes tried: (codes, sum of squared errors)."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    raised = damped(hessian.unsqueeze(0), DAMPING)[0][order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(raised), upper=True)
    rest, codes, total = target.clone(), torch.zeros_like(target), torch.zeros((), dtype=torch.float64)
    weigh = torch.zeros(len(target)) if bit_costs is None else multipliers(steps, hessian.unsqueeze(0), bit_costs.lam)
    every = torch.arange(-SPAN, SPAN + 1).double()
    for place, column in enumerate(order.tolist()):
        for row in range(len(target)):
            step, wanted = float(steps[row, column]), float(rest[row, column])
            costs = ((wanted - every * step) / upper[place, place]).square()
            if bit_costs is not None:
                costs = costs + weigh[row] * bit_costs.bits[int(bit_costs.classes[row, column])].double()
            codes[row, column] = every[costs.argmin()]
            error = (wanted - codes[row, column] * step) / upper[place, place]
            rest[row, order[place:]] -= error * upper[place, place:]
            total = total + error.square()
    return codes, total


def uneven(rows: int, columns: int) -> Tensor:
    """Steps that vary over rows and columns, float64."""
    over_rows = torch.linspace(-1, 0.5, rows, dtype=torch.float64).exp2()
    return over_rows.unsqueeze(1) * torch.linspace(0.2, -0.3, columns, dtype=torch.float64).exp2()


@pytest.mark.parametrize("diagonal", [torch.ones(10), torch.logspace(-3, 3, 10)])
@pytest.mark.parametrize("step", [2.0, 0.3, 1e-4])
def test_uncorrelated_inputs_give_nearest_rounding_however_large_the_codes(diagonal: Tensor, step: float) -> None:
    target, steps = weights(6, 10).double(), step * uneven(6, 10)
    codes = feedback_unbounded(target, steps, torch.diag(diagonal.double()).unsqueeze(0))
    assert torch.equal(codes, (target / steps).round())
    assert step > 1e-3 or float(codes.abs().max()) > 1e4


@pytest.mark.parametrize("lam", [0.03, 0.1155, 0.4])
def test_alone_every_weight_takes_the_code_of_least_error_and_bits(lam: float) -> None:
    """All codes tried, one weight at a time: (w - k s)**2 + lam s**2 bits(k)."""
    target, steps = 3 * weights(8, 30).double(), torch.tensor([0.5, 1.0, 2.0, 0.25] * 2).double().unsqueeze(1)
    bit_costs = laplace(lam, 8, 30)
    codes = feedback_unbounded(target, steps, torch.eye(30, dtype=torch.float64).unsqueeze(0), bit_costs)
    every = torch.arange(-SPAN, SPAN + 1).double()
    cost = ((target / steps).unsqueeze(2) - every).square() + lam * bit_costs.bits.double()[bit_costs.classes]
    assert torch.equal(codes, every[cost.argmin(2)])
    assert not torch.equal(codes, (target / steps).round())
    assert torch.equal(scalar_unbounded((target / steps).float(), bit_costs).double(), codes)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("step", [3.0, 0.4, 0.01])
def test_scalar_codes_are_those_of_feedback_under_a_hessian_of_one(lam: float, step: float) -> None:
    """Bits that rise and fall as a real table's do, codes beyond the table, and more weights than one piece has."""
    target = weights(64, 700) * weights(64, 1).exp()
    bits = 12 * torch.rand(5, 2 * SPAN + 1, generator=seeded(3))
    bit_costs = BitCosts(torch.randint(0, 5, target.shape, generator=seeded(4)).byte(), bits, lam)
    flat = BitCosts(bit_costs.classes.reshape(-1, 1).long(), bits, lam)
    hessian, steps = torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1), step)
    expected = feedback_unbounded(target.reshape(-1, 1), steps, hessian, flat).reshape(target.shape)
    found = scalar_unbounded(target / step, bit_costs)
    cost = [
        (target / step - codes).double().square() + lam * bit_costs.of(bit_costs.classes, codes)
        for codes in (found, expected)
    ]
    assert float((found != expected).double().mean()) < 1e-4, "but for ties"
    torch.testing.assert_close(*cost, rtol=1e-4, atol=1e-4)
    assert step > 0.02 or float(found.abs().max()) > SPAN


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_codes_are_those_of_the_algorithm_and_its_losses_are_the_damped_error(lam: float) -> None:
    target, hessian, steps = 2 * weights(6, 20).double(), moments(correlated(20)), uneven(6, 20)
    bit_costs = laplace(lam, 6, 20) if lam else None
    expected, loss = reference(target, steps, hessian[0], bit_costs)
    codes = feedback_unbounded(target, steps, hessian, bit_costs, block=7)
    assert torch.equal(codes, expected)
    error = output_error(codes * steps - target, damped(hessian, DAMPING)).sum()
    torch.testing.assert_close(error, loss, rtol=1e-9, atol=0)


def test_a_lambda_of_zero_weighs_no_bits() -> None:
    target, hessian, steps = weights(6, 20).double(), moments(correlated(20)), uneven(6, 20)
    plain = feedback_unbounded(target, steps, hessian)
    assert torch.equal(plain, feedback_unbounded(target, steps, hessian, laplace(0.0, 6, 20)))


@pytest.mark.parametrize("groups", [1, 3])
def test_codes_are_those_of_gptq_where_it_clips_nothing(groups: int) -> None:
    target, hessian = weights(9, 40).double(), moments(correlated(40, groups=groups))
    step = torch.full((9, 1), 0.07, dtype=torch.float64)
    codes = feedback_unbounded(target, step, hessian)
    bounded = feedback_codes(target, step, -128 * step, 8, hessian)
    assert float(bounded.min()) > 0 and float(bounded.max()) < 255
    assert torch.equal(codes, bounded - 128)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_the_order_of_columns_and_the_unit_of_weights_and_inputs_change_nothing(lam: float, dead: bool) -> None:
    inputs = correlated(24)
    if dead:
        inputs[:, :, 5] = 0
    target, hessian, steps = weights(6, 24).double(), moments(inputs), 0.4 * uneven(6, 24)
    bit_costs = laplace(lam, 6, 24)
    codes = feedback_unbounded(target, steps, hessian, bit_costs)
    order = torch.randperm(24, generator=seeded(3))
    shuffled = BitCosts(bit_costs.classes[:, order], bit_costs.bits, lam)
    again = feedback_unbounded(target[:, order], steps[:, order], hessian[:, order][:, :, order], shuffled)
    assert torch.equal(again, codes[:, order])
    assert torch.equal(codes, feedback_unbounded(8 * target, 8 * steps, hessian, bit_costs))
    assert torch.equal(codes, feedback_unbounded(target, steps, 1024 * hessian, bit_costs))
    descended = descend_unbounded(codes, target, steps, hessian, bit_costs)
    assert torch.equal(descended, descend_unbounded(codes, target, steps, 1024 * hessian, bit_costs))
    energies = conditional_energies(hessian, DAMPING)
    torch.testing.assert_close(conditional_energies(1024 * hessian, DAMPING), 1024 * energies)
    assert torch.equal(-codes, feedback_unbounded(-target, steps, hessian, bit_costs))


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_groups_are_layers_of_their_own(lam: float) -> None:
    target, hessian, steps = weights(8, 12).double(), moments(correlated(12, groups=4)), 0.5 * uneven(8, 12)
    bit_costs = laplace(lam, 8, 12)
    together = feedback_unbounded(target, steps, hessian, bit_costs)
    descended = descend_unbounded(together, target, steps, hessian, bit_costs, sweeps=1)
    for group in range(4):
        part = slice(2 * group, 2 * group + 2)
        own = BitCosts(bit_costs.classes[part], bit_costs.bits, lam)
        alone = feedback_unbounded(target[part], steps[part], hessian[group : group + 1], own)
        assert torch.equal(together[part], alone)
        alone = descend_unbounded(alone, target[part], steps[part], hessian[group : group + 1], own, sweeps=1)
        assert torch.equal(descended[part], alone)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_block_size_changes_nothing(groups: int) -> None:
    target, hessian, steps = weights(9, 40).double(), moments(correlated(40, groups=groups)), uneven(9, 40)
    bit_costs = laplace(0.05, 9, 40)
    found = [feedback_unbounded(target, steps, hessian, bit_costs, block=block) for block in (1, 7, 128)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    start = (target / steps).round()
    found = [descend_unbounded(start, target, steps, hessian, bit_costs, block=block) for block in (1, 7, 128)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_energies_are_what_the_columns_that_follow_do_not_explain() -> None:
    hessian = moments(correlated(12, groups=2))
    found = conditional_energies(hessian, DAMPING)
    raised = damped(hessian, DAMPING)
    for group in range(2):
        order = hessian[group].diagonal().argsort(descending=True)
        for place, column in enumerate(order.tolist()):
            rest = order[place:]
            unexplained = 1 / torch.linalg.inv(raised[group][rest][:, rest])[0, 0]
            torch.testing.assert_close(found[group, column], unexplained, rtol=1e-9, atol=0)


def test_energies_of_uncorrelated_inputs_are_their_own() -> None:
    diagonal = torch.logspace(-2, 2, 8, dtype=torch.float64)
    found = conditional_energies(torch.diag(diagonal).unsqueeze(0), DAMPING)
    torch.testing.assert_close(found[0], diagonal + DAMPING * diagonal.mean())


def test_a_column_that_is_never_active_is_rounded_to_nearest() -> None:
    x = correlated(12)
    x[:, :, 5] = 0
    target = weights(6, 12).double()
    codes = feedback_unbounded(target, torch.full((6, 1), 0.3), moments(x))
    assert torch.equal(codes[:, 5], (target[:, 5] / torch.tensor(0.3).double()).round())


@pytest.mark.parametrize("samples", [1, 3])
def test_fewer_samples_than_columns_still_leave_less_error_than_rounding(samples: int) -> None:
    target, hessian = weights(64, 30).double(), moments(correlated(30, positions=samples))
    assert int(torch.linalg.matrix_rank(hessian[0])) < 30
    step = torch.full((1, 1), 0.5, dtype=torch.float64)
    codes = feedback_unbounded(target, step, hessian)
    codes = descend_unbounded(codes, target, step, hessian)
    errors = [output_error(one * 0.5 - target, hessian).sum() for one in (codes, (target / 0.5).round())]
    assert bool(codes.isfinite().all()) and errors[0] < errors[1]


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.03, 0.1, 0.5]), st.sampled_from([0.05, 0.5, 3.0]), st.booleans())
@settings(max_examples=30)
def test_descent_never_raises_the_cost(seed: int, lam: float, step: float, from_nearest: bool) -> None:
    target, hessian = weights(6, 10, seed).double(), moments(correlated(10, positions=200, groups=2, seed=seed))
    steps, bit_costs = step * uneven(6, 10), laplace(lam, 6, 10)
    codes = (target / steps).round() if from_nearest else feedback_unbounded(target, steps, hessian, bit_costs)
    weigh = multipliers(steps, hessian, lam)

    def cost(codes: Tensor) -> Tensor:
        error = output_error(codes * steps - target, damped(hessian, 1e-4))
        return error + weigh * bits_of(codes, bit_costs).sum(1)

    before = cost(codes)
    for _ in range(3):
        codes = descend_unbounded(codes, target, steps, hessian, bit_costs, sweeps=1)
        assert torch.equal(codes, codes.round())
        after = cost(codes)
        assert bool((after <= before * (1 + 1e-9)).all())
        before = after


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_descent_ends_where_no_single_code_helps(lam: float) -> None:
    target, hessian, steps = weights(6, 10).double(), moments(correlated(10)), uneven(6, 10)
    bit_costs = laplace(lam, 6, 10)
    weigh = multipliers(steps, hessian, lam)

    def cost(codes: Tensor) -> Tensor:
        error = output_error(codes * steps - target, damped(hessian, 1e-4))
        return error + weigh * bits_of(codes, bit_costs).sum(1)

    codes = descend_unbounded((target / steps).round(), target, steps, hessian, bit_costs, sweeps=100)
    assert torch.equal(codes, descend_unbounded(codes, target, steps, hessian, bit_costs, sweeps=1))
    least = cost(codes)
    for column in range(10):
        for change in (-2, -1, 1, 2):
            other = codes.clone()
            other[:, column] += change
            assert bool((cost(other) >= least - 1e-9).all())


def test_more_for_a_bit_leaves_fewer_bits_and_more_error() -> None:
    target, hessian = 2 * weights(32, 24).double(), moments(correlated(24))
    step = torch.full((1, 1), 0.7, dtype=torch.float64)
    bits, errors = [], []
    for lam in (0.0, 0.05, 0.2, 0.8):
        bit_costs = laplace(lam, 32, 24)
        codes = descend_unbounded(
            feedback_unbounded(target, step, hessian, bit_costs), target, step, hessian, bit_costs
        )
        bits.append(float(bits_of(codes, bit_costs).sum()))
        errors.append(float(output_error(codes * 0.7 - target, hessian).sum()))
    assert bits == sorted(bits, reverse=True) and errors == sorted(errors)
    assert bits[-1] < 0.7 * bits[0]


def test_steps_twice_as_fine_leave_a_quarter_of_the_error() -> None:
    target, hessian = weights(64, 24).double(), moments(correlated(24))
    errors = []
    for step in (0.4, 0.2, 0.1, 0.05):
        steps = torch.full((1, 1), step, dtype=torch.float64)
        codes = feedback_unbounded(target, steps, hessian)
        errors.append(float(output_error(codes * steps - target, damped(hessian, DAMPING)).sum()))
    assert errors == pytest.approx([errors[0] / 4**n for n in range(4)], rel=0.1)
    # At high rate each error is uniform: a twelfth of the square of a step.
    assert errors[-1] == pytest.approx(64 * float(conditional_energies(hessian, DAMPING).sum()) * 0.05**2 / 12, rel=0.1)


def test_codes_beyond_the_table_cost_what_its_ends_do() -> None:
    bit_costs = laplace(0.1, 1, 2)
    codes = torch.tensor([[-1000.0, 1000.0], [-SPAN, SPAN], [-SPAN + 1, 0]])
    found = bit_costs.of(torch.tensor([0, 1]), codes)
    expected = [[float(bit_costs.bits[0, 0]), float(bit_costs.bits[1, -1])]] * 2
    expected.append([float(bit_costs.bits[0, 1]), float(bit_costs.bits[1, SPAN])])
    assert found.tolist() == expected


def test_no_rows_have_no_codes() -> None:
    hessian, step = moments(correlated(5)), torch.ones(1, 1)
    codes = feedback_unbounded(torch.zeros(0, 5), step, hessian)
    assert codes.shape == descend_unbounded(codes, torch.zeros(0, 5), step, hessian).shape == (0, 5)
