"""A live model is traced here as a torch.fx graph that runs on any copy of the model, node by node."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from qcompress.data.batches import Batch, first_tensor
from qcompress.data.foreign import first_line

Values: TypeAlias = dict[fx.Node, Any]
"""The values of the nodes that are still needed."""

RELATIVE_TOLERANCE = 1e-4
"""How far a trace may be from its model: what another order of summation explains."""

_IN_PLACE: Mapping[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class Untraceable(Exception):
    """Why torch.fx cannot follow the model, on one line."""


class _Tracer(fx.Tracer):
    """Follows every module but torch's own and the named ones."""

    def __init__(self, leaves: Collection[str]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._leaves:
            return True
        # torch's own encoder layers are looked into where they hold layers that are compressed.
        inside = any(name.startswith(f"{module_qualified_name}.") for name in self._leaves)
        return not inside and super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, layers: Collection[str], example: Batch) -> fx.Graph:
    """The graph of `module` in eval mode; the modules named in `layers` stay whole.

    Nothing in it works in place, so that it can be run again from values that were kept.

    raises  Untraceable where torch.fx cannot follow the model, or where what it followed computes something else
    """
    concrete = {name: None for name in _optional_inputs(module) if name not in example.kwargs}
    try:
        graph = _Tracer(layers).trace(module, concrete_args=concrete or None)
    except Exception as error:
        # Whatever the model's own code does with a proxy may raise anything.
        raise Untraceable(first_line(error)) from None
    _without_in_place(graph)
    with torch.no_grad():
        expected = first_tensor(module(*example.args, **example.kwargs))
        try:
            found = first_tensor(run(graph, module, example))
        except Exception as error:
            raise Untraceable(" ".join(f"its trace does not run: {error}".split())[:200]) from None
    scale = float(expected.abs().max()) + torch.finfo(expected.dtype).tiny
    if found.shape != expected.shape or float((found - expected).abs().max()) > RELATIVE_TOLERANCE * scale:
        raise Untraceable("its trace gives other outputs than the model")
    return graph


def _optional_inputs(module: nn.Module) -> list[str]:
    """The arguments of forward that have a default, which a call may leave out."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [one.name for one in parameters if one.default is not one.empty]


def _without_in_place(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _IN_PLACE.get(node.target, node.target)
            if node.kwargs.get("inplace"):
                node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            with graph.inserting_before(node):
                copy = graph.call_method("clone", (node.args[0],))
            node.args = (copy, *node.args[1:])


def start(graph: fx.Graph, batch: Batch) -> Values:
    """The values of the graph's inputs for one batch."""
    values: Values = {}
    positional = iter(batch.args)
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            values[node] = batch.kwargs[name] if name in batch.kwargs else next(positional, None)
    return values


def step(module: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The value of one node on `module`, which may be any copy of the model that was traced."""
    args = fx.node.map_arg(node.args, lambda one: values[one])
    kwargs = fx.node.map_arg(node.kwargs, lambda one: values[one])
    match node.op:
        case "placeholder":
            return values[node]
        case "get_attr":
            return operator.attrgetter(str(node.target))(module)
        case "call_function":
            function: Callable[..., Any] = node.target  # type: ignore[assignment]
            return function(*args, **kwargs)
        case "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        case "call_module":
            return module.get_submodule(str(node.target))(*args, **kwargs)
        case _:
            return args[0]


def run(graph: fx.Graph, module: nn.Module, batch: Batch) -> Any:
    """What `module`, a copy of the traced model, gives for a batch."""
    values = start(graph, batch)
    for node in graph.nodes:
        values[node] = step(module, node, values)
        if node.op == "output":
            return values[node]
    return None
