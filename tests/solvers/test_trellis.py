"""The codes of a trellis: no path is cheaper, what decodes them agrees, and what they gain on a Gaussian source."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompress.coding.grids import trellis_values
from qcompress.coding.trellis import NEXT_STATE, trellis_states
from qcompress.coding.unbounded.lengths import class_costs, coded_bits
from qcompress.coding.unbounded.tokens import CLASSES, CONTEXTS
from qcompress.solvers.hessian import damped, output_error
from qcompress.solvers.trellis import trellis_codes
from qcompress.solvers.unbounded import (
    BitCosts,
    conditional_energies,
    feedback_unbounded,
    unbounded_grid,
    with_codes,
    with_step,
)
from qcompress.types.encoded import Unbounded
from solvers.second_order import correlated, moments, seeded, weights

SPAN = 12
DAMPING = 0.01


def laplace(lam: float, rows: int, columns: int) -> BitCosts:
    """Bits that rise with every magnitude, by another slope in each class and in odd states."""
    magnitudes = torch.arange(-SPAN, SPAN + 1).abs().float()
    bits = torch.stack([0.4 + (0.5 + 0.02 * context) * magnitudes for context in range(CONTEXTS)])
    classes = (torch.arange(rows).unsqueeze(1) + torch.arange(columns)) % 3
    return BitCosts(classes, bits, lam)


def context_of(bit_costs: BitCosts, row: int, column: int, odd: int) -> int:
    return int(bit_costs.classes[row, column]) + CLASSES * (1 + odd)


def bits_of(codes: Tensor, bit_costs: BitCosts) -> float:
    """The bits of codes int32 [rows, columns], one by one."""
    states = trellis_states(codes.numpy())
    total = 0.0
    for (row, column), code in np.ndenumerate(codes.numpy()):
        total += float(bit_costs.bits[context_of(bit_costs, row, column, states[row, column] & 1), int(code) + SPAN])
    return total


@pytest.mark.parametrize("lam", [0.0, 0.1])
@pytest.mark.parametrize("diagonal", [[1.0] * 5, [4.0, 0.1, 1.0, 3.0, 0.5]])
def test_no_path_is_cheaper(lam: float, diagonal: list[float]) -> None:
    """All 7**5 paths of short rows, where columns do not feed one another."""
    hessian = torch.diag(torch.tensor(diagonal).double()).unsqueeze(0)
    target, bit_costs = 0.9 * weights(6, 5).double(), laplace(lam, 6, 5)
    energies = damped(hessian, DAMPING)[0].diagonal()
    # Both unions together have half the step.
    weigh = lam * float((0.25 * energies).mean())
    paths = torch.tensor(list(itertools.product(range(-3, 4), repeat=5)), dtype=torch.int32)
    values, odd = trellis_values(paths) / 2, torch.from_numpy(trellis_states(paths.numpy()) & 1).long()
    found = trellis_codes(target, torch.ones(1, 1), hessian, bit_costs).int()
    for row in range(6):
        bits = bit_costs.bits.double()[bit_costs.classes[row] + CLASSES * (1 + odd), paths.long() + SPAN].sum(1)
        costs = ((values - target[row]).square() * energies).sum(1) + weigh * bits
        (mine,) = ((paths == found[row]).all(1)).nonzero().flatten().tolist()
        assert float(costs[mine]) <= float(costs.min()) + 1e-9


def survivors(target: Tensor, step: float, hessian: Tensor, bit_costs: BitCosts, row: int) -> tuple[list[int], float]:
    """One row, a state and a code at a time: each state keeps its best path with a rest of its own. (codes, cost)."""
    raised = damped(hessian.unsqueeze(0), DAMPING)[0]
    upper = torch.linalg.cholesky(torch.linalg.inv(raised), upper=True)
    weigh = bit_costs.lam * float((step / (2 * upper.diagonal())).square().mean())
    alive: dict[int, tuple[float, Tensor, list[int]]] = {0: (0.0, target[row].clone(), [])}
    for column in range(target.shape[1]):
        after: dict[int, tuple[float, Tensor, list[int]]] = {}
        for state, (cost, rest, codes) in alive.items():
            odd = state & 1
            for code in range(-SPAN, SPAN + 1):
                half_steps = 2 * code - odd * (code > 0) + odd * (code < 0)
                error = (rest[column] - half_steps * step / 2) / upper[column, column]
                bits = float(bit_costs.bits[context_of(bit_costs, row, column, odd), code + SPAN])
                total = cost + float(error.square()) + weigh * bits
                following = int(NEXT_STATE[state][code & 1])
                if following not in after or total < after[following][0]:
                    left = rest.clone()
                    left[column:] -= error * upper[column, column:]
                    after[following] = (total, left, [*codes, code])
        alive = after
    cost, _, codes = min(alive.values(), key=lambda one: one[0])
    return codes, cost


@pytest.mark.parametrize("lam", [0.0, 0.12])
def test_codes_are_those_of_survivors_that_each_keep_their_own_rest(lam: float) -> None:
    target, hessian, bit_costs = weights(3, 12).double(), moments(correlated(12)), laplace(lam, 3, 12)
    codes = trellis_codes(target, torch.full((1, 1), 0.7), hessian, bit_costs, block=5)
    for row in range(3):
        expected, cost = survivors(target, 0.7, hessian[0], bit_costs, row)
        assert codes[row].int().tolist() == expected
        # Where lambda is 0 the cost is the damped error: nothing is lost in between.
        if lam == 0:
            values = trellis_values(codes[row : row + 1].int()) * 0.35
            error = output_error(values - target[row : row + 1], damped(hessian, DAMPING))
            assert float(error) == pytest.approx(cost, rel=1e-5)


@pytest.mark.parametrize("columns", [1, 7, 300])
def test_what_lies_on_the_trellis_comes_back(columns: int) -> None:
    """Decoding by the steps gives what the encoder believed: rows of its values leave no error at all."""
    codes = torch.randint(-9, 10, (8, columns), generator=seeded(columns), dtype=torch.int32)
    values = trellis_values(codes).double() * 0.25
    hessian = moments(correlated(columns, positions=2 * columns + 50))
    found = trellis_codes(values, torch.full((1, 1), 0.5), hessian)
    assert torch.equal(trellis_values(found.int()).double() * 0.25, values)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_block_size_changes_nothing(groups: int) -> None:
    target, hessian = weights(6, 40).double(), moments(correlated(40, groups=groups))
    bit_costs, step = laplace(0.1, 6, 40), torch.full((1, 1), 0.6)
    found = [trellis_codes(target, step, hessian, bit_costs, block=block) for block in (1, 7, 128)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_groups_are_layers_of_their_own() -> None:
    target, hessian, bit_costs = weights(8, 12).double(), moments(correlated(12, groups=4)), laplace(0.1, 8, 12)
    steps = torch.linspace(0.4, 0.9, 8).unsqueeze(1)
    together = trellis_codes(target, steps, hessian, bit_costs)
    for group in range(4):
        part = slice(2 * group, 2 * group + 2)
        own = BitCosts(bit_costs.classes[part], bit_costs.bits, bit_costs.lam)
        assert torch.equal(together[part], trellis_codes(target[part], steps[part], hessian[[group]], own))


def test_units_change_nothing() -> None:
    target, hessian, bit_costs = weights(4, 20).double(), moments(correlated(20)), laplace(0.1, 4, 20)
    step = torch.full((1, 1), 0.5)
    codes = trellis_codes(target, step, hessian, bit_costs)
    assert torch.equal(codes, trellis_codes(16 * target, 16 * step, 4 * hessian, bit_costs))
    # In float32 the squares of such errors are zero.
    small = 2.0**-90
    assert torch.equal(
        trellis_codes(small * target.float(), small * step, hessian, bit_costs),
        trellis_codes(target.float(), step, hessian, bit_costs),
    )


@pytest.mark.parametrize("step", [1e-3, 1e4])
def test_codes_have_no_bounds(step: float) -> None:
    target = weights(4, 20).double()
    codes = trellis_codes(target, torch.full((1, 1), step), torch.eye(20, dtype=torch.float64).unsqueeze(0))
    values = trellis_values(codes.int()) * (step / 2)
    assert float((values - target).abs().max()) <= min(step, float(target.abs().max()))
    assert step < 1 or not codes.any()


def test_inputs_that_are_never_active_or_too_few_leave_finite_codes() -> None:
    x = correlated(12, positions=3)
    x[:, :, 5] = 0
    target, step = weights(32, 12).double(), torch.full((1, 1), 0.5)
    hessian = moments(x)
    codes = trellis_codes(target, step, hessian)
    assert bool(codes.isfinite().all())
    error = output_error(trellis_values(codes.int()) * 0.25 - target, hessian).sum()
    assert float(error) < float(output_error((target / 0.5).round() * 0.5 - target, hessian).sum())


# A memoryless Gaussian source, 64 rows of 1024: no lossy code leaves less than D(R) = 2**(-2 R).


def gaussian() -> Tensor:
    """Of mean square 1, so that a sample's luck is no gain."""
    source = torch.randn(64, 1024, generator=seeded(5))
    return source / source.square().mean().sqrt()


