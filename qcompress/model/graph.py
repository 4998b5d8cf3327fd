"""A traced network says who feeds whom: each layer's batch norm and activation, its input layers, its blocks."""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.operations import BatchNorm, batch_norm_at, clip_bounds, kind_of
from qcompress.model.stages import TracedStage, cut_nodes
from qcompress.model.trace import start, step

MERGED_LAYERS = 8
"""A block of the network's own making joins layers into one unit up to this many; a residual part may have more."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Activation:
    """What is applied to a layer's output.

    kind  `relu`; `capped`, ReLU that ends at `cap`, as ReLU6; `slope`, linear on either side of zero, as PReLU;
          `identity` where another layer, a sum, a pooling or the network's end follows at once; `other`
    """

    kind: Literal["relu", "capped", "slope", "identity", "other"]
    cap: float | None = None


def layer_call(live: LiveModel, layer: str) -> fx.Node | None:
    """The node that calls a layer, where a single one does."""
    calls = [node for node in live.graph.nodes if node.op == "call_module" and node.target == layer]
    return calls[0] if len(calls) == 1 else None


def single_consumer(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """The one node that reads the values of `node`, past nodes that change nothing; None where several do.

    Nodes that read only a shape do not count.
    """
    while True:
        readers = [user for user in node.users if kind_of(module, user) != "shape"]
        if len(readers) != 1:
            return None
        if kind_of(module, readers[0]) != "identity":
            return readers[0]
        node = readers[0]


def batch_norm_of(live: LiveModel, layer: str) -> BatchNorm | None:
    """The batch norm that alone reads a layer's output and that serves no other layer."""
    call = layer_call(live, layer)
    reader = None if call is None else single_consumer(live.module, call)
    norm = None if reader is None else batch_norm_at(live.module, reader)
    if norm is None or channel_axis(live, layer) != 1:
        return None
    return norm if all(read_once(live, tensor) for tensor in norm.tensors) else None


def activation_after(live: LiveModel, layer: str, *, through_batch_norm: bool = True) -> Activation | None:
    """What is applied to a layer's output, after its batch norm where it has one and `through_batch_norm` says so.

    None where several nodes read what an activation would be applied to, so that none belongs to the layer alone, and
    for a layer that is called more than once.
    """
    node = layer_call(live, layer)
    norm = batch_norm_of(live, layer) if through_batch_norm else None
    reader = None if node is None else single_consumer(live.module, node if norm is None else norm.node)
    return None if reader is None else activation_at(live.module, reader)


def activation_at(module: nn.Module, node: fx.Node) -> Activation:
    """What a node is as an activation."""
    match kind_of(module, node):
        case "clip":
            low, high = clip_bounds(module, node) or (math.nan, math.nan)
            if low != 0 or math.isnan(high):
                return Activation("other")
            return Activation("relu") if math.isinf(high) else Activation("capped", high)
        case "slope":
            return Activation("slope")
        case "nonlinear":
            return Activation("other")
        case _:
            return Activation("identity")


def read_once(live: LiveModel, tensor: str) -> bool:
    """Whether a single node reads a tensor of the network, under this name or another that it is tied to."""
    return _notes(live).reads[id(find_tensor(live.module, tensor))] <= 1


def channel_axis(live: LiveModel, layer: str) -> int | None:
    """The axis of a layer's output along which its channels lie; None for a convolution of a sample without a batch."""
    module: Any = live.module.get_submodule(layer)
    call = layer_call(live, layer)
    rank = len(node_shapes(live).get(call, ())) if call is not None else 0
    if isinstance(module, nn.Linear):
        return rank - 1
    return 1 if rank == module.weight.ndim else None


def node_shapes(live: LiveModel) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every value that is one tensor, for the batch that is the live model's example."""
    return _notes(live).shapes


def node_numbers(live: LiveModel) -> dict[fx.Node, float]:
    """The value of every node that is a number, such as a size, for the batch that is the live model's example."""
    return _notes(live).numbers


@dataclass(frozen=True)
class _Notes:
    """What a graph does not say of itself.

    reads  how many nodes read each parameter and buffer, by identity
    """

    shapes: dict[fx.Node, tuple[int, ...]]
    numbers: dict[fx.Node, float]
    reads: Counter[int]


def _notes(live: LiveModel) -> _Notes:
    """Made once and kept on the graph, which never changes."""
    first = next(iter(live.graph.nodes))
    if "notes" not in first.meta:
        first.meta["notes"] = _Notes(*_measure(live), _count_reads(live))
    notes: _Notes = first.meta["notes"]
    return notes


