"""Lattices: unbounded codes to reals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.coding.side import Grid
from qcompress.coding.trellis import trellis_states
from qcompress.encoded import Lattice
from qcompress.types import Shape

FACTORS: NDArray[np.float32] = np.array(
    [float.fromhex(text) for text in (
        "0x1.000000p0", "0x1.172b84p0", "0x1.306fe0p0", "0x1.4bfdaep0",
        "0x1.6a09e6p0", "0x1.8ace54p0", "0x1.ae89fap0", "0x1.d5818ep0",
    )],
    np.float32,
)  # fmt: skip
"""float32 [8]: 2**(i / 8) to the nearest; a factor 2**(e / 8) is FACTORS[e % 8] * 2**(e // 8)."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def trellis_values(codes: Tensor) -> Tensor:
    """The half-steps that the codes of a trellis stand for, int64 [rows, columns].

    codes  int32 [rows, columns]; every row starts in state 0
    """
    odd = torch.from_numpy(np.ascontiguousarray(trellis_states(codes.cpu().numpy()) & 1)).to(codes.device)
    return codes.long() * 2 - codes.sign().long() * odd


def step_value(encoded: Lattice) -> float:
    """The step of a code whose row and column have no factor."""
    return float(encoded.step) * 2.0**encoded.exponent


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


def lattice_of_grid(codes: NDArray[np.int32], grid: Grid, shape: Shape, axis: tuple[int, ...], dtype: str) -> Lattice:
    """The lattice of codes [rows, columns] and of the grid that side information has given."""
    rows, channels, taps = (
        None if part is None else torch.from_numpy(part.astype(np.int8))
        for part in (grid.rows, grid.channels, grid.taps)
    )
    return Lattice(
        codes=torch.from_numpy(codes),
        step=torch.from_numpy(np.array(grid.step, np.uint16).view(np.float16)),
        exponent=grid.exponent,
        shape=shape,
        rows=rows,
        channels=channels,
        taps=taps,
        trellis=grid.trellis,
        axis=axis,
        dtype=dtype,
    )
