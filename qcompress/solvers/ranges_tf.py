"""AIMET's range search: the grid of least error on a histogram, where what is clipped counts threefold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.coding.half import from_half, round_scale
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
    candidates = len(SYMMETRIC_SHARES) if symmetric else len(SCALE_SHARES) * len(OFFSET_SHARES) + 1
    per_slab = max(1, SLAB_VALUES // max(candidates * min(steps + 3, BUCKETS), blocks.shape[1]))
    search = _symmetric if symmetric else _asymmetric
    # In units of 2**exponent, where scales are what float16 holds.
    slabs = (blocks[rows].double() * 2.0**-exponent for rows in spans(max(1, len(blocks)), per_slab))
    return joined_grid(search(slab, steps, bits) for slab in slabs)


def _symmetric(blocks: Tensor, steps: int, bits: int) -> Grid:
    low, high = extremes(blocks)
    largest = torch.maximum(high, -low).unsqueeze(1) / (steps / 2)
    scales = round_scale(largest * torch.tensor(SYMMETRIC_SHARES, dtype=torch.float64, device=blocks.device), 0)
    zeros = torch.full_like(scales, 2.0 ** (bits - 1))
    best = _cheapest(blocks, from_half(scales, 0).double(), zeros.double(), steps)
    return Grid(scales.gather(1, best).squeeze(1), convention="full")


def _asymmetric(blocks: Tensor, steps: int, bits: int) -> Grid:
    low, high = (end.unsqueeze(1) for end in extremes(blocks))
    low, high = low.clamp(max=0), high.clamp(min=0)
    shares = torch.cartesian_prod(torch.tensor(SCALE_SHARES), torch.tensor(OFFSET_SHARES)).double().to(blocks.device)
    scale = (high - low) / steps * shares[:, 0]
    bottom = -(shares[:, 1] * steps).round() * scale
    ends = torch.maximum(bottom, low), torch.minimum(bottom + steps * scale, high)
    lows, highs = (torch.cat([end, plain], 1) for end, plain in zip(ends, (low, high), strict=True))
    scales = round_scale((highs - lows) / steps, 0)
    reals = from_half(scales, 0).double()
    zeros = (-lows / reals).round().clamp(0, steps)
    best = _cheapest(blocks, reals, zeros, steps)
    return Grid(scales.gather(1, best).squeeze(1), zero_point=zeros.gather(1, best).squeeze(1).to(torch.uint8))


def _cheapest(blocks: Tensor, scales: Tensor, zeros: Tensor, steps: int) -> Tensor:
    """The candidate of least cost, the first of equals: int64 [blocks, 1].

    scales, zeros  float64 [blocks, candidates]
    """
    buckets = _fill_buckets(blocks)
    # With few levels, sums over what is nearest to each cost less than a look at every bucket.
    cost = _cost_by_level if steps < BUCKETS // 8 else _cost_by_bucket
    return cost(buckets, scales.unsqueeze(2), zeros.unsqueeze(2), steps).argmin(1, keepdim=True)


@dataclass(frozen=True)
class _Buckets:
    """Counts and mid-points float64 [blocks, BUCKETS]; the low end and the width above 0 float64 [blocks, 1, 1]."""

    counts: Tensor
    centres: Tensor
    low: Tensor
    width: Tensor


def _fill_buckets(blocks: Tensor) -> _Buckets:
    low, high = (end.unsqueeze(1) for end in extremes(blocks))
    width = (high - low) / BUCKETS
    safe = torch.where(width > 0, width, 1.0)
    places = ((blocks - low) / safe).long().clamp_(0, BUCKETS - 1)
    counts = low.new_zeros(len(blocks), BUCKETS).scatter_add_(1, places, torch.ones_like(places, dtype=torch.float64))
    middles = torch.arange(BUCKETS, dtype=torch.float64, device=blocks.device) + 0.5
    return _Buckets(counts, low + middles * width, low.unsqueeze(2), safe.unsqueeze(2))


def _cost_by_bucket(buckets: _Buckets, scale: Tensor, zero: Tensor, steps: int) -> Tensor:
    """The cost of each candidate, [blocks, candidates]; scale and zero with a last dimension of 1."""
    scale, zero, x = scale.float(), zero.float(), buckets.centres.float().unsqueeze(1)
    rest = x / scale
    error = torch.round(rest).clamp_(-zero, steps - zero).sub_(rest).mul_(scale).square_()
    clipped = (rest < -zero).logical_or_(rest > steps - zero)
    weights = torch.where(clipped, CLIPPED_WEIGHT, 1.0).mul_(buckets.counts.float().unsqueeze(1))
    return error.mul_(weights).sum(2)


def _cost_by_level(buckets: _Buckets, scale: Tensor, zero: Tensor, steps: int) -> Tensor:
    """The same from the counts and the first two moments of what is nearest to each level."""
    levels = (torch.arange(steps + 1, dtype=torch.float64, device=scale.device) - zero) * scale
    # What lies below the first level or above the last is clipped to it, and apart from what is rounded to it.
    borders = torch.cat([levels[:, :, :1], (levels[:, :, 1:] + levels[:, :, :-1]) / 2, levels[:, :, -1:]], 2)
    values = F.pad(levels, (1, 1), mode="replicate")
    weights = torch.ones(steps + 3, dtype=torch.float64, device=scale.device)
    weights[[0, -1]] = CLIPPED_WEIGHT
    below = ((borders - buckets.low) / buckets.width - 0.5).ceil_().clamp_(0, BUCKETS).long()
    counts, x = buckets.counts, buckets.centres
    count, total, squares = (
        _between(moment, below).mul_(weights) for moment in (counts, counts * x, counts * x.square())
    )
    return (squares - 2 * values * total + values.square() * count).sum(2)


def _between(moment: Tensor, places: Tensor) -> Tensor:
    """The sums of a moment [blocks, BUCKETS] before the first place, from each to the next, and after the last."""
    running = F.pad(moment.cumsum(1), (1, 0))
    sums = running.gather(1, places.flatten(1)).view(places.shape)
    whole = running[:, -1:, None].expand(*places.shape[:2], 1)
    return torch.diff(sums, dim=2, prepend=torch.zeros_like(whole), append=whole)
