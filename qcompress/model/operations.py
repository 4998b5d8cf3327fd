"""A node of a traced graph has one name for what it computes, whether it is a module, a function or a method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import fx, nn

Kind: TypeAlias = Literal[
    "batch_norm",
    "clip",
    "slope",
    "identity",
    "max_pool",
    "average_pool",
    "mean",
    "pad",
    "resize",
    "reshape",
    "slice",
    "add",
    "concatenate",
    "shape",
    "nonlinear",
    "other",
]


def _named(kind: Kind, *names: str) -> dict[str, Kind]:
    """The names with this kind, and what has one name a number of dimensions with all three."""
    return {name.replace("*", str(d)): kind for name in names for d in (1, 2, 3)}


_KINDS: dict[str, Kind] = {
    **_named("batch_norm", "batchnorm", "batchnorm*d", "syncbatchnorm"),
    **_named("clip", "relu", "relu6", "hardtanh", "clamp", "clip", "clampmin", "clampmax"),
    **_named("slope", "prelu", "leakyrelu"),
    **_named("identity", "identity", "contiguous", "clone", "detach", "float"),
    **_named("identity", "dropout", "dropout*d", "alphadropout", "featuredropout", "featurealphadropout"),
    **_named("max_pool", "maxpool*d", "adaptivemaxpool*d"),
    **_named("average_pool", "avgpool*d", "adaptiveavgpool*d"),
    **_named("mean", "mean"),
    **_named("pad", "pad", "zeropad*d", "constantpad*d", "reflectionpad*d", "replicationpad*d", "circularpad*d"),
    **_named("resize", "interpolate", "upsample", "upsamplingnearest*d", "upsamplingbilinear*d"),
    **_named("reshape", "flatten", "reshape", "view", "squeeze", "unsqueeze"),
    **_named("slice", "getitem"),
    **_named("add", "add"),
    **_named("concatenate", "cat", "concat", "concatenate"),
    **_named("shape", "size", "dim", "ndimension", "numel"),
    **_named("nonlinear", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu", "selu", "celu", "mish"),
    **_named("nonlinear", "softplus", "softsign", "logsigmoid", "softmax", "logsoftmax", "rrelu", "glu", "threshold"),
    **_named("nonlinear", "hardshrink", "softshrink", "tanhshrink", "softmin", "softmax2d", "exp", "square", "sqrt"),
}
"""By the lower-case name of a class, function or method, without underscores."""


def kind_of(module: nn.Module, node: fx.Node) -> Kind:
    """What a node of the graph of `module` computes; `other` for what is not known, which is no statement on it."""
    if node.op == "call_module":
        owner = type(module.get_submodule(str(node.target)))
        # A class of the same name from elsewhere may compute anything.
        return _KINDS.get(owner.__name__.lower(), "other") if owner.__module__.startswith("torch.nn.") else "other"
    if node.op == "call_method":
        return _KINDS.get(_plain(str(node.target)), "other")
    if node.op != "call_function":
        return "other"
    if node.target is getattr:
        return "shape" if node.args[1] in ("shape", "ndim", "dtype", "device") else "other"
    if not str(getattr(node.target, "__module__", "")).startswith(("torch", "_operator")):
        return "other"
    name = _plain(getattr(node.target, "__name__", ""))
    # Dropout as a function drops unless it is told that it is not training.
    return "other" if "dropout" in name and option(module, node, "training", 2, True) else _KINDS.get(name, "other")


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def option(module: nn.Module, node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    """An option of a node: the module's attribute, or the argument of that name or at that position, x being 0."""
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), name, default)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def clip_bounds(module: nn.Module, node: fx.Node) -> tuple[float, float] | None:
    """The least and the largest value that a `clip` node lets through; None where they are no numbers."""
    name = _operation_name(module, node)
    low: Any
    high: Any
    match name:
        case "relu":
            low, high = 0.0, None
        case "relu6":
            low, high = 0.0, 6.0
        case "hardtanh":
            low, high = option(module, node, "min_val", 1, -1.0), option(module, node, "max_val", 2, 1.0)
        case "clampmin":
            low, high = option(module, node, "min", 1), None
        case "clampmax":
            low, high = None, option(module, node, "max", 1)
        case _:
            low, high = option(module, node, "min", 1), option(module, node, "max", 2)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _operation_name(module: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__.lower()
    return _plain(str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", ""))


@dataclass(frozen=True)
class Padding:
    """What a `pad` node adds.

    amounts   places before and behind, from the last axis to the first; below 0 it takes away
    constant  whether it adds `value`; else what it finds in its input
    """

    amounts: tuple[int, ...]
    constant: bool
    value: float


def padding_at(module: nn.Module, node: fx.Node, numbers: Mapping[fx.Node, float]) -> Padding | None:
    """The padding of a `pad` node, None where it is not known.

    numbers  what nodes that are numbers, such as sizes, have been seen to be
    """
    if node.op == "call_module":
        own: Any = module.get_submodule(str(node.target))
        constant = type(own).__name__.startswith(("Zero", "Constant"))
        return Padding(tuple(own.padding), constant, float(getattr(own, "value", 0.0)))
    amounts, value = option(module, node, "pad", 1), option(module, node, "value", 3)
    if not isinstance(amounts, (tuple, list)):
        return None
    known = [numbers.get(one) if isinstance(one, fx.Node) else one for one in (*amounts, value or 0.0)]
    if any(one is None for one in known):
        return None
    *places, filler = (float(one) for one in known if one is not None)
    mode = option(module, node, "mode", 2, "constant")
    return Padding(tuple(int(place) for place in places), mode == "constant", filler)


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm in eval mode: the names of its tensors, and its eps.

    weight, bias  None where it is not affine
    """

    node: fx.Node
    running_mean: str
    running_var: str
    weight: str | None
    bias: str | None
    eps: float

    @property
    def affine(self) -> bool:
        return self.weight is not None and self.bias is not None

    @property
    def owner(self) -> str:
        """The module that holds its tensors."""
        return self.running_mean.rpartition(".")[0]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(one for one in (self.running_mean, self.running_var, self.weight, self.bias) if one is not None)


def batch_norm_at(module: nn.Module, node: fx.Node) -> BatchNorm | None:
    """The batch norm that a node computes, as a module or as a function of a module's tensors.

    None for any other node, and for one that uses its batch's statistics.
    """
    if kind_of(module, node) != "batch_norm":
        return None
    if node.op == "call_module":
        own: Any = module.get_submodule(str(node.target))
        parts = ("running_mean", "running_var", "weight", "bias")
        names = [f"{node.target}.{part}" if getattr(own, part) is not None else None for part in parts]
    else:
        if option(module, node, "training", 5, False):
            return None
        parts = ("running_mean", "running_var", "weight", "bias")
        values = [option(module, node, part, position) for position, part in enumerate(parts, start=1)]
        if any(value is not None and not (isinstance(value, fx.Node) and value.op == "get_attr") for value in values):
            return None
        names = [None if value is None else str(value.target) for value in values]
    mean, variance, weight, bias = names
    if mean is None or variance is None:
        return None
    return BatchNorm(node, mean, variance, weight, bias, float(option(module, node, "eps", 7, 1e-5)))


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The values that an `add` or a `concatenate` joins, in order, with repetitions; numbers are left out."""
    found = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args[:2]
    return [one for one in found if isinstance(one, fx.Node)]
