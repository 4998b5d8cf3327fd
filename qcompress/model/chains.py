"""Cross-layer equalization may scale these pairs of layers: the path between them is positively homogeneous."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from qcompress.model.fold import is_free, kernels
from qcompress.model.graph import (
    activation_at,
    batch_norm_of,
    channel_axis,
    layer_call,
    node_numbers,
    node_shapes,
    single_consumer,
)
from qcompress.model.layers import CONVOLUTIONS, TRANSPOSED
from qcompress.model.live import LiveModel
from qcompress.model.operations import kind_of, option, padding_at


@dataclass(frozen=True)
class Link:
    """Two layers with nothing between the first (and its batch norm) and the second but what keeps channels apart and
    gives s times its values for s times its input, for any s > 0 a channel.

    rectified  whether values below zero change on the way, as by ReLU
    cap        where the activation ends, as ReLU6 does at 6: then the cap must be scaled too
    padded     whether the second layer also sees zeros that the first did not give
    repeats    how many inputs of the second, side by side, hold one channel: more than 1 where places were flattened
    """

    first: str
    second: str
    rectified: bool
    cap: float | None
    padded: bool
    repeats: int


def equalization_links(live: LiveModel, layers: Collection[str]) -> list[Link]:
    """The links among the given layers, in the order of the graph; every layer in them is free (model.fold)."""
    free = {name for name in layers if is_free(live, name)}
    links = [_link_from(live, name, free) for name in live.layers if name in free]
    return [link for link in links if link is not None]


def join_links(live: LiveModel, links: Sequence[Link]) -> list[tuple[Link, ...]]:
    """The links in rows: what goes through a depthwise layer is scaled before and behind it at once."""
    after = {link.first: link for link in links}
    rows: list[tuple[Link, ...]] = []
    joined: set[str] = set()
    for link in links:
        if link.first in joined:
            continue
        row = [link]
        while row[-1].repeats == 1 and _is_depthwise(live.module, row[-1].second) and row[-1].second in after:
            row.append(after[row[-1].second])
        joined |= {one.first for one in row}
        rows.append(tuple(row))
    return rows


def cap_module(live: LiveModel, link: Link) -> str:
    """The module whose outputs a cap on this link bounds from above: of the first layer's batch norm, or its own.

    Where the batch norm is a function, its activation takes its place if it is a module of its own, so that a cap holds
    for the traced network too.
    """
    norm = batch_norm_of(live, link.first)
    if norm is None or norm.node.op == "call_module":
        return link.first if norm is None else norm.owner
    reader = single_consumer(live.module, norm.node)
    alone = reader is not None and reader.op == "call_module" and layer_call(live, str(reader.target)) is not None
    return str(reader.target) if reader is not None and alone else norm.owner


def _is_depthwise(module: nn.Module, name: str) -> bool:
    """Whether every channel of the layer comes from one channel, in order."""
    layer: Any = module.get_submodule(name)
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def _link_from(live: LiveModel, name: str, free: Collection[str]) -> Link | None:
    """The link that begins at a layer, if there is one."""
    norm, axis = batch_norm_of(live, name), channel_axis(live, name)
    node = layer_call(live, name) if norm is None else norm.node
    rectified, padded, cap, at_once = False, False, None, True
    while node is not None and (reader := single_consumer(live.module, node)) is not None:
        if reader.op == "call_module" and str(reader.target) in live.layers:
            link = Link(name, str(reader.target), rectified, cap, padded, 1)
            return _arrived(live, link, reader, axis) if link.second in free else None
        activation = activation_at(live.module, reader)
        if activation.kind == "identity":
            if axis != 1 or not keeps_channels(live, reader):
                return None
            padded = padded or _adds_zeros(live, reader)
        elif activation.kind == "other" or (activation.cap is not None and not (at_once and axis == 1)):
            # A cap is that of the layer's own channels, so it must come before anything else.
            return None
        else:
            rectified, cap = True, activation.cap or cap
        node, at_once = reader, False
    return None


def _arrived(live: LiveModel, link: Link, call: fx.Node, axis: int | None) -> Link | None:
    """The link with what depends on its second layer; None where its channels are not those of the first."""
    first: Any = live.module.get_submodule(link.first)
    second: Any = live.module.get_submodule(link.second)
    rank = len(node_shapes(live)[call])
    expected = rank - 1 if isinstance(second, nn.Linear) else 1
    outputs, inputs = kernels(first, first.weight), kernels(second, second.weight)
    repeats, rest = divmod(inputs.shape[0] * inputs.shape[2], outputs.shape[0] * outputs.shape[1])
    if axis != expected or rest or (rank != second.weight.ndim and not isinstance(second, nn.Linear)):
        return None
    # A transposed convolution does not meet every place of its output with all of its kernel positions.
    padded = link.padded or isinstance(second, TRANSPOSED) or _pads_with_zeros(second)
    return replace(link, padded=padded, repeats=repeats)


def _pads_with_zeros(module: Any) -> bool:
    if not isinstance(module, CONVOLUTIONS) or module.padding_mode != "zeros":
        return False
    if isinstance(module.padding, str):
        return module.padding == "same" and max(module.kernel_size) > 1
    return any(module.padding)


def keeps_channels(live: LiveModel, node: fx.Node) -> bool:
    """Whether a node treats every channel (axis 1) by itself, as a function that is linear or takes a maximum.

    Where it reshapes, a channel may become several in a row.
    """
    module, shapes = live.module, node_shapes(live)
    before, after = shapes.get(node.all_input_nodes[0], ()), shapes.get(node, ())
    if len(before) < 2 or len(after) < 2 or before[0] != after[0] or not before[1] or after[1] % before[1]:
        return False
    same = before[1] == after[1]
    match kind_of(module, node):
        case "max_pool" | "average_pool" | "resize":
            return same and len(before) > 2
        case "mean":
            found = option(module, node, "dim", 1)
            dims = (found,) if isinstance(found, int) else tuple(found or (0,))
            return all(dim % len(before) >= 2 for dim in dims)
        case "pad":
            padding = padding_at(module, node, node_numbers(live))
            return padding is not None and padding.value == 0 and not any(padding.amounts[2 * (len(before) - 2) :])
        case "slice":
            index = node.args[1]
            return same and isinstance(index, tuple) and index[:2] == (slice(None), slice(None))
        case "reshape":
            return True
        case _:
            return False


def _adds_zeros(live: LiveModel, node: fx.Node) -> bool:
    """Whether a node that keeps channels also makes zeros of its own."""
    module = live.module
    if kind_of(module, node) == "average_pool":
        amounts = option(module, node, "padding", 3, 0)
        return any(amounts) if isinstance(amounts, (tuple, list)) else bool(amounts)
    padding = padding_at(module, node, node_numbers(live)) if kind_of(module, node) == "pad" else None
    return padding is not None and padding.constant and any(padding.amounts)
