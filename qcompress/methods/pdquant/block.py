"""One block learns here: its layers with their grids and roundings, its activation steps, and its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from qcompress.calibration.activations import INPUT_BITS, grids_of_inputs
from qcompress.coding.grids import Exponent
from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.errors import ModelError
from qcompress.methods.pdquant.inputs import Inputs, make_inputs
from qcompress.methods.pdquant.prediction import Prediction, Rest, make_prediction
from qcompress.model.graph import inputs_of_network
from qcompress.model.layers import blank_gram, matrix_layer, measure_gram
from qcompress.model.live import LiveModel, find_tensor, layer_name
from qcompress.model.runs import run_through
from qcompress.model.stages import Stage, State, stage_output
from qcompress.model.sweep import paired_inputs
from qcompress.registry import PdquantConfig
from qcompress.solvers.grids import Grid
from qcompress.solvers.hessian import choose_grid, encoded_rows, grid_exponent, least_squares_target, row_levels
from qcompress.solvers.rounding import SoftRounding, beta_at, make_neighbours, round_by_gram
from qcompress.types.encoded import ActivationGrid, Encoded, Fitted, for_tensor
from qcompress.types.plan import Decision, row_shape
from qcompress.types.run import Gram
from qcompress.types.settings import ActivationSettings

EVALUATED_SAMPLES = 256


class Step(nn.Module):
    """The quantizer.

    keep       probability that a value passes as it is
    generator  of the coins for that
    """

    def __init__(self, grid: ActivationGrid, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(grid.scale, device=device))
        self.zero_point, self.bits = grid.zero_point, grid.bits
        self.keep = 0.0
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        most = 2**self.bits - 1
        steps = x / self.scale
        rounded = steps + (steps.round() - steps).detach()
        quantized = ((rounded + self.zero_point).clamp(0, most) - self.zero_point) * self.scale
        if not self.keep:
            return quantized
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) < self.keep
        return torch.where(kept, x, quantized)

    def hook(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])

    def grid(self) -> ActivationGrid:
        return ActivationGrid(self.bits, float(self.scale.detach().abs().clamp_min(2.0**-100)), self.zero_point)


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

    decision: Decision[PdquantConfig]
    module: nn.Module
    grid: Grid
    exponent: Exponent
    rounding: SoftRounding
    start: Tensor
    nearest: Tensor

    def encode(self, codes: Tensor) -> Encoded:
        return for_tensor(encoded_rows(codes, self.grid, self.decision.config, self.exponent), self.decision)

    def weight(self, codes: Tensor) -> Tensor:
        return weight_from_rows(self.rounding.neighbours.values(codes), self.rounding.shape, self.rounding.axis)


def make_layer(
    decision: Decision[PdquantConfig], weight: Tensor, module: nn.Module, gram: Gram, generator: torch.Generator
) -> Layer:
    """The layer before it learns.

    weight  as it is in full precision
    gram    of the layer's inputs
    """
    config = decision.config
    rows = rows_from_weight(weight, decision.axis).flatten(1).contiguous()
    exponent = grid_exponent(rows, config)
    grid = choose_grid(rows, config, config.range or "minmax", exponent, gram.hessian, generator)
    scale, low = row_levels(grid, config, exponent, rows)
    aim = rows
    if config.preset != "paper" and gram.cross is not None:
        aim = least_squares_target(rows, gram.hessian, gram.cross, HOLD)
    neighbours = make_neighbours(aim, scale, low, config.bits)
    nearest = torch.where(neighbours.rest > 0.5, neighbours.ceiling, neighbours.floor)
    start = nearest
    if config.preset != "paper":
        start = round_by_gram(aim, neighbours, gram.hessian, None, **GRAM_START)
        towards = (start > neighbours.floor).to(rows.dtype)
        neighbours.rest.lerp_(towards, START_TRUST)
    rounding = SoftRounding(neighbours, tuple(weight.shape), decision.axis)
    return Layer(decision, module, grid, exponent, rounding, start, nearest)


def _unreached_gram(live: LiveModel, decision: Decision[PdquantConfig], groups: int) -> Gram:
    """The Gram of a layer that no calibration sample reaches."""
    live.unreached.add(decision.tensor.name)
    shape = row_shape(decision.tensor.shape, decision.axis)
    return blank_gram(groups, math.prod(shape[1:]), live.device)


def round_unreached(live: LiveModel, decision: Decision[PdquantConfig]) -> Encoded:
    """The codes of a layer that no calibration sample reaches."""
    name = decision.tensor.name
    product = matrix_layer(live.quantized.get_submodule(layer_name(name)))
    gram = _unreached_gram(live, decision, 1 if product is None else product.groups)
    generator = live.generator(name)
    layer = make_layer(decision, find_tensor(live.module, name), live.quantized, gram, generator)
    return layer.encode(layer.nearest)


@dataclass(frozen=True)
class Loss:
    """The loss of one block.

    module      the network that is quantized
    targets     the block's outputs in full precision from corrected inputs, of every sample
    channels    the axis of its channels
    prediction  None where only the outputs matter
    """

    stage: Stage
    module: nn.Module
    config: PdquantConfig
    inputs: Inputs
    targets: Tensor
    channels: int
    prediction: Prediction | None

    def energy(self) -> float:
        """What the squared error would be if the block gave nothing."""
        return float(self.targets.double().square().sum()) / self._positions(self.targets)

    def of(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Reconstruction from mixed inputs and prediction difference from noisy ones, for some samples."""
        noisy = self.inputs.noisy_of(chosen)
        state = self.stage.run(self.module, noisy)
        mixed = state
        if self.config.drop:
            mixed = self.stage.run(self.module, self.inputs.mixed(noisy, chosen, self.config.drop, generator))
        error = self._error(stage_output(self.stage, mixed), chosen)
        return error if self.prediction is None else error + self.prediction.loss(chosen, state)

    def whole(self) -> float:
        """The exact loss on inputs of the quantized network, over all samples or the first so many."""
        total, count = 0.0, min(self.inputs.samples, EVALUATED_SAMPLES)
        size = self.config.batch_size
        for start in range(0, count, size):
            chosen = torch.arange(start, min(start + size, count), device=self.targets.device)
            state = self.stage.run(self.module, self.inputs.noisy_of(chosen))
            error = float(self._error(stage_output(self.stage, state), chosen))
            if self.prediction is not None:
                error += self.prediction.exact(chosen, state)
            total += error * len(chosen)
        return total / count

    def _error(self, found: Tensor, chosen: Tensor) -> Tensor:
        return (found - self.targets[chosen]).square().sum() / self._positions(found)

    def _positions(self, y: Tensor) -> int:
        """What the squared error is averaged over: samples and places, channels being summed."""
        return y.numel() // y.shape[self.channels]


