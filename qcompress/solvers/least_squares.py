"""Alternating least squares finds the uniform grid of least squared error for each block.

Codes are assigned to a grid, then scale and offset are regressed on the codes; neither step can raise the error. Where
it ends depends on the start, so one round is tried from a ladder of starts, for either end of the range on its own, and
the best start goes on. All is in units of 2**exponent: see `blocks.Chunk`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np
import torch
from torch import Tensor

from qcompress.coding.grids import HALF_TINY
from qcompress.solvers.blocks import Chunk

OUTER_SIGMA = (0.798, 1.494, 2.05, 2.51, 2.92, 3.28, 3.61, 3.93)
"""By bits: the outermost level of the best uniform grid for a Gaussian, in standard deviations (Max, 1960)."""


@dataclass(frozen=True)
class Effort:
    """How many starts are tried, and how many rounds follow from the best.

    corners      pairs of rungs (of the low end, of the high end), rung 0 being the whole range
    scale_rungs  starts for a grid of fixed zero
    """

    corners: tuple[tuple[int, int], ...]
    scale_rungs: int
    rounds: int

    @property
    def rungs(self) -> int:
        return 1 + max(max(corner) for corner in self.corners)


NORMAL = Effort(((1, 1), (2, 2), (1, 3), (3, 1)), scale_rungs=4, rounds=1)
"""Within 0.16 dB of HIGH, at well under half its cost."""
HIGH = Effort(tuple(product(range(4), range(4))), scale_rungs=8, rounds=4)
"""More than 4 rungs for either end gain less than 0.02 dB."""

Start = tuple[Tensor, Tensor | None]
"""The scale of each block and its lowest level, float64 [blocks]; None where the code of zero is fixed."""


def fit_affine(chunk: Chunk, low: Tensor, high: Tensor, bits: int, effort: Effort) -> tuple[Tensor, Tensor]:
    """(scale, mean code), float64 [blocks]: scale * (code - mean code) fits the blocks, which are centred.

    The lowest level is left to the caller, who rounds the scale first: the best one for any scale puts the mean code on
    the block's mean. With 1 bit this is the best split in two of the block's sorted values, exact for blocks of one
    piece.

    low, high  float64 [blocks], the blocks' ends, centred too
    """
    starts = _splits(chunk, low, high) if bits == 1 else _shrunken_ranges(chunk, low, high, bits, effort)
    scale, _, mean_code = _descend(chunk, starts, bits, None, effort.rounds)
    return scale, mean_code


def fit_scale(chunk: Chunk, absmax: Tensor, bits: int, zero: float, effort: Effort, *, signed: bool) -> Tensor:
    """The scale, float64 [blocks], for levels scale * (code - zero); of either sign where `signed`.

    absmax  float64 [blocks]
    """
    rungs = _ladder(absmax, _root_mean_square(chunk), bits, effort.scale_rungs)
    signs = (1.0, -1.0) if signed else (1.0,)
    starts = ((rung * (sign * 2 / (2**bits - 1)), None) for rung, sign in product(rungs, signs))
    return _descend(chunk, starts, bits, zero, effort.rounds)[0]


def _root_mean_square(chunk: Chunk) -> Tensor:
    """float64 [blocks]."""
    return (chunk.totals(1, lambda x, room: torch.mul(x, x, out=room[0]))[0] / chunk.length).sqrt()


def _ladder(end: Tensor, sigma: Tensor, bits: int, rungs: int) -> list[Tensor]:
    """Distances from just beyond `end` in to where a Gaussian's best grid ends, or about a step in from the end."""
    step = 2 / (2**bits - 1)
    first = end * (1 + step / 4)
    last = torch.minimum(OUTER_SIGMA[bits - 1] * sigma, end * max(1 - 0.875 * step, 0.25))
    # numpy's power: torch's rounds differently where the blocks do not fill a vector register.
    shrinkage = (last / first.clamp_min(HALF_TINY)).cpu().numpy()
    ratio = torch.from_numpy(np.power(shrinkage, 1 / (rungs - 1))).to(end.device)
    return list(accumulate(range(rungs - 1), lambda rung, _: rung * ratio, initial=first))


