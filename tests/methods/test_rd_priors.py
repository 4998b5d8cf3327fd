"""Hessians of inputs that nobody has seen: the moments that they claim, and matrices that can be one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from solvers.second_order import seeded
from torch import Tensor

from qcompress.methods.rd.free import MOST_COLOURS, MOST_COLUMNS, guess_inputs, split_channels
from qcompress.solvers.alike import AlikeChannels
from qcompress.types.config import Shape


def guess(shape: Shape) -> Tensor:
    """The second moments of the guess."""
    inputs = guess_inputs(shape)
    assert inputs is not None
    return inputs.dense() if isinstance(inputs, AlikeChannels) else inputs


@pytest.mark.parametrize("shape", [(4, 8), (4, 0), (7, 1)])
def test_nothing_is_said_of_a_weight_without_a_kernel(shape: Shape) -> None:
    assert guess_inputs(shape) is None


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (4, 3, 3, 3), (4, 1, 5, 5), (4, 6, 1, 1), (4, 6, 4), (2, 5, 2, 3, 2)])
def test_it_is_a_matrix_of_second_moments(shape: Shape) -> None:
    hessian = guess(shape)
    columns = math.prod(shape[1:])
    assert (hessian.dtype, hessian.shape) == (torch.float64, (columns, columns))
    assert torch.equal(hessian, hessian.T)
    assert float(torch.linalg.eigvalsh(hessian).min()) > 0
    diagonal = hessian.diagonal()
    assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal))


def test_behind_a_relu_inputs_have_its_mean_and_places_near_one_another_are_alike() -> None:
    """Entry by entry: mean**2, plus the variance times 1/2 for each place between two of a channel."""
    rectified = torch.randn(1_000_000, generator=seeded(0)).clamp(min=0)
    mean, variance = float(rectified.mean()), float(rectified.var())
    hessian = guess((4, 5, 2, 3))
    places = list(itertools.product(range(5), range(2), range(3)))
    for (i, (c, y, x)), (j, (d, v, u)) in itertools.product(enumerate(places), repeat=2):
        alike = 0.5 ** (abs(y - v) + abs(x - u)) if c == d else 0.0
        assert float(hessian[i, j]) == pytest.approx(mean**2 + variance * alike, rel=0.01)


def test_colours_are_alike_and_have_no_mean() -> None:
    hessian = guess((4, 3, 3, 3))
    parts = hessian.reshape(3, 9, 3, 9)
    assert torch.allclose(parts[0, :, 1], 0.9 * parts[0, :, 0])
    assert float(parts[0, 0, 0, 8]) == pytest.approx(0.5**4)
    wider = guess((4, MOST_COLOURS + 1, 3, 3))
    assert float(wider[0, 9]) == pytest.approx(0.16)


def test_sums_of_errors_weigh_more_than_errors() -> None:
    hessian = guess((4, 8, 3, 3))
    alike = torch.full((72,), 1.0, dtype=torch.float64)
    turned = alike.clone()
    turned[1::2] = -1
    assert float(alike @ hessian @ alike) > 50 * float(turned @ hessian @ turned)


@pytest.mark.parametrize("channels", [1, 3, 64, 97, 512, 2048])
@pytest.mark.parametrize("kernel", [(1,), (3, 3), (7, 7), (16, 16), (2000,)])
def test_wide_weights_are_cut_into_equal_parts_of_whole_channels(channels: int, kernel: tuple[int, ...]) -> None:
    shape = (4, channels, *kernel)
    parts = split_channels(shape)
    assert 1 <= parts <= channels and channels % parts == 0
    columns = channels // parts * math.prod(kernel)
    assert columns <= MOST_COLUMNS or parts == channels
    assert parts == 1 or channels * math.prod(kernel) > MOST_COLUMNS


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 0, 3, 3), (4, 2, 0, 3)])
def test_a_weight_without_elements_is_one_part(shape: Shape) -> None:
    assert split_channels(shape) == 1
