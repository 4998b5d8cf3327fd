"""Each byte of an artifact gets its place here, from the plan alone: slots in file order, and the header's room."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qcompress.artifact.manifest import METADATA_KEY, UNBOUNDED_VALUES, Entry, Manifest, Placement, manifest_text
from qcompress.checkpoint.safetensors_file import RESERVED
from qcompress.coding.packing import row_bytes
from qcompress.coding.payload import bound_bytes
from qcompress.coding.rows import dim_of, grid_shape, stored_codebook_shape
from qcompress.coding.unbounded.payload import bound_payload, bound_side
from qcompress.coding.unbounded.tables import pooled
from qcompress.types.config import Coding, CodingChoice, Shape
from qcompress.types.plan import DTYPE_BITS, Decision, row_shape

INDEX_NAME = "model.safetensors.index.json"

POOL_NAME = f"{RESERVED}side"
"""The side information of all small unbounded tensors of a file: a part of no tensor."""

PARTS = ("codes", "scale", "zero_point", "offset", "codebook")
"""Every part of a compressed tensor, in the order in which its CRC-32 runs over them."""


def part_name(tensor: str, part: str) -> str:
    return f"{tensor}{RESERVED}{part}"


@dataclass(frozen=True, slots=True)
class Slot:
    """One stored tensor. `n_bytes` is exact unless `varies`: then the most that entropy coding can need.

    tensor  whose part it is; empty where several tensors share it
    """

    name: str
    dtype: str
    shape: Shape
    n_bytes: int
    tensor: str
    varies: bool = False


@dataclass(frozen=True)
class Layout:
    """One file: its slots in file order, and the room for its header.

    header_bytes  the 8 bytes of length and the padded header
    shrinks       whether data may move up, in the end, to where the header turns out to stop
    """

    slots: tuple[Slot, ...]
    header_bytes: int
    shrinks: bool = False

    @property
    def data_bytes(self) -> int:
        return sum(slot.n_bytes for slot in self.slots)

    @property
    def file_bytes(self) -> int:
        """Exact, or a bound where a slot varies."""
        return self.header_bytes + self.data_bytes

    @property
    def exact(self) -> bool:
        return not any(slot.varies for slot in self.slots)


def grid_of(decision: Decision) -> Placement:
    """What places the grid that a compressing decision will store."""
    form = decision.config.form
    assert form != "kept"
    return decision.config.stored_convention if form == "symmetric" else form


def make_slots(decision: Decision, choice: CodingChoice) -> list[Slot]:
    """The stored tensors of one decision; none for a tensor that another one stands for."""
    tensor = decision.tensor
    if decision.tied_to is not None:
        return []
    if not decision.compresses:
        stored = replace(tensor, dtype=decision.stored or tensor.dtype)
        return [Slot(stored.name, stored.dtype, stored.shape, stored.n_bytes, stored.name)]
    config = decision.config
    rows = row_shape(tensor.shape, decision.axis)
    columns = math.prod(rows[1:])
    if config.form == "lattice":
        most = bound_payload(tensor.numel)
        return [Slot(part_name(tensor.name, "codes"), "U8", (most,), most, tensor.name, varies=True)]
    if config.form == "codebook":
        return _codebook_slots(decision, rows[0], columns, choice)
    grids, bits = grid_shape(rows, config.unit, config.group_size), config.code_bits
    packed: Shape = (rows[0], row_bytes(columns, bits))
    most = math.prod(packed) if choice in ("packed", "auto") else bound_bytes(rows[0], columns, bits, choice)
    shape = packed if choice in ("packed", "auto") else (most,)
    name = tensor.name
    slots = [
        Slot(part_name(name, "codes"), "U8", shape, most, name, varies=choice != "packed"),
        Slot(part_name(name, "scale"), "F16", grids, 2 * math.prod(grids), name),
    ]
    if config.form == "zero-point":
        slots.append(Slot(part_name(name, "zero_point"), "U8", grids, math.prod(grids), name))
    elif config.form == "offset":
        slots.append(Slot(part_name(name, "offset"), "F16", grids, 2 * math.prod(grids), name))
    return slots


def _codebook_slots(decision: Decision, rows: int, columns: int, choice: CodingChoice) -> list[Slot]:
    config, name = decision.config, decision.tensor.name
    code_rows, bits = rows // config.dim, config.code_bits
    packed: Shape = (code_rows, row_bytes(columns, bits))
    most = math.prod(packed) if choice in ("packed", "auto") else bound_bytes(code_rows, columns, bits, choice)
    shape = packed if choice in ("packed", "auto") else (most,)
    slots = [Slot(part_name(name, "codes"), "U8", shape, most, name, varies=choice != "packed")]
    if decision.codebook.stored_in is not None:
        return slots
    tables = stored_codebook_shape(decision)
    dtype, size = {"f16": ("F16", 2), "f32": ("F32", 4), "int8": ("I8", 1)}[config.codebook]
    slots.append(Slot(part_name(name, "codebook"), dtype, tables, size * math.prod(tables), name))
    if config.codebook == "int8":
        slots.append(Slot(part_name(name, "scale"), "F16", (tables[0], 1), 2 * tables[0], name))
    return slots


def make_layout(decisions: Sequence[Decision], choice: CodingChoice, manifest: Manifest) -> Layout:
    """The layout of one file; `manifest` holds all that is known before the data, its `tensors` are not read."""
    pool = pool_of(decisions)
    slots = sorted(
        (slot for d in decisions for slot in make_slots(d, choice)), key=lambda slot: _file_order(slot, pool)
    )
    if pool:
        most = bound_side([d.tensor.numel for d in decisions if d.tensor.name in pool])
        slots.append(Slot(POOL_NAME, "U8", (most,), most, POOL_NAME, varies=True))
    entries = {d.tensor.name: widest_entry(d, choice) for d in decisions if d.compresses}
    widest = replace(manifest, tensors=entries, sha256="0" * 64, input_sha256="0" * 64)
    header = render_header(slots, widest)
    return Layout(tuple(slots), header_room(header), shrinks=bool(pool))


def header_room(header: bytes) -> int:
    """The bytes before the data: the length, the header, and what fills them up to a multiple of 8."""
    return 8 + -(-len(header) // 8) * 8


def pool_of(decisions: Iterable[Decision]) -> list[str]:
    """The unbounded tensors of a file that share tables, by name: they are coded together, when all are known."""
    unbounded_tensors = (d.tensor for d in decisions if d.compresses and d.config.form == "lattice")
    return pooled_names({tensor.name: tensor.numel for tensor in unbounded_tensors})


def pooled_names(sizes: Mapping[str, int]) -> list[str]:
    """Which unbounded tensors of a file share its pool, in the order of their names; `sizes` are weights by name."""
    names = sorted(sizes)
    if not names:
        return []
    return [name for name, shared in zip(names, pooled([sizes[name] for name in names]), strict=True) if shared]


def _file_order(slot: Slot, pool: Container[str]) -> tuple[bool, bool, bool, int, str]:
    # Codes, whose length may vary, come last, so that all else has its place; wide dtypes first keep that aligned.
    # Those of the pool come last of all, because they wait for one another.
    return (slot.name.endswith(".qc.codes"), slot.varies, slot.tensor in pool, -DTYPE_BITS[slot.dtype], slot.name)


def widest_entry(decision: Decision, choice: CodingChoice) -> Entry:
    """The entry of a compressing decision with every number still unknown at its widest."""
    if decision.config.form == "lattice":
        return unbounded_entry(decision, "packed" if choice == "packed" else "zstd")
    return Entry(
        shape=decision.tensor.shape,
        dtype=decision.tensor.dtype,
        axis=decision.axis,
        bits=decision.config.code_bits,
        grid=grid_of(decision),
        coding="zstd" if choice == "auto" else choice,
        exponent=-126,
        crc32=2**32 - 1,
        dim=dim_of(decision),
        codebook=decision.codebook.stored_in,
    )


def unbounded_entry(decision: Decision, coding: Coding) -> Entry:
    """The entry of an unbounded tensor, of which the manifest says little."""
    tensor = decision.tensor
    shape, dtype, axis = tensor.shape, tensor.dtype, decision.axis
    return Entry(shape, dtype, axis, grid="lattice", coding=coding, codebook=None, **UNBOUNDED_VALUES)


def render_header(slots: Sequence[Slot], manifest: Manifest) -> bytes:
    """The safetensors header of `slots` in file order, without length and padding."""
    return header_text(slots, {"format": "pt", METADATA_KEY: manifest_text(manifest)})


def header_text(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header: metadata, then the slots in file order without a hole."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for slot in slots:
        end = position + slot.n_bytes
        header[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [position, end]}
        position = end
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def index_text(files: Mapping[str, Sequence[Slot]]) -> str:
    """The index of a sharded folder: which file holds each stored tensor."""
    weight_map = {slot.name: file for file, slots in files.items() for slot in slots}
    total = sum(slot.n_bytes for slots in files.values() for slot in slots)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, sort_keys=True, indent=2) + "\n"
