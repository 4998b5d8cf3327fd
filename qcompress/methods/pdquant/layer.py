"""One layer of a block: its grid, and the rounding that is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.encoded import Encoded
from qcompress.model.layers import Gram
from qcompress.registry import PdquantConfig
from qcompress.solvers.grids import Grid
from qcompress.solvers.hessian import choose_grid, encoded_weight, grid_exponent, least_squares_target, row_levels
from qcompress.solvers.rounding import SoftRounding, make_lattice, round_by_gram
from qcompress.types import Decision

HOLD = 0.01
"""How firmly weights that make up for drift are held at what they were, see solvers.hessian."""
START_TRUST = 0.7
"""How far soft rounding starts from the weight's own place towards the rounding that it starts from."""
GRAM_START: dict[str, Any] = {"iterations": 200, "learning_rate": 3e-2, "strength": 0.1, "warm_up": 0.2}


@dataclass
class Layer:
    """A layer with its grid and its roundings.

    module          of the network that is quantized
    start, nearest  codes [rows, columns]: those that learning starts from, and those of nearest rounding
    """

    decision: Decision
    module: nn.Module
    grid: Grid
    exponent: int
    rounding: SoftRounding
    start: Tensor
    nearest: Tensor

    def encode(self, codes: Tensor) -> Encoded:
        return encoded_weight(codes, self.grid, self.decision.config, self.exponent, self.decision)

    def weight(self, codes: Tensor) -> Tensor:
        return weight_from_rows(self.rounding.lattice.values(codes), self.rounding.shape, self.rounding.axis)


def make_layer(decision: Decision, weight: Tensor, module: nn.Module, gram: Gram, generator: torch.Generator) -> Layer:
    """The layer before it learns.

    weight  as it is in full precision
    gram    of the layer's inputs
    """
    config: PdquantConfig = decision.config
    rows = rows_from_weight(weight, decision.axis).flatten(1).contiguous()
    exponent = grid_exponent(rows)
    grid = choose_grid(rows, config, config.range or "minmax", exponent, gram.hessian, generator)
    scale, low = row_levels(grid, config.bits, exponent, rows)
    aim = rows
    if config.preset != "paper" and gram.cross is not None:
        aim = least_squares_target(rows, gram.hessian, gram.cross, HOLD)
    lattice = make_lattice(aim, scale, low, config.bits)
    nearest = torch.where(lattice.rest > 0.5, lattice.ceiling, lattice.floor)
    start = nearest
    if config.preset != "paper":
        start = round_by_gram(aim, lattice, gram.hessian, None, **GRAM_START)
        towards = (start > lattice.floor).to(rows.dtype)
        lattice.rest.lerp_(towards, START_TRUST)
    rounding = SoftRounding(lattice, tuple(weight.shape), decision.axis)
    return Layer(decision, module, grid, exponent, rounding, start, nearest)
