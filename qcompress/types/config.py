"""MethodConfig is the base of every method's config: what the plan, the layout and the codes read of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Granularity: TypeAlias = Literal["tensor", "channel", "group"]

Form: TypeAlias = Literal[
    "kept", "symmetric", "zero-point", "offset", "codebook", "table", "blocked", "unbounded", "constant"
]
"""What decodes the codes: nothing; a scale alone, or beside an unsigned integer zero point or a real offset; a codebook
of a tensor's own; a table and scales; scales of blocks and integers of their sub-blocks; the step of a quantizer
without ends; or one value without any codes."""

Convention: TypeAlias = Literal["narrow", "full", "mid-rise"]
"""Where zero lies on a symmetric grid of b bits: at code 2**(b-1) - 1, at 2**(b-1), or at (2**b - 1) / 2."""

ScaleDtype: TypeAlias = Literal["f16", "bf16"]
"""Of which dtype scales and offsets are numbers; without one they are float16 times a power of two."""

CodebookDtype: TypeAlias = Literal["f16", "f32", "int8"]

TableName: TypeAlias = Literal["nf4", "iq4_nl", "e2m1", "e4m3", "e5m2"]
"""Tables of values that everybody knows, see coding.tables."""

TableValues: TypeAlias = TableName | CodebookDtype
"""Where the values of a table come from: its name, or how they are stored."""
Share: TypeAlias = Literal["layer", "type", "model"]

Rows: TypeAlias = Shape
"""The shape (rows, ...) of a weight whose channel axes come first and became one."""

Example: TypeAlias = Mapping[str, object]


class Section:
    """A part of a recipe: pydantic refuses unknown keys in it, and values of another type."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = {"extra": "forbid", "strict": True}
    example: ClassVar[Example] = {}
    """What a hint and the schema show of it."""
    paths: ClassVar[tuple[str, ...]] = ()
    """The keys whose values are files or folders that a run reads."""

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages of extras without which it does nothing."""
        return ()


@dataclass(frozen=True)
class Options(Section):
    """What a recipe can say of one rule: every field an option, and those that it leaves out are None or a default."""

    def _fill(self, values: Mapping[str, object]) -> None:
        """Set every option of these that was not given: what a recipe says comes before any preset."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class MethodConfig(Options):
    """What all configs have in common; what is not a config's own is as for a tensor that is kept.

    bits         of a code; None where codes have no width, or where a budget has yet to choose it
    granularity  as the recipe gives it, see `unit`
    group_size   values of a row that share a grid, or channels that share a codebook, where `unit` is group
    dim          neighbouring rows that have one code together
    axis         the channel axis, or the pair of them in stacked experts; the plan's choice where None
    codebook     how the entries of a codebook are stored
    share        what shares one codebook; None: each tensor has its own
    table        where the values of a table come from
    sub_blocks   sub-blocks of `group_size` values in a block, where the form is blocked
    subzero      what is taken from the scale of a sub-block
    offsets      whether sub-blocks have offsets, where the form is blocked
    row_exponents  whether each row has an exponent of its own
    scales       the dtype that holds scales and offsets exactly

    A dataclass field of the same name takes the place of what is read-only here.
    """

    if TYPE_CHECKING:
        # At run time a field `bits` without a default would take the property for one.
        @property
        def bits(self) -> int | None: ...

    @property
    def code_bits(self) -> int:
        """The bits of a code, of a config whose codes have a width."""
        assert self.bits is not None
        return self.bits

    @property
    def form(self) -> Form:
        """What the codes are stored with."""
        return "kept"

    @property
    def granularity(self) -> Granularity | None:
        return "tensor"

    @property
    def unit(self) -> Granularity:
        """The granularity that holds: what has a grid or a codebook of its own."""
        return self.granularity or "tensor"

    @property
    def group_size(self) -> int | None:
        return None

    @property
    def dim(self) -> int:
        return 1

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        return None

    @property
    def stored_convention(self) -> Convention:
        """Where zero lies on a symmetric grid."""
        return "full"

    @property
    def codebook(self) -> CodebookDtype:
        return "f16"

    @property
    def share(self) -> Share | None:
        return None

    @property
    def table(self) -> TableValues:
        return "f16"

    @property
    def sub_blocks(self) -> int:
        return 1

    @property
    def subzero(self) -> int:
        return 0

    @property
    def offsets(self) -> bool:
        return False

    @property
    def row_exponents(self) -> bool:
        return False

    @property
    def scales(self) -> ScaleDtype | None:
        return None

    def changed(self, **options: object) -> Self:
        """The same config but for these options."""
        return type(self)(**{**{one.name: getattr(self, one.name) for one in fields(self)}, **options})

    def refuse(self, rows: Rows) -> str | None:
        """Why a weight of shape `rows` cannot be encoded so, or None."""
        return None


@dataclass(frozen=True)
class PenaltyConfig(Options):
    """What all regularizers' configs have in common: nothing that the plan reads; see registry.regularizers."""


Coding: TypeAlias = Literal["packed", "zstd", "ans"]


CodingChoice: TypeAlias = Literal["auto", "packed", "zstd", "ans"]
