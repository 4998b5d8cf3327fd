"""Floats become planes of bytes and back without loss, exponents first: these repeat, mantissas hardly do.

artifact/SPEC.md describes the bytes, "Kept tensors on disk". Values stand in blocks that are coded by themselves, so
that no more than one of them need be in memory on either side. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.ans import LONGEST_VARINT, chunk_count, parse_varint, run_jobs, varint
from qcompress.coding.packing import Bytes
from qcompress.coding.payload import decode_payload, encode_payload, least_bytes
from qcompress.coding.rows import spans
from qcompress.coding.stored import Stored
from qcompress.types.config import Coding
from qcompress.types.plan import KeepCoding

BLOCK_VALUES = 1 << 20
"""Values of one block; part of the format."""
_CODINGS: tuple[Coding, ...] = get_args(Coding)
"""By the number that stands before a plane."""
_PASS_VALUES = 1 << 15
"""What is taken apart or put together at a time stays in a core's cache."""


@dataclass(frozen=True)
class FloatDtype:
    """How many bits the exponents and the mantissas of a dtype have, beside the sign."""

    exponent: int
    mantissa: int

    @property
    def n_bytes(self) -> int:
        return (1 + self.exponent + self.mantissa) // 8

    @property
    def words(self) -> np.dtype[Any]:
        return np.dtype(f"<u{self.n_bytes}")


PLANE_DTYPES = {
    "BF16": FloatDtype(8, 7),
    "F16": FloatDtype(5, 10),
    "F32": FloatDtype(8, 23),
    "F64": FloatDtype(11, 52),
}
"""The dtypes whose tensors can be coded."""


def split_planes(raw: memoryview, dtype: str) -> list[Bytes]:
    """The bytes of values as planes, the one of the highest bits first: uint8 [values] each.

    The bits of a value are first put in the order exponent, sign, mantissa, each part as it is.
    """
    kind = PLANE_DTYPES[dtype]
    words = np.frombuffer(raw, kind.words)
    planes = [np.empty(len(words), np.uint8) for _ in range(kind.n_bytes)]
    exponents = ((1 << kind.exponent) - 1) << (kind.mantissa + 1)
    sign, mantissas = 1 << kind.mantissa, (1 << kind.mantissa) - 1
    for span in spans(len(words), _PASS_VALUES):
        part = words[span]
        ordered = ((part << 1) & exponents) | ((part >> kind.exponent) & sign) | (part & mantissas)
        for place, plane in enumerate(reversed(planes)):
            # Bits above a byte are dropped.
            plane[span] = ordered >> (8 * place)
    return planes


def join_planes(planes: list[Bytes], dtype: str) -> Bytes:
    """The inverse of `split_planes`: the bytes of the values, uint8 [bytes]."""
    kind = PLANE_DTYPES[dtype]
    words: NDArray[Any] = np.empty(len(planes[0]), kind.words)
    exponents = ((1 << kind.exponent) - 1) << kind.mantissa
    sign, mantissas = 1 << kind.mantissa, (1 << kind.mantissa) - 1
    for span in spans(len(words), _PASS_VALUES):
        ordered = planes[0][span].astype(kind.words)
        for plane in planes[1:]:
            ordered <<= 8
            ordered |= plane[span]
        words[span] = ((ordered >> 1) & exponents) | ((ordered & sign) << kind.exponent) | (ordered & mantissas)
    return words.view(np.uint8)


def encode_values(raw: Stored, dtype: str, choice: KeepCoding) -> Iterator[bytes]:
    """The payload of a tensor's bytes, block by block; equal inputs give equal bytes.

    choice  how planes are coded that take fewer bytes then; the others are as they are
    """
    size = PLANE_DTYPES[dtype].n_bytes
    for span in spans(raw.size // size, BLOCK_VALUES):
        planes = split_planes(raw.read(size * span.start, size * span.stop), dtype)
        yield b"".join(part for plane in planes for part in _encode_plane(plane, choice))


def _encode_plane(plane: Bytes, choice: KeepCoding) -> tuple[bytes, bytes, bytes | memoryview]:
    coding, payload = encode_payload(plane.reshape(1, -1), 8, len(plane), choice, least_bytes(len(plane)))
    if len(payload) >= len(plane):
        coding, payload = "packed", plane.data
    return bytes([_CODINGS.index(coding)]), varint(len(payload)), payload


def decode_values(stored: Stored, dtype: str, count: int, executor: Executor | None = None) -> Iterator[memoryview]:
    """The bytes of so many values, block by block, from the payload that `encode_values` made of them.

    Raises ValueError where it is none.

    executor  of processes, among which the blocks of a large tensor are shared
    """
    blocks = run_jobs(_decode_block, _coded_blocks(stored, dtype, count), chunk_count(1, count), executor)
    yield from (block.data for block in blocks)


@dataclass(frozen=True)
class _CodedBlock:
    """So many values, each plane its coding and its payload."""

    dtype: str
    values: int
    planes: tuple[tuple[Coding, bytes], ...]


def _coded_blocks(stored: Stored, dtype: str, count: int) -> Iterator[_CodedBlock]:
    at = 0
    for span in spans(count, BLOCK_VALUES):
        values, planes = span.stop - span.start, []
        for _ in range(PLANE_DTYPES[dtype].n_bytes):
            coding, payload, at = _parse_plane(stored, at, values)
            planes.append((coding, payload))
        yield _CodedBlock(dtype, values, tuple(planes))
    if at != stored.size:
        raise ValueError(f"the payload goes on for {stored.size - at} bytes behind its last block")


def _parse_plane(stored: Stored, at: int, values: int) -> tuple[Coding, bytes, int]:
    """The coding and the payload of the plane at a place, and where it ends."""
    head = stored.read(at, min(stored.size, at + 1 + LONGEST_VARINT))
    if not len(head) or head[0] >= len(_CODINGS):
        raise ValueError("a plane is missing, or of an unknown coding")
    size, start = parse_varint(head, 1)
    start += at
    if size > min(values, stored.size - start):
        raise ValueError(f"a plane of {values} values declares {size} bytes")
    return _CODINGS[head[0]], bytes(stored.read(start, start + size)), start + size


def _decode_block(block: _CodedBlock) -> Bytes:
    """The bytes of its values."""
    least = least_bytes(block.values)
    planes = [decode_payload(payload, coding, 8, 1, block.values, least=least) for coding, payload in block.planes]
    return join_planes([plane.reshape(-1) for plane in planes], block.dtype)
