"""Weights become these frozen values: codes with what decodes them, and what stands beside them.

A method returns Kept or one of the other forms; the grid is already rounded to its dtype on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from qcompress.types.config import Convention, Shape, TableName
from qcompress.types.figures import figure
from qcompress.types.plan import Decision

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor as it is, or as a method that declares `adjusts` changed it."""

    value: Tensor


@dataclass(frozen=True, slots=True)
class Affine:
    """Integer codes on a uniform grid, the grid already rounded to its disk dtype.

    codes       uint8 [rows, columns] in [0, 2**bits)
    scale       float16 [1 or rows, groups], not 0; its value is scale * 2**exponent
    zero_point  uint8, shaped like scale: weight = scale * (code - zero_point)
    offset      float16, shaped like scale, with the same exponent: weight = scale * code + offset
    convention  where neither is present: weight = scale * (code - middle), see Convention
    shape       of the weight; `axis` are its channel axes, which become the rows
    dtype       of the weight, as safetensors names it
    group_size      values of a row that share a grid, the last group of a row may have fewer; None: groups are equal
    row_exponents   int8 [1 or rows], each a row's in place of `exponent`, which is then 0; None: all have `exponent`
    """

    codes: Tensor
    bits: int
    scale: Tensor
    exponent: int
    shape: Shape
    zero_point: Tensor | None = None
    offset: Tensor | None = None
    convention: Convention | None = None
    axis: tuple[int, ...] = (0,)
    dtype: str = "F32"
    group_size: int | None = None
    row_exponents: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Codes that name values of one table, given or fitted, times a scale a group.

    codes          uint8 [rows, columns], below the number of values, none of a value that is not finite
    bits           1 to 8
    values         float32 [values] of a given table; float16, float32 or int8 of a fitted one
    scale          float16 [1 or rows, groups]; a weight is values[code] * scale * 2**exponent
    given          the name of the table, where it is one that everybody knows
    exponent, shape, axis, dtype, group_size, row_exponents   as in Affine
    """

    codes: Tensor
    bits: int
    values: Tensor
    scale: Tensor
    exponent: int
    shape: Shape
    given: TableName | None = None
    axis: tuple[int, ...] = (0,)
    dtype: str = "F32"
    group_size: int | None = None
    row_exponents: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Blocked:
    """Integer codes on a grid a sub-block, whose scale and offset are integers times those of a block.

    codes          uint8 [rows, columns] in [0, 2**bits)
    scale          float16 [rows, blocks]; the scale of a sub-block is scale * (subscale - subzero) * 2**exponent
    subscale       uint8 [rows, sub-blocks]
    offset         float16 [rows, blocks]: weight = sub-block's scale * code + offset * suboffset * 2**exponent
    suboffset      uint8 [rows, sub-blocks], present where offset is
    convention     where they are not: weight = sub-block's scale * (code - middle), see Convention
    subzero        0 to 255
    group_size     values of a row in a sub-block, and
    sub_blocks     sub-blocks in a block; the last ones of a row may be smaller
    exponent, shape, axis, dtype, row_exponents   as in Affine
    """

    codes: Tensor
    bits: int
    scale: Tensor
    subscale: Tensor
    exponent: int
    shape: Shape
    group_size: int
    sub_blocks: int
    offset: Tensor | None = None
    suboffset: Tensor | None = None
    convention: Convention | None = None
    subzero: int = 0
    axis: tuple[int, ...] = (0,)
    dtype: str = "F32"
    row_exponents: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Codebook:
    """Codes that name entries of tables of values; `dim` neighbouring rows have one code together.

    codes      uint8, or int16 above 8 bits, [rows / dim, columns], below the number of entries
    bits       1 to 12
    centroids  float16, float32 or int8 [tables, entries, dim]: every rows / tables rows have a table of their own
    scale      float16 [tables, 1] of int8 centroids, else None
    exponent   a weight is centroid * scale * 2**exponent; 0 for float32 centroids
    shape      of the weight; `axis` are its channel axes, which become the rows
    dtype      of the weight, as safetensors names it
    """

    codes: Tensor
    bits: int
    centroids: Tensor
    exponent: int
    shape: Shape
    scale: Tensor | None = None
    axis: tuple[int, ...] = (0,)
    dtype: str = "F32"

    @property
    def dim(self) -> int:
        """Weights a vector."""
        return int(self.centroids.shape[2])


@dataclass(frozen=True, slots=True)
class Unbounded:
    """Unbounded integer codes on a grid through zero, whose step is a product of factors; made to be entropy coded.

    codes     int32 [rows, columns]
    step      float16 [], above 0; a weight is code * step * 2**exponent * row factor * column factor
    rows      int8 [rows] or None: the factor of a row is 2**(value / 8)
    channels  int8 [columns / taps] or None, and
    taps      int8 [taps] or None: the factor of column j is 2**((channels[j // taps] + taps[j % taps]) / 8)
    trellis   whether the codes of a row drive the eight-state trellis, which halves the step of every other code
    shape     of the weight; `axis` are its channel axes, which become the rows
    dtype     of the weight, as safetensors names it
    """

    codes: Tensor
    step: Tensor
    exponent: int
    shape: Shape
    rows: Tensor | None = None
    channels: Tensor | None = None
    taps: Tensor | None = None
    trellis: bool = False
    axis: tuple[int, ...] = (0,)
    dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class Constant:
    """A weight all of whose values are one, which is finite and lies in its dtype."""

    value: float
    shape: Shape
    axis: tuple[int, ...] = (0,)
    dtype: str = "F32"


Grouped: TypeAlias = Affine | Table | Blocked
"""A weight of codes of so many bits, whose groups have a scale each."""

Coded: TypeAlias = Grouped | Codebook | Unbounded
"""A weight that stands in codes."""

Compressed: TypeAlias = Coded | Constant
"""All but what is kept."""

Encoded: TypeAlias = Kept | Compressed

CompressedT = TypeVar("CompressedT", bound=Compressed)


def for_tensor(compressed: CompressedT, decision: Decision) -> CompressedT:
    """What rows became as that of the weight that a decision names: with its shape, channel axes and dtype."""
    return replace(compressed, shape=decision.tensor.shape, axis=decision.axis, dtype=decision.tensor.dtype)


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """The quantizer at a module's input, one for the whole tensor: value = scale * (code - zero_point).

    bits        1 to 8; codes lie in [0, 2**bits)
    scale       above 0, a float32 number
    zero_point  in [0, 2**bits), so that zero lies on the grid
    """

    bits: int
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Fitted:
    """What a method on a live model has chosen.

    encoded      tensor name -> its codes; Kept for what a method that declares `adjusts` changed
    references   tensor name -> the float weight that its codes stand for, where that is not the checkpoint's
    activations  module name -> the quantizer at its input, from a method that chooses it itself
    caps         module name -> the largest value of each channel (dimension 1) of its output, float32 [channels]
    notes        what was skipped and why, one line each
    measured     by names of the method's own, what it is to be told when it sees other blocks of the same network
    """

    encoded: Mapping[str, Encoded]
    references: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, ActivationGrid] = field(default_factory=dict)
    caps: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measured: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClassUse:
    """What the codes of one unbounded tensor under one table take."""

    # fmt: off
    context: int = field(metadata=figure(
        "table", "count", "its number: that of a scale class, and 32 or 64 more in states of a trellis",
        "32 in even states, 64 in odd ones"))
    count: int = field(metadata=figure("codes", "count", "how many of the tensor's codes the table codes"))
    magnitude: float = field(metadata=figure("magnitude", "number", "mean absolute code of a scale class"))
    ideal_bits: float = field(metadata=figure(
        "ideal bits", "bits", "bits a code at the order-0 entropy of the tensor's codes in the class",
        "raw bits included, as in the next"))
    table_bits: float = field(metadata=figure(
        "table bits", "bits", "bits a code under the stored table, which other tensors may share"))
    # fmt: on
