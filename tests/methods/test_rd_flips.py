"""Flipped roundings: sums within half a step, by the cheapest changes there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from solvers.second_order import weights
from torch import Tensor

from qcompress.methods.rd.free import flip_unbounded, flipped


def sums(target: Tensor, codes: Tensor, width: int) -> Tensor:
    return (codes - target).reshape(-1, width).sum(1)


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([0.1, 1.0, 30.0]))
def test_sums_are_within_half_a_step_and_no_code_moves_by_more_than_one(seed: int, columns: int, scale: float) -> None:
    target = scale * weights(6, columns, seed).double()
    codes = flipped(target, target.round())
    assert torch.equal(codes, codes.round())
    assert float(sums(target, codes, columns).abs().max()) <= 0.5 + 1e-9
    assert float((codes - target.round()).abs().max()) <= 1
    assert float((codes - target).abs().max()) <= 1 + 1e-9


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_no_other_codes_of_such_sums_lie_nearer(seed: int, columns: int) -> None:
    """All codes about the nearest tried: the least squared error among those whose sum is within half a step."""
    target = weights(1, columns, seed).double()
    nearest = target.round()
    found = flipped(target, nearest)
    changes = torch.tensor(list(itertools.product((-1, 0, 1), repeat=columns))).double()
    every = nearest + changes
    allowed = every[(every - target).sum(1).abs() <= 0.5 + 1e-9]
    least = float((allowed - target).square().sum(1).min())
    assert float((found - target).square().sum()) == pytest.approx(least, rel=1e-9, abs=1e-12)


def test_kernels_are_summed_before_rows() -> None:
    target = weights(8, 36).double()
    codes = flip_unbounded(target, 4)
    assert float(sums(target, codes, 36).abs().max()) <= 0.5
    plain = sums(target, target.round(), 9).abs()
    assert float(sums(target, codes, 9).abs().mean()) < 0.5 * float(plain.mean())
    by_kernel = flipped(target.reshape(-1, 9), target.round().reshape(-1, 9))
    assert float(sums(target.reshape(-1, 9), by_kernel, 9).abs().max()) <= 0.5
    assert torch.equal(codes, flipped(target, by_kernel.reshape(target.shape)))


@pytest.mark.parametrize("kernels", [1, 12])
def test_without_kernels_only_rows_are_summed(kernels: int) -> None:
    target = weights(8, 12).double()
    assert torch.equal(flip_unbounded(target, kernels), flipped(target, target.round()))


def test_what_lies_on_the_lattice_stays() -> None:
    target = torch.tensor([[3.0, -2.0, 0.0, 1e6], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(flip_unbounded(target, 2), target)


def test_opposite_weights_have_opposite_codes() -> None:
    target = weights(8, 18).double()
    assert torch.equal(flip_unbounded(-target, 2), -flip_unbounded(target, 2))


def test_rows_do_not_depend_on_one_another() -> None:
    target = weights(8, 18).double()
    assert torch.equal(flip_unbounded(target, 2)[3:5], flip_unbounded(target[3:5], 2))
