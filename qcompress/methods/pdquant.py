"""PD-Quant: blocks learn rounding and activation steps together, against the network's prediction.

Liu et al. 2023, arXiv 2212.07048. `preset: paper` follows the official code, with first and last layer at the width
that is asked for. Ours starts from the roundings of least output error of each layer (solvers.rounding) around the
weights that make up for the drift of their inputs, takes the prediction difference in its quadratic form, and keeps of
the learned, the starting and the nearest roundings those with which the block's own loss is least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.errors import ModelError
from qcompress.model.activations import INPUT_BITS, attach_activations, grids_of_inputs
from qcompress.model.block_correction import correct_inputs, norms_in, seen_statistics
from qcompress.model.block_prediction import fitting_probes, prediction_difference, probe, quadratic_difference
from qcompress.model.graph import batch_norm_of, inputs_of_network, make_blocks
from qcompress.model.layers import Gram, matrix_layer, measure_gram
from qcompress.model.live import LiveModel, find_tensor, layer_name
from qcompress.model.stages import (
    Stage,
    State,
    TracedStage,
    WholeStage,
    join_states,
    last_output,
    pick_samples,
    replace_output,
    stage_output,
)
from qcompress.model.sweep import layer_inputs, run_stage
from qcompress.registry import PdquantConfig
from qcompress.settings import ActivationSettings
from qcompress.solvers.grids import Grid
from qcompress.solvers.hessian import choose_grid, encoded_weight, grid_exponent, least_squares_target, row_levels
from qcompress.solvers.rounding import SoftRounding, beta_at, make_lattice, round_by_gram
from qcompress.types import ActivationGrid, Decision, Encoded, Fitted

HOLD = 0.01
"""How firmly weights that make up for drift are held at what they were, see solvers.hessian."""
START_TRUST = 0.7
"""How far soft rounding starts from the weight's own place towards the rounding that it starts from."""
GRAM_START: dict[str, Any] = {"iterations": 200, "learning_rate": 3e-2, "strength": 0.1, "warm_up": 0.2}
EVALUATED_SAMPLES = 256


def fit(live: LiveModel, decisions: Sequence[Decision]) -> Fitted:
    """Codes block by block, each from inputs that the quantized blocks before it give, with activation quantizers.

    raises  ModelError for a network that is neither traced nor cut by named blocks, and for layers that are no matrix
            products
    """
    wanted = {layer_name(decision.tensor.name): decision for decision in decisions}
    stages = _blocks(live)
    encoded: dict[str, Encoded] = {}
    activations: dict[str, ActivationGrid] = {}
    clean = [stages[0].begin(batch) for batch in live.calibration]
    noisy = list(clean)
    for place, stage in enumerate(stages):
        names = [name for name in stage.layers if name in wanted]
        if names:
            block = _Block(live, stages, place, {name: wanted[name] for name in names}, clean, noisy)
            found = block.fit()
            encoded |= found.encoded
            activations |= found.activations
            live.put(found.encoded)
            attach_activations(live.quantized, found.activations)
        clean = run_stage(stage, live.module, clean)
        noisy = run_stage(stage, live.quantized, noisy)
    return Fitted(encoded, activations=activations)


def _blocks(live: LiveModel) -> tuple[Stage, ...]:
    if live.blocks:
        return live.stages
    if live.traced:
        return make_blocks(live)
    reason = "pdquant needs the network in blocks, and it cannot be traced"
    raise ModelError(live.place, reason, "name its units under `model.blocks`")


@dataclass
class _Layer:
    """One layer of a block: its grid, and the rounding that is learned."""

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


class _Step(nn.Module):
    """An activation quantizer whose step is learned, at a layer's input; its zero point stays."""

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


