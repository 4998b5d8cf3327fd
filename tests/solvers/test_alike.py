"""Channels that are alike: the codes that the whole Hessian gives, without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompress.methods.rd.free import guess_inputs
from qcompress.solvers.alike import AlikeChannels, descend_alike, energies_of, feedback_alike
from qcompress.solvers.unbounded import BitCosts, conditional_energies, descend_unbounded, feedback_unbounded

SPAN = 16


def drawn(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns), dtype=dtype)


def laplace(lam: float, rows: int, columns: int) -> BitCosts:
    """Prices of three classes, whose codes cost the more the larger they are."""
    sizes = torch.arange(-SPAN, SPAN + 1).abs().float()
    bits = torch.stack([1.0 + slope * sizes for slope in (0.4, 1.1, 2.5)])
    classes = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(1)).byte()
    return BitCosts(classes, bits, lam)


def alike(channels: int, kernel: tuple[int, ...]) -> AlikeChannels:
    inputs = guess_inputs((1, channels, *kernel))
    assert isinstance(inputs, AlikeChannels)
    return inputs


def uneven(channels: int) -> AlikeChannels:
    """Taps of unlike energies, which no guess has."""
    part = drawn(3, 8)
    return AlikeChannels(part @ part.T / 8, -0.7, channels)


INPUTS = [alike(6, (3, 3)), alike(17, (1, 1)), alike(1, (5, 5)), alike(9, (4,)), uneven(5)]


@pytest.mark.parametrize("inputs", INPUTS)
def test_conditional_energies_are_those_of_the_whole_hessian(inputs: AlikeChannels) -> None:
    hessian = inputs.dense().unsqueeze(0)
    expected = conditional_energies(hessian, 0.01, act_order=False)
    torch.testing.assert_close(energies_of(inputs.damped(0.01)).reshape(1, -1), expected)


@pytest.mark.parametrize("inputs", INPUTS[:-1])
@pytest.mark.parametrize("lam", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("step", [2.0, 0.5])
def test_codes_are_those_of_the_whole_hessian(inputs: AlikeChannels, lam: float, step: float) -> None:
    """Of taps of one energy, which are rounded in their order there too."""
    target, hessian = drawn(40, inputs.columns), inputs.dense().unsqueeze(0)
    steps = torch.full((1, 1), step, dtype=torch.float64)
    bit_costs = laplace(lam, *target.shape) if lam else None
    codes = feedback_alike(target, step, inputs, bit_costs)
    assert torch.equal(codes, feedback_unbounded(target, steps, hessian, bit_costs))
    assert inputs.columns == 25 or not torch.equal(codes, (target / step).round())
    found = descend_alike(codes, target, step, inputs, bit_costs)
    assert torch.equal(found, descend_unbounded(codes, target, steps, hessian, bit_costs))


def test_in_float32_next_to_no_code_differs() -> None:
    inputs = alike(64, (3, 3))
    target, hessian = drawn(200, inputs.columns, torch.float32), inputs.dense().unsqueeze(0)
    bit_costs = laplace(0.03, *target.shape)
    codes = feedback_alike(target, 0.7, inputs, bit_costs)
    expected = feedback_unbounded(target, torch.full((1, 1), 0.7), hessian, bit_costs)
    assert float((codes != expected).double().mean()) < 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.05])
def test_descent_lowers_error_and_bits_together(lam: float) -> None:
    """Also where taps have unlike energies."""
    inputs, step = uneven(12), 1.3
    target = drawn(30, inputs.columns)
    bit_costs = laplace(lam, *target.shape)
    hessian = inputs.damped(1e-4).dense()
    unit = bit_costs.lam * step**2 * float(energies_of(inputs.damped(0.01)).mean())

    def cost(codes: Tensor) -> float:
        error = codes * step - target
        bits = bit_costs.bits[bit_costs.classes.long(), codes.clamp(-SPAN, SPAN).long() + SPAN]
        return float(((error @ hessian) * error).sum()) + unit * float(bits.double().sum())

    rounded = (target / step).round()
    once, twice = (descend_alike(rounded, target, step, inputs, bit_costs, sweeps=sweeps) for sweeps in (1, 2))
    assert cost(twice) <= cost(once) < cost(rounded)
