"""Lattices: unbounded codes to reals, and the trellis that some of them drive.

The trellis (Marcellin and Fischer 1990; union quantizers as in JPEG 2000, part 2) has a step of its own, half the
stored one. In even states a code k stands for 2k half-steps, in odd states for 2k - sgn(k); both hold zero. The parity
of k moves a feedback shift register of three bits s0 s1 s2 whose parity check is (1 + D + D**3, D**2), Ungerboeck's
code of eight states: s0' = s0 + s1, s1' = s2 + k, s2' = s0, modulo 2. s0, the lowest bit, is what makes a state odd.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.types import Lattice, Shape

STATES = 8

NEXT_STATE: NDArray[np.uint8] = np.array(
    [[(s & 1 ^ s >> 1 & 1) | (s >> 2 ^ parity) << 1 | (s & 1) << 2 for parity in (0, 1)] for s in range(STATES)],
    np.uint8,
)
"""uint8 [state, parity of the code] -> the state of the next column."""

FACTORS: NDArray[np.float32] = np.array(
    [float.fromhex(text) for text in (
        "0x1.000000p0", "0x1.172b84p0", "0x1.306fe0p0", "0x1.4bfdaep0",
        "0x1.6a09e6p0", "0x1.8ace54p0", "0x1.ae89fap0", "0x1.d5818ep0",
    )],
    np.float32,
)  # fmt: skip
"""float32 [8]: 2**(i / 8) to the nearest; a factor 2**(e / 8) is FACTORS[e % 8] * 2**(e // 8)."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def trellis_states(codes: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The state in which each code was chosen, uint8 [rows, columns]; every row starts in state 0.

    codes  int32 [rows, columns]
    """
    # The register over GF(2), column by column: memory runs along the columns.
    parities = np.ascontiguousarray((codes & 1).astype(np.uint8).T)
    states = np.empty_like(parities)
    state = np.zeros(codes.shape[0], np.uint8)
    following = NEXT_STATE.reshape(-1)
    for column, parity in enumerate(parities):
        states[column] = state
        state = following.take(state << 1 | parity, mode="clip")
    return states.T


def trellis_values(codes: Tensor) -> Tensor:
    """The half-steps that the codes of a trellis stand for, int64 [rows, columns].

    codes  int32 [rows, columns]; every row starts in state 0
    """
    odd = torch.from_numpy(np.ascontiguousarray(trellis_states(codes.cpu().numpy()) & 1)).to(codes.device)
    return codes.long() * 2 - codes.sign().long() * odd


def step_factors(encoded: Lattice) -> Tensor:
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


def steps(encoded: Lattice) -> Tensor:
    """The step of every code, float32 [rows or 1, columns or 1]: finite, and equal on every machine.

    Rounded once, from the exact product of step, factor and power of two.
    """
    eighths = step_factors(encoded)
    low, high = (int(end) for end in torch.aminmax(eighths)) if eighths.numel() else (0, 0)
    # 11 bits times 24 times a power of two: exact in float64.
    every = np.arange(low, high + 1)
    exact = np.ldexp(float(encoded.step) * FACTORS.astype(np.float64)[every % 8], every // 8 + encoded.exponent)
    found = torch.from_numpy(np.minimum(exact, _FLOAT32_MAX).astype(np.float32))
    return found.to(eighths.device)[eighths - low]


def decode_lattice_rows(encoded: Lattice) -> Tensor:
    """The weight as float32 [rows, columns]: code * step, or half-steps * (step / 2); one more rounding."""
    if encoded.trellis:
        return trellis_values(encoded.codes).float() * (steps(encoded) * 0.5)
    return encoded.codes.float() * steps(encoded)


def take_lattice_rows(encoded: Lattice, start: int, stop: int) -> Lattice:
    """The rows [start, stop) as a weight of two dimensions; views, no copies."""
    codes = encoded.codes[start:stop]
    rows = None if encoded.rows is None else encoded.rows[start:stop]
    return replace(encoded, codes=codes, shape=tuple(codes.shape), axis=(0,), rows=rows)


def tap_count(shape: Shape, axis: tuple[int, ...]) -> int:
    """Columns of one input channel: the sizes behind the first one that is no channel axis; 1 of a plain matrix."""
    if len(shape) < 2:
        return 1
    rest = [size for index, size in enumerate(shape) if index not in axis]
    return math.prod(rest[1:])
