"""Tables of values that everybody knows are listed here, and what a code names in them. Imports no torch.

nf4     the sixteen quantiles of a normal distribution of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E)
iq4_nl  the sixteen integers of llama.cpp's IQ4_NL
e2m1    the four-bit numbers of the OCP Microscaling formats (MXFP4): a sign, two bits of exponent, one of mantissa
e4m3    its eight-bit numbers with four bits of exponent: no infinity, and a NaN of either sign
e5m2    those with five bits of exponent: IEEE half precision without the last eight bits of the mantissa
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from qcompress.types.config import TableName

NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GIVEN_BITS: dict[TableName, int] = {"nf4": 4, "iq4_nl": 4, "e2m1": 4, "e4m3": 8, "e5m2": 8}
"""Bits of a code of every given table, which has 2**bits values."""


def given_values(name: TableName) -> NDArray[np.float32]:
    """The values of a given table, float32 [2**bits] in the order of their codes; NaN and Inf where a code has none."""
    match name:
        case "nf4":
            return np.array(NF4, np.float32)
        case "iq4_nl":
            return np.array(IQ4_NL, np.float32)
        case "e2m1":
            return np.array([*E2M1, *(-value for value in E2M1)], np.float32)
        case "e4m3":
            return _small_floats(4, 3, nan=(127, 255))
        case "e5m2":
            return _small_floats(5, 2, nan=(*range(124, 128), *range(252, 256)))
        case _:
            assert_never(name)


def _small_floats(exponent_bits: int, mantissa_bits: int, nan: tuple[int, ...]) -> NDArray[np.float32]:
    """Every float of one byte: a sign, an exponent, a mantissa; a NaN for the codes that are no numbers."""
    codes = np.arange(256)
    mantissa, exponent = codes & (1 << mantissa_bits) - 1, codes >> mantissa_bits & (1 << exponent_bits) - 1
    normal = exponent > 0
    size = np.ldexp(
        mantissa + (normal << mantissa_bits), np.maximum(exponent, 1) - (1 << exponent_bits - 1) + 1 - mantissa_bits
    )
    values: NDArray[np.float32] = np.where(codes < 128, size, -size).astype(np.float32)
    values[list(nan)] = np.nan
    return values
