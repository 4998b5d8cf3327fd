"""A session measures a live model's responses once, and codes its weights at as many rates as a budget tries."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qcompress.calibration.corrections import match_outputs
from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.coding.unbounded.lengths import class_costs, coded_bits
from qcompress.methods.rd.responses import Response, is_lookup, measure_responses
from qcompress.model.layers import MatrixLayer
from qcompress.model.live import LiveModel, find_tensor, put_tensors
from qcompress.model.runs import run_stage
from qcompress.model.stages import last_output
from qcompress.model.sweep import LayerStep, measure_skip, sweep
from qcompress.registry import RdConfig
from qcompress.solvers.hessian import least_squares_target
from qcompress.solvers.trellis import trellis_codes
from qcompress.solvers.unbounded import (
    BitCosts,
    bisect_rate,
    column_factors,
    descend_unbounded,
    eighths,
    feedback_unbounded,
    grid_steps,
    unbounded_grid,
    with_codes,
    with_step,
)
from qcompress.types.encoded import Fitted, Kept, Unbounded
from qcompress.types.plan import Decision

HOLD = 0.01
"""How firmly the least squares target is held at the weights, as a share of the Hessian's mean diagonal."""
PRICED_CODES = 64
DIVERGENCE_SAMPLES = 512
FINEST_STEP = 2.0**-18
"""Of the largest weight: where few weights matter a budget would be spent on them without end."""
LEAST_COLUMN_RATE = 1.2
"""Bits a weight under which columns of one tensor share a step: theirs is a high-rate argument."""
LOG_SCALES = (-14.0, 6.0)
"""Logarithms of factors on all steps between which one is searched for a rate."""
ALIKE = 2.0
"""By how much rates differ at most for one pass to take its prices from the codes of another."""


@dataclass(frozen=True)
class _Layer:
    """One weight, its response, and its grids of unit step under either kind of allocation."""

    decision: Decision[RdConfig]
    rows: Tensor
    response: Response
    taps: int
    is_lookup: bool

    @property
    def config(self) -> RdConfig:
        return self.decision.config


@dataclass(frozen=True)
class _Pass:
    """What one sweep made of a rate.

    rate        bits a weight that it was asked for
    targets     the weights that codes round in place of the checkpoint's, in their shapes
    bits        of all codes with their side information
    divergence  the mean Kullback-Leibler divergence of the network's outputs, in nats
    """

    rate: float
    unbounded_tensors: Mapping[str, Unbounded]
    targets: Mapping[str, Tensor]
    adjusted: Mapping[str, Tensor]
    bits: float
    divergence: float