@dataclass
class Block:
    """A block, the states that run into it, and what is learned in it.

    stages        the block and those after it
    decisions     layer name -> what is asked for
    clean, noisy  states of every calibration batch before the block, in full precision and from the quantized network
    """

    live: LiveModel
    stages: Sequence[Stage]
    decisions: dict[str, Decision[PdquantConfig]]
    clean: Sequence[State]
    noisy: Sequence[State]
    layers: dict[str, Layer] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stage = self.stages[0]
        self.config: PdquantConfig = next(iter(self.decisions.values())).config
        self.generator = self.live.generator(self.stage.name)

    def fit(self) -> Fitted:
        """Learn; `live.quantized` is left with neither parametrizations nor this block's quantizers."""
        with torch.no_grad():
            loss = self.prepare()
        for layer in self.layers.values():
            parametrize.register_parametrization(layer.module, "weight", layer.rounding, unsafe=True)
        try:
            with torch.enable_grad():
                self.trainer(loss)
        finally:
            for layer in self.layers.values():
                parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=False)
        with torch.no_grad():
            codes = self.best_codes(loss)
        for handle in self.handles:
            handle.remove()
        encoded = {layer.decision.tensor.name: layer.encode(codes[name]) for name, layer in self.layers.items()}
        return Fitted(encoded, activations={name: step.grid() for name, step in self.steps.items()})

    def prepare(self) -> Loss:
        """What is to be lowered. Layers begin with the codes of their start, and inputs with their quantizers."""
        inputs = make_inputs(self.live, self.stage, self.config, self.clean, self.noisy)
        self._prepare_layers()
        self._prepare_steps()
        return self._make_loss(inputs)

    def _prepare_layers(self) -> None:
        """Each layer's grid and start, one after another, each from what those before it now give."""
        for name, decision in self.decisions.items():
            module = self.live.quantized.get_submodule(name)
            product = matrix_layer(module)
            if product is None:
                what = f"{type(module).__name__} is no matrix product that calibrated methods know"
                raise ModelError(f"layer {name}", what, "give it a rule of its own with squant, mse or rtn")
            clean, noisy = paired_inputs(self.live, self.stage, name, self.clean, self.noisy)
            if noisy:
                gram = measure_gram(product, noisy, None if clean is noisy else clean, self.generator)
            else:
                gram = _unreached_gram(self.live, decision, product.groups)
            weight = find_tensor(self.live.module, decision.tensor.name)
            layer = make_layer(decision, weight, module, gram, self.generator)
            self.layers[name] = layer
            self.live.put({decision.tensor.name: layer.encode(layer.start)})

    def _prepare_steps(self) -> None:
        settings = self.live.activations
        if settings is None:
            return
        inputs = inputs_of_network(self.live)
        bits = {name: INPUT_BITS if name in inputs else settings.bits for name in self.decisions}
        if settings.range not in (None, "minmax", "mse", "percentile"):
            settings = ActivationSettings(bits=settings.bits)

        def run() -> None:
            run_through(self.stage, self.live.quantized, self.noisy)

        for name, grid in grids_of_inputs(self.live.quantized, run, settings, bits).items():
            step = Step(grid, self.live.device)
            self.steps[name] = step
            self.handles.append(self.live.quantized.get_submodule(name).register_forward_pre_hook(step.hook))

    def _make_loss(self, inputs: Inputs) -> Loss:
        targets = stage_output(self.stage, self.stage.run(self.live.module, inputs.corrected))
        prediction = make_prediction(
            Rest(self.live.module, self.stages), self.config, inputs, self.clean, self.generator
        )
        kinds = {type(layer.module).__name__ for layer in self.layers.values()}
        convolves = any(kind.startswith("Conv") and kind != "Conv1D" for kind in kinds)
        channels = 1 if targets.ndim in (3, 4, 5) and convolves else -1
        return Loss(self.stage, self.live.quantized, self.config, inputs, targets, channels, prediction)

    def trainer(self, loss: Loss) -> None:
        """Lower it by the roundings, which stand in the place of the weights, and by the steps."""
        config, samples = self.config, loss.inputs.samples
        # As published, or as a share of the energy.
        unit = 1.0 if config.preset == "paper" else max(loss.energy(), 1e-30)
        roundings = [layer.rounding for layer in self.layers.values()]
        optimizer = torch.optim.Adam([one.v for one in roundings], lr=config.learning_rate or 1e-2)
        scales = [step.scale for step in self.steps.values()]
        pace = torch.optim.Adam(scales, lr=config.activation_rate) if scales else None
        iterations = config.iterations or 1
        cosine = None if pace is None else torch.optim.lr_scheduler.CosineAnnealingLR(pace, iterations)
        for step in self.steps.values():
            step.keep, step.generator = config.drop or 0.0, self.generator
        for iteration in range(iterations):
            chosen = torch.randint(
                samples, (min(config.batch_size, samples),), generator=self.generator, device=self.live.device
            )
            total = loss.of(chosen, self.generator) / unit
            beta = beta_at(iteration / iterations, config.warm_up, "linear")
            if beta is not None:
                total = total + sum(self._pull(one, beta) for one in roundings)
            optimizer.zero_grad()
            if pace is not None:
                pace.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if pace is not None and cosine is not None:
                pace.step()
                cosine.step()
        for step in self.steps.values():
            step.keep = 0.0

    def _pull(self, rounding: SoftRounding, beta: float) -> Tensor:
        """The rounding penalty: the sum, as published, or the mean against an error that is a share of the energy."""
        strength = self.config.strength or 0.0
        penalty = rounding.penalty(beta)
        return strength * penalty if self.config.preset == "paper" else 20 * strength * penalty / rounding.v.numel()

    def best_codes(self, loss: Loss) -> dict[str, Tensor]:
        """Of the learned, the starting and the nearest codes those of least loss on the calibration data."""
        learned = {name: layer.rounding.codes() for name, layer in self.layers.items()}
        starting = {name: layer.start for name, layer in self.layers.items()}
        nearest = {name: layer.nearest for name, layer in self.layers.items()}
        best, least = learned, math.inf
        for codes in (learned, starting, nearest):
            for name, layer in self.layers.items():
                find_tensor(self.live.quantized, f"{name}.weight").copy_(layer.weight(codes[name]))
            found = loss.whole()
            if found < least:
                best, least = codes, found
        return best
