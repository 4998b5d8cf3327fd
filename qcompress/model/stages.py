"""A network is cut into stages that run one after another from kept values: each layer is computed once a pass.

Traced networks are cut before every compressed layer. Others run by the blocks that the recipe names, or as one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from qcompress.data.batches import Batch, first_tensor, run_model
from qcompress.errors import ModelError
from qcompress.model.trace import start, step

State: TypeAlias = Any
"""What flows from stage to stage, for one batch; opaque but to the stages."""


RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Whose outputs are tensors of their own."""


class Stage(Protocol):
    """A part of the network.

    name    of the block or of the layer that it begins with
    layers  the compressed modules that it calls, in order
    """

    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> tuple[str, ...]: ...

    def begin(self, batch: Batch) -> State:
        """The state before the first stage."""

    def run(self, module: nn.Module, state: State) -> State:
        """The state after this stage of `module`, which is the network or a copy of it; `state` stays as it is."""


@dataclass(frozen=True)
class TracedStage:
    """Nodes of the traced graph, in their order.

    spent  the values that nothing after this stage needs
    """

    name: str
    layers: tuple[str, ...]
    graph: fx.Graph
    nodes: tuple[fx.Node, ...]
    spent: tuple[fx.Node, ...]

    def begin(self, batch: Batch) -> State:
        return start(self.graph, batch)

    def run(self, module: nn.Module, state: State) -> State:
        values = dict(state)
        for node, spent in zip(self.nodes, self._spent_by, strict=True):
            with self._in_place(module, node):
                values[node] = step(module, node, values)
            for one in spent:
                values.pop(one, None)
        return values

    @cached_property
    def _spent_by(self) -> tuple[tuple[fx.Node, ...], ...]:
        """For each node the values that nothing needs once it has run."""
        last = {one: index for index, node in enumerate(self.nodes) for one in (node, *node.all_input_nodes)}
        groups: dict[int, list[fx.Node]] = {}
        for one in self.spent:
            groups.setdefault(last.get(one, len(self.nodes) - 1), []).append(one)
        return tuple(tuple(groups.get(index, ())) for index in range(len(self.nodes)))

    @contextmanager
    def _in_place(self, module: nn.Module, node: fx.Node) -> Iterator[None]:
        """A rectifier overwrites what a layer of this stage gave it alone, and needs no memory of its own."""
        source = node.args[0] if node.op == "call_module" and node.args else None
        if torch.is_grad_enabled() or not isinstance(source, fx.Node) or source.op != "call_module":
            yield
            return
        rectifier: Any = module.get_submodule(str(node.target))
        layer = module.get_submodule(str(source.target))
        alone = source in self.nodes and len(source.users) == 1
        in_place = alone and type(rectifier) in RECTIFIERS and type(layer) in LAYERS
        if in_place:
            rectifier.inplace = True
        try:
            yield
        finally:
            if in_place:
                rectifier.inplace = False


@dataclass(frozen=True)
class WholeStage:
    """A network that cannot be cut."""

    name: str
    layers: tuple[str, ...]

    def begin(self, batch: Batch) -> State:
        return batch

    def run(self, module: nn.Module, state: State) -> State:
        return module(*state.args, **state.kwargs)


@dataclass(frozen=True)
class BlockState:
    """Between blocks: the next block's arguments, and what the last one gave."""

    batch: Batch
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: Any = None

    def changed(self, change: Callable[[Any], Any]) -> BlockState:
        """The state with what `change` makes of each tensor, or of what stands for one, between the blocks."""
        return BlockState(self.batch, *tree_map(change, (self.args, self.kwargs, self.output)))


class _Reached(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.call = (args, kwargs)


@dataclass(frozen=True)
class HeadStage:
    """What runs before the first named block."""

    name: str
    layers: tuple[str, ...]

    def begin(self, batch: Batch) -> State:
        return BlockState(batch)

    def run(self, module: nn.Module, state: State) -> State:
        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args, kwargs)

        handle = module.get_submodule(self.name).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            module(*state.batch.args, **state.batch.kwargs)
        except _Reached as reached:
            args, kwargs = reached.call
            return BlockState(state.batch, args, kwargs)
        finally:
            handle.remove()
        raise ModelError(f"block {self.name}", "the model never calls it", "name blocks that a forward pass calls")


