"""Real scales, offsets and centroids as the disk holds them: half precision, with one exponent for a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24


def exponent_for(largest: float) -> int:
    """The exponent under which a scale or offset of about `largest`, the largest |weight|, lies near 2**12 in float16.

    Eight times `largest` still fits, and scales down to 2**-25 of it keep all 11 bits.
    """
    if largest == 0.0:
        # The least scale that there is, for grids without a level at zero.
        return -126
    return max(-126, min(112, math.frexp(largest)[1] - 12))


def round_scale(scale: Tensor, exponent: int, *, up: bool = False) -> Tensor:
    """A scale as the disk holds it: float16, never zero, times 2**exponent.

    scale    float32, any shape, not negative unless its sign is meant
    up       round away from zero, so that a range is covered; a relative 2**-20 is forgiven, which makes a range that
             was read off its own grid give that grid again
    returns  float16, shaped like scale
    """
    reduced = scale.double() * 2.0**-exponent
    half = reduced.clamp(-HALF_MAX, HALF_MAX).half()
    if up:
        short = (half.double().abs() < reduced.abs() * (1 - 2.0**-20)) & (half.abs() < HALF_MAX)
        # One step of a float16's bit pattern is one step away from zero, whatever the sign.
        half = torch.where(short, (half.view(torch.int16) + 1).view(torch.float16), half)
    return torch.where(half == 0, torch.full_like(half, HALF_TINY), half)


def round_offset(offset: Tensor, exponent: int) -> Tensor:
    """An offset as the disk holds it: float16, shaped like the float one that is given, nearest, times 2**exponent."""
    return (offset.double() * 2.0**-exponent).clamp(-HALF_MAX, HALF_MAX).half()


def from_half(half: Tensor, exponent: int) -> Tensor:
    """The float32 value of a stored scale or offset: exact unless below float32's smallest."""
    return half.float() * 2.0**exponent