def coded(source: Tensor, step: float, *, trellis: bool, lam: float) -> tuple[Unbounded, float]:
    """(codes, mean squared error) of one encoding and two with bit costs from the last."""
    rows, columns = source.shape
    hessian = torch.eye(columns, dtype=torch.float64).unsqueeze(0)
    grid = with_step(unbounded_grid((rows, columns), (0,), "F32", rows=None, columns=None, size=(rows, columns)), step)
    grid = Unbounded(grid.codes, grid.step, grid.exponent, grid.shape, trellis=trellis)
    step = float(grid.step) * 2.0**grid.exponent
    steps = torch.full((1, 1), step)
    encode = trellis_codes if trellis else feedback_unbounded
    unbounded = with_codes(grid, encode(source, steps, hessian))
    for _ in range(2 if lam else 0):
        ((classes, bits),) = class_costs([unbounded], 64)
        unbounded = with_codes(grid, encode(source, steps, hessian, BitCosts(classes.long(), bits, lam)))
    values = trellis_values(unbounded.codes) / 2 if trellis else unbounded.codes
    return unbounded, float((values * step - source).square().mean())


def entropy(unbounded: Unbounded) -> float:
    """Bits a weight of the codes by their frequencies, on a trellis in even and in odd states apart."""
    codes = unbounded.codes
    odd = torch.from_numpy(trellis_states(codes.numpy()) & 1) * int(unbounded.trellis)
    found = 0.0
    for part in (codes[odd == 0], codes[odd == 1]):
        counts = torch.unique(part, return_counts=True)[1].double()
        found -= float((counts * (counts / counts.sum()).log2()).sum())
    return found / codes.numel()


