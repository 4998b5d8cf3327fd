"""A layer to be coded, and the grid that an allocation of one rate gives it among all the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.coding.rows import rows_from_weight
from qcompress.methods.rd.responses import Response, is_lookup
from qcompress.model.live import LiveModel
from qcompress.registry import RdConfig
from qcompress.solvers.unbounded import column_factors, eighths, grid_steps, unbounded_grid, with_codes, with_step
from qcompress.types.config import Shape
from qcompress.types.encoded import Unbounded
from qcompress.types.plan import Decision, row_shape

FINEST_STEP = 2.0**-18
"""Of the largest weight: where few weights matter a budget would be spent on them without end."""
LEAST_COLUMN_RATE = 1.2
"""Bits a weight under which columns of one tensor share a step: theirs is a high-rate argument."""


@dataclass(frozen=True)
class Layer:
    """One weight and its response.

    shape, axis, dtype  of the weight
    size       its rows and columns
    rows       float32 [rows, columns]: all of them, or some of many
    deviation  the root of the weights' mean square
    largest    magnitude of a weight
    is_lookup  whether its rows are looked up by number
    """

    shape: Shape
    axis: tuple[int, ...]
    dtype: str
    config: RdConfig
    size: tuple[int, int]
    rows: Tensor
    deviation: float
    largest: float
    response: Response
    is_lookup: bool

    @property
    def weights(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def taps(self) -> int:
        """Columns of one input channel."""
        return math.prod(row_shape(self.shape, self.axis)[2:])


def make_layer(live: LiveModel, decision: Decision[RdConfig], response: Response) -> Layer:
    """The layer of a live model's weight, with all of its rows."""
    tensor = decision.tensor
    rows = rows_from_weight(live.weight(tensor.name), decision.axis).flatten(1).contiguous()
    return Layer(
        shape=tensor.shape,
        axis=decision.axis,
        dtype=tensor.dtype,
        config=decision.config,
        size=(rows.shape[0], rows.shape[1]),
        rows=rows,
        deviation=float(rows.square().mean().sqrt()),
        largest=float(rows.abs().max()),
        response=response,
        is_lookup=is_lookup(live, tensor.name),
    )


def make_grids(layers: Mapping[str, Layer], kind: str, rate: float) -> dict[str, Unbounded]:
    """Every layer's grid, whose steps wait for one common factor.

    Nothing was measured of what no sample reaches: there steps are to weights as they are elsewhere, in the median.

    kind  of allocation: `measured` or `relative`, see RdConfig
    """
    grids = {name: _grid(layer, kind, rate) for name, layer in layers.items()}
    reached = [name for name, layer in layers.items() if layer.response.reached and layer.deviation > 0]
    if len(reached) < len(grids):
        shares = [float(grids[name].step) * 2.0 ** grids[name].exponent / layers[name].deviation for name in reached]
        share = statistics.median(shares) if shares else 1.0
        for name, layer in layers.items():
            if not layer.response.reached:
                grids[name] = with_step(grids[name], share * layer.deviation or 1.0)
    return grids


def _grid(layer: Layer, kind: str, rate: float) -> Unbounded:
    response = layer.response
    normed = kind == "relative"
    uneven = (normed or layer.is_lookup) and bool((response.gains != response.gains[0]).any())
    rows = eighths(1 / response.gains) if uneven else None
    columns = None
    if layer.config.columns is not False and rate > LEAST_COLUMN_RATE and not layer.is_lookup:
        columns = column_factors(response.energies, layer.taps, layer.size[0])
    grid = unbounded_grid(layer.shape, layer.axis, layer.dtype, rows=rows, columns=columns, size=layer.size)
    grid = replace(grid, trellis=layer.config.trellis and not layer.is_lookup)
    weights = response.gains.square() if normed else torch.ones_like(response.gains)
    harm = _harm(grid_steps(grid, weights.device).double(), weights, response.energies)
    power = float((weights * response.power).sum())
    if normed:
        # In proportion to the inputs of an output: measured better than the same for all, or than by weights.
        step = (layer.size[1] * power / harm) ** 0.5 or 1.0
    else:
        step = (layer.weights / (max(response.slope, 1e-30) * harm)) ** 0.5
    return with_step(grid, step)


def _harm(steps: Tensor, weights: Tensor, energies: Tensor) -> float:
    """sum over rows and columns of weight * step**2 * energy, where steps are factors of rows times those of columns.

    steps     float64 [rows or 1, columns or 1]
    weights   float64 [rows]
    energies  float64 [groups, columns]
    """
    squares = steps.square()
    by_row = (weights * (squares[:, 0] / squares[0, 0])).reshape(len(energies), -1).sum(1)
    by_column = (squares[:1] * energies).sum(1)
    return float((by_row * by_column).sum())


def scaled(grid: Unbounded, scale: float, layer: Layer) -> Unbounded:
    """The grid with its step times a factor."""
    return with_step(grid, max(float(grid.step) * 2.0**grid.exponent * scale, FINEST_STEP * layer.largest))


def rounded(grid: Unbounded, scale: float, layer: Layer) -> Unbounded:
    """The layer's rows rounded to nearest on the scaled grid: nearly the rate of its codes by feedback, at once."""
    grid = scaled(grid, scale, layer)
    return with_codes(grid, layer.rows / grid_steps(grid, layer.rows.device))
