"""What an artifact says of one compressed tensor: its form, its fields, and the stored parts that follow from them.

A checksum of a tensor covers all that decides its values, these fields too. SPEC.md, "Forms". Imports no torch.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never, get_args

from qcompress.checkpoint.safetensors_file import RESERVED
from qcompress.coding.packing import row_bytes
from qcompress.coding.payload import least_bytes
from qcompress.coding.rows import stored_codebook_shape
from qcompress.coding.tables import GIVEN_BITS
from qcompress.types.config import Coding, Convention, Shape, TableName
from qcompress.types.plan import Decision, TensorInfo, row_shape

StoredForm: TypeAlias = Literal["affine", "codebook", "table", "blocked", "unbounded", "constant"]
Placement: TypeAlias = Literal["zero-point", "offset"] | Convention
"""What places a grid: a stored zero point, a stored offset, or a symmetric convention."""

FORMS: tuple[StoredForm, ...] = get_args(StoredForm)
GRIDS: tuple[Placement, ...] = (*get_args(get_args(Placement)[0]), *get_args(Convention))
CODINGS: tuple[Coding, ...] = get_args(Coding)
STORED_VALUES: Mapping[str, str] = {"f16": "F16", "f32": "F32", "int8": "I8"}
"""How values of codebooks and fitted tables are stored, by how configs say it."""

PARTS = (
    *("codes", "scale", "zero_point", "offset", "exponent", "subscale", "suboffset", "codebook", "table"),
)  # fmt: skip
"""Every part of a compressed tensor, in the order in which its CRC-32 runs over them."""

COMMON_FIELDS = ("axis", "dtype", "form", "shape")
FORM_FIELDS: Mapping[StoredForm, tuple[str, ...]] = {
    "affine": ("bits", "grid", "group", "row_exponents"),
    "codebook": ("bits", "dim", "group", "shared", "values"),
    "table": ("bits", "group", "row_exponents", "values"),
    "blocked": ("bits", "grid", "group", "row_exponents", "sub_blocks", "subzero"),
    "unbounded": (),
    "constant": (),
}
"""The fields that an entry of each form has besides COMMON_FIELDS."""
USUAL: Mapping[str, object] = {"dim": 1, "row_exponents": False, "shared": None, "subzero": 0}
"""Fields that stand in an entry only where they are not this."""

Group: TypeAlias = Literal["tensor", "channel"] | int
Part: TypeAlias = tuple[str, Shape]
"""The dtype and shape of a stored tensor."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One compressed tensor. What its form does not have is as it stands here.

    bits           of a code
    grid           what places the codes of affine and blocked forms
    group          what has a scale of its own, or a codebook: the tensor, a row, or so many values of a row (of a
                   codebook: so many rows)
    sub_blocks     groups that share the scale of a block, of the blocked form
    subzero        what is taken from the scale of each of them
    dim            rows that have one code together
    values         of a table: its name; of others and of codebooks their dtype
    shared         the tensor of the same file whose codebook this one has, where that is another
    row_exponents  whether each row has an exponent of its own, which is stored
    coding         of the codes; it and all that follows is known only when they are written
    exponent       of scale, offset and codebook, where rows have none
    entries        of a codebook, or values of a fitted table
    value          of a constant
    crc32          of all that decides the tensor's values, see `seal`
    """

    form: StoredForm
    shape: Shape
    dtype: str
    axis: tuple[int, ...]
    bits: int = 0
    grid: Placement | None = None
    group: Group = "tensor"
    sub_blocks: int = 1
    subzero: int = 0
    dim: int = 1
    values: str = ""
    shared: str | None = None
    row_exponents: bool = False
    coding: Coding = "packed"
    exponent: int = 0
    entries: int = 0
    value: float = 0.0
    crc32: int = 0

    @property
    def is_unbounded(self) -> bool:
        return self.form == "unbounded"

    @property
    def has_exponent(self) -> bool:
        """Whether there is one for the whole tensor: unbounded codes have theirs in their side information."""
        return self.form not in ("unbounded", "constant") and not self.row_exponents

    @property
    def has_entries(self) -> bool:
        """Whether it stores values that codes name, whose number nothing else tells."""
        return (self.form == "codebook" and self.shared is None) or (self.form == "table" and self.given is None)

    @property
    def given(self) -> TableName | None:
        """The name of its table, where everybody knows it."""
        return next((name for name in GIVEN_BITS if name == self.values), None)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return row_shape(self.shape, self.axis)[0]

    @property
    def leads(self) -> bool:
        """Whether its rows lie one behind another in the weight."""
        return len(self.shape) < 2 or self.axis == tuple(range(len(self.axis)))

    @property
    def code_rows(self) -> int:
        return self.rows // self.dim

    @property
    def columns(self) -> int:
        return math.prod(row_shape(self.shape, self.axis)[1:])

    @property
    def group_size(self) -> int | None:
        """Values of a row that share a scale, where that is neither a row nor the tensor."""
        return self.group if isinstance(self.group, int) else None

    @property
    def tables(self) -> int:
        """Codebooks: every rows / tables rows have one of their own."""
        match self.group:
            case "tensor":
                return 1
            case "channel":
                return self.rows
            case size:
                return self.rows // size

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and groups of the scales of an affine form or a table; of the sub-blocks of a blocked one."""
        match self.group:
            case "tensor":
                return (1, 1)
            case "channel":
                return (self.rows, 1)
            case size:
                return (self.rows, -(-self.columns // size))

    def parts(self) -> dict[str, Part]:
        """part -> dtype and shape of what stores it; of coded and unbounded codes the shape is as yet (0,)."""
        parts: dict[str, Part] = {"codes": ("U8", self._codes_shape())}
        grids = self.grid_shape if self.form in ("affine", "table", "blocked") else (0, 0)
        match self.form:
            case "affine":
                parts["scale"] = ("F16", grids)
                if self.grid == "zero-point":
                    parts["zero_point"] = ("U8", grids)
                elif self.grid == "offset":
                    parts["offset"] = ("F16", grids)
            case "table":
                parts["scale"] = ("F16", grids)
                if self.given is None:
                    parts["table"] = (self.values, (self.entries,))
            case "blocked":
                blocks = (grids[0], -(-grids[1] // self.sub_blocks))
                parts |= {"scale": ("F16", blocks), "subscale": ("U8", grids)}
                if self.grid == "offset":
                    parts |= {"offset": ("F16", blocks), "suboffset": ("U8", grids)}
            case "codebook" if self.shared is None:
                parts["codebook"] = (self.values, (self.tables, self.entries, self.dim))
                if self.values == "I8":
                    parts["scale"] = ("F16", (self.tables, 1))
            case _:
                pass
        if self.row_exponents:
            parts["exponent"] = ("I8", (grids[0],))
        return parts

    def _codes_shape(self) -> Shape:
        if self.form == "constant":
            return (least_bytes(self.numel),)
        if self.form == "unbounded" or self.coding != "packed":
            return (0,)
        return (self.code_rows, row_bytes(self.columns, self.bits))

    def fields(self) -> dict[str, object]:
        """The fields of the entry that are known before its tensor is read, as JSON has them."""
        values = {name: getattr(self, name) for name in (*COMMON_FIELDS, *FORM_FIELDS[self.form])}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def part_name(tensor: str, part: str) -> str:
    return f"{tensor}{RESERVED}{part}"


def planned_entry(decision: Decision) -> Entry:
    """The entry of a compressing decision as far as the plan knows it; a codebook has the most entries that it can."""
    config, tensor = decision.config, decision.tensor
    common = (tensor.shape, tensor.dtype, decision.axis)
    group: Group = config.unit if config.unit != "group" else config.group_size or 0
    exponents = config.row_exponents or decision.row_exponents
    match config.form:
        case "symmetric" | "zero-point" | "offset":
            grid = config.stored_convention if config.form == "symmetric" else config.form
            return Entry("affine", *common, bits=config.code_bits, grid=grid, group=group, row_exponents=exponents)
        case "codebook":
            return Entry(
                "codebook",
                *common,
                bits=config.code_bits,
                group=group,
                dim=config.dim,
                values=STORED_VALUES[config.codebook],
                shared=decision.codebook.stored_in,
                entries=stored_codebook_shape(decision)[1],
            )
        case "table":
            return Entry(
                "table",
                *common,
                bits=config.code_bits,
                group=group,
                values=STORED_VALUES.get(config.table, config.table),
                row_exponents=exponents,
                entries=0 if config.table in GIVEN_BITS else 2**config.code_bits,
            )
        case "blocked":
            return Entry(
                "blocked",
                *common,
                bits=config.code_bits,
                grid="offset" if config.offsets else config.stored_convention,
                group=group,
                sub_blocks=config.sub_blocks,
                subzero=config.subzero,
                row_exponents=exponents,
            )
        case "unbounded" | "constant":
            return Entry(config.form, *common)
        case "kept":
            raise AssertionError(f"{tensor.name} is kept")
        case _:
            assert_never(config.form)


def describe(name: str, fields: Mapping[str, object]) -> bytes:
    """What the checksum of a tensor ends with: its name and all that the manifest says of it."""
    return json.dumps([name, fields], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def seal(name: str, entry: Entry, crc32: int) -> int:
    """The CRC-32 of a tensor: of the bytes of its parts, which is given, and then of what the manifest says of it."""
    written: dict[str, object] = {"coding": entry.coding}
    if entry.has_exponent:
        written["exponent"] = entry.exponent
    if entry.has_entries:
        written["entries"] = entry.entries
    if entry.form == "constant":
        crc32 = zlib.crc32(struct.pack("<d", entry.value), crc32)
    return zlib.crc32(describe(name, entry.fields() | written), crc32)


def seal_kept(name: str, dtype: str, stored: str, shape: Shape, crc32: int, *, coded: bool = False) -> int:
    """The same of a kept tensor, `coded` or not: `dtype` is its own, `stored` the one of its bytes."""
    fields = {"dtype": dtype, "form": "coded" if coded else "kept", "shape": list(shape), "stored": stored}
    return zlib.crc32(describe(name, fields), crc32)


def seal_all_kept(kept: Sequence[tuple[TensorInfo, str]], crc32: int) -> int:
    """The same of all kept tensors of a compact file, each as it is stored and with its own dtype, in order."""
    of = [[info.name, dtype, info.dtype, list(info.shape)] for info, dtype in kept]
    return zlib.crc32(describe("", {"form": "kept", "of": of}), crc32)


def seal_tied(name: str, twin: str) -> int:
    """The same of a name that stands for another tensor."""
    return zlib.crc32(describe(name, {"form": "tied", "to": twin}))


def seal_pool(names: Sequence[str], crc32: int) -> int:
    """The same of what several tensors pool, given that of its bytes; `names` are those tensors, in order."""
    return zlib.crc32(describe("", {"form": "pool", "of": list(names)}), crc32)
