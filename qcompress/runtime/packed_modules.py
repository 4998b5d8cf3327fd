"""Modules of a network read packed weights where they read parameters: any module that asks itself for its weight.

A module's class becomes a subclass of its own, in which the parameter is a property that decodes. An embedding decodes
the rows that it looks up; a linear layer may compute from codes by a kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from qcompress.coding.grids import exponent_of, from_half, middle
from qcompress.runtime.packed_weight import PackedWeight
from qcompress.types.encoded import Affine, Compressed

HOLDER = "{}_packed"
"""The name of the submodule that holds a parameter's codes."""
PLAIN, NAMES = "plain_class", "packed_names"
"""What a class with packed parameters says of itself: the class that it is made of, and the parameters' names."""
INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS = 16
"""torch's kernel takes rows by so many."""


def takes_packed(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module can be held packed.

    Recurrent layers read theirs from a list of their own; what a parametrization is made of is read while it is loaded.
    """
    return name in module._parameters and not isinstance(module, nn.RNNBase | ParametrizationList)


def put_packed(module: nn.Module, name: str, weight: PackedWeight) -> None:
    """Hold a parameter of a module as codes from now on; anew where it is held so. `takes_packed` says where it can."""
    module._parameters.pop(name, None)
    module.add_module(HOLDER.format(name), weight)
    kind = type(module)
    if name in kind.__dict__.get(NAMES, ()):
        return
    plain: type[nn.Module] = kind.__dict__.get(PLAIN, kind)
    names = (*kind.__dict__.get(NAMES, ()), name)
    # A class can be hashed, whatever its instances say.
    module.__class__ = _packed_class(plain, names)  # type: ignore[arg-type]


@cache
def _packed_class(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of a class of modules whose parameters of these names are decoded when they are read."""
    bases: tuple[type, ...] = (plain,)
    for own in _FROM_CODES:
        kind = own.__mro__[1]
        if names == ("weight",) and issubclass(plain, kind):
            # Behind a class with a forward of its own, which then calls ours in place of torch's.
            bases = (own,) if plain is kind else (plain, own)
    body: dict[str, Any] = {name: property(_reader(HOLDER.format(name))) for name in names}
    return type(f"Packed{plain.__name__}", bases, body | {PLAIN: plain, NAMES: names, "__module__": __name__})


def _reader(holder: str) -> Any:
    def read(module: nn.Module) -> Tensor:
        return cast("PackedWeight", module._modules[holder]).decode()

    return read


class PackedEmbedding(nn.Embedding):
    """An embedding that decodes the rows that it looks up, no others."""

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None:
            return super().forward(input)
        return cast("PackedWeight", self._modules["weight_packed"]).decode_rows(input)


class PackedLinear(nn.Linear):
    """A linear layer that computes from codes, where its weight is of Int4Weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self._modules["weight_packed"]
        if isinstance(weight, Int4Weight) and input.dtype == torch.bfloat16:
            found = weight.matmul(input)
            return found if self.bias is None else found + self.bias
        return super().forward(input)


_FROM_CODES = (PackedEmbedding, PackedLinear)


class Int4Weight(PackedWeight):
    """A weight of 4 bits as torch's kernel for processors holds it: scales and offsets rounded to bfloat16.

    Its values are not exactly those of the artifact: relative errors of 2**-9 in scales and offsets, as in everything
    that a network in bfloat16 computes.
    """

    codes: Tensor
    grids: Tensor

    def __init__(self, encoded: Affine, group: int) -> None:
        super().__init__(encoded.shape, encoded.dtype)
        self._group = group
        scale = from_half(encoded.scale, exponent_of(encoded))
        if encoded.offset is not None:
            offset = from_half(encoded.offset, exponent_of(encoded)) + 8 * scale
        elif encoded.zero_point is not None:
            offset = (8 - encoded.zero_point.float()) * scale
        else:
            assert encoded.convention is not None
            offset = (8 - middle(encoded.convention, encoded.bits)) * scale
        rows, columns = encoded.codes.shape
        groups = columns // group
        # A grid may be longer than the kernel's groups are: then several have the same.
        both = torch.stack((scale, offset), -1).bfloat16().expand(rows, -1, 2)
        both = both.repeat_interleave(groups // both.shape[1], dim=1)
        self.register_buffer("grids", both.transpose(0, 1).contiguous().view(torch.int16))
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(encoded.codes.int().contiguous(), 1)
        self.register_buffer("codes", codes)

    def matmul(self, input: Tensor) -> Tensor:
        """input [..., columns], bfloat16, times the transposed weight: [..., rows]."""
        grids = self.grids.view(torch.bfloat16)
        flat = input.reshape(-1, input.shape[-1])
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, self._group, grids)
        return cast("Tensor", found).reshape(*input.shape[:-1], -1)

    def decode(self) -> Tensor:
        unit = torch.eye(self.shape[1], dtype=torch.bfloat16, device=self.codes.device)
        return self.matmul(unit).T.contiguous().to(self.dtype)


def int4_weight(module: nn.Module, name: str, encoded: Compressed, dtype: torch.dtype) -> Int4Weight | None:
    """The weight of a linear layer as torch's 4-bit kernel computes from it; None where the kernel is not for it.

    The kernel is fast in bfloat16 alone, on processors, for grids that fill its groups.
    """
    if not isinstance(module, nn.Linear) or name != "weight" or not isinstance(encoded, Affine):
        return None
    if dtype != torch.bfloat16 or encoded.bits != 4 or encoded.axis != (0,) or encoded.codes.is_cuda:
        return None
    rows, columns = encoded.codes.shape
    grid = -(-columns // encoded.scale.shape[1]) if encoded.group_size is None else encoded.group_size
    fitting = [group for group in INT4_GROUPS if grid % group == 0 and columns % grid == 0]
    return Int4Weight(encoded, fitting[-1]) if fitting and rows % INT4_ROWS == 0 else None
