"""A sequential pass visits the layers of a live model in the order in which they run, with the inputs of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompress.data.batches import Batch
from qcompress.errors import ModelError
from qcompress.model.flow import CallsAnew, Flow
from qcompress.model.graph import batch_norm_of, layer_call, node_shapes, single_consumer
from qcompress.model.joint import joint_gram
from qcompress.model.layers import (
    InnerProduct,
    InputsAnew,
    MatrixLayer,
    are_all_looked_at,
    blank_gram,
    drawn_places,
    measure_gram,
    measure_inner_gram,
    shapes_of,
)
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.operations import inputs_of, kind_of
from qcompress.model.products import Call, Product, product_of
from qcompress.model.routing import Tape
from qcompress.model.runs import Calls, Runs, layer_calls, refuse_unusable
from qcompress.model.stages import Stage, State, TracedStage
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import Gram

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
    grams      of the steps before, which those that see the same inputs share
    following  how many of the modules after this one are called with the same inputs, whatever is put in its place
    world      the ranks that each have some of the inputs
    stage      that its module lies in, before which both networks stand at `noisy_states` and `clean_states`; None for
               a module that no calibration sample reaches
    """

    name: str
    tensor: str
    layer: MatrixLayer | InnerProduct
    columns: int
    noisy: Sequence[Any]
    clean: Sequence[Any]
    generator: torch.Generator
    stage: Stage | None = None
    noisy_states: Sequence[State] = ()
    clean_states: Sequence[State] = ()
    unreached: set[str] = field(default_factory=set)
    grams: GramMemory = field(default_factory=lambda: GramMemory())
    following: int = 0
    world: World = ALONE

    @property
    def is_reached(self) -> bool:
        return bool(self.noisy)

    def gram(self) -> Gram:
        """The Gram of the inputs, those of all ranks; where nothing reaches the weight that of plain rounding, and
        `unreached` names it."""
        clean = None if self.clean is self.noisy else self.clean
        if isinstance(self.layer, InnerProduct):
            world = self.world
            measure = None if world.size == 1 else partial(joint_gram, world=world)
            found, missed = measure_inner_gram(
                self.layer, self.columns, self.noisy, clean, self.generator, world, measure
            )
            if missed:
                of = "" if missed == self.layer.rows else f" {missed} of the {self.layer.rows} rows of"
                self.unreached.add(f"{of} {self.tensor}".strip())
            return found
        if self.world.size > 1:
            known = self.grams.known(self.noisy, clean)
            if not all(self.world.tell(known is not None)):
                known = joint_gram(self.layer, self.noisy, clean, self.generator, self.world)
            if known is None:
                return self._blank(self.layer)
            positions = sum(self.world.tell(sum(math.prod(shape[:-1]) for shape in shapes_of(self.noisy))))
            if known.count == positions and are_all_looked_at(self.layer, self.noisy, known.count):
                self.grams.keep(self.noisy, clean, known)
            return known
        if not self.noisy:
            return self._blank(self.layer)
        # Places are drawn from the generator in any case, so that what is drawn after them is the same.
        places = drawn_places(self.layer, self.noisy, self.generator)
        if not are_all_looked_at(self.layer, self.noisy, places):
            return measure_gram(self.layer, self.noisy, clean, self.generator, places)
        known = self.grams.known(self.noisy, clean)
        if known is None:
            known = measure_gram(self.layer, self.noisy, clean, self.generator, places)
            self.grams.keep(self.noisy, clean, known)
        return known

    def _blank(self, layer: MatrixLayer) -> Gram:
        """The Gram of a weight that nothing reaches."""
        self.unreached.add(self.tensor)
        return blank_gram(1 if layer.joined else layer.groups, self.columns, self.generator.device)


class GramMemory:
    """The Gram that was measured last, for other layers of the same inputs: queries, keys and values have one."""

    def __init__(self) -> None:
        self._last: tuple[Sequence[Tensor], Sequence[Tensor] | None, Gram] | None = None

    def known(self, noisy: Sequence[Tensor], clean: Sequence[Tensor] | None) -> Gram | None:
        """The Gram of these inputs, if it was the last one."""
        if self._last is None or not all(map(_are_same, self._last[:2], (noisy, clean))):
            return None
        return self._last[2]

    def forget(self) -> None:
        """Let go of the Gram and of its inputs."""
        self._last = None

    def keep(self, noisy: Sequence[Tensor], clean: Sequence[Tensor] | None, gram: Gram) -> None:
        """Note a Gram of all that these inputs hold, in place of that of others."""
        self._last = (noisy, clean, gram)


