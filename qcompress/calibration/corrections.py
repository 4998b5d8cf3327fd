"""Corrections take away a layer's mean error after any method, and match batch norms to what they now see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qcompress.model.fold import NormedLayer
from qcompress.model.graph import batch_norm_of
from qcompress.model.layers import MatrixLayer, matrix_layer
from qcompress.model.live import LiveModel, find_tensor, put_tensors
from qcompress.model.moments import input_moments
from qcompress.model.operations import BatchNorm
from qcompress.model.runs import layer_inputs, run_stage, run_through
from qcompress.model.stages import Stage, State
from qcompress.model.sweep import LayerStep
from qcompress.types.ranks import ALONE, World
from qcompress.types.settings import Companion


@dataclass(frozen=True)
class Corrected:
    """The adjusted tensors by name, and what had no home for its correction."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Moments:
    """Of a layer's output, by channel: float64 [channels]."""

    mean: Tensor
    variance: Tensor


def mean_errors(
    live: LiveModel, reference: nn.Module, layers: Sequence[NormedLayer], caps: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What each layer of `live.quantized` gives more on average than that of `reference`, float64 [channels].

    The error of the weight times the mean input that the batch norms before it tell of (Nagel et al. 2019, arXiv
    1906.04721, section 4.2.1); layers whose input no statistics reach are left out.

    reference  a copy of the network with the weights that were quantized
    caps       of its modules' outputs, see Fitted
    """
    models = input_moments(live, reference, caps)
    errors = {}
    for layer in layers:
        model = models.get(layer.name)
        if model is not None and model.mean_known:
            name = f"{layer.name}.weight"
            error = find_tensor(live.quantized, name) - find_tensor(reference, name)
            errors[layer.name] = replace(layer, weight=error).response(model.moments[0])
    return errors


@torch.no_grad()
def correct_by_data(
    live: LiveModel, reference: nn.Module, names: Collection[str], correct: Callable[[str, Tensor], None]
) -> None:
    """Call `correct` with each layer and the mean over the calibration data of what `live.quantized` gives more there.

    What it changes in `live.quantized`, the layers after it see. One pass through both networks, where AIMET's code
    runs the network once more for every layer.
    """
    clean = [live.stages[0].begin(batch) for batch in live.calibration]
    noisy = list(clean)
    for stage in live.stages:
        for name in (name for name in stage.layers if name in names):
            before, after = (
                _output_mean(module.get_submodule(name), layer_inputs(stage, module, states, [name])[name])
                for module, states in ((reference, clean), (live.quantized, noisy))
            )
            correct(name, after - before)
        clean, noisy = run_stage(stage, reference, clean), run_stage(stage, live.quantized, noisy)


def _output_mean(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The mean output for these inputs, over samples and places: float64 [channels]."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        rows = module(x).movedim(axis, -1).flatten(0, -2)
        total, count = total + rows.sum(0, dtype=torch.float64), count + len(rows)
    return total / max(count, 1)


def run_companions(live: LiveModel, companions: Sequence[Companion]) -> Corrected:
    """Correct `live.quantized` layer by layer, each after all before it, and give the tensors that changed.

    bias_correction takes the mean of (quantized - full-precision output) from the layer's bias, or moves the running
    mean of its batch norm by it. batch_norm also scales the running variance by the ratio of the outputs' variances, so
    that the batch norm gives what it gave: with statistics measured on both networks, few samples do. A layer with
    neither is skipped and named (Nagel et al. 2019, arXiv 1906.04721, section 4.2; Sun et al. 2019 for batch norms).
    """
    stages, world = live.stages, live.world
    clean, noisy = live.begin()
    changed: dict[str, Tensor] = {}
    notes: list[str] = []
    for stage in stages:
        for name in stage.layers:
            if matrix_layer(live.module.get_submodule(name)) is None:
                continue
            before = output_moments(stage, live.module, clean, name, world)
            after = output_moments(stage, live.quantized, noisy, name, world)
            if before is None or after is None:
                continue
            updates = _correct(live, name, before, after, companions)
            if not updates:
                notes.append(f"{name}: no bias and no batch norm to hold its correction")
            put_tensors(live.quantized, updates)
            changed |= updates
        clean = run_stage(stage, live.module, clean)
        noisy = run_stage(stage, live.quantized, noisy)
    return Corrected(changed, tuple(notes))


@torch.no_grad()
def match_outputs(live: LiveModel, step: LayerStep) -> dict[str, Tensor]:
    """Give a layer's outputs the mean and the variance that they had: the tensors that changed in `live.quantized`.

    The batch norm behind the layer takes both, or its bias the mean; without either nothing changes. As
    `run_companions`, but for one layer whose inputs are at hand.
    """
    assert isinstance(step.layer, MatrixLayer)
    layer = step.layer
    before, after = (
        _moments(layer.outputs(module.get_submodule(step.name)(x)) for x in inputs)
        for module, inputs in ((live.module, step.clean), (live.quantized, step.noisy))
    )
    updates = _correct(live, step.name, before, after, ("batch_norm", "bias_correction"))
    put_tensors(live.quantized, updates)
    return updates


@torch.no_grad()
def output_moments(
    stage: Stage, module: nn.Module, states: Sequence[State], name: str, world: World = ALONE
) -> _Moments | None:
    """Mean and variance of a layer's output over all positions of all batches of all ranks; None where no rank calls
    it."""
    layer = matrix_layer(module.get_submodule(name))
    assert layer is not None
    sums = _Sums()

    def watch(_: nn.Module, __: object, output: Tensor) -> None:
        sums.add(layer.outputs(output))

    handle = module.get_submodule(name).register_forward_hook(watch)
    try:
        run_through(stage, module, states)
    finally:
        handle.remove()
    sums.add_up(world)
    return sums.moments() if sums.count else None


class _Sums:
    """Over outputs [positions, channels], by channel."""

    def __init__(self) -> None:
        self.total = self.squares = torch.zeros(())
        self.count = 0

    def add(self, output: Tensor) -> None:
        rows = output.double()
        self.total, self.squares = self.total + rows.sum(0), self.squares + rows.square().sum(0)
        self.count += len(rows)

    def add_up(self, world: World) -> None:
        """Make them those of all ranks."""
        if world.size == 1:
            return
        told = world.tell([self.count, self.total.tolist(), self.squares.tolist()])
        filled = [one for one in told if one[0]]
        self.count = sum(count for count, _, _ in filled)
        if filled:
            self.total, self.squares = (
                torch.tensor([one[part] for one in filled], dtype=torch.float64).sum(0).to(self.total.device)
                for part in (1, 2)
            )

    def moments(self) -> _Moments:
        mean = self.total / self.count
        return _Moments(mean, (self.squares / self.count - mean.square()).clamp_min(0))


def _moments(outputs: Iterable[Tensor]) -> _Moments:
    """Of outputs [positions, channels]."""
    sums = _Sums()
    for output in outputs:
        sums.add(output)
    return sums.moments()


def _correct(
    live: LiveModel, name: str, before: _Moments, after: _Moments, companions: Sequence[Companion]
) -> dict[str, Tensor]:
    norm = batch_norm_of(live, name) if live.traced else None
    if norm is not None and "batch_norm" in companions:
        return _matched(live.quantized, norm, before, after)
    shift = after.mean - before.mean
    bias = getattr(live.quantized.get_submodule(name), "bias", None)
    if isinstance(bias, Tensor):
        return {f"{name}.bias": (bias.double() - shift).to(bias.dtype)}
    if norm is not None:
        mean = find_tensor(live.quantized, norm.running_mean)
        return {norm.running_mean: (mean.double() + shift).to(mean.dtype)}
    return {}


def _matched(module: nn.Module, norm: BatchNorm, before: _Moments, after: _Moments) -> dict[str, Tensor]:
    """Statistics under which the batch norm of the quantized layer gives the mean and the variance that it gave."""
    mean, variance = (find_tensor(module, tensor).double() for tensor in (norm.running_mean, norm.running_var))
    # A dead channel keeps its statistics but for the shift.
    ratio = torch.where(before.variance > 0, after.variance / before.variance, 1.0)
    ratio = torch.where(ratio > 0, ratio, 1.0)
    matched_mean = after.mean + (mean - before.mean) * ratio.sqrt()
    matched_variance = ((variance + norm.eps) * ratio - norm.eps).clamp_min(0)
    dtype = find_tensor(module, norm.running_mean).dtype
    return {norm.running_mean: matched_mean.to(dtype), norm.running_var: matched_variance.to(dtype)}
