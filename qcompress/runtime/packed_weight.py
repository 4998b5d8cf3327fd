"""A weight is held as its codes here, and decoded anew wherever it is read: exactly what the artifact decodes to.

Buffers hold no floating point numbers but one marker, so that a module's `.half()` or `.to(torch.bfloat16)` changes the
dtype that weights are decoded to and no grid. Decoding is traced by torch.compile as one graph.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.coding.grids import TORCH_DTYPES, decode, decode_rows, in_dtype, step_factors, step_table, trellis_values
from qcompress.coding.packing import pack
from qcompress.coding.rows import weight_from_rows
from qcompress.types.config import Shape
from qcompress.types.encoded import Affine, Blocked, Codebook, Compressed, Constant, Table, Unbounded

INTEGERS = {torch.float16: torch.int16, torch.float32: torch.int32}
"""The integers of the same size, as which floating point buffers are held."""
MARKER = "like"


class PackedWeight(nn.Module):
    """A weight of a network that is held as codes.

    shape  of the weight
    """

    like: Tensor

    def __init__(self, shape: Shape, dtype: str) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        # What .to() makes of this one says what dtype the network has.
        self.register_buffer(MARKER, torch.empty(0, dtype=TORCH_DTYPES[dtype]), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network that the weight is part of."""
        return self.like.dtype

    def decode(self) -> Tensor:
        """The weight in its shape and the network's dtype, rounded to the artifact's dtype before."""
        raise NotImplementedError

    def decode_rows(self, rows: Tensor) -> Tensor:
        """Rows of a weight of two dimensions, [*rows.shape, columns]: what indexing the decoded weight gives."""
        return self.decode()[rows]


class PackedCodes(PackedWeight):
    """A weight of one of the forms whose codes have a fixed number of bits: as many are held for each."""

    codes: Tensor

    def __init__(self, encoded: Affine | Table | Blocked | Codebook) -> None:
        super().__init__(encoded.shape, encoded.dtype)
        self._kind = type(encoded)
        self._columns = encoded.codes.shape[1]
        self._parts: dict[str, torch.dtype] = {}
        self._fields: dict[str, Any] = {}
        for field in fields(encoded):
            value = getattr(encoded, field.name)
            if field.name == "codes":
                self.register_buffer("codes", _pack_groups(value, encoded.bits))
            elif isinstance(value, Tensor):
                self._parts[field.name] = value.dtype
                self.register_buffer(field.name, value.view(INTEGERS.get(value.dtype, value.dtype)).contiguous())
            else:
                self._fields[field.name] = value

    def _parts_of(self, rows: Tensor | None) -> dict[str, Any]:
        """The parts of the grid; of some rows only, where it has one for each."""
        parts = {name: getattr(self, name).view(dtype) for name, dtype in self._parts.items()}
        if rows is None or parts["scale"].shape[0] == 1:
            return parts
        return {name: value if name == "values" else value[rows] for name, value in parts.items()}

    def _encoded(self, codes: Tensor, rows: Tensor | None = None) -> Affine | Table | Blocked | Codebook:
        unpacked = unpack(codes, self._fields["bits"], self._columns)
        return self._kind(codes=unpacked, **self._parts_of(rows), **self._fields)

    def decode(self) -> Tensor:
        return decode(self._encoded(self.codes)).to(self.dtype)

    def decode_rows(self, rows: Tensor) -> Tensor:
        if self._kind is Codebook or self._fields["axis"] != (0,) or len(self.shape) != 2:
            return super().decode_rows(rows)
        flat = rows.reshape(-1)
        found = in_dtype(decode_rows(self._encoded(self.codes[flat], flat)), self._fields["dtype"]).to(self.dtype)
        return found.reshape(*rows.shape, self._columns)


class PackedIntegers(PackedWeight):
    """A weight of unbounded codes, entropy coded on the disk: the integers in the fewest bytes that hold each of them.

    A step is one of few values, which a table holds; rows and columns name theirs by a sum.
    """

    codes: Tensor
    steps: Tensor
    row_steps: Tensor
    column_steps: Tensor

    def __init__(self, encoded: Unbounded) -> None:
        super().__init__(encoded.shape, encoded.dtype)
        self._axis, self._dtype = encoded.axis, encoded.dtype
        row = step_factors(replace(encoded, channels=None, taps=None))
        column = step_factors(replace(encoded, rows=None))
        (low, high), (left, right) = _ends(row), _ends(column)
        steps = step_table(encoded, low + left, high + right)
        integers = encoded.codes
        if encoded.trellis:
            integers, steps = trellis_values(encoded.codes), steps * 0.5
        self.register_buffer("codes", _in_fewest_bytes(integers))
        self.register_buffer("steps", steps.view(torch.int32))
        self.register_buffer("row_steps", (row - low).to(torch.int16))
        self.register_buffer("column_steps", (column - left).to(torch.int16))

    def decode(self) -> Tensor:
        places = self.row_steps.int() + self.column_steps
        rows = self.codes.float() * self.steps.view(torch.float32)[places]
        return weight_from_rows(in_dtype(rows, self._dtype), tuple(self.shape), self._axis).to(self.dtype)


class PackedConstant(PackedWeight):
    """A weight all of whose values are one."""

    def __init__(self, encoded: Constant) -> None:
        super().__init__(encoded.shape, encoded.dtype)
        self._dtype, self._value = TORCH_DTYPES[encoded.dtype], encoded.value

    def decode(self) -> Tensor:
        value = torch.full((), self._value, dtype=self._dtype, device=self.like.device)
        return value.to(self.dtype).expand(self.shape)


def pack_weight(encoded: Compressed) -> PackedWeight:
    """Hold a compressed weight as its codes."""
    match encoded:
        case Affine() | Table() | Blocked() | Codebook():
            return PackedCodes(encoded)
        case Unbounded():
            return PackedIntegers(encoded)
        case Constant():
            return PackedConstant(encoded)
        case _:
            assert_never(encoded)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes [rows, columns] of packed ones, as coding.packing lays them out, in operations that torch.compile traces.

    packed   uint8 [rows, bytes], each row padded to whole groups of eight codes
    returns  uint8, above 8 bits int16
    """
    if bits == 8:
        return packed[:, :columns]
    mask = 2**bits - 1
    if 8 % bits == 0:
        lanes = [(packed >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(lanes, -1).flatten(1)[:, :columns]
    groups = packed.reshape(len(packed), -1, bits)
    if bits > 8:
        groups = groups.int()
    lanes = []
    for start in range(0, 8 * bits, bits):
        first, shift = divmod(start, 8)
        code = groups[..., first] >> shift
        for more in range(1, (shift + bits + 7) // 8):
            # Bits above the eighth of uint8 are lost, as they should be.
            code = code | (groups[..., first + more] << (8 * more - shift))
        lanes.append(code & mask)
    codes = torch.stack(lanes, -1).flatten(1)[:, :columns]
    return codes.to(torch.int16) if bits > 8 else codes


def _pack_groups(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] packed, each row padded to whole groups of eight codes."""
    packed = torch.from_numpy(pack(codes.cpu().numpy(), bits))
    missing = -packed.shape[1] % (1 if 8 % bits == 0 else bits)
    return F.pad(packed, (0, missing)) if missing else packed


def _in_fewest_bytes(integers: Tensor) -> Tensor:
    low, high = _ends(integers)
    for dtype in (torch.int8, torch.int16):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return integers.to(dtype)
    return integers.to(torch.int32)


def _ends(integers: Tensor) -> tuple[int, int]:
    if not integers.numel():
        return 0, 0
    low, high = torch.aminmax(integers)
    return int(low), int(high)