def gap(unbounded: Unbounded, error: float) -> tuple[float, float]:
    """(bits a weight, dB by which the error lies above D(R)). The file takes hardly more than those bits."""
    bits = entropy(unbounded)
    assert bits - 0.005 < coded_bits([unbounded]) / unbounded.codes.numel() < bits + 0.01
    return bits, 10 * math.log10(error * 4.0**bits)


@pytest.mark.parametrize("step", [1.8, 1.0, 0.52])
def test_scalar_codes_lie_by_the_gap_of_entropy_coded_rounding_above_the_bound(step: float) -> None:
    rate, above = gap(*coded(gaussian(), step, trellis=False, lam=0.1155))
    assert 1 < rate < 3.05
    assert 1.45 < above < 1.6


@pytest.mark.parametrize(("step", "bound"), [pytest.param(1.9, 0.95, marks=pytest.mark.slow), (1.1, 0.8), (0.6, 0.8)])
def test_the_trellis_halves_the_gap(step: float, bound: float) -> None:
    rate, above = gap(*coded(gaussian(), step, trellis=True, lam=0.4))
    assert (2 if bound < 0.9 else 1.2) < rate < 3.2
    assert 0.5 < above < bound


def test_classes_of_columns_take_what_a_rotation_of_correlated_inputs_would_cost() -> None:
    """Weights are white, inputs autoregressive, in their own basis and in a random one: reverse water-filling."""
    size, step = 256, 0.15
    places = torch.arange(size).double()
    covariance = 0.9 ** (places.unsqueeze(1) - places).abs()
    rotation = torch.linalg.qr(torch.randn(size, size, generator=seeded(1), dtype=torch.float64)).Q
    weight = torch.randn(1024, size, generator=seeded(2), dtype=torch.float64)
    determinant = float(torch.linalg.eigvalsh(covariance).log2().mean().exp2())
    grid = unbounded_grid((1024, size), (0,), "F32", rows=None, columns=None, size=(1024, size))
    for hessian in (covariance, rotation.T @ covariance @ rotation):
        energies = conditional_energies(hessian.unsqueeze(0), 1e-9)
        steps = step * (energies.log().mean().exp() / energies).sqrt()
        codes = feedback_unbounded(weight, steps, hessian.unsqueeze(0), damping=1e-9)
        error = float(output_error(codes * steps - weight, hessian.unsqueeze(0)).mean()) / size
        rate = coded_bits([with_codes(grid, codes)]) / codes.numel()
        assert 3.4 < rate < 5
        assert 1.45 < 10 * math.log10(error * 4**rate / determinant) < 1.65
