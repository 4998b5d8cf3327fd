"""The second decoder's part for kept tensors that stand in codes, written from SPEC.md alone, one value at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

EXPONENT = {"BF16": 8, "F16": 5, "F32": 8, "F64": 11}
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
BLOCK = 2**20


def kept_bytes(
    codes: bytes,
    dtype: str,
    shape: list[int],
    varint: Callable[[bytes, int], tuple[int, int]],
    decode: Callable[[bytes, str, int, int, int, int], np.ndarray],
) -> bytes:
    """The bytes of a tensor; `varint` and `decode` read the parts of a plane."""
    count, size = math.prod(shape), BYTES[dtype]
    assert 0 < len(codes) <= count * size
    if len(codes) == count * size:
        return codes
    values, at = [], 0
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        numbers = [0] * n
        for _ in range(size):
            coding = ("packed", "zstd", "ans")[codes[at]]
            length, at = varint(codes, at + 1)
            assert length <= n
            plane = decode(codes[at : at + length], coding, 8, 1, n, n)
            at += length
            numbers = [256 * number + int(byte) for number, byte in zip(numbers, plane[0], strict=True)]
        values += [in_place(number, dtype) for number in numbers]
    assert at == len(codes)
    return b"".join(value.to_bytes(size, "little") for value in values)


def in_place(number: int, dtype: str) -> int:
    """Exponent, sign, mantissa -> sign, exponent, mantissa."""
    bits = f"{number:0{8 * BYTES[dtype]}b}"
    exponent, sign, mantissa = bits[: EXPONENT[dtype]], bits[EXPONENT[dtype]], bits[EXPONENT[dtype] + 1 :]
    return int(sign + exponent + mantissa, 2)