@dataclass
class _Block:
    """One block while it learns."""

    live: LiveModel
    stages: Sequence[Stage]
    place: int
    decisions: dict[str, Decision]
    clean_states: Sequence[State]
    noisy_states: Sequence[State]
    layers: dict[str, _Layer] = field(default_factory=dict)
    steps: dict[str, _Step] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stage = self.stages[self.place]
        self.config: PdquantConfig = next(iter(self.decisions.values())).config
        self.generator = self.live.generator(self.stage.name)
        sizes = [batch.size for batch in self.live.calibration]
        self.clean, self.noisy = join_states(self.clean_states, sizes), join_states(self.noisy_states, sizes)
        self.samples = sum(sizes)

    def fit(self) -> Fitted:
        """Learn; `live.quantized` is left with neither parametrizations nor this block's quantizers."""
        with torch.no_grad():
            corrected = self._corrected()
            self._prepare_layers()
            self._prepare_steps()
            self.targets = stage_output(self.stage, self.stage.run(self.live.module, corrected))
            self.plain = stage_output(self.stage, self.stage.run(self.live.module, self.clean))
            self._prepare_prediction()
        self.energy = float(self.targets.double().square().sum()) / self._positions(self.targets)
        for layer in self.layers.values():
            parametrize.register_parametrization(layer.module, "weight", layer.rounding, unsafe=True)
        try:
            with torch.enable_grad():
                self._learn(corrected)
        finally:
            for layer in self.layers.values():
                parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=False)
        with torch.no_grad():
            codes = self._best_codes()
        for handle in self.handles:
            handle.remove()
        encoded = {layer.decision.tensor.name: layer.encode(codes[name]) for name, layer in self.layers.items()}
        return Fitted(encoded, activations={name: step.grid() for name, step in self.steps.items()})

    def _corrected(self) -> State:
        """The clean inputs, moved towards the statistics of the batch norms in the block, where that is asked for."""
        stage, module = self.stage, self.live.module
        if not self.config.distribution_correction or not isinstance(stage, TracedStage):
            return self.clean
        every = (batch_norm_of(self.live, name) for name in self.live.layers)
        norms = seen_statistics(module, norms_in(stage, [norm for norm in every if norm is not None]))
        sources = [node for node, value in self.clean.items() if isinstance(value, Tensor)]
        if not norms or len(sources) != 1:
            return self.clean
        (source,) = sources
        parts = []
        for chosen in torch.arange(self.samples, device=self.live.device).split(self.config.batch_size):  # type: ignore[no-untyped-call]
            state = pick_samples(self.clean, chosen, self.samples)
            moved = correct_inputs(
                state[source],
                partial(_run_with, stage, module, state, source),
                module,
                norms,
                steps=self.config.correction_steps or 1,
                closeness=self.config.correction_weight,
            )
            parts.append(moved)
        return {**self.clean, source: torch.cat(parts)}

    def _prepare_layers(self) -> None:
        """Each layer's grid and start, one after another, each from what those before it now give."""
        for name, decision in self.decisions.items():
            module = self.live.quantized.get_submodule(name)
            product = matrix_layer(module)
            if product is None:
                what = f"{type(module).__name__} is no matrix product that calibrated methods know"
                raise ModelError(f"layer {name}", what, "give it a rule of its own with squant, mse or rtn")
            clean = layer_inputs(self.stage, self.live.module, self.clean_states, [name])[name]
            noisy = layer_inputs(self.stage, self.live.quantized, self.noisy_states, [name])[name]
            gram = measure_gram(product, noisy, clean, self.generator)
            self.layers[name] = _prepare_layer(self.live, decision, module, gram, self.generator)
            layer = self.layers[name]
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
            run_stage(self.stage, self.live.quantized, self.noisy_states)

        for name, grid in grids_of_inputs(self.live.quantized, run, settings, bits).items():
            step = _Step(grid, self.live.device)
            self.steps[name] = step
            self.handles.append(self.live.quantized.get_submodule(name).register_forward_pre_hook(step.hook))

    def _rest(self, state: State) -> Tensor:
        """The logits of the full-precision network from the state after this block."""
        for stage in self.stages[self.place + 1 :]:
            state = stage.run(self.live.module, state)
        return last_output(state)

    def _logits_of(self, state: State, y: Tensor) -> Tensor:
        """The logits of the full-precision network where this block gives y instead of what `state` holds."""
        if isinstance(self.stage, TracedStage):
            return self._rest({**state, self.stage.nodes[-1]: y})
        return self._rest(replace_output(state, y))

    def _prepare_prediction(self) -> None:
        """Probes of every sample, or its full-precision logits, batch by batch."""
        self.last = self.place == len(self.stages) - 1
        self.probes: Tensor | None = None
        self.logits: Tensor | None = None
        if not self.config.prediction or isinstance(self.stage, WholeStage):
            return
        quadratic = self.config.prediction_form == "quadratic" and not self.last
        count = fitting_probes(self.plain)
        probes, logits = [], []
        after = [self.stage.run(self.live.module, state) for state in self.clean_states]
        for state in after:
            if quadratic:
                y = stage_output(self.stage, state)
                rest = partial(self._logits_of, state)
                probes.append(probe(y, rest, self.config.temperature, count, self.generator))
            else:
                logits.append(self._rest(state) if not self.last else last_output(state))
        self.probes = torch.cat(probes) if probes else None
        self.logits = torch.cat(logits) if logits else None

    def _positions(self, y: Tensor) -> int:
        """What the squared error is averaged over: samples and places, channels being summed."""
        return y.numel() // y.shape[1 if y.ndim in (3, 4, 5) and not self._channels_last else -1]

    @property
    def _channels_last(self) -> bool:
        kinds = {type(layer.module).__name__ for layer in self.layers.values()}
        return not any(kind.startswith("Conv") and kind != "Conv1D" for kind in kinds)

    def _learn(self, corrected: State) -> None:
        config = self.config
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
                self.samples, (min(config.batch_size, self.samples),), generator=self.generator, device=self.live.device
            )
            loss = self._loss(chosen, corrected)
            beta = beta_at(iteration / iterations, config.warm_up, "linear")
            if beta is not None:
                loss = loss + sum(self._pull(one, beta) for one in roundings)
            optimizer.zero_grad()
            if pace is not None:
                pace.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
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

    def _loss(self, chosen: Tensor, corrected: State) -> Tensor:
        """Reconstruction from mixed inputs and prediction difference from noisy ones, for some samples."""
        noisy = pick_samples(self.noisy, chosen, self.samples)
        state = self.stage.run(self.live.quantized, noisy)
        found = stage_output(self.stage, state)
        mixed = found
        if self.config.drop:
            other = pick_samples(corrected, chosen, self.samples)
            mixed_state = _mixed(noisy, other, self.config.drop, self.generator)
            mixed = stage_output(self.stage, self.stage.run(self.live.quantized, mixed_state))
        error = (mixed - self.targets[chosen]).square().sum() / self._positions(mixed)
        if self.probes is not None:
            error = error + self.config.prediction * quadratic_difference(
                self.probes[chosen], found - self.plain[chosen]
            )
        elif self.logits is not None:
            logits = last_output(state) if self.last else self._rest(state)
            difference = prediction_difference(self.logits[chosen], logits, self.config.temperature)
            error = error + self.config.prediction * difference
        return error if self.config.preset == "paper" else error / max(self.energy, 1e-30)

    def _best_codes(self) -> dict[str, Tensor]:
        """Of the learned, the starting and the nearest codes those of least loss on the calibration data."""
        learned = {name: layer.rounding.codes() for name, layer in self.layers.items()}
        starting = {name: layer.start for name, layer in self.layers.items()}
        nearest = {name: layer.nearest for name, layer in self.layers.items()}
        best, least = learned, math.inf
        for codes in (learned, starting, nearest):
            for name, layer in self.layers.items():
                find_tensor(self.live.quantized, f"{name}.weight").copy_(layer.weight(codes[name]))
            loss = self._whole_loss()
            if loss < least:
                best, least = codes, loss
        return best

    def _whole_loss(self) -> float:
        """The loss on inputs of the quantized network, over all samples or the first so many."""
        total, count = 0.0, min(self.samples, EVALUATED_SAMPLES)
        size = self.config.batch_size
        for start in range(0, count, size):
            chosen = torch.arange(start, min(start + size, count), device=self.live.device)
            noisy = pick_samples(self.noisy, chosen, self.samples)
            state = self.stage.run(self.live.quantized, noisy)
            found = stage_output(self.stage, state)
            error = float((found - self.targets[chosen]).square().sum() / self._positions(found))
            if self.probes is not None or self.logits is not None:
                error += self.config.prediction * self._difference(chosen, state)
            total += error * len(chosen)
        return total / count

    def _difference(self, chosen: Tensor, state: State) -> float:
        """The exact prediction difference of some samples."""
        clean = pick_samples(self.clean, chosen, self.samples)
        wanted = self._rest(self.stage.run(self.live.module, clean))
        return float(prediction_difference(wanted, self._rest(state), self.config.temperature))


