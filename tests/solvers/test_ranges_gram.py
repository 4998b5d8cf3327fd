"""AIMET's range search against one that tries every candidate on every bucket in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompress.coding.grids import decode_rows, exponent_for, from_half
from qcompress.registry import RtnConfig
from qcompress.solvers.grids import Grid, affine_from_grid
from qcompress.solvers.ranges import tf_enhanced_grid


def heavy(count: int, length: int, seed: int = 0) -> Tensor:
    """Values with long tails, off centre."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_t(3, (count, length)) * 0.1 + 0.05).float()


def grid_of(blocks: Tensor, bits: int, symmetric: bool) -> tuple[Grid, int]:
    exponent = exponent_for(float(blocks.abs().max()))
    return tf_enhanced_grid(blocks, bits, symmetric, exponent), exponent


def cost(values: np.ndarray, low: float, high: float, steps: int) -> float:
    """The cost of a range as the scheme defines it, bucket by bucket."""
    counts, edges = np.histogram(values, 512, (values.min(), values.max()))
    total, scale = 0.0, (high - low) / steps
    for count, x in zip(counts, (edges[1:] + edges[:-1]) / 2, strict=True):
        if x < low:
            total += 3 * count * (x - low) ** 2
        elif x > high:
            total += 3 * count * (x - high) ** 2
        else:
            total += count * (x - (low + scale * round((x - low) / scale))) ** 2
    return total


def candidates(values: np.ndarray, bits: int, symmetric: bool) -> list[tuple[float, float]]:
    steps = 2**bits - 1
    if symmetric:
        widest = np.abs(values).max() / (steps / 2)
        scales = [widest * (0.01 + share / 100) for share in range(101)]
        return [(-(2 ** (bits - 1)) * scale, (2 ** (bits - 1) - 1) * scale) for scale in scales]
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    ranges = [(low, high)]
    for share in range(1, 18):
        scale = (high - low) / steps * share / 16
        for twentieth in range(21):
            bottom = -round(steps * twentieth / 20) * scale
            ends = max(bottom, low), min(bottom + steps * scale, high)
            if ends[0] < ends[1]:
                step = (ends[1] - ends[0]) / steps
                zero = round(-ends[0] / step)
                ranges.append((-zero * step, (steps - zero) * step))
    return ranges


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
def test_no_candidate_costs_less(bits: int, symmetric: bool) -> None:
    steps = 2**bits - 1
    blocks = heavy(3, 700, bits)
    grid, exponent = grid_of(blocks, bits, symmetric)
    for index, block in enumerate(blocks.double().numpy()):
        scale = float(from_half(grid.scale, exponent)[index])
        zero = 2 ** (bits - 1) if grid.zero_point is None else int(grid.zero_point[index])
        found = cost(block, -zero * scale, (steps - zero) * scale, steps)
        least = min(cost(block, *ends, steps) for ends in candidates(block, bits, symmetric))
        # Scales are rounded to float16 before they are tried, here they are not.
        assert found <= least * 1.03 + 1e-12


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_symmetric_grid_has_its_zero_on_the_middle_code(bits: int) -> None:
    grid, _ = grid_of(heavy(4, 100), bits, True)
    assert grid.convention == "full" and grid.zero_point is None and grid.offset is None
    assert bool((grid.scale > 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_do_not_see_each_other(symmetric: bool) -> None:
    blocks = heavy(40, 300)
    exponent = exponent_for(float(blocks.abs().max()))
    whole = tf_enhanced_grid(blocks, 4, symmetric, exponent)
    parts = [tf_enhanced_grid(block.unsqueeze(0), 4, symmetric, exponent) for block in blocks]
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))
    if whole.zero_point is not None:
        assert torch.equal(
            whole.zero_point, torch.cat([part.zero_point for part in parts if part.zero_point is not None])
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-100, 2.0**60])
def test_no_range_is_too_small_or_too_large(symmetric: bool, factor: float) -> None:
    blocks = heavy(3, 200)
    plain, exponent = grid_of(blocks, 4, symmetric)
    scaled, other = grid_of(blocks * factor, 4, symmetric)
    assert torch.equal(plain.scale, scaled.scale)
    assert 2.0 ** (other - exponent) == factor


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-40])
@pytest.mark.parametrize("bits", [2, 8])
def test_equal_values(value: float, symmetric: bool, bits: int) -> None:
    blocks = torch.full((2, 50), value)
    grid, exponent = grid_of(blocks, bits, symmetric)
    decoded = decode_rows(affine_from_grid(blocks, grid, RtnConfig(bits=bits), exponent))
    assert bool(decoded.isfinite().all())
    # Two bits reach no further than one step above zero, of half the range at most 1.01.
    assert float((decoded - blocks).abs().max()) <= abs(value) * 0.35


def test_an_outlier_is_clipped() -> None:
    blocks = heavy(1, 5000)
    blocks.clamp_(-0.5, 0.5)[0, 0] = 3.0
    grid, exponent = grid_of(blocks, 4, True)
    assert float(from_half(grid.scale, exponent)) * 7.5 < 1.5
