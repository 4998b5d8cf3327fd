"""Which matrix products a network's weights stand in, which module computes each, and what flows into it.

A plain layer is called with its input. What is multiplied inside a module is seen there: the states of a recurrent
layer by running it step by step, the products of attention and of stacked experts by watching a call of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qcompress.model.layers import TRANSPOSED, InnerProduct, Inputs, MatrixLayer, Parts, matrix_layer
from qcompress.model.recurrent import is_recurrent, recurrent_inputs
from qcompress.types.config import Shape

ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


@dataclass(frozen=True)
class Call:
    """What a module was called with.

    version  of its one tensor, which rises with each change in place; None where it has several arguments, or others
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    version: int | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call, while it is made."""
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        return cls(args, kwargs, args[0]._version if alone else None)

    def is_like(self, other: Call) -> bool:
        """Whether both were given the same values: one and the same tensor, unchanged between them."""
        return self.version is not None and self.version == other.version and self.args[0] is other.args[0]

    @property
    def first(self) -> Any:
        """Its first argument, which is the input of most modules."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


@dataclass(frozen=True)
class Product:
    """The matrix product that a weight stands in.

    weight  its name within the module
    caller  the module whose calls show what flows into it
    layer   how a Gram is made of that
    axis    the channel axes of a weight that is watched
    """

    weight: str
    caller: str
    layer: MatrixLayer | InnerProduct
    axis: tuple[int, ...] = (0,)

    @property
    def tensor(self) -> str:
        """The name of the weight in the network."""
        return f"{self.caller}.{self.weight}" if self.caller else self.weight

    def rows_of(self, weight: Tensor) -> int:
        """How many rows the weight has, each of the inputs' length."""
        if isinstance(self.layer, InnerProduct):
            return self.layer.rows
        if isinstance(self.layer.module, TRANSPOSED):
            return weight.shape[1] * (1 if self.layer.joined else self.layer.groups)
        return weight.shape[1 if type(self.layer.module).__name__ == "Conv1D" else 0]

    def inputs(self, network: nn.Module, calls: Sequence[Call]) -> list[Inputs]:
        """What each call of the module gives the product in `network`, which is the one that was called or a copy."""
        if isinstance(self.layer, MatrixLayer):
            return [call.first for call in calls]
        module = network.get_submodule(self.caller)
        return [self._seen(module, self.layer.rows, call) for call in calls]

    def _seen(self, module: nn.Module, rows: int, call: Call) -> Parts:
        if is_recurrent(module):
            return {(0, rows): recurrent_inputs(module, self.weight, call.args, call.kwargs).detach()}
        owner, _, leaf = self.weight.rpartition(".")
        watch = _Watch(getattr(module.get_submodule(owner), leaf), self.axis)
        with torch.no_grad(), _plainly(module), watch:
            module.forward(*call.args, **call.kwargs)
        return {span: torch.cat(found) for span, found in watch.found.items()}


def product_of(module: nn.Module, tensor: str) -> Product | None:
    """The product that a tensor of a network stands in, or None for one that stands in none that is known."""
    name, _, leaf = tensor.rpartition(".")
    try:
        owner = module.get_submodule(name)
    except AttributeError:
        # A network may name what it saves otherwise than its modules.
        return None
    value = getattr(owner, leaf, None)
    if not isinstance(value, Tensor):
        return None
    shape = tuple(value.shape)
    parent, _, child = name.rpartition(".")
    for attention, weight in ((name, leaf), (parent, f"{child}.{leaf}")):
        if weight in ATTENTION_WEIGHTS and _is_attention(module.get_submodule(attention)):
            return Product(weight, attention, InnerProduct(shape[0]))
    if leaf == "weight" and (layer := matrix_layer(owner)) is not None:
        return Product(leaf, name, layer)
    if is_recurrent(owner) and leaf.startswith("weight_"):
        return Product(leaf, name, InnerProduct(shape[0]))
    axis = stacked_axis(owner, shape)
    return None if axis is None else Product(leaf, name, InnerProduct(shape[0] * shape[axis[1]]), axis)


def caller_of(module: nn.Module, tensor: str) -> str:
    """The module whose calls show what flows into a tensor: the one that it belongs to, or what multiplies by it."""
    product = product_of(module, tensor)
    return tensor.rpartition(".")[0] if product is None else product.caller


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def stacked_axis(module: nn.Module, shape: Shape) -> tuple[int, int] | None:
    """The channel axes of the stacked weights of transformers' experts, whose products can be watched; else None."""
    transposed = getattr(module, "is_transposed", None)
    count = getattr(module, "num_experts", None)
    known = isinstance(transposed, bool) and hasattr(module, "config") and len(shape) == 3 and shape[0] == count
    if not known:
        return None
    return (0, 2) if transposed else (0, 1)


@contextmanager
def _plainly(module: nn.Module) -> Iterator[None]:
    """Attention multiplies step by step, stacked experts one after another: a fused operation shows no inputs."""
    config: Any = getattr(module, "config", None)
    experts, fused = getattr(config, "_experts_implementation", None), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if experts is not None:
            config._experts_implementation = "eager"
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if experts is not None:
            config._experts_implementation = experts


_FACTORS: Mapping[Any, int] = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.linear.default: 0,
}
"""Products of two tensors, and where the first of the two stands among the arguments."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what every product multiplies a weight or parts of it by: rows [from, to) -> inputs [positions, columns].

    axis  the channel axes of the weight, whose rows the parts are counted in
    """

    def __init__(self, weight: Tensor, axis: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weight = weight
        self._place = weight.untyped_storage().data_ptr()
        # Of one row to the next, and of one column to the next.
        self._columns = next(size for index, size in enumerate(weight.shape) if index not in axis)
        self._across = next(step for index, step in enumerate(weight.stride()) if index not in axis)
        self._row = weight.stride(axis[-1])
        self._axis = axis
        self.found: dict[tuple[int, int], list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _FACTORS:
            first, second = args[_FACTORS[func] : _FACTORS[func] + 2]
            if func is torch.ops.aten.linear.default:
                second = second.t()
            self._look(second, first)
            self._look(first.mT, second.mT)
        return func(*args, **(kwargs or {}))

    def _look(self, factor: Tensor, x: Tensor) -> None:
        """Keep x [..., positions, columns] where the factor [..., columns, rows] is a part of the weight."""
        if factor.untyped_storage().data_ptr() != self._place or factor.dtype != self._weight.dtype:
            return
        if factor.ndim == 3:
            for part, inputs in zip(factor, x, strict=True):
                self._look(part, inputs)
            return
        if factor.shape[0] != self._columns or (factor.stride(0) != self._across and self._columns > 1):
            return
        if factor.stride(1) != self._row and factor.shape[1] > 1:
            return
        start = self._first_row(int(factor.storage_offset()) - int(self._weight.storage_offset()))
        if start is not None:
            self.found.setdefault((start, start + factor.shape[1]), []).append(x.reshape(-1, x.shape[-1]).detach())

    def _first_row(self, offset: int) -> int | None:
        """The row whose first value lies so far behind the weight's; None where none does."""
        row = 0
        steps = self._weight.stride()
        for axis in sorted(self._axis, key=lambda one: steps[one], reverse=True):
            index, offset = divmod(offset, steps[axis])
            row = row * self._weight.shape[axis] + index
        return row if offset == 0 else None
