"""Channels that are independent but for their means: the codes that the whole Hessian gives, without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompress.methods.rd.free import guess_inputs
from qcompress.solvers.channels import ChannelInputs, descend_channels, energies_of, feedback_channels
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


def alike(channels: int, kernel: tuple[int, ...]) -> ChannelInputs:
    inputs = guess_inputs((1, channels, *kernel))
    assert isinstance(inputs, ChannelInputs)
    return inputs


def uneven(channels: int) -> ChannelInputs:
    """Taps of unlike energies, which no guess has."""
    part = drawn(3, 8)
    return ChannelInputs((part @ part.T / 8).unsqueeze(0), torch.full((channels,), -0.7, dtype=torch.float64))


def unlike(channels: int, kernel: tuple[int, ...]) -> ChannelInputs:
    """Channels of unlike variances and means, of either sign."""
    sizes = drawn(2, channels).abs() * torch.linspace(0.2, 2, channels)
    means = sizes[0] * torch.tensor([1.0, -1.0]).repeat(channels)[:channels]
    return ChannelInputs(sizes[1].square().reshape(-1, 1, 1) * alike(channels, kernel).within, means)


INPUTS = [
    alike(6, (3, 3)),
    alike(17, (1, 1)),
    alike(1, (5, 5)),
    alike(9, (4,)),
    unlike(7, (3, 3)),
    unlike(20, (1, 1)),
    replace(unlike(6, (2, 2)), means=torch.zeros(6, dtype=torch.float64)),
    uneven(5),
]


@pytest.mark.parametrize("inputs", INPUTS)
def test_conditional_energies_are_those_of_the_whole_hessian(inputs: ChannelInputs) -> None:
    hessian = inputs.dense().unsqueeze(0)
    # Taps of one channel keep their order here, whatever their energies.
    expected = conditional_energies(hessian, 0.01, act_order=inputs is not INPUTS[-1])
    torch.testing.assert_close(energies_of(inputs.damped(0.01)).reshape(1, -1), expected)


@pytest.mark.parametrize("inputs", INPUTS[:-1])
@pytest.mark.parametrize("lam", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("step", [2.0, 0.5])
def test_codes_are_those_of_the_whole_hessian(inputs: ChannelInputs, lam: float, step: float) -> None:
    """Of taps of one energy, which are rounded in their order there too."""
    target, hessian = drawn(40, inputs.columns), inputs.dense().unsqueeze(0)
    steps = torch.full((1, 1), step, dtype=torch.float64)
    bit_costs = laplace(lam, *target.shape) if lam else None
    codes = feedback_channels(target, step, inputs, bit_costs)
    assert torch.equal(codes, feedback_unbounded(target, steps, hessian, bit_costs))
    assert inputs.columns == 25 or not torch.equal(codes, (target / step).round())
    found = descend_channels(codes, target, step, inputs, bit_costs)
    assert torch.equal(found, descend_unbounded(codes, target, steps, hessian, bit_costs))


def test_in_float32_next_to_no_code_differs() -> None:
    inputs = alike(64, (3, 3))
    target, hessian = drawn(200, inputs.columns, torch.float32), inputs.dense().unsqueeze(0)
    bit_costs = laplace(0.03, *target.shape)
    codes = feedback_channels(target, 0.7, inputs, bit_costs)
    expected = feedback_unbounded(target, torch.full((1, 1), 0.7), hessian, bit_costs)
    assert float((codes != expected).double().mean()) < 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.05])
@pytest.mark.parametrize("inputs", [uneven(12), unlike(12, (3,)), replace(uneven(12), means=unlike(12, (3,)).means)])
def test_descent_lowers_error_and_bits_together(inputs: ChannelInputs, lam: float) -> None:
    """Also where taps have unlike energies."""
    step = 1.3
    target = drawn(30, inputs.columns)
    bit_costs = laplace(lam, *target.shape)
    hessian = inputs.damped(1e-4).dense()
    unit = bit_costs.lam * step**2 * float(energies_of(inputs.damped(0.01)).mean())

    def cost(codes: Tensor) -> float:
        error = codes * step - target
        bits = bit_costs.bits[bit_costs.classes.long(), codes.clamp(-SPAN, SPAN).long() + SPAN]
        return float(((error @ hessian) * error).sum()) + unit * float(bits.double().sum())

    rounded = (target / step).round()
    once, twice = (descend_channels(rounded, target, step, inputs, bit_costs, sweeps=sweeps) for sweeps in (1, 2))
    assert cost(twice) <= cost(once) < cost(rounded)
