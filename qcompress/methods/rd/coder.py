"""The layers of a live model are coded one after another, each for the inputs that those before it now give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.calibration.corrections import match_outputs
from qcompress.coding.rows import weight_from_rows
from qcompress.coding.unbounded.lengths import class_costs
from qcompress.methods.rd.layers import Layer
from qcompress.methods.rd.responses import Response
from qcompress.model.layers import MatrixLayer
from qcompress.model.live import LiveModel
from qcompress.model.sweep import LayerStep, measure_skip, sweep
from qcompress.registry import RdConfig
from qcompress.solvers.hessian import least_squares_target
from qcompress.solvers.trellis import trellis_codes
from qcompress.solvers.unbounded import BitCosts, descend_unbounded, feedback_unbounded, grid_steps, with_codes
from qcompress.types.encoded import Fitted, Kept, Unbounded

HOLD = 0.01
"""How firmly the least squares target is held at the weights, as a share of the Hessian's mean diagonal."""
PRICED_CODES = 64
CODED_AT_ONCE = 1 << 20
"""Weights of a table that is looked up: each is coded for itself."""


@dataclass(frozen=True)
class Prices:
    """What the codes of one weight cost.

    classes  uint8 [rows, columns]
    bits     float32 [contexts, 2 * PRICED_CODES + 1], see BitCosts
    """

    classes: Tensor
    bits: Tensor

    def costs(self, lam: float, device: torch.device) -> BitCosts:
        return BitCosts(self.classes.long().to(device), self.bits.to(device), lam)


def make_prices(before: Mapping[str, Unbounded], config: RdConfig) -> dict[str, Prices]:
    """What codes cost under the tables of codes like those that they will be; nothing where bits have no price."""
    if config.lam == 0:
        return {}
    return dict(zip(before, (Prices(*one) for one in class_costs([*before.values()], PRICED_CODES)), strict=True))


@dataclass(frozen=True)
class Coded:
    """What became of the layers.

    unbounded  their codes
    targets    the weights that codes round in place of the checkpoint's, in their shapes
    adjusted   norms and biases that were matched to what the full-precision network gives
    """

    unbounded: Mapping[str, Unbounded]
    targets: Mapping[str, Tensor]
    adjusted: Mapping[str, Tensor]

    def fitted(self) -> Fitted:
        adjusted = {name: Kept(value) for name, value in self.adjusted.items()}
        return Fitted({**self.unbounded, **adjusted}, references=self.targets)


def code_layers(
    live: LiveModel,
    layers: Mapping[str, Layer],
    grids: Mapping[str, Unbounded],
    prices: Mapping[str, Prices],
    config: RdConfig,
) -> Coded:
    """One sweep over layers with their final grids; `live.quantized` ends with all of it in place."""
    coded: dict[str, Unbounded] = {}
    adjusted: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.is_lookup:
            coded[name] = _code_each(layer.rows, grids[name], prices.get(name), config.lam)
            live.put({name: coded[name]})
    for step in sweep(live, [name for name, layer in layers.items() if not layer.is_lookup]):
        name, layer = step.tensor, layers[step.tensor]
        bit_costs = prices[name].costs(config.lam, live.device) if name in prices else None
        coded[name], target = _code(live, layer, grids[name], step, bit_costs)
        if target is not None:
            targets[name] = weight_from_rows(target.cpu(), layer.shape, layer.axis)
        live.put({name: coded[name]})
        if config.match and isinstance(step.layer, MatrixLayer) and step.is_reached:
            adjusted |= match_outputs(live, step)
    return Coded(coded, targets, adjusted)


def _code(
    live: LiveModel, layer: Layer, grid: Unbounded, step: LayerStep, bit_costs: BitCosts | None
) -> tuple[Unbounded, Tensor | None]:
    """The codes, and what they round where it is not the weight, float32 [rows, columns]."""
    gram = step.gram()
    target = layer.rows
    if gram.cross is not None:
        skip = measure_skip(live, step)
        target = least_squares_target(layer.rows, gram.hessian, gram.cross, HOLD, skip)
    target = _without_dead(target, layer.response, gram.hessian)
    steps, config = grid_steps(grid, target.device), layer.config
    if config.trellis:
        codes = trellis_codes(target, steps, gram.hessian, bit_costs, damping=config.damping)
    else:
        codes = feedback_unbounded(target, steps, gram.hessian, bit_costs, damping=config.damping)
        if config.sweeps:
            codes = descend_unbounded(codes, target, steps, gram.hessian, bit_costs, sweeps=config.sweeps)
    return with_codes(grid, codes), None if gram.cross is None else target


def _code_each(rows: Tensor, grid: Unbounded, prices: Prices | None, lam: float) -> Unbounded:
    """Every weight for itself: the codes of a table that is looked up."""
    alone = torch.ones(1, 1, 1, dtype=torch.float64, device=rows.device)
    steps = grid_steps(grid, rows.device).expand(rows.shape)
    few = max(1, CODED_AT_ONCE // max(1, rows.shape[1]))
    codes = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
    for start in range(0, len(rows), few):
        here, own = slice(start, start + few), None
        if prices is not None:
            own = Prices(prices.classes[here].reshape(-1, 1), prices.bits).costs(lam, rows.device)
        target = rows[here].reshape(-1, 1)
        codes[here] = feedback_unbounded(target, steps[here].reshape(-1, 1), alone, own).reshape(rows[here].shape)
    return with_codes(grid, codes)


def _without_dead(target: Tensor, response: Response, hessian: Tensor) -> Tensor:
    """The target without what never matters: inputs that stay at zero, outputs that hardly reach the batch norm."""
    normed = response.power * response.gains.square()
    outputs = normed <= 1e-9 * normed.mean()
    energies = hessian.diagonal(dim1=1, dim2=2)
    inputs = (energies <= 1e-12 * energies.amax()).repeat_interleave(len(target) // len(hessian), 0)
    return torch.where(outputs.to(target.device).unsqueeze(1) | inputs, torch.zeros_like(target), target)
