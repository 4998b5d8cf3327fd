"""A sequential pass visits the layers of a live model in the order in which they run, with the inputs of each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qcompress.errors import DataError, ModelError
from qcompress.model.graph import batch_norm_of, layer_call, node_shapes, single_consumer
from qcompress.model.layers import MatrixLayer, drawn_places, matrix_layer, measure_gram
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.operations import inputs_of, kind_of
from qcompress.model.stages import Stage, State, TracedStage
from qcompress.types.run import Gram

LARGEST_INPUT = 1e18
"""A magnitude whose square float32 still holds."""
SMALLEST_GAIN = 0.05
"""Channels whose batch norm multiplies by less than this share of the median make up for nothing."""


@dataclass(frozen=True)
class LayerStep:
    """A layer whose turn it is.

    noisy  its inputs in the quantized network, one tensor a call and batch
    clean  its inputs in the full-precision network; the same list where the sweep watches one network only
    stage  that it lies in, before which both networks stand at `noisy_states` and `clean_states`
    """

    name: str
    layer: MatrixLayer
    noisy: list[Tensor]
    clean: list[Tensor]
    generator: torch.Generator
    stage: Stage
    noisy_states: Sequence[State]
    clean_states: Sequence[State]

    def gram(self) -> Gram:
        clean = None if self.clean is self.noisy else self.clean
        return measure_gram(self.layer, self.noisy, clean, self.generator)


def sweep(live: LiveModel, wanted: Collection[str], *, sequential: bool = True) -> Iterator[LayerStep]:
    """Every wanted layer in turn. What the caller puts into `live.quantized` before it goes on, later layers see.

    sequential  `noisy` comes from the quantized network; else from the full-precision one, all layers alike
    raises      ModelError for a wanted layer that is no matrix product; DataError for inputs that are not finite
    """
    stages = live.stages
    clean = [stages[0].begin(batch) for batch in live.calibration]
    noisy = list(clean) if sequential else clean
    for stage in stages:
        names = [name for name in stage.layers if name in wanted]
        from_clean = layer_inputs(stage, live.module, clean, names)
        for name in names:
            inputs = from_clean.pop(name)
            also = layer_inputs(stage, live.quantized, noisy, [name])[name] if sequential else inputs
            layer, generator = matrix_layer_of(live, name), live.generator(name)
            yield LayerStep(name, layer, also, inputs, generator, stage, noisy, clean)
        clean = run_stage(stage, live.module, clean)
        noisy = run_stage(stage, live.quantized, noisy) if sequential else clean


def matrix_layer_of(live: LiveModel, name: str) -> MatrixLayer:
    module = live.quantized.get_submodule(name)
    layer = matrix_layer(module)
    if layer is None:
        what = f"{type(module).__name__} is no matrix product that calibrated methods know"
        raise ModelError(f"layer {name}", what, "give it a rule of its own with squant, mse or rtn")
    return layer


def refuse_unusable(name: str, x: Tensor) -> None:
    """Raise DataError where no statistics can be made of a layer's input: NaN, Inf, or squares beyond float32.

    x  floats or, of a lookup, integers
    """
    if x.is_floating_point() and x.numel() and not float(x.abs().amax()) <= LARGEST_INPUT:
        what = f"its inputs hold NaN, Inf or values beyond {LARGEST_INPUT:g}"
        raise DataError(f"layer {name}", what, "check data.calibration and data.normalize, and the checkpoint")


@torch.no_grad()
def run_stage(stage: Stage, module: nn.Module, states: Sequence[State]) -> list[State]:
    return [stage.run(module, state) for state in states]


@torch.no_grad()
def layer_inputs(
    stage: Stage, module: nn.Module, states: Sequence[State], names: Sequence[str]
) -> dict[str, list[Tensor]]:
    """The first argument of every call of the named layers while the stage runs: one tensor a call and batch.

    raises  DataError for inputs that no statistics can be made of
    """
    found = _layer_inputs(stage, module, states, names)
    for name, inputs in found.items():
        for x in inputs:
            refuse_unusable(name, x)
    return found


def _layer_inputs(
    stage: Stage, module: nn.Module, states: Sequence[State], names: Sequence[str]
) -> dict[str, list[Tensor]]:
    if not names:
        return {}
    if isinstance(stage, TracedStage) and [*names] == [*stage.layers] and len(names) == 1:
        first, *others = stage.nodes
        if not any(node.target == names[0] for node in others):
            source = first.args[0] if first.args else first.kwargs["input"]
            return {names[0]: [state[source] for state in states]}
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen[name].append(args[0] if args else next(iter(kwargs.values())))

        handles.append(module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in names:
        watch(name)
    try:
        run_stage(stage, module, states)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def measure_skip(live: LiveModel, step: LayerStep) -> Tensor | None:
    """E[d x^T], float64 [groups, rows a group, columns], at the places that the layer's Gram was measured at.

    x are the layer's inputs in the quantized network and d is what its output lacks for the sum that it ends in: the
    difference of the sum's other side between both networks, in units of the layer's output before its batch norm.
    None where the output ends in no such sum, or the other side comes later.
    """
    if not live.traced or not isinstance(step.stage, TracedStage):
        return None
    other = _other_side(live, step.name)
    states = list(zip(step.clean_states, step.noisy_states, strict=True))
    if other is None or len(states) != len(step.noisy) or not all(other in a and other in b for a, b in states):
        return None
    gains = _gains(live, step.name)
    total: Tensor | None = None
    count = 0
    generator = live.generator(step.name)
    places = drawn_places(step.layer, step.noisy, generator)
    for (clean, noisy), x in zip(states, step.noisy, strict=True):
        lack = (clean[other] - noisy[other]).float()
        lack = torch.where(gains != 0, lack / gains, 0.0)
        state = generator.get_state()
        columns = step.layer.columns(x.float(), places, generator)
        generator.set_state(state)
        picked = step.layer.picked(lack, places, generator)
        product = torch.matmul(picked.transpose(1, 2), columns).double()
        total = product if total is None else total + product
        count += columns.shape[1]
    return None if total is None else total / count


def _other_side(live: LiveModel, name: str) -> fx.Node | None:
    """The other summand of the sum that a layer's output, or its batch norm's, goes to; of the same shape."""
    call, norm = layer_call(live, name), batch_norm_of(live, name)
    own = call if norm is None else norm.node
    reader = None if own is None else single_consumer(live.module, own)
    if call is None or own is None or reader is None or kind_of(live.module, reader) != "add":
        return None
    sides = inputs_of(reader)
    shapes = node_shapes(live)
    if len(sides) != 2 or reader.kwargs.get("alpha", 1) != 1 or shapes.get(sides[0]) != shapes.get(sides[1]):
        return None
    others = [side for side in sides if side is not own]
    return others[0] if len(others) == 1 else None


def _gains(live: LiveModel, name: str) -> Tensor:
    """What a unit of the layer's output adds to the sum, float32 [1, channels, 1, ...]; 0 for channels left alone."""
    norm = batch_norm_of(live, name)
    if norm is None:
        return torch.ones((), device=live.device)
    gains = (find_tensor(live.module, norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        gains = gains * find_tensor(live.module, norm.weight).detach()
    gains = torch.where(gains.abs() >= SMALLEST_GAIN * gains.abs().median(), gains, 0.0)
    rank = len(node_shapes(live)[norm.node])
    return gains.reshape(1, -1, *([1] * (rank - 2)))
