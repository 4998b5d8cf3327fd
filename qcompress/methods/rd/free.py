"""Rate-distortion without data: what the inputs are is a guess, and the rest is as with data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompress.coding.lengths import class_costs
from qcompress.registry import RdConfig
from qcompress.solvers.flips import flip_lattice
from qcompress.solvers.lattice import Prices, descend_lattice, feedback_lattice
from qcompress.solvers.lattice_grid import grid_steps, lattice_grid, with_codes, with_step
from qcompress.solvers.priors import prior_hessian, split_channels
from qcompress.types import Lattice

PRICED_CODES = 64
ROWS_AT_ONCE = 1 << 22
"""Weights that are coded at a time: rows do not depend on one another."""


def free_step(weight: Tensor, factor: float) -> float:
    """The step of a weight: `factor` times the square root of its deviation.

    Between equal steps for all tensors and steps in proportion to the weights: a tensor of large weights stands in
    front of more of the same, but its errors also weigh more (measured, docs/methods.md).
    """
    flat = weight.float()
    deviation = float(flat.square().mean().sqrt()) if flat.numel() else 0.0
    return factor * deviation**0.5 if deviation > 0 else 1.0


def encode(weight: Tensor, config: RdConfig, exponent: int) -> Lattice:
    """The codes of one weight, float32 [rows, ...], on the grid that `config.step` says.

    exponent  not used: the step has its own
    """
    assert config.step is not None
    rows = weight.flatten(1)
    taps = math.prod(weight.shape[2:])
    empty = lattice_grid(tuple(rows.shape), (0,), "F32", rows=None, columns=None, size=(rows.shape[0], rows.shape[1]))
    grid = with_step(empty, free_step(weight, config.step))
    steps = grid_steps(grid, rows.device)
    shape = tuple(weight.shape)
    if config.prior == "flips" and weight.ndim > 2:
        return with_codes(grid, flip_lattice(rows / steps, rows.shape[1] // taps))
    hessian = prior_hessian((shape[0], shape[1] // split_channels(shape), *shape[2:])) if weight.ndim > 2 else None
    if hessian is None or config.prior == "none":
        hessian = torch.ones(1, 1, dtype=torch.float64)
    nearest = with_codes(grid, rows / steps)
    prices = None
    if config.rate > 0 and rows.numel():
        ((classes, bits),) = class_costs([nearest], PRICED_CODES)
        prices = Prices(classes.long().to(rows.device), bits.to(rows.device), config.rate)
    return with_codes(grid, _codes(rows, steps, hessian.unsqueeze(0).to(rows.device), prices, config))


def _codes(rows: Tensor, steps: Tensor, hessian: Tensor, prices: Prices | None, config: RdConfig) -> Tensor:
    """Codes of rows that are cut into parts of the Hessian's width, each a layer for itself."""
    width = hessian.shape[-1]
    target = rows.reshape(-1, width)
    parts = []
    for start in range(0, len(target), max(1, ROWS_AT_ONCE // width)):
        stop = start + max(1, ROWS_AT_ONCE // width)
        own = (
            None if prices is None else Prices(prices.classes.reshape(-1, width)[start:stop], prices.bits, prices.rate)
        )
        part = feedback_lattice(target[start:stop], steps, hessian, own, damping=config.damping)
        if config.sweeps:
            part = descend_lattice(part, target[start:stop], steps, hessian, own, sweeps=config.sweeps)
        parts.append(part)
    return torch.cat(parts).reshape(rows.shape)
