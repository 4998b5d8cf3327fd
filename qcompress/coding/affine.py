"""Integers back to reals: affine grids, and whatever else a weight can be encoded in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from qcompress.coding.codebook import decode_codebook_rows, row_unit, take_codebook_rows
from qcompress.coding.half import from_half
from qcompress.coding.lattice import decode_lattice_rows, take_lattice_rows
from qcompress.coding.rows import weight_from_rows
from qcompress.encoded import Affine, Codebook, Encoded, Kept, Lattice
from qcompress.types import Convention

Coded: TypeAlias = Affine | Codebook | Lattice
"""A weight that stands in codes."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


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
    if isinstance(encoded, Codebook):
        return decode_codebook_rows(encoded)
    if isinstance(encoded, Lattice):
        return decode_lattice_rows(encoded)
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


def row_spans(encoded: Coded, values: int) -> Iterator[tuple[int, int]]:
    """Where an encoded weight may be cut into pieces of about so many values: rows [start, stop)."""
    rows, columns = encoded.codes.shape
    unit = 1
    if isinstance(encoded, Codebook):
        unit, rows = row_unit(encoded), rows * encoded.dim
    step = unit * max(1, values // max(columns * unit, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def take_rows(encoded: Coded, start: int, stop: int) -> Coded:
    """The rows [start, stop) of an encoded weight, as a weight of two dimensions; views, no copies.

    Of a codebook both ends lie where `row_spans` cuts.
    """
    if isinstance(encoded, Codebook):
        return take_codebook_rows(encoded, start, stop)
    if isinstance(encoded, Lattice):
        return take_lattice_rows(encoded, start, stop)
    codes = encoded.codes[start:stop]
    grid = {} if encoded.scale.shape[0] == 1 else {"scale", "zero_point", "offset"}
    parts = {part: value[start:stop] for part in grid if (value := getattr(encoded, part)) is not None}
    return replace(encoded, codes=codes, shape=tuple(codes.shape), axis=(0,), **parts)


def decode(encoded: Encoded) -> Tensor:
    """The weight in its own shape and dtype."""
    match encoded:
        case Kept(value):
            return value
        case Affine() | Codebook() | Lattice():
            dtype = TORCH_DTYPES[encoded.dtype]
            # A grid may reach past the largest number of a dtype, which is nearer to the weight than infinity.
            most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
            rows = decode_rows(encoded).clamp_(-most, most)
            return weight_from_rows(rows, encoded.shape, encoded.axis).to(dtype)
        case _:
            assert_never(encoded)
