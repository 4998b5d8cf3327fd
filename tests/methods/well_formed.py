"""What an encoded weight must be by its config, whatever method chose it: forms, shapes, dtypes, codes in range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompress.coding.rows import codebook_shape, grid_shape
from qcompress.types.config import Form, MethodConfig, Shape
from qcompress.types.encoded import Affine, Codebook, Coded, Unbounded

DTYPES = {"f16": torch.float16, "f32": torch.float32, "int8": torch.int8}
PARTS = ("codes", "scale", "offset", "zero_point", "centroids", "step", "rows", "channels", "taps")
ABOUT = ("exponent", "bits", "convention", "trellis", "shape", "axis", "dtype")


def form_of(encoded: Coded) -> Form:
    """What decodes the codes; exactly one thing does."""
    if isinstance(encoded, Codebook):
        return "codebook"
    if isinstance(encoded, Unbounded):
        return "unbounded"
    assert sum(part is not None for part in (encoded.zero_point, encoded.offset, encoded.convention)) == 1
    if encoded.convention is not None:
        return "symmetric"
    return "offset" if encoded.zero_point is None else "zero-point"


def assert_well_formed(encoded: object, shape: Shape, config: MethodConfig, rows: Shape | None = None) -> None:
    """An encoded weight of this shape; `rows` [rows, ...] is that of its rows where its channel axes are not first."""
    assert isinstance(encoded, Coded)
    rows = rows or shape
    size = (rows[0], math.prod(rows[1:]))
    assert form_of(encoded) == config.form, "the form that was declared is not the one that is encoded"
    assert (encoded.shape, encoded.dtype) == (shape, "F32")
    match encoded:
        case Affine():
            assert encoded.codes.dtype == torch.uint8 and encoded.codes.shape == size
            assert encoded.codes.is_contiguous()
            assert encoded.bits == config.bits
            assert not encoded.codes.numel() or int(encoded.codes.max()) < 2**encoded.bits
            assert encoded.scale.dtype == torch.float16
            assert tuple(encoded.scale.shape) == grid_shape(size, config.unit, config.group_size)
            assert bool((encoded.scale != 0).all()) and bool(encoded.scale.isfinite().all())
            assert encoded.convention == (config.stored_convention if config.form == "symmetric" else None)
            if encoded.offset is not None:
                assert (encoded.offset.dtype, encoded.offset.shape) == (torch.float16, encoded.scale.shape)
                assert bool(encoded.offset.isfinite().all())
            if encoded.zero_point is not None:
                assert (encoded.zero_point.dtype, encoded.zero_point.shape) == (torch.uint8, encoded.scale.shape)
        case Codebook():
            assert encoded.bits == config.code_bits
            tables, _, dim = codebook_shape(config, *size)
            assert encoded.codes.dtype == (torch.uint8 if encoded.bits <= 8 else torch.int16)
            assert encoded.codes.shape == (size[0] // dim, size[1])
            assert encoded.centroids.dtype == DTYPES[config.codebook]
            assert (encoded.centroids.shape[0], encoded.dim) == (tables, dim)
            assert 1 <= encoded.centroids.shape[1] <= 2**encoded.bits
            assert not encoded.codes.numel() or int(encoded.codes.min()) >= 0
            assert not encoded.codes.numel() or int(encoded.codes.max()) < encoded.centroids.shape[1]
            assert bool(encoded.centroids.double().isfinite().all())
            assert (encoded.scale is not None) == (config.codebook == "int8")
            if encoded.scale is not None:
                assert (encoded.scale.dtype, tuple(encoded.scale.shape)) == (torch.float16, (tables, 1))
        case Unbounded():
            assert config.bits is None
            assert encoded.codes.dtype == torch.int32 and encoded.codes.shape == size
            assert (encoded.step.dtype, encoded.step.ndim) == (torch.float16, 0)
            assert bool(encoded.step > 0) and bool(encoded.step.isfinite())
            if encoded.rows is not None:
                assert (encoded.rows.dtype, tuple(encoded.rows.shape)) == (torch.int8, size[:1])
            assert (encoded.channels is None) == (encoded.taps is None)
            if encoded.channels is not None and encoded.taps is not None:
                assert (encoded.channels.dtype, encoded.taps.dtype) == (torch.int8, torch.int8)
                assert encoded.channels.numel() * encoded.taps.numel() == size[1]


def assert_same(one: object, other: object) -> None:
    """Equal kinds, codes and grids, bit for bit."""
    assert type(one) is type(other)
    for name in (*PARTS, *ABOUT):
        first, second = getattr(one, name, None), getattr(other, name, None)
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            assert torch.equal(first, second), name
        else:
            assert first == second, name