class Session:
    """A live model whose weights can be coded at any rate, each time in a copy of it that is as it was.

    Steps come from an allocation: of equal slope with measured sensitivities, or of an error relative to each layer's
    normed output that grows with its inputs. The better one is told by what it makes of the calibration data at the
    first rate, and stays.
    """

    def __init__(self, live: LiveModel, decisions: Sequence[Decision[RdConfig]]) -> None:
        self.live = live
        named = {decision.tensor.name: decision for decision in decisions}
        self.config = decisions[0].config
        responses = measure_responses(live, named, damping=self.config.damping)
        self.layers = {name: self._layer(name, named[name], response) for name, response in responses.items()}
        self._start = {name: value.detach().clone() for name, value in live.quantized.state_dict().items()}
        self._samples = live.calibration[: max(1, DIVERGENCE_SAMPLES // live.calibration[0].size)]
        self._wanted = _log_probabilities(live, live.module, self._samples)
        self.kind: str | None = self.config.allocation or ("relative" if self.config.effort == "fast" else None)
        self._last: _Pass | None = None

    def _layer(self, name: str, decision: Decision[RdConfig], response: Response) -> _Layer:
        weight = find_tensor(self.live.module, decision.tensor.name).detach()
        rows = rows_from_weight(weight, decision.axis)
        taps = math.prod(rows.shape[2:])
        return _Layer(decision, rows.flatten(1).contiguous(), response, taps, is_lookup(self.live, name))

    def fit(self, live: LiveModel, rate: float) -> Fitted:
        """Codes on the steps under which rounding takes `rate` bits a weight, side information included.

        live  a copy of the session's model with nothing encoded yet; its `quantized` ends as what is returned
        """
        self.live = live
        if self._last is None or self.kind is None:
            done = self._first(rate)
        else:
            done = self._pass(self.kind, rate, self._last)
        self._last = done
        self._restore()
        put_tensors(self.live.quantized, done.adjusted)
        self.live.put(done.unbounded_tensors)
        adjusted = {name: Kept(value) for name, value in done.adjusted.items()}
        return Fitted({**done.unbounded_tensors, **adjusted}, references=done.targets)

    def _first(self, rate: float) -> _Pass:
        """The pass of the better allocation; with high effort another one, at the prices of its codes."""
        kinds = [self.kind] if self.kind else ["measured", "relative"]
        tried = {kind: self._pass(kind, rate, None) for kind in kinds}
        # Divergence falls about fourfold with each bit a weight.
        self.kind = min(tried, key=lambda kind: tried[kind].divergence * 4.0 ** (tried[kind].bits / self.weights))
        done = tried[self.kind]
        return self._pass(self.kind, rate, done) if self.config.effort == "high" else done

    @property
    def weights(self) -> int:
        """Weights that are coded."""
        return sum(layer.rows.numel() for layer in self.layers.values())

    def _restore(self) -> None:
        self.live.quantized.load_state_dict(self._start)

    def _grids(self, kind: str, rate: float) -> dict[str, Unbounded]:
        """Every layer's grid, whose steps wait for one common factor.

        Nothing was measured of what no sample reaches: there steps are to weights as they are elsewhere, in the median.
        """
        grids = {name: self._grid(layer, kind, rate) for name, layer in self.layers.items()}
        sizes = {name: float(layer.rows.square().mean().sqrt()) for name, layer in self.layers.items()}
        reached = [name for name, layer in self.layers.items() if layer.response.reached and sizes[name] > 0]
        if len(reached) < len(grids):
            shares = [float(grids[name].step) * 2.0 ** grids[name].exponent / sizes[name] for name in reached]
            share = statistics.median(shares) if shares else 1.0
            for name, layer in self.layers.items():
                if not layer.response.reached:
                    grids[name] = with_step(grids[name], share * sizes[name] or 1.0)
        return grids

    def _grid(self, layer: _Layer, kind: str, rate: float) -> Unbounded:
        response, tensor = layer.response, layer.decision.tensor
        normed = kind == "relative"
        uneven = (normed or layer.is_lookup) and bool((response.gains != response.gains[0]).any())
        rows = eighths(1 / response.gains) if uneven else None
        columns = None
        if layer.config.columns is not False and rate > LEAST_COLUMN_RATE and not layer.is_lookup:
            columns = column_factors(response.energies, layer.taps, layer.rows.shape[0])
        grid = unbounded_grid(
            tensor.shape,
            layer.decision.axis,
            tensor.dtype,
            rows=rows,
            columns=columns,
            size=(layer.rows.shape[0], layer.rows.shape[1]),
        )
        grid = replace(grid, trellis=layer.config.trellis and not layer.is_lookup)
        steps = grid_steps(grid, layer.rows.device).double().expand(layer.rows.shape)
        weights = response.gains.square() if normed else torch.ones_like(response.gains)
        energies = response.energies.repeat_interleave(len(weights) // len(response.energies), 0)
        harm = float((weights.unsqueeze(1) * steps.square() * energies).sum())
        power = float((weights * response.power).sum())
        if normed:
            # In proportion to the inputs of an output: measured better than the same for all, or than by weights.
            step = (layer.rows.shape[1] * power / harm) ** 0.5 or 1.0
        else:
            step = (layer.rows.numel() / (max(response.slope, 1e-30) * harm)) ** 0.5
        return with_step(grid, step)

    def _scaled(self, grid: Unbounded, scale: float, layer: _Layer) -> Unbounded:
        finest = FINEST_STEP * float(layer.rows.abs().max())
        return with_step(grid, max(float(grid.step) * 2.0**grid.exponent * scale, finest))

    def _rounded(self, grids: Mapping[str, Unbounded], scale: float) -> dict[str, Unbounded]:
        """Every weight rounded to nearest: nearly the rate of its codes by feedback, at once."""
        found = {}
        for name, grid in grids.items():
            rows = self.layers[name].rows
            grid = self._scaled(grid, scale, self.layers[name])
            found[name] = with_codes(grid, rows / grid_steps(grid, rows.device))
        return found

    def _scale(self, grids: Mapping[str, Unbounded], rate: float) -> float:
        """The factor on all steps under which rounding takes so many bits a weight."""

        def rate_at(log: float) -> float:
            return coded_bits([*self._rounded(grids, math.exp(log)).values()]) / self.weights

        return math.exp(bisect_rate(rate_at, rate, *LOG_SCALES))

    def _pass(self, kind: str, rate: float, before: _Pass | None) -> _Pass:
        """One sweep in which every layer is coded for the inputs that the layers before it now give.

        before  whose codes tell prices, where it was of a like rate; else rounded ones do
        """
        grids = self._grids(kind, rate)
        scale = self._scale(grids, rate)
        alike = before is not None and max(before.rate, rate) <= ALIKE * min(before.rate, rate)
        priced = before.unbounded_tensors if before is not None and alike else self._rounded(grids, scale)
        self._restore()
        bit_costs = self._bit_costs(priced)
        unbounded_tensors: dict[str, Unbounded] = {}
        adjusted: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if layer.is_lookup:
                grid = self._scaled(grids[name], scale, layer)
                unbounded_tensors[name] = _code_each(layer.rows, grid, bit_costs.get(name))
                self.live.put({name: unbounded_tensors[name]})
        products = [name for name, layer in self.layers.items() if not layer.is_lookup]
        for step in sweep(self.live, products):
            layer, grid = self.layers[step.tensor], self._scaled(grids[step.tensor], scale, self.layers[step.tensor])
            unbounded_tensors[step.tensor], target = self._code(layer, grid, step, bit_costs.get(step.tensor))
            if target is not None:
                tensor = layer.decision.tensor
                targets[tensor.name] = weight_from_rows(target.cpu(), tensor.shape, layer.decision.axis)
            self.live.put({step.tensor: unbounded_tensors[step.tensor]})
            if self.config.match and isinstance(step.layer, MatrixLayer) and step.is_reached:
                adjusted |= match_outputs(self.live, step)
        bits = coded_bits([*unbounded_tensors.values()])
        divergence = self._divergence()
        return _Pass(rate, unbounded_tensors, targets, adjusted, bits, divergence)

    def _bit_costs(self, before: Mapping[str, Unbounded]) -> dict[str, BitCosts]:
        if self.config.lam == 0:
            return {}
        ordered = [before[name] for name in self.layers]
        device, lam = self.live.device, self.config.lam
        found = class_costs(ordered, PRICED_CODES)
        return {
            name: BitCosts(classes.long().to(device), bits.to(device), lam)
            for name, (classes, bits) in zip(self.layers, found, strict=True)
        }

    def _code(
        self, layer: _Layer, grid: Unbounded, step: LayerStep, bit_costs: BitCosts | None
    ) -> tuple[Unbounded, Tensor | None]:
        """The codes, and what they round where it is not the weight, float32 [rows, columns]."""
        gram = step.gram()
        target = layer.rows
        if gram.cross is not None:
            skip = measure_skip(self.live, step)
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

    def _divergence(self) -> float:
        found = _log_probabilities(self.live, self.live.quantized, self._samples)
        return float((self._wanted.exp() * (self._wanted - found)).sum(-1).mean())


def _code_each(rows: Tensor, grid: Unbounded, bit_costs: BitCosts | None) -> Unbounded:
    """Every weight for itself: the codes of a table that is looked up."""
    steps = grid_steps(grid, rows.device).expand(rows.shape).reshape(-1, 1)
    alone = torch.ones(1, 1, 1, dtype=torch.float64, device=rows.device)
    own = None if bit_costs is None else BitCosts(bit_costs.classes.reshape(-1, 1), bit_costs.bits, bit_costs.lam)
    return with_codes(grid, feedback_unbounded(rows.reshape(-1, 1), steps, alone, own).reshape(rows.shape))


def _without_dead(target: Tensor, response: Response, hessian: Tensor) -> Tensor:
    """The target without what never matters: inputs that stay at zero, outputs that hardly reach the batch norm."""
    normed = response.power * response.gains.square()
    outputs = normed <= 1e-9 * normed.mean()
    energies = hessian.diagonal(dim1=1, dim2=2)
    inputs = (energies <= 1e-12 * energies.amax()).repeat_interleave(len(target) // len(hessian), 0)
    return torch.where(outputs.to(target.device).unsqueeze(1) | inputs, torch.zeros_like(target), target)


@torch.no_grad()
def _log_probabilities(live: LiveModel, module: nn.Module, batches: Sequence[object]) -> Tensor:
    """The logarithms of the network's output probabilities, [positions, classes]."""
    states = [live.stages[0].begin(batch) for batch in batches]  # type: ignore[arg-type]
    for stage in live.stages:
        states = run_stage(stage, module, states)
    return torch.cat([last_output(state).flatten(0, -2).float() for state in states]).log_softmax(-1)
