"""A sequential pass visits the layers of a live model in the order in which they run, with the inputs of each."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompress.errors import DataError, ModelError
from qcompress.model.graph import batch_norm_of, layer_call, node_shapes, single_consumer
from qcompress.model.layers import (
    InnerProduct,
    MatrixLayer,
    blank_gram,
    drawn_places,
    measure_gram,
    measure_inner_gram,
)
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.operations import inputs_of, kind_of
from qcompress.model.products import Call, Product, product_of
from qcompress.model.routing import Tape
from qcompress.model.stages import Stage, State, TracedStage
from qcompress.types.run import Gram

LARGEST_INPUT = 1e18
"""A magnitude whose square float32 still holds."""
SMALLEST_GAIN = 0.05
"""Channels whose batch norm multiplies by less than this share of the median make up for nothing."""


@dataclass(frozen=True)
class LayerStep:
    """A weight whose turn it is.

    name       the module whose calls show what flows into it
    tensor     its name
    columns    of its rows
    noisy      its inputs in the quantized network, one for each call and batch that has any
    clean      its inputs in the full-precision network; the same list where the sweep watches one network only, or
               where the networks do not pass the same samples
    unreached  rows of the weight that no input reaches; set by `gram`
    stage      that its module lies in, before which both networks stand at `noisy_states` and `clean_states`; None for
               a module that no calibration sample reaches
    """

    name: str
    tensor: str
    layer: MatrixLayer | InnerProduct
    columns: int
    noisy: list[Any]
    clean: list[Any]
    generator: torch.Generator
    stage: Stage | None = None
    noisy_states: Sequence[State] = ()
    clean_states: Sequence[State] = ()
    unreached: set[str] = field(default_factory=set)

    @property
    def is_reached(self) -> bool:
        return bool(self.noisy)

    def gram(self) -> Gram:
        """The Gram of the inputs; where nothing reaches the weight that of plain rounding, and `unreached` names it."""
        clean = None if self.clean is self.noisy else self.clean
        if isinstance(self.layer, InnerProduct):
            found, missed = measure_inner_gram(self.layer, self.columns, self.noisy, clean, self.generator)
            if missed:
                of = "" if missed == self.layer.rows else f" {missed} of the {self.layer.rows} rows of"
                self.unreached.add(f"{of} {self.tensor}".strip())
            return found
        if not self.noisy:
            self.unreached.add(self.tensor)
            groups = 1 if self.layer.joined else self.layer.groups
            return blank_gram(groups, self.columns, self.generator.device)
        return measure_gram(self.layer, self.noisy, clean, self.generator)


def sweep(live: LiveModel, wanted: Collection[str], *, sequential: bool = True) -> Iterator[LayerStep]:
    """Every wanted weight in turn. What the caller puts into `live.quantized` before it goes on, later ones see.

    Those of modules that no calibration sample reaches come last. A network that routes by values takes the routes of
    the full-precision one in both.

    sequential  `noisy` comes from the quantized network; else from the full-precision one, all layers alike
    raises      ModelError for a wanted weight of no matrix product; DataError for inputs that are not finite
    """
    products = {name: product_at(live, name) for name in wanted}
    waiting: dict[str, list[Product]] = {}
    for product in products.values():
        waiting.setdefault(product.caller, []).append(product)
    stages = live.stages
    clean, noisy = live.begin()
    noisy = noisy if sequential else clean
    for stage in stages:
        tapes = [Tape() for _ in clean] if live.routes else None
        names = [name for name in stage.layers if name in waiting]
        from_clean = layer_calls(stage, live.module, clean, names, tapes)
        from_noisy: dict[str, list[Call]] = {}
        for place, name in enumerate(names):
            if sequential and name not in from_noisy:
                alike = _with_one_input(names[place:], from_clean)
                once = all(len(from_clean[one]) == len(clean) for one in alike)
                from_noisy = layer_calls(stage, live.quantized, noisy, alike, tapes, once=once)
            calls = from_clean.pop(name)
            also = from_noisy.pop(name) if sequential else calls
            for product in _in_order(live, waiting.pop(name)):
                inputs = product_inputs(product, live.module, calls)
                other = product_inputs(product, live.quantized, also) if sequential else inputs
                both = _paired(inputs, other) if sequential else [_filled(inputs)] * 2
                yield _step(live, product, both[1], both[0], stage, noisy, clean)
        if stage is stages[-1]:
            break
        clean = run_stage(stage, live.module, clean, tapes)
        noisy = run_stage(stage, live.quantized, noisy, tapes) if sequential else clean
    for products_left in waiting.values():
        for product in products_left:
            nothing: list[Any] = []
            yield _step(live, product, nothing, nothing)


def _with_one_input(names: Sequence[str], calls: Mapping[str, Sequence[Call]]) -> list[str]:
    """The first of the modules, and those right after it that see what it sees, so that none waits for another."""
    first = calls[names[0]]

    def is_like(name: str) -> bool:
        own = calls[name]
        return len(own) == len(first) > 0 and all(a.is_like(b) for a, b in zip(first, own, strict=True))

    return [names[0], *itertools.takewhile(is_like, names[1:])]


def _step(
    live: LiveModel,
    product: Product,
    noisy: list[Any],
    clean: list[Any],
    stage: Stage | None = None,
    noisy_states: Sequence[State] = (),
    clean_states: Sequence[State] = (),
) -> LayerStep:
    weight = find_tensor(live.module, product.tensor)
    plain = isinstance(product.layer, MatrixLayer)
    columns = weight.numel() // product.rows_of(weight)
    generator = live.generator(product.caller if plain else product.tensor)
    states = (noisy_states, clean_states)
    return LayerStep(
        product.caller, product.tensor, product.layer, columns, noisy, clean, generator, stage, *states, live.unreached
    )


def _in_order(live: LiveModel, products: Sequence[Product]) -> list[Product]:
    """The products of one module in the order of its parameters, which is the one that it computes them in."""
    if len(products) == 1:
        return [*products]
    order = [name for name, _ in live.module.get_submodule(products[0].caller).named_parameters()]
    return sorted(products, key=lambda product: order.index(product.weight))


def product_at(live: LiveModel, tensor: str) -> Product:
    """The product that a weight stands in. Raises ModelError where it stands in none that is known."""
    product = product_of(live.quantized, tensor)
    if product is None:
        what = "is the weight of no matrix product that calibrated methods know"
        raise ModelError(f"tensor {tensor}", what, "give it a rule of its own with squant, mse or rtn")
    return product


def product_inputs(product: Product, network: nn.Module, calls: Sequence[Call]) -> list[Any]:
    """What flows into a product in these calls. Raises DataError where no statistics can be made of it."""
    found = product.inputs(network, calls)
    for x in found:
        for part in [x] if isinstance(x, Tensor) else x.values():
            refuse_unusable(product.caller, part)
    return found


def _paired(clean: list[Any], noisy: list[Any]) -> tuple[list[Any], list[Any]]:
    """The inputs of both networks, without calls that get none; twice the quantized one's where they do not pair."""
    if [*map(_sizes, clean)] != [*map(_sizes, noisy)]:
        rest = _filled(noisy)
        return rest, rest
    return _filled(clean), _filled(noisy)


