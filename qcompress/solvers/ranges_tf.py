"""AIMET's range search: the grid of least error on a histogram, where what is clipped counts threefold."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.coding.affine import from_half, round_scale
from qcompress.solvers.blocks import extremes, spans
from qcompress.solvers.grids import Grid, joined_grid

BUCKETS = 512
CLIPPED_WEIGHT = 3.0
SYMMETRIC_SHARES = tuple((1 + hundredths) / 100 for hundredths in range(101))
SCALE_SHARES = tuple(sixteenths / 16 for sixteenths in range(1, 18))
OFFSET_SHARES = tuple(twentieths / 20 for twentieths in range(21))
SLAB_VALUES = 1 << 22


def tf_enhanced_grid(blocks: Tensor, bits: int, symmetric: bool, exponent: int) -> Grid:
    """The candidate grid of least cost of each block: squared error within the range, and three times that beyond it.

    The cost is counted on the mid-points of 512 buckets over the block's range (the `tf_enhanced` scheme of AIMET, and
    the candidates of its code). Symmetric: 101 scales up to 1.01 of the min-max one, on the `full` convention, so that
    2 bits reach -2, -1, 0 and 1. Else: 17 scales by 21 zero points, cut to the observed range, and the min-max grid.
    We differ from it in that no range is too small: it never goes below 0.01, and takes [-1, 1] for zeros.

    blocks   float32 [blocks, length]
    """
    steps = 2**bits - 1
    per_slab = max(1, SLAB_VALUES // max(BUCKETS * len(SYMMETRIC_SHARES), blocks.shape[1], 1))
    search = _symmetric if symmetric else _asymmetric
    return joined_grid(search(blocks[rows], steps, bits, exponent) for rows in spans(max(1, len(blocks)), per_slab))


def _symmetric(blocks: Tensor, steps: int, bits: int, exponent: int) -> Grid:
    low, high = (end.double() for end in extremes(blocks))
    largest = torch.maximum(high, -low).unsqueeze(1) / (steps / 2)
    scales = round_scale(largest * torch.tensor(SYMMETRIC_SHARES, dtype=torch.float64, device=blocks.device), exponent)
    zeros = torch.full_like(scales, 2.0 ** (bits - 1))
    best = _cheapest(blocks, from_half(scales, exponent).double(), zeros.double(), steps)
    return Grid(scales.gather(1, best).squeeze(1), convention="full")


def _asymmetric(blocks: Tensor, steps: int, bits: int, exponent: int) -> Grid:
    low, high = (end.double().unsqueeze(1) for end in extremes(blocks))
    low, high = low.clamp(max=0), high.clamp(min=0)
    shares = torch.cartesian_prod(torch.tensor(SCALE_SHARES), torch.tensor(OFFSET_SHARES)).double().to(blocks.device)
    scale = (high - low) / steps * shares[:, 0]
    bottom = -(shares[:, 1] * steps).round() * scale
    ends = torch.maximum(bottom, low), torch.minimum(bottom + steps * scale, high)
    lows, highs = (torch.cat([end, plain], 1) for end, plain in zip(ends, (low, high), strict=True))
    scales = round_scale((highs - lows) / steps, exponent)
    reals = from_half(scales, exponent).double()
    zeros = (-lows / reals).round().clamp(0, steps)
    best = _cheapest(blocks, reals, zeros, steps)
    return Grid(scales.gather(1, best).squeeze(1), zero_point=zeros.gather(1, best).squeeze(1).to(torch.uint8))


def _cheapest(blocks: Tensor, scales: Tensor, zeros: Tensor, steps: int) -> Tensor:
    """The candidate of least cost, the first of equals: int64 [blocks, 1].

    scales, zeros  float64 [blocks, candidates]
    """
    counts, centres = _histogram(blocks)
    scale, zero, x = scales.unsqueeze(2), zeros.unsqueeze(2), centres.unsqueeze(1)
    inside = (x >= -zero * scale) & (x <= (steps - zero) * scale)
    codes = torch.round(x / scale) + zero
    error = (codes.clamp_(0, steps) - zero).mul_(scale).sub_(x).square_()
    weights = torch.where(inside, 1.0, CLIPPED_WEIGHT) * counts.unsqueeze(1)
    return error.mul_(weights).sum(2).argmin(1, keepdim=True)


def _histogram(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and mid-points of the buckets over each block's range: float64 [blocks, BUCKETS]."""
    low, high = extremes(blocks)
    width = (high.double() - low.double()).unsqueeze(1) / BUCKETS
    places = (blocks.double() - low.unsqueeze(1)) / torch.where(width > 0, width, 1.0)
    counts = torch.zeros(len(blocks), BUCKETS, dtype=torch.float64, device=blocks.device)
    counts.scatter_add_(1, places.long().clamp_(0, BUCKETS - 1), torch.ones_like(places))
    middles = torch.arange(BUCKETS, dtype=torch.float64, device=blocks.device) + 0.5
    return counts, low.double().unsqueeze(1) + middles * width