def _are_same(some: Sequence[Tensor] | None, others: Sequence[Tensor] | None) -> bool:
    if some is None or others is None:
        return some is others
    if isinstance(some, InputsAnew) or isinstance(others, InputsAnew):
        return getattr(some, "source", some) is getattr(others, "source", others)
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def sweep(
    live: LiveModel, wanted: Collection[str], *, sequential: bool = True, paired: bool = True
) -> Iterator[LayerStep]:
    """Every wanted weight in turn. What the caller puts into `live.quantized` before it goes on, later ones see.

    Those of modules that no calibration sample reaches come last. A network that routes by values takes the routes of
    the full-precision one in both.

    sequential  `noisy` comes from the quantized network; else from the full-precision one, all layers alike
    paired      whether `clean` is asked for beside it; where it is not, the full-precision network may not run at all
    raises      ModelError for a wanted weight of no matrix product; DataError for inputs that are not finite
    """
    products = {name: product_at(live, name) for name in wanted}
    waiting: dict[str, list[Product]] = {}
    for product in products.values():
        waiting.setdefault(product.caller, []).append(product)
    stages = live.stages
    begun = live.begin()
    clean, noisy = Flow(live.module, begun[0]), Flow(live.quantized, begun[1])
    noisy = noisy if sequential else clean
    grams = GramMemory()
    paired = paired or not sequential or live.routes
    for stage, behind in itertools.zip_longest(stages, stages[1:]):
        names = [name for name in stage.layers if name in waiting]
        tapes = [Tape() for _ in clean] if live.routes else None
        clean_runs, noisy_runs = Runs(stage, live.module, clean, tapes), Runs(stage, live.quantized, noisy, tapes)
        # How often a module is called, and which see one input, the first batch tells too.
        every = paired or noisy_runs.repeats
        first_runs = clean_runs if paired else noisy_runs if every else Runs(stage, live.quantized, noisy[:1])
        first_calls = {**first_runs.calls(names, last=paired)}
        batches = len(clean) if every else 1
        from_noisy: dict[str, Sequence[Call]] = {}
        for place, name in enumerate(names):
            if sequential and name not in from_noisy:
                grams.forget()
                alike = _with_one_input(names[place:], first_calls)
                # Ranks whose samples go other ways, as to experts, agree on those that are alike on all.
                alike = alike[: min(live.world.tell(len(alike)))]
                once = all(len(first_calls[one]) == batches for one in alike)
                from_noisy = {**_noisy_calls(noisy_runs, alike, first_calls[name], names[place:] if once else ())}
            calls = first_calls.pop(name)
            also = from_noisy.pop(name) if sequential else calls
            own = _in_order(live, waiting.pop(name))
            # The products of one module see what those before them in it now give.
            following = len(from_noisy) if len(own) == 1 else 0
            for product in own:
                of_noisy = product_inputs(product, live.quantized, also) if sequential else None
                of_clean = product_inputs(product, live.module, calls) if paired else None
                pair = _paired(of_clean, of_noisy)
                yield _step(live, product, pair, grams, stage, (clean, noisy), following)
        if behind is None:
            break
        # What is noted of inputs would ask for states that are let go.
        grams.forget()
        later = _deferred(live, stage, behind, *((clean,) if paired else ()), *((noisy,) if sequential else ()))
        clean = next(later) or Flow(live.module, clean_runs.after()) if paired else clean
        noisy = next(later) or Flow(live.quantized, noisy_runs.after()) if sequential else clean
    for products_left in waiting.values():
        for product in products_left:
            yield _step(live, product, _paired([], None), grams)


def _noisy_calls(runs: Runs, names: Sequence[str], first: Sequence[Call], waiting: Sequence[str]) -> Calls:
    """The calls of modules that see one input in the quantized network.

    first    calls of one of them in a network with the same inputs' shapes
    waiting  see `next_calls`; none where they may be called more or less often than once a batch
    """
    if runs.repeats and isinstance(first, CallsAnew):
        return dict.fromkeys(names, runs.anew(names[0], first.shapes))
    return runs.next_calls(names, waiting) if waiting else runs.calls(names)


def _deferred(live: LiveModel, stage: Stage, behind: Stage, *flows: Flow) -> Iterator[Flow | None]:
    """For each network the states behind a stage, to be computed anew; None where they are held."""
    example, samples = _shapes_of_samples(live.example), live.example.size
    alike = all(_shapes_of_samples(batch) == example for batch in live.own_batches)
    # Of one sample it is not seen which dimension the samples run along.
    if not live.traced or live.routes or not alike or samples == 1:
        return itertools.repeat(None)
    shapes = {node: shape[1:] for node, shape in node_shapes(live).items() if shape[:1] == (samples,)}
    sizes = [batch.size for batch in live.own_batches]
    found = [flow.deferred(stage, behind, shapes, sizes, len(flows)) for flow in flows]
    return iter(found if all(found) else [None] * len(flows))


def _shapes_of_samples(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(x.shape[1:]) for x in (*batch.args, *batch.kwargs.values())]