def paired_inputs(
    live: LiveModel, stage: Stage, name: str, clean: Sequence[State], noisy: Sequence[State]
) -> tuple[list[Any], list[Any]]:
    """What flows into a layer of a stage in the full-precision network and in the quantized one, see LayerStep."""
    tapes = [Tape() for _ in clean] if live.routes else None
    networks = ((live.module, clean), (live.quantized, noisy))
    calls = [layer_calls(stage, module, states, [name], tapes)[name] for module, states in networks]
    first, second = ([call.first for call in found] for found in calls)
    for x in (*first, *second):
        refuse_unusable(name, x)
    return _paired(first, second)


def _sizes(x: Any) -> Any:
    return x.shape if isinstance(x, Tensor) else {span: part.shape for span, part in x.items()}


def _filled(inputs: list[Any]) -> list[Any]:
    return [x for x in inputs if (x.numel() if isinstance(x, Tensor) else x)]


def refuse_unusable(name: str, x: Tensor) -> None:
    """Raise DataError where no statistics can be made of a layer's input: NaN, Inf, or squares beyond float32.

    x  floats or, of a lookup, integers
    """
    if x.is_floating_point() and x.numel() and not float(x.abs().amax()) <= LARGEST_INPUT:
        what = f"its inputs hold NaN, Inf or values beyond {LARGEST_INPUT:g}"
        raise DataError(f"layer {name}", what, "check data.calibration and data.normalize, and the checkpoint")


