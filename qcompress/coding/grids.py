"""Grids are rounded to what the disk holds here, and codes of every form become reals again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, TypeAlias, TypeVar, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qcompress.coding.rows import row_slices, weight_from_rows
from qcompress.coding.trellis import trellis_states
from qcompress.types.config import Convention
from qcompress.types.encoded import (
    Affine,
    Blocked,
    Codebook,
    Coded,
    Constant,
    Encoded,
    Grouped,
    Kept,
    Table,
    Unbounded,
)

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
CentroidDtype: TypeAlias = Literal["f16", "f32", "int8"]
INT8_MOST = 127
FACTORS: NDArray[np.float32] = np.array(
    [float.fromhex(text) for text in (
        "0x1.000000p0", "0x1.172b84p0", "0x1.306fe0p0", "0x1.4bfdaep0",
        "0x1.6a09e6p0", "0x1.8ace54p0", "0x1.ae89fap0", "0x1.d5818ep0",
    )],
    np.float32,
)  # fmt: skip
"""float32 [8]: 2**(i / 8) to the nearest; a factor 2**(e / 8) is FACTORS[e % 8] * 2**(e // 8)."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
LARGE_EXPONENT = 104
"""Above it a code times its scale may leave float32 though its sum with the offset does not; part of the format."""
SPREAD_BITS = 33
"""Scales below 2**-33 of the largest weight have less than 4 of float16's 11 bits under the exponent of that weight."""
SAFE_BITS = 127
"""What is below 2**127 is below the largest number of float32 and of bfloat16."""
_UNBOUNDED_BITS = 16 + 32 + 31
"""A step takes 16 bits above its exponent, its factors 32 and a code 31."""
ROW_PARTS = ("scale", "zero_point", "offset", "subscale", "suboffset", "row_exponents")
"""What a weight with groups has a row of for each of its rows, unless it has one for all."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def exponent_for(largest: float) -> int:
    """The exponent under which a scale or offset of about `largest`, the largest |weight|, lies near 2**12 in float16.

    Eight times `largest` still fits, and scales down to 2**-25 of it keep all 11 bits.
    """
    if largest == 0.0:
        # The least scale that there is, for grids without a level at zero.
        return -126
    return max(-126, min(112, math.frexp(largest)[1] - 12))


COMMON_EXPONENT = exponent_for(1.0)
"""Of rows that `rows_alike` gives."""
Exponent: TypeAlias = int | Tensor
"""Of the scales of a weight: one, or int8 or int32 [rows], one a row."""
GroupedT = TypeVar("GroupedT", bound=Grouped)


def spread_too_far(largest: Tensor, bits: int) -> bool:
    """Whether a scale of some row would be a float16 of few bits, or none, under the exponent of the largest one.

    largest  of the magnitudes of each row, float [rows]; rows of zeros do not count
    """
    ends = largest.aminmax()
    least, most = float(ends.min), float(ends.max)
    if least == 0 < most:
        least = float(largest[largest > 0].min())
    return least < 2.0 ** (bits - SPREAD_BITS) * most


def row_exponents(rows: Tensor) -> Tensor:
    """The exponent of each of rows [rows, ...] by itself, int32 [rows]."""
    largest = rows.flatten(1).abs().amax(1).tolist()
    return torch.tensor([exponent_for(one) for one in largest], dtype=torch.int32, device=rows.device)


def rows_alike(rows: Tensor, exponents: Tensor) -> Tensor:
    """Rows [rows, ...] times powers of two: float32, the largest of each in [1, 2), as COMMON_EXPONENT wants them."""
    powers = (COMMON_EXPONENT - exponents).reshape(-1, *[1] * (rows.ndim - 1))
    return torch.ldexp(rows.double(), powers).float()


def with_row_exponents(encoded: GroupedT, exponents: Tensor) -> GroupedT:
    """What became of `rows_alike`, as the rows that they were made of."""
    return replace(encoded, exponent=0, row_exponents=exponents.to(torch.int8))


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


def from_half(half: Tensor, exponent: Exponent) -> Tensor:
    """The float32 value of a stored scale or offset: exact unless below float32's smallest.

    half      float16 [rows, ...]
    """
    if isinstance(exponent, int):
        return half.float() * 2.0**exponent
    # The bits of a power of two are its exponent; torch's own power need not be exact.
    powers = (exponent.to(torch.int32) + 127 << 23).view(torch.float32)
    return half.float() * powers.reshape(-1, *[1] * (half.ndim - 1))


def exponent_of(encoded: Grouped) -> Exponent:
    """The exponent of all scales of a weight, or one a row."""
    return encoded.exponent if encoded.row_exponents is None else encoded.row_exponents


def store_centroids(values: Tensor, dtype: CentroidDtype, exponent: int) -> tuple[Tensor, Tensor | None, int]:
    """(centroids, scale, exponent) as Codebook has them.

    values    float32 or float64 [tables, entries, dim]
    exponent  of half precision, see exponent_for
    """
    if dtype == "f32":
        return values.float(), None, 0
    reduced = values.double() * 2.0**-exponent
    if dtype == "f16":
        return reduced.clamp(-HALF_MAX, HALF_MAX).half(), None, exponent
    most = reduced.abs().flatten(1).amax(1, keepdim=True)
    scale = round_scale((most / INT8_MOST * 2.0**exponent), exponent, up=True)
    codes = (reduced / scale.double().unsqueeze(2)).round().clamp(-INT8_MOST, INT8_MOST)
    return codes.to(torch.int8), scale, exponent


def centroid_values(encoded: Codebook) -> Tensor:
    """The centroids as float32 [tables, entries, dim]."""
    return stored_values(encoded.centroids, encoded.scale, encoded.exponent)


def stored_values(centroids: Tensor, scale: Tensor | None, exponent: int) -> Tensor:
    """What `store_centroids` gave, as float32 [tables, entries, dim]."""
    values = centroids.float()
    if scale is not None:
        values = values * scale.float().unsqueeze(2)
    return values * 2.0**exponent


def decode_codebook_rows(encoded: Codebook) -> Tensor:
    """The weight as float32 [rows, columns]."""
    values = centroid_values(encoded)
    tables, entries, dim = values.shape
    vectors, columns = encoded.codes.shape
    offsets = torch.arange(tables, device=values.device).repeat_interleave(vectors // tables) * entries
    places = encoded.codes.long() + offsets.unsqueeze(1)
    # [vectors, columns, dim] -> [vectors, dim, columns]: the places of a vector are neighbouring rows.
    found = values.flatten(0, 1)[places]
    return found.movedim(2, 1).reshape(vectors * dim, columns)


def take_codebook_rows(encoded: Codebook, start: int, stop: int) -> Codebook:
    """The rows [start, stop) as a weight of two dimensions; both ends on whole vectors and, with tables of their own
    for some rows, on whole tables."""
    dim, tables = encoded.dim, len(encoded.centroids)
    codes = encoded.codes[start // dim : -(-stop // dim)]
    centroids, scale = encoded.centroids, encoded.scale
    if tables > 1:
        rows = len(encoded.codes) * dim // tables
        own = slice(start // rows, -(-stop // rows))
        centroids, scale = centroids[own], None if scale is None else scale[own]
    shape = (len(codes) * dim, codes.shape[1])
    return replace(encoded, codes=codes, shape=shape, axis=(0,), centroids=centroids, scale=scale)


def with_entries(encoded: Codebook, entries: int) -> Codebook:
    """The same with so many entries a table, no fewer than it has: the last one is repeated."""
    missing = entries - encoded.centroids.shape[1]
    if missing <= 0:
        return encoded
    filled = torch.cat((encoded.centroids, encoded.centroids[:, -1:].expand(-1, missing, -1)), 1)
    return replace(encoded, centroids=filled)


def row_unit(encoded: Codebook) -> int:
    """Rows that must stay together when a weight is cut."""
    tables = len(encoded.centroids)
    return len(encoded.codes) * encoded.dim // tables if tables > 1 else encoded.dim


def trellis_values(codes: Tensor) -> Tensor:
    """The half-steps that the codes of a trellis stand for, int64 [rows, columns].

    codes  int32 [rows, columns]; every row starts in state 0
    """
    odd = torch.from_numpy(np.ascontiguousarray(trellis_states(codes.cpu().numpy()) & 1)).to(codes.device)
    return codes.long() * 2 - codes.sign().long() * odd


def step_value(encoded: Unbounded) -> float:
    """The step of a code whose row and column have no factor."""
    return float(encoded.step) * 2.0**encoded.exponent


def step_factors(encoded: Unbounded) -> Tensor:
    """Eighths of octaves by which rows and columns change the step, int64 [rows or 1, columns or 1]."""
    columns = encoded.codes.shape[1]
    device = encoded.codes.device
    eighths = torch.zeros(1, 1, dtype=torch.int64, device=device)
    if encoded.rows is not None:
        eighths = eighths + encoded.rows.long().unsqueeze(1)
    taps = torch.zeros(1, dtype=torch.int64, device=device) if encoded.taps is None else encoded.taps.long()
    if encoded.channels is not None:
        eighths = eighths + (encoded.channels.long().unsqueeze(1) + taps).reshape(1, -1)
    elif encoded.taps is not None:
        eighths = eighths + taps.repeat(columns // len(taps)).unsqueeze(0)
    return eighths


def steps(encoded: Unbounded) -> Tensor:
    """The step of every code, float32 [rows or 1, columns or 1]: finite, and equal on every machine.

    Rounded once, from the exact product of step, factor and power of two.
    """
    eighths = step_factors(encoded)
    low, high = (int(end) for end in torch.aminmax(eighths)) if eighths.numel() else (0, 0)
    return step_table(encoded, low, high).to(eighths.device)[eighths - low]


def step_table(encoded: Unbounded, low: int, high: int) -> Tensor:
    """The step under each number of eighths of octaves from `low` to `high`: float32 [high - low + 1]."""
    # 11 bits times 24 times a power of two: exact in float64.
    every = np.arange(low, high + 1)
    exact = np.ldexp(float(encoded.step) * FACTORS.astype(np.float64)[every % 8], every // 8 + encoded.exponent)
    return torch.from_numpy(np.minimum(exact, _FLOAT32_MAX).astype(np.float32))


def decode_unbounded_rows(encoded: Unbounded) -> Tensor:
    """The weight as float32 [rows, columns]: code * step, or half-steps * (step / 2); one more rounding."""
    if encoded.trellis:
        values = trellis_values(encoded.codes).float() * (steps(encoded) * 0.5)
    else:
        values = encoded.codes.float() * steps(encoded)
    return values.clamp_(-_FLOAT32_MAX, _FLOAT32_MAX) if encoded.exponent + _UNBOUNDED_BITS > SAFE_BITS else values


def take_unbounded_rows(encoded: Unbounded, start: int, stop: int) -> Unbounded:
    """The rows [start, stop) as a weight of two dimensions; views, no copies."""
    codes = encoded.codes[start:stop]
    rows = None if encoded.rows is None else encoded.rows[start:stop]
    return replace(encoded, codes=codes, shape=tuple(codes.shape), axis=(0,), rows=rows)


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


def decode_rows(encoded: Coded) -> Tensor:
    """The weight as float32 [rows, columns]."""
    match encoded:
        case Codebook():
            return decode_codebook_rows(encoded)
        case Unbounded():
            return decode_unbounded_rows(encoded)
        case Affine():
            return _decode_affine_rows(encoded)
        case Table():
            scale = from_half(encoded.scale, exponent_of(encoded))
            groups = _in_groups(encoded.codes, scale.shape[1], encoded.group_size)
            values = encoded.values.float()[groups.long()]
            return _out_of_groups(values.mul_(scale.unsqueeze(-1)), encoded.codes)
        case Blocked():
            return _decode_blocked_rows(encoded)
        case _:
            assert_never(encoded)


def _decode_affine_rows(encoded: Affine) -> Tensor:
    """code * scale + offset, (code - zero point) * scale or (code - middle) * scale."""
    exponent = exponent_of(encoded)
    scale = from_half(encoded.scale, exponent).unsqueeze(-1)
    values = _in_groups(encoded.codes, scale.shape[1], encoded.group_size).float()
    if encoded.offset is not None:
        values = _scaled_and_moved(values, scale, from_half(encoded.offset, exponent).unsqueeze(-1), exponent)
    elif encoded.zero_point is not None:
        values.sub_(encoded.zero_point.float().unsqueeze(-1)).mul_(scale)
    else:
        assert encoded.convention is not None
        values.sub_(middle(encoded.convention, encoded.bits)).mul_(scale)
    return _out_of_groups(values, encoded.codes)


def _scaled_and_moved(codes: Tensor, scale: Tensor, offset: Tensor, exponent: Exponent) -> Tensor:
    """codes * scale + offset, in place; near the end of float32 2**8 times smaller on the way, which is exact."""
    if (exponent if isinstance(exponent, int) else int(exponent.max())) <= LARGE_EXPONENT:
        return codes.mul_(scale).add_(offset)
    large = torch.as_tensor(exponent, device=codes.device).reshape(-1, 1, 1) > LARGE_EXPONENT
    smaller = torch.where(large, 2.0**-8, 1.0)
    found = codes.mul_(scale * smaller).add_(offset * smaller).div_(smaller)
    return found.clamp_(-_FLOAT32_MAX, _FLOAT32_MAX)


def _decode_blocked_rows(encoded: Blocked) -> Tensor:
    """The same, scale and offset of a sub-block being those of its block times an integer."""
    exponent, sub_blocks = exponent_of(encoded), encoded.subscale.shape[1]

    def of_sub_blocks(halves: Tensor, integers: Tensor) -> Tensor:
        # A block may be larger than a row.
        most = min(encoded.sub_blocks, sub_blocks)
        by_block = from_half(halves, exponent).repeat_interleave(most, dim=1)[:, :sub_blocks]
        return (by_block * integers).unsqueeze(-1)

    scale = of_sub_blocks(encoded.scale, encoded.subscale.float() - encoded.subzero)
    values = _in_groups(encoded.codes, sub_blocks, encoded.group_size).float()
    if encoded.offset is not None and encoded.suboffset is not None:
        offset = of_sub_blocks(encoded.offset, encoded.suboffset.float())
        values = _scaled_and_moved(values, scale, offset, exponent)
    else:
        assert encoded.convention is not None
        values.sub_(middle(encoded.convention, encoded.bits)).mul_(scale)
    return _out_of_groups(values, encoded.codes)


def _in_groups(codes: Tensor, groups: int, group_size: int | None) -> Tensor:
    """Codes [rows, columns] as [rows, groups, values]; a last group that is shorter is filled up with zeros."""
    rows, columns = codes.shape
    size = group_size if group_size is not None and groups > 1 else -(-columns // max(groups, 1))
    missing = groups * size - columns
    return (F.pad(codes, (0, missing)) if missing else codes).reshape(rows, groups, size)


def _out_of_groups(values: Tensor, codes: Tensor) -> Tensor:
    """Values [rows, groups, values] as those of the codes [rows, columns] that they were made of."""
    return values.flatten(1)[:, : codes.shape[1]]


def row_spans(encoded: Coded, values: int) -> Iterator[tuple[int, int]]:
    """Where an encoded weight may be cut into pieces of about so many values: rows [start, stop)."""
    rows, columns = encoded.codes.shape
    unit = 1
    if isinstance(encoded, Codebook):
        unit, rows = row_unit(encoded), rows * encoded.dim
    return ((span.start, span.stop) for span in row_slices(rows, columns, values, unit))


def take_rows(encoded: Coded, start: int, stop: int) -> Coded:
    """The rows [start, stop) of an encoded weight, as a weight of two dimensions; views, no copies.

    Of a codebook both ends lie where `row_spans` cuts.
    """
    if isinstance(encoded, Codebook):
        return take_codebook_rows(encoded, start, stop)
    if isinstance(encoded, Unbounded):
        return take_unbounded_rows(encoded, start, stop)
    codes = encoded.codes[start:stop]
    parts = {}
    if encoded.scale.shape[0] > 1:
        found = {part: getattr(encoded, part, None) for part in ROW_PARTS}
        parts = {part: value[start:stop] for part, value in found.items() if value is not None}
    return replace(encoded, codes=codes, shape=tuple(codes.shape), axis=(0,), **parts)


def decode(encoded: Encoded) -> Tensor:
    """The weight in its own shape and dtype."""
    match encoded:
        case Kept(value):
            return value
        case Constant():
            return torch.full(encoded.shape, encoded.value, dtype=TORCH_DTYPES[encoded.dtype])
        case Affine() | Codebook() | Table() | Blocked() | Unbounded():
            return weight_from_rows(in_dtype(decode_rows(encoded), encoded.dtype), encoded.shape, encoded.axis)
        case _:
            assert_never(encoded)


def decode_into(encoded: Encoded, into: Tensor) -> None:
    """Fill in what `decode` gives of a weight of two dimensions whose rows lead.

    into  [rows, columns], of the weight's dtype
    """
    if isinstance(encoded, (Kept, Constant)):
        into.copy_(decode(encoded))
        return
    rows = decode_rows(encoded)
    if _may_exceed(encoded):
        _clamp(rows, into.dtype)
    into.copy_(rows)


def _may_exceed(encoded: Coded) -> bool:
    """Whether a value may lie beyond the largest number of the weight's dtype, from exponents alone."""
    if encoded.dtype not in ("F32", "BF16"):
        return True
    match encoded:
        case Affine() | Blocked():
            # A code takes 8 bits, a number of a grid 16 beside its exponent and one of a sub-block 8, a sum one more.
            exponent = exponent_of(encoded)
            most = exponent if isinstance(exponent, int) else int(exponent.max())
            return most + 8 + 16 + 8 + 1 > SAFE_BITS
        case Unbounded():
            return encoded.exponent + _UNBOUNDED_BITS > SAFE_BITS
        case _:
            return True


def in_dtype(rows: Tensor, dtype: str) -> Tensor:
    """Decoded rows in the weight's dtype; float32 `rows` may be changed.

    A grid may reach past the largest number of a dtype, which is nearer to the weight than infinity.
    """
    wanted = TORCH_DTYPES[dtype]
    return _clamp(rows, wanted).to(wanted)


def _clamp(rows: Tensor, dtype: torch.dtype) -> Tensor:
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return rows.clamp_(-most, most)
