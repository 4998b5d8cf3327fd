"""Tensors that are kept become torch's again, byte for byte, whatever their dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qcompress.coding.grids import TORCH_DTYPES
from qcompress.types.plan import TensorInfo

NEWER_DTYPES = {"F8_E8M0": "float8_e8m0fnu"}
"""The dtypes that torch has had from some version on, later than the oldest that we work with."""

KEPT_DTYPES = TORCH_DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    **{name: getattr(torch, dtype) for name, dtype in NEWER_DTYPES.items() if hasattr(torch, dtype)},
}
"""Every dtype that a kept tensor can have in torch."""


def no_counterpart(dtype: str) -> str:
    """What is wrong with a dtype that is not among KEPT_DTYPES."""
    return f"dtype {dtype} has no counterpart in torch"


def tensor_of(pieces: Iterable[memoryview], info: TensorInfo) -> Tensor:
    """A tensor of bytes that it does not share; its dtype is one of KEPT_DTYPES."""
    dtype = KEPT_DTYPES[info.dtype]
    raw = bytearray(info.n_bytes)
    at = 0
    for piece in pieces:
        raw[at : at + len(piece)] = piece
        at += len(piece)
    if not raw:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(info.shape)