@torch.no_grad()
def run_stage(
    stage: Stage, module: nn.Module, states: Sequence[State], tapes: Sequence[Tape] | None = None
) -> list[State]:
    """The states after a stage; `tapes`, one a batch, keep or give what the network decides by values."""
    if tapes is None:
        return [stage.run(module, state) for state in states]
    found = []
    for state, tape in zip(states, tapes, strict=True):
        with tape:
            found.append(stage.run(module, state))
    return found


@torch.no_grad()
def layer_calls(
    stage: Stage,
    module: nn.Module,
    states: Sequence[State],
    names: Sequence[str],
    tapes: Sequence[Tape] | None = None,
    *,
    once: bool = False,
) -> dict[str, list[Call]]:
    """Every call of the named modules while the stage runs.

    once  each is called once by a state, as far as is known, so that a run may end with the last of them
    """
    if not names:
        return {}
    if isinstance(stage, TracedStage) and [*names] == [*stage.layers] and len(names) == 1:
        first, *others = stage.nodes
        if not any(node.target == names[0] for node in others):
            return {names[0]: [_call_of(first, state) for state in states]}
    seen: dict[str, list[Call]] = {name: [] for name in names}
    missing: set[str] = set()

    def watch(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name].append(Call.of(args, kwargs))
            missing.discard(name)
            if once and not missing:
                raise _AllSeen

        handles.append(module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in names:
        watch(name)
    try:
        for place, state in enumerate(states):
            missing |= {*names}
            with suppress(_AllSeen), nullcontext() if tapes is None else tapes[place]:
                stage.run(module, state)
    finally:
        for handle in handles:
            handle.remove()
    if once and any(len(calls) != len(states) for calls in seen.values()):
        return layer_calls(stage, module, states, names, tapes)
    return seen


class _AllSeen(Exception):
    """Every module that is waited for was called."""


def _call_of(node: fx.Node, state: State) -> Call:
    def value(one: fx.Node) -> Any:
        return state[one]

    return Call(fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value))


def layer_inputs(
    stage: Stage, module: nn.Module, states: Sequence[State], names: Sequence[str]
) -> dict[str, list[Tensor]]:
    """The first argument of every call of the named layers while the stage runs: one tensor a call and batch.

    raises  DataError for inputs that no statistics can be made of
    """
    found = {n: [call.first for call in calls] for n, calls in layer_calls(stage, module, states, names).items()}
    for name, inputs in found.items():
        for x in inputs:
            refuse_unusable(name, x)
    return found


def measure_skip(live: LiveModel, step: LayerStep) -> Tensor | None:
    """E[d x^T], float64 [groups, rows a group, columns], at the places that the layer's Gram was measured at.

    x are the layer's inputs in the quantized network and d is what its output lacks for the sum that it ends in: the
    difference of the sum's other side between both networks, in units of the layer's output before its batch norm.
    None where the output ends in no such sum, or the other side comes later.
    """
    if not live.traced or not isinstance(step.stage, TracedStage) or not isinstance(step.layer, MatrixLayer):
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
        if step.layer.joined:
            product = torch.cat([*product], 1).unsqueeze(0)
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
