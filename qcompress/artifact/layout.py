"""Each byte of an artifact gets its place here, from the plan alone: slots in file order, and the header's room."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qcompress.artifact.entry import Entry, part_name, planned_entry
from qcompress.artifact.manifest import FORMAT, MANIFEST_NAME, METADATA_KEY, Manifest, manifest_frame
from qcompress.checkpoint.safetensors_file import RESERVED
from qcompress.coding.payload import bound_bytes, least_bytes
from qcompress.coding.unbounded.payload import bound_payload, bound_side
from qcompress.coding.unbounded.tables import pooled
from qcompress.types.config import CodingChoice, Shape
from qcompress.types.plan import DTYPE_BITS, Decision

INDEX_NAME = "model.qcompress.safetensors.index.json"
SUFFIX = ".safetensors"
MARK = ".qcompress"
"""Stands in the file names of a compressed folder, so that nothing takes what they hold for plain weights."""

POOL_NAME = f"{RESERVED}side"
"""The side information of all small unbounded tensors of a file: a part of no tensor."""

OWN_NAMES = (MANIFEST_NAME, POOL_NAME)
"""Stored tensors of an artifact that each of its files may have."""


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


def make_slots(decision: Decision, choice: CodingChoice) -> list[Slot]:
    """The stored tensors of one decision; none for a tensor that another one stands for."""
    tensor = decision.tensor
    if decision.tied_to is not None:
        return []
    if not decision.compresses:
        stored = replace(tensor, dtype=decision.stored or tensor.dtype)
        return [Slot(stored.name, stored.dtype, stored.shape, stored.n_bytes, stored.name)]
    entry = planned_entry(decision)
    slots = []
    for part, (dtype, shape) in entry.parts().items():
        n_bytes, varies = math.prod(shape) * DTYPE_BITS[dtype] // 8, False
        if part == "codes" and entry.form != "constant":
            shape, n_bytes, varies = _most_codes(entry, choice)
        slots.append(Slot(part_name(tensor.name, part), dtype, shape, n_bytes, tensor.name, varies))
    return slots


def _most_codes(entry: Entry, choice: CodingChoice) -> tuple[Shape, int, bool]:
    """The shape and bytes of the codes of a planned entry, at most, and whether they may come to less."""
    if entry.is_unbounded:
        most = bound_payload(entry.numel)
        return (most,), most, True
    shape = entry.parts()["codes"][1]
    if choice in ("packed", "auto"):
        return shape, math.prod(shape), choice != "packed"
    most = max(bound_bytes(entry.code_rows, entry.columns, entry.bits, choice), least_bytes(entry.numel))
    return (most,), most, True


def make_layout(decisions: Sequence[Decision], choice: CodingChoice, manifest: Manifest) -> Layout:
    """The layout of one file; `manifest` holds all that is known before the data, see `planned_manifest`."""
    pool = pool_of(decisions)
    slots = sorted(
        (slot for d in decisions for slot in make_slots(d, choice)), key=lambda slot: _file_order(slot, pool)
    )
    if pool:
        most = bound_side([d.tensor.numel for d in decisions if d.tensor.name in pool])
        slots.append(Slot(POOL_NAME, "U8", (most,), most, POOL_NAME, varies=True))
    slots.append(manifest_slot(manifest_frame(manifest)))
    return Layout(tuple(slots), header_room(render_header(slots)), shrinks=bool(pool))


def manifest_slot(frame: bytes) -> Slot:
    """The slot of a manifest, whose length the plan knows; it belongs to no tensor, and is written last."""
    return Slot(MANIFEST_NAME, "U8", (len(frame),), len(frame), MANIFEST_NAME, varies=False)


def planned_manifest(manifest: Manifest, decisions: Sequence[Decision]) -> Manifest:
    """The manifest with the entries of a plan and with nothing in the place of the numbers that only data tell."""
    kept = [d.tensor.name for d in decisions if not d.compresses and d.tied_to is None]
    pool = [POOL_NAME] if pool_of(decisions) else []
    return replace(
        manifest,
        tensors={d.tensor.name: planned_entry(d) for d in decisions if d.compresses},
        crc32s=dict.fromkeys([*kept, *pool, *manifest.tied], 0),
    )


def marked_name(file: str) -> str:
    """The name of the file of a compressed folder that stands for one of a checkpoint.

    model.safetensors -> model.qcompress.safetensors, and -00001-of-00002 stays at the end of the stem
    """
    stem = file.removesuffix(SUFFIX)
    shard = re.search(r"-\d+-of-\d+$", stem)
    place = shard.start() if shard else len(stem)
    return f"{stem[:place]}{MARK}{stem[place:]}{SUFFIX}"


def plain_name(file: str) -> str:
    """The inverse of `marked_name`; a name without the mark is its own."""
    return re.sub(rf"{re.escape(MARK)}(?=(-\d+-of-\d+)?{re.escape(SUFFIX)}$)", "", file)


def header_room(header: bytes) -> int:
    """The bytes before the data: the length, the header, and what fills them up to a multiple of 8."""
    return 8 + -(-len(header) // 8) * 8


def pool_of(decisions: Iterable[Decision]) -> list[str]:
    """The unbounded tensors of a file that share tables, by name: they are coded together, when all are known."""
    unbounded_tensors = (d.tensor for d in decisions if d.compresses and d.config.form == "unbounded")
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


def render_header(slots: Sequence[Slot]) -> bytes:
    """The safetensors header of an artifact of `slots` in file order, without length and padding."""
    return header_text(slots, {"format": "pt", METADATA_KEY: str(FORMAT)})


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
    """The index of a sharded folder: which file holds each stored tensor but those that every file has for itself."""
    weight_map = {slot.name: file for file, slots in files.items() for slot in slots if slot.name not in OWN_NAMES}
    total = sum(slot.n_bytes for slots in files.values() for slot in slots)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, sort_keys=True, indent=2) + "\n"