@dataclass(frozen=True)
class BlockStage:
    """One named block: its output takes the place of its first argument, the others stay for the next block."""

    name: str
    layers: tuple[str, ...]

    def begin(self, batch: Batch) -> State:
        return BlockState(batch)

    def run(self, module: nn.Module, state: State) -> State:
        output = module.get_submodule(self.name)(*state.args, **state.kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
        return BlockState(state.batch, (hidden, *state.args[1:]), state.kwargs, output)


@dataclass(frozen=True)
class TailStage:
    """What runs after the last block: the whole network with its blocks replaced by what they gave."""

    name: str
    layers: tuple[str, ...]
    blocks: tuple[str, ...]

    def begin(self, batch: Batch) -> State:
        return BlockState(batch)

    def run(self, module: nn.Module, state: State) -> State:
        with _answering(module, self.blocks, state.output):
            return module(*state.batch.args, **state.batch.kwargs)


@contextmanager
def _answering(module: nn.Module, blocks: Sequence[str], output: Any) -> Iterator[None]:
    """The module with every named block giving `output` at once."""
    modules = [module.get_submodule(name) for name in blocks]
    own = [vars(one).get("forward") for one in modules]
    for one in modules:
        one.forward = lambda *_, **__: output
    try:
        yield
    finally:
        for one, before in zip(modules, own, strict=True):
            del one.forward
            if before is not None:
                one.forward = before


def block_stages(blocks: Sequence[str], layers: Sequence[str], called: Sequence[str]) -> tuple[Stage, ...]:
    """What runs before the first block, each block, and what runs after the last one.

    called  the layers and the first block in the order of their calls
    """
    inside = {name: block for block in blocks for name in layers if name == block or name.startswith(f"{block}.")}
    first = called.index(blocks[0])
    outer = [name for name in called if name not in inside and name != blocks[0]]
    before = tuple(name for name in outer if called.index(name) < first)
    after = tuple(name for name in outer if called.index(name) > first)
    stages: list[Stage] = [HeadStage(blocks[0], before)]
    stages += [BlockStage(block, tuple(name for name in layers if inside.get(name) == block)) for block in blocks]
    return (*stages, TailStage("output", after, tuple(blocks)))


def glob_modules(module: nn.Module, globs: Sequence[str], place: str) -> list[str]:
    """The names of the modules that globs name, each glob at its own depth, in the order of the modules.

    raises  ModelError for a glob that names nothing
    """
    names = [name for name, _ in module.named_modules() if name]
    chosen: set[str] = set()
    for glob in globs:
        matches = {name for name in names if fnmatchcase(name, glob) and name.count(".") == glob.count(".")}
        if not matches:
            raise ModelError(place, f"blocks: {glob!r} names no module", f"modules are named like {names[-1]!r}")
        chosen |= matches
    return [name for name in names if name in chosen]


def traced_stages(graph: fx.Graph, layers: Sequence[str]) -> tuple[Stage, ...]:
    """A stage from each compressed layer to the next; layers that are called twice keep all between in one."""
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    calls: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        if node.op == "call_module" and str(node.target) in layers:
            calls.setdefault(str(node.target), []).append(index)
    cuts = [0]
    names: list[list[str]] = [[]]
    busy_until = -1
    for name, places in sorted(calls.items(), key=lambda item: item[1][0]):
        if places[0] > busy_until:
            cuts.append(places[0])
            names.append([])
        names[-1].append(name)
        busy_until = max(busy_until, places[-1])
    stages = cut_nodes(graph, nodes, [*cuts, len(nodes)], names)
    return tuple(one for one in stages if one.nodes)


def cut_nodes(
    graph: fx.Graph, nodes: Sequence[fx.Node], cuts: Sequence[int], names: Sequence[Sequence[str]]
) -> list[TracedStage]:
    """Stages of nodes[cuts[i] : cuts[i + 1]], with the compressed layers names[i]."""
    last_use = {node: index for index, user in enumerate(nodes) for node in user.all_input_nodes}
    stages = []
    for (begin, end), layers in zip(pairwise(cuts), names, strict=True):
        output = nodes[-1]
        spent = tuple(node for node in graph.nodes if node is not output and begin <= last_use.get(node, -1) < end)
        name = layers[0] if layers else "input"
        stages.append(TracedStage(name, tuple(layers), graph, tuple(nodes[begin:end]), spent))
    return stages


def last_output(state: State) -> Tensor:
    """The network's logits from the state after the last stage."""
    if isinstance(state, dict) and isinstance(next(iter(state)), fx.Node):
        output = next(value for node, value in state.items() if node.op == "output")
        return first_tensor(output)
    return first_tensor(state)


def stage_output(stage: Stage, state: State) -> Tensor:
    """What a stage hands on, from the state after it: its last value, a block's hidden state, or the logits."""
    if isinstance(stage, TracedStage):
        return first_tensor(state[stage.nodes[-1]])
    if isinstance(state, BlockState):
        return first_tensor(state.args[0])
    return first_tensor(state)


def replace_output(state: State, hidden: Tensor) -> State:
    """The state between named blocks where the last one gave another hidden state."""
    output = hidden if isinstance(state.output, Tensor | None) else (hidden, *state.output[1:])
    return replace(state, args=(hidden, *state.args[1:]), output=output)


def join_states(states: Sequence[State], sizes: Sequence[int]) -> State:
    """The state of several batches at once: what runs along the samples is joined, the rest is the first's.

    sizes  samples of each batch
    """
    first = states[0]
    if isinstance(first, Tensor):
        along = all(state.ndim and len(state) == size for state, size in zip(states, sizes, strict=True))
        return torch.cat(list(states)) if along else first
    if isinstance(first, Mapping):
        return {key: join_states([state[key] for state in states], sizes) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(join_states(parts, sizes) for parts in zip(*states, strict=True))
    if isinstance(first, (BlockState, Batch)):
        parts = {one.name: join_states([getattr(state, one.name) for state in states], sizes) for one in fields(first)}
        return type(first)(**parts)
    return first


def pick_samples(state: State, chosen: Tensor, samples: int) -> State:
    """The state of some samples only; what does not run along `samples` samples stays as it is.

    chosen  int64, their numbers
    """
    if isinstance(state, Tensor):
        return state[chosen] if state.ndim and len(state) == samples else state
    if isinstance(state, Mapping):
        return {key: pick_samples(value, chosen, samples) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        return type(state)(pick_samples(value, chosen, samples) for value in state)
    if isinstance(state, (BlockState, Batch)):
        parts = {one.name: pick_samples(getattr(state, one.name), chosen, samples) for one in fields(state)}
        return type(state)(**parts)
    return state


def execution_order(module: nn.Module, names: set[str], example: Batch) -> list[str]:
    """The named modules that a forward pass calls, in the order of their first call.

    raises  ModelError where the module does not run on the example
    """
    order: dict[str, None] = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name in names
    ]
    try:
        with torch.no_grad():
            run_model(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)