@torch.no_grad()
def _measure(live: LiveModel) -> tuple[dict[fx.Node, tuple[int, ...]], dict[fx.Node, float]]:
    shapes: dict[fx.Node, tuple[int, ...]] = {}
    numbers: dict[fx.Node, float] = {}
    values = start(live.graph, live.example)
    for node in live.graph.nodes:
        value = values[node] = step(live.module, node, values)
        if isinstance(value, Tensor):
            shapes[node] = tuple(value.shape)
        elif isinstance(value, (int, float)):
            numbers[node] = value
    return shapes, numbers


def _count_reads(live: LiveModel) -> Counter[int]:
    reads: Counter[int] = Counter()
    for node in live.graph.nodes:
        if node.op == "call_module":
            owner = live.module.get_submodule(str(node.target))
            reads.update({id(one) for one in chain(owner.parameters(), owner.buffers())})
        elif node.op == "get_attr":
            reads[id(operator.attrgetter(str(node.target))(live.module))] += len(node.users)
    return reads


def input_layers(live: LiveModel) -> set[str]:
    """The layers that see the network's own input: no compressed layer lies before them."""
    names = set(live.layers)
    behind: set[fx.Node] = set()
    found: set[str] = set()
    for node in live.graph.nodes:
        is_layer = node.op == "call_module" and str(node.target) in names
        after = any(source in behind for source in node.all_input_nodes)
        if is_layer and not after:
            found.add(str(node.target))
        if is_layer or after:
            behind.add(node)
    return found


def inputs_of_network(live: LiveModel) -> set[str]:
    """The layers that see the network's own input; of a network that cannot be traced the first that is called."""
    if live.at is not None:
        return {*live.at.inputs}
    return input_layers(live) if live.traced else set(live.layers[:1])


def make_blocks(live: LiveModel) -> tuple[TracedStage, ...]:
    """The traced network as blocks that run one after another, each from the single value that the one before gives.

    Every block holds at least one compressed layer. Residual parts are never cut; layers in a row that belong to one
    module of the network's own making, such as a depthwise and a pointwise convolution, form one block.
    """
    nodes = [node for node in live.graph.nodes if node.op != "placeholder"]
    parts = _parts(nodes, set(live.layers))
    if not parts:
        return ()
    merged: list[tuple[int, list[str]]] = []
    for block, group in groupby(parts, key=lambda part: _module_around(live.module, part[1])):
        run = list(group)
        layers = [name for _, names in run for name in names]
        whole = block is not None and len(layers) <= MERGED_LAYERS
        merged += [(run[0][0], layers)] if whole else run
    cuts = [begin for begin, _ in merged]
    return tuple(cut_nodes(live.graph, nodes, [0, *cuts[1:], len(nodes)], [names for _, names in merged]))


def _parts(nodes: list[fx.Node], layers: set[str]) -> list[tuple[int, list[str]]]:
    """Where parts between two single values begin, and their layers; what holds no layer ends the part before it."""
    parts: list[tuple[int, list[str]]] = [(0, [])]
    single = _single_values(nodes, layers)
    for index, node in enumerate(nodes):
        if index in single:
            parts.append((index, []))
        if node.op == "call_module" and str(node.target) in layers and node.target not in parts[-1][1]:
            parts[-1][1].append(str(node.target))
    return [part for part in parts if part[1]]


def _single_values(nodes: list[fx.Node], layers: set[str]) -> set[int]:
    """The places before which the values that are still needed are one, and no layer is between two of its calls."""
    index = {node: place for place, node in enumerate(nodes)}
    last_use = {source: place for place, node in enumerate(nodes) for source in node.all_input_nodes}
    change = [0] * (len(nodes) + 2)
    for source, last in last_use.items():
        # A tensor of the network can be read anywhere.
        if source.op != "get_attr":
            change[index.get(source, -1) + 1] += 1
            change[last + 1] -= 1
    calls: dict[str, list[int]] = {}
    for node, place in index.items():
        if node.op == "call_module" and str(node.target) in layers:
            calls.setdefault(str(node.target), []).append(place)
    for places in calls.values():
        # Two calls of one layer bind all between them: another value stays alive, as it were.
        change[places[0] + 1] += 1
        change[places[-1] + 1] -= 1
    single, alive = set(), 0
    for place in range(len(nodes)):
        alive += change[place]
        if place and alive == 1:
            single.add(place)
    return single


def _module_around(module: nn.Module, layers: list[str]) -> str | None:
    """The innermost module of the network's own making that holds all the layers; None where that is the network."""
    paths = [name.split(".")[:-1] for name in layers]
    common = [steps[0] for steps in takewhile(lambda steps: len({*steps}) == 1, zip(*paths, strict=False))]
    while common and isinstance(module.get_submodule(".".join(common)), CONTAINERS):
        common.pop()
    return ".".join(common) or None