def _shrunken_ranges(chunk: Chunk, low: Tensor, high: Tensor, bits: int, effort: Effort) -> Iterator[Start]:
    """Both ends drawn in, each on its own: that finds better grids than drawing in both alike.

    First the whole range with a level on the mean: beside one huge value the rest then shares that level, not two.
    """
    whole = ((high - low) / (2**bits - 1)).clamp_min(HALF_TINY)
    yield whole, (low / whole).round() * whole
    sigma = _root_mean_square(chunk)
    below, above = (_ladder(end.clamp_min(0), sigma, bits, effort.rungs) for end in (-low, high))
    for down, up in effort.corners:
        yield (below[down] + above[up]) / (2**bits - 1), -below[down]


def _splits(chunk: Chunk, low: Tensor, high: Tensor) -> Iterator[Start]:
    """Thresholds, as grids of 1 bit: each block's best of all, or a choice of them where a block has several pieces."""
    if chunk.held is None:
        sigma = _root_mean_square(chunk)
        thresholds = [(low + high) / 2, *(sigma * z for z in (-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4))]
    elif chunk.length == 1:
        thresholds = [low]
    else:
        rows = chunk.held.t() if chunk.dim == 0 else chunk.held
        values = torch.from_numpy(np.sort(rows.cpu().numpy(), axis=1)).to(rows.device).double()
        left = values.cumsum(1)
        count = torch.arange(1, chunk.length, dtype=torch.float64, device=values.device)
        # The squares that a split takes away, from the sums on its left about the block's mean.
        inside = left[:, :-1] - left[:, -1:] * (count / chunk.length)
        best = (inside.square() / (count * (chunk.length - count))).argmax(1, keepdim=True)
        thresholds = [((values.gather(1, best) + values.gather(1, best + 1)) / 2).squeeze(1)]
    scale = (high - low).clamp_min(HALF_TINY)
    for threshold in thresholds:
        yield scale, threshold - scale / 2


def _descend(
    chunk: Chunk, starts: Iterator[Start], bits: int, zero: float | None, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, gain, mean code), float64 [blocks]: a round from each start, then more from each block's best."""
    scale, gain, mean_code = _round(chunk, next(starts), bits, zero)
    for start in starts:
        other = _round(chunk, start, bits, zero)
        better = other[1] > gain
        scale, gain, mean_code = (
            torch.where(better, new, old) for new, old in zip(other, (scale, gain, mean_code), strict=True)
        )
    for _ in range(rounds):
        scale, gain, mean_code = _round(chunk, (scale, -scale * mean_code), bits, zero)
    return scale, gain, mean_code


def _round(chunk: Chunk, start: Start, bits: int, zero: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes nearest to a grid, then the grid that fits these codes best: (scale, gain, mean code).

    The gain is by how much the squared error of that grid lies below the sum of squares. `zero` is the code of zero
    where it is fixed.
    """
    scale, low = start
    # Nothing below what the disk holds: this also keeps a constant block from dividing by zero.
    scale = torch.where(scale < 0, scale.clamp_max(-HALF_TINY), scale.clamp_min(HALF_TINY))
    if zero is not None or low is None:
        assert zero is not None
        low = -zero * scale
    low_piece, rate_piece = chunk.spread(low), chunk.spread(1 / scale)

    def products(x: Tensor, room: Tensor) -> None:
        code, squared, weighted = room
        torch.sub(x, low_piece, out=code).mul_(rate_piece).round_().clamp_(0, 2**bits - 1)
        if zero is not None:
            code.sub_(zero)
        torch.mul(code, code, out=squared)
        torch.mul(code, x, out=weighted)

    total, squares, weighted = chunk.totals(3, products)
    mean_code = total / chunk.length
    spread = squares if zero is not None else squares - total * mean_code
    # Codes that are all alike say nothing about the scale; float32 sums of them may differ in the last bits.
    varied = spread > squares * 2.0**-20
    scale = torch.where(varied, weighted / spread, scale)
    return scale, torch.where(varied, weighted * scale, 0.0), mean_code