def _with_one_input(names: Sequence[str], calls: Mapping[str, Sequence[Call]]) -> list[str]:
    """The first of the modules, and those right after it that see what it sees, so that none waits for another."""
    first = calls[names[0]]

    def is_like(name: str) -> bool:
        own = calls[name]
        if isinstance(first, CallsAnew) or isinstance(own, CallsAnew):
            return own is first
        return len(own) == len(first) > 0 and all(a.is_like(b) for a, b in zip(first, own, strict=True))

    return [names[0], *itertools.takewhile(is_like, names[1:])]


def _step(
    live: LiveModel,
    product: Product,
    inputs: tuple[Sequence[Any], Sequence[Any]],
    grams: GramMemory,
    stage: Stage | None = None,
    states: tuple[Sequence[State], Sequence[State]] = ((), ()),
    following: int = 0,
) -> LayerStep:
    """The step of a product; its inputs and the states before its stage are of the clean and of the noisy network."""
    weight = find_tensor(live.module, product.tensor)
    plain = isinstance(product.layer, MatrixLayer)
    return LayerStep(
        name=product.caller,
        tensor=product.tensor,
        layer=product.layer,
        columns=weight.numel() // product.rows_of(weight),
        noisy=inputs[1],
        clean=inputs[0],
        generator=live.generator(product.caller if plain else product.tensor),
        stage=stage,
        noisy_states=states[1],
        clean_states=states[0],
        unreached=live.unreached,
        grams=grams,
        following=following,
        world=live.world,
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


def product_inputs(product: Product, network: nn.Module, calls: Sequence[Call]) -> Sequence[Any]:
    """What flows into a product in these calls. Raises DataError where no statistics can be made of it."""
    if isinstance(calls, CallsAnew) and isinstance(product.layer, MatrixLayer):
        return InputsAnew(partial(_input_anew, product.caller, calls), calls.shapes, calls)
    found = product.inputs(network, calls)
    for x in found:
        for part in [x] if isinstance(x, Tensor) else x.values():
            refuse_unusable(product.caller, part)
    return found


def _input_anew(name: str, calls: CallsAnew, index: int) -> Tensor:
    x: Tensor = calls[index].first
    refuse_unusable(name, x)
    return x


def _paired(clean: Sequence[Any] | None, noisy: Sequence[Any] | None) -> tuple[Sequence[Any], Sequence[Any]]:
    """The inputs of both networks, without calls that get none; twice one's where the other's do not pair or are None.

    Where they do not pair they are the quantized network's.
    """
    if clean is None or noisy is None or _sizes(clean) != _sizes(noisy):
        one = _filled(noisy if noisy is not None else clean or [])
        return one, one
    return _filled(clean), _filled(noisy)


def paired_inputs(
    live: LiveModel, stage: Stage, name: str, clean: Sequence[State], noisy: Sequence[State]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """What flows into a layer of a stage in the full-precision network and in the quantized one, see LayerStep."""
    tapes = [Tape() for _ in clean] if live.routes else None
    networks = ((live.module, clean), (live.quantized, noisy))
    calls = [layer_calls(stage, module, states, [name], tapes)[name] for module, states in networks]
    first, second = ([call.first for call in found] for found in calls)
    for x in (*first, *second):
        refuse_unusable(name, x)
    return _paired(first, second)


def _sizes(inputs: Sequence[Any]) -> list[Any]:
    if isinstance(inputs, InputsAnew):
        return [*inputs.shapes]
    return [
        tuple(x.shape) if isinstance(x, Tensor) else {span: tuple(part.shape) for span, part in x.items()}
        for x in inputs
    ]


def _filled(inputs: Sequence[Any]) -> Sequence[Any]:
    if isinstance(inputs, InputsAnew):
        return inputs
    return [x for x in inputs if (x.numel() if isinstance(x, Tensor) else x)]


def measure_skip(live: LiveModel, step: LayerStep) -> Tensor | None:
    """E[d x^T], float64 [groups, rows a group, columns], at the places that the layer's Gram was measured at.

    x are the layer's inputs in the quantized network and d is what its output lacks for the sum that it ends in: the
    difference of the sum's other side between both networks, in units of the layer's output before its batch norm.
    None where the output ends in no such sum, or the other side comes later.
    """
    if not live.traced or not isinstance(step.stage, TracedStage) or not isinstance(step.layer, MatrixLayer):
        return None
    other = _other_side(live, step.name)
    if other is None or len(step.clean_states) != len(step.noisy):
        return None
    gains = _gains(live, step.name)
    total: Tensor | None = None
    count = 0
    generator = live.generator(step.name)
    places = drawn_places(step.layer, step.noisy, generator)
    for clean, noisy, x in zip(step.clean_states, step.noisy_states, step.noisy, strict=True):
        if other not in clean or other not in noisy:
            return None
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
