"""Affine grids: integers to reals, and real scales to what the disk holds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from qcompress.coding.rows import weight_from_rows
from qcompress.types import Affine, Convention, Encoded, Kept

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

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


def middle(convention: Convention, bits: int) -> float:
    """The code, real where it lies between two codes, at which a symmetric grid is zero."""
    match convention:
        case "narrow":
            return 2.0 ** (bits - 1) - 1
        case "full":
            return 2.0 ** (bits - 1)
        case "mid-rise":
            return (2.0**bits - 1) / 2
        case _:
            assert_never(convention)


def decode_rows(encoded: Affine) -> Tensor:
    """The weight as float32 [rows, columns]."""
    rows, columns = encoded.codes.shape
    grid_rows, groups = encoded.scale.shape
    if not encoded.codes.numel():
        return torch.zeros(rows, columns)
    # A single grid row holds one block for the whole tensor; else each row has `groups` blocks.
    values = encoded.codes.reshape(grid_rows, groups, -1).float()
    scale = from_half(encoded.scale, encoded.exponent).unsqueeze(-1)
    if encoded.offset is not None:
        values.mul_(scale).add_(from_half(encoded.offset, encoded.exponent).unsqueeze(-1))
    elif encoded.zero_point is not None:
        values.sub_(encoded.zero_point.float().unsqueeze(-1)).mul_(scale)
    else:
        assert encoded.convention is not None
        values.sub_(middle(encoded.convention, encoded.bits)).mul_(scale)
    return values.reshape(rows, columns)


def take_rows(encoded: Affine, start: int, stop: int) -> Affine:
    """The rows [start, stop) of an encoded weight, as a weight of two dimensions; views, no copies."""
    codes = encoded.codes[start:stop]
    grid = {} if encoded.scale.shape[0] == 1 else {"scale", "zero_point", "offset"}
    parts = {part: value[start:stop] for part in grid if (value := getattr(encoded, part)) is not None}
    return replace(encoded, codes=codes, shape=tuple(codes.shape), axis=(0,), **parts)


def decode(encoded: Encoded) -> Tensor:
    """The weight in its own shape and dtype."""
    match encoded:
        case Kept(value):
            return value
        case Affine():
            dtype = TORCH_DTYPES[encoded.dtype]
            # A grid may reach past the largest number of a dtype, which is nearer to the weight than infinity.
            most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
            rows = decode_rows(encoded).clamp_(-most, most)
            return weight_from_rows(rows, encoded.shape, encoded.axis).to(dtype)
        case _:
            assert_never(encoded)
