"""Rate-distortion without data: what the inputs are is a guess, and the rest is as with data."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qcompress.coding.lengths import class_costs
from qcompress.coding.trellis import STATES
from qcompress.encoded import Lattice
from qcompress.registry import RdConfig
from qcompress.solvers.flips import flip_lattice
from qcompress.solvers.lattice import Prices, descend_lattice, feedback_lattice
from qcompress.solvers.lattice_grid import grid_steps, lattice_grid, root_mean_square, with_codes, with_step
from qcompress.solvers.lattice_trellis import trellis_lattice
from qcompress.solvers.priors import prior_hessian, split_channels
from qcompress.types import Shape

PRICED_CODES = 64
ROWS_AT_ONCE = 1 << 22
"""Weights that are coded at a time: rows do not depend on one another."""
FINEST_STEP = 2.0**-26
"""Of the largest weight: float32 knows nothing finer, and codes have 32 bits."""
TRELLIS_PRICE = 0.06
"""Half of what it is with data: nothing makes up for weights that shrink."""
MOST_TRELLIS_COLUMNS = 1 << 12
"""Wider rows take scalar codes: the time and memory of a trellis go with the square of a row."""


def free_step(weight: Tensor, factor: float) -> float:
    """The step of a weight: `factor` times the square root of its deviation.

    Between equal steps for all tensors and steps in proportion to the weights: a tensor of large weights stands in
    front of more of the same, but its errors also weigh more (measured, docs/methods.md).
    """
    deviation = root_mean_square(weight)
    return factor * deviation**0.5 if deviation > 0 else 1.0


def encode(weight: Tensor, config: RdConfig, exponent: int) -> Lattice:
    """The codes of one weight, float32 [rows, ...], on the grid that `config.step` says.

    On a trellis where the effort is high and rows are not too wide for it; else as with normal effort. Steps are no
    finer than FINEST_STEP of the largest weight.

    exponent  not used: the step has its own
    """
    assert config.step is not None
    shape = tuple(weight.shape)
    rows = weight.reshape(shape[0], math.prod(shape[1:]))
    size = (rows.shape[0], rows.shape[1])
    largest = float(rows.abs().max()) if rows.numel() else 0.0
    grid = lattice_grid(shape, (0,), "F32", rows=None, columns=None, size=size)
    grid = with_step(grid, max(free_step(weight, config.step), FINEST_STEP * largest))
    steps = grid_steps(grid, rows.device)
    if not rows.numel():
        return with_codes(grid, rows)
    if config.prior == "flips" and weight.ndim > 2:
        return with_codes(grid, flip_lattice(rows / steps, math.prod(shape[1:2])))
    hessian = _hessian(shape, config).to(rows.device)
    if config.trellis and not _is_trellis(hessian, size[1]):
        config = replace(config, effort="normal")
    if config.trellis and config.price is None:
        config = replace(config, price=TRELLIS_PRICE)
    grid = replace(grid, trellis=config.trellis)
    if config.trellis and hessian.shape[-1] == 1:
        hessian = torch.eye(size[1], dtype=torch.float64, device=rows.device).unsqueeze(0)
    prices = None
    if config.rate > 0:
        ((classes, bits),) = class_costs([with_codes(grid, rows / steps)], PRICED_CODES)
        prices = Prices(classes.long().to(rows.device), bits.to(rows.device), config.rate)
    return with_codes(grid, _codes(rows, steps, hessian, prices, config))


def _hessian(shape: Shape, config: RdConfig) -> Tensor:
    """What the inputs are taken to be, float64 [1, columns, columns]: of a part of the row, or 1 where nothing is."""
    guess = None
    if len(shape) > 2 and config.prior == "correlated":
        guess = prior_hessian((shape[0], shape[1] // split_channels(shape), *shape[2:]))
    return torch.ones(1, 1, 1, dtype=torch.float64) if guess is None else guess.unsqueeze(0)


def _is_trellis(hessian: Tensor, columns: int) -> bool:
    """Whether a path can run along whole rows: it cannot from part to part, and each survivor holds the rest of one."""
    return hessian.shape[-1] in (1, columns) and columns <= MOST_TRELLIS_COLUMNS


def _codes(rows: Tensor, steps: Tensor, hessian: Tensor, prices: Prices | None, config: RdConfig) -> Tensor:
    """Codes of rows that are cut into parts of the Hessian's width, each a layer for itself."""
    width = hessian.shape[-1]
    target = rows.reshape(-1, width)
    count = max(1, ROWS_AT_ONCE // (STATES * width if config.trellis else width))
    parts = []
    for start in range(0, len(target), count):
        stop = start + count
        own = None
        if prices is not None:
            own = Prices(prices.classes.reshape(-1, width)[start:stop], prices.bits, prices.rate)
        if config.trellis:
            part = trellis_lattice(target[start:stop], steps, hessian, own, damping=config.damping)
        else:
            part = feedback_lattice(target[start:stop], steps, hessian, own, damping=config.damping)
            if config.sweeps:
                part = descend_lattice(part, target[start:stop], steps, hessian, own, sweeps=config.sweeps)
        parts.append(part)
    return torch.cat(parts).reshape(rows.shape)