def _prepare_layer(
    live: LiveModel, decision: Decision, module: nn.Module, gram: Gram, generator: torch.Generator
) -> _Layer:
    config: PdquantConfig = decision.config
    weight = find_tensor(live.module, decision.tensor.name)
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
    return _Layer(decision, module, grid, exponent, rounding, start, nearest)


def _run_with(stage: Stage, module: nn.Module, state: State, source: Any, x: Tensor) -> State:
    """The state after a traced stage where one value of its input is x."""
    return stage.run(module, {**state, source: x})


def _mixed(noisy: State, clean: State, share: float, generator: torch.Generator) -> Any:
    """The noisy state with each number, by a coin of `share`, taken from the clean one."""
    if isinstance(noisy, Tensor) and noisy.is_floating_point():
        coin = torch.rand(noisy.shape, generator=generator, device=noisy.device) < share
        return torch.where(coin, clean, noisy)
    if isinstance(noisy, dict):
        return {key: _mixed(value, clean[key], share, generator) for key, value in noisy.items()}
    if isinstance(noisy, tuple):
        return tuple(_mixed(one, other, share, generator) for one, other in zip(noisy, clean, strict=True))
    if hasattr(noisy, "args"):
        return type(noisy)(noisy.batch, _mixed(noisy.args, clean.args, share, generator), noisy.kwargs, noisy.output)
    return noisy
