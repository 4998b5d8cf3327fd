"""The grid of a lattice before its codes: a step, and the factors by which rows and columns change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qcompress.coding.half import exponent_for, round_scale
from qcompress.coding.lattice import steps
from qcompress.encoded import Lattice
from qcompress.types import Shape

OCTAVE = 8
"""Factors are powers of two in eighths of an octave."""
WIDEST_FACTOR = 4 * OCTAVE
"""Rows and columns change a step by no more than this, either way."""
SIDE_BITS = 5.0
"""What one factor costs, about."""


def eighths(factors: Tensor) -> Tensor:
    """Positive factors as int8 in eighths of an octave, around their geometric mean."""
    logs = factors.double().clamp_min(1e-30).log2()
    return ((logs - logs.mean()) * OCTAVE).round().clamp(-WIDEST_FACTOR, WIDEST_FACTOR).to(torch.int8)


def column_factors(energies: Tensor, taps: int, rows: int) -> tuple[Tensor, Tensor] | None:
    """(channels int8, taps int8) that give every column an equal share of the error, or None where they do not pay.

    At high rate every column should have the step that makes its conditional energy count alike: reverse water-filling.
    The logarithms of steps are split into a part of the input channel and one of the place in the kernel.

    energies  float64 [groups, columns], columns in the order [channel, tap]
    rows      of the weight, over all groups
    """
    logs = -0.5 * energies.clamp_min(1e-300).log2().mean(0).reshape(-1, taps)
    mean = logs.mean()
    channels = ((logs.mean(1) - mean) * OCTAVE).round().clamp(-WIDEST_FACTOR, WIDEST_FACTOR)
    places = ((logs.mean(0) - mean) * OCTAVE).round().clamp(-WIDEST_FACTOR, WIDEST_FACTOR)
    factors = torch.exp2((channels.unsqueeze(1) + places) / OCTAVE).reshape(1, -1)
    weighed = factors.square() * energies
    # Bits that equal steps would lose: half the logarithm of arithmetic over geometric mean, before against after.
    gain = 0.5 * (_spread(energies) - _spread(weighed)) * energies.shape[1] * rows
    if gain <= SIDE_BITS * (channels.numel() + places.numel()):
        return None
    return channels.to(torch.int8), places.to(torch.int8)


def _spread(energies: Tensor) -> float:
    return float(energies.mean(1).log2().mean() - energies.clamp_min(1e-300).log2().mean())


def root_mean_square(weight: Tensor) -> float:
    """The deviation of weights from zero; 0 of none. In float64: squares leave the range of float32."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(max(1, weight.numel()))


def lattice_grid(
    shape: Shape,
    axis: tuple[int, ...],
    dtype: str,
    *,
    rows: Tensor | None,
    columns: tuple[Tensor, Tensor] | None,
    size: tuple[int, int],
) -> Lattice:
    """A lattice without codes and with a step of one, for a weight of rows and columns `size`."""
    empty = torch.zeros(1, 1, dtype=torch.int32).expand(size)
    channels, taps = columns if columns is not None else (None, None)
    one = torch.ones((), dtype=torch.float16)
    return Lattice(empty, one, 0, shape, rows=rows, channels=channels, taps=taps, axis=axis, dtype=dtype)


def with_step(grid: Lattice, step: float) -> Lattice:
    """The grid with another step, as the disk holds it."""
    step = min(max(step, 2.0**-100), 2.0**100)
    exponent = exponent_for(step)
    half = round_scale(torch.tensor(step, dtype=torch.float64), exponent)
    return replace(grid, step=half.cpu(), exponent=exponent)


def grid_steps(grid: Lattice, device: torch.device) -> Tensor:
    """The step of every weight, float32 [rows or 1, columns or 1]."""
    return steps(grid).to(device)


def with_codes(grid: Lattice, codes: Tensor) -> Lattice:
    """The grid with its codes, of any dtype."""
    return replace(grid, codes=codes.cpu().round().to(torch.int32))


def bisect_rate(rate_at: Callable[[float], float], wanted: float, low: float, high: float, tries: int = 40) -> float:
    """The least logarithm in [low, high] at which a falling rate is at most what is wanted."""
    for _ in range(tries):
        middle = (low + high) / 2
        if rate_at(middle) > wanted:
            low = middle
        else:
            high = middle
        if math.isclose(low, high, rel_tol=0, abs_tol=1e-4):
            break
    return high
