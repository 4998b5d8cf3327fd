"""Each byte of an artifact gets its place here, from the plan alone: slots in file order, and the header's room."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from qcompress.artifact.entry import PARTS, Entry, part_name, planned_entry
from qcompress.artifact.manifest import (
    DATA_NAME,
    FORMAT,
    MANIFEST_NAME,
    METADATA_KEY,
    POOL_NAME,
    Manifest,
    ManifestError,
    manifest_frame,
    pool_names,
)
from qcompress.checkpoint.safetensors_file import Container as StoredFile
from qcompress.coding.payload import bound_bytes, least_bytes
from qcompress.coding.unbounded.payload import bound_payload, bound_side
from qcompress.types.config import CodingChoice, Shape
from qcompress.types.plan import DTYPE_BITS, Decision, TensorInfo

INDEX_NAME = "model.qcompress.safetensors.index.json"
SUFFIX = ".safetensors"
MARK = ".qcompress"
"""Stands in the file names of a compressed folder, so that nothing takes what they hold for plain weights."""

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
    compact       whether the header names the slots in one
    """

    slots: tuple[Slot, ...]
    header_bytes: int
    shrinks: bool = False
    compact: bool = False

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
        stored = decision.stored_as
        if decision.coding is not None:
            most = stored.n_bytes
            return [Slot(part_name(stored.name, "codes"), "U8", (most,), most, stored.name, varies=True)]
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
    pool = pool_names(manifest.tensors)
    shared = set(pool)
    slots = [slot for d in decisions for slot in make_slots(d, choice)]
    if pool:
        most = bound_side([manifest.tensors[name].numel for name in pool])
        slots.append(Slot(POOL_NAME, "U8", (most,), most, POOL_NAME, varies=True))
    if manifest.is_compact:
        manifest = replace(manifest, lengths={slot.name: slot.n_bytes for slot in slots if slot.varies})
        slots.sort(key=lambda slot: compact_order(slot, manifest.tensors, shared))
    else:
        slots.sort(key=lambda slot: _file_order(slot, shared, manifest.coded))
    slots.append(manifest_slot(manifest_frame(manifest)))
    room = header_room(render_header(slots, compact=manifest.is_compact))
    return Layout(tuple(slots), room, shrinks=bool(pool), compact=manifest.is_compact)


def manifest_slot(frame: bytes) -> Slot:
    """The slot of a manifest, which belongs to no tensor and is written last."""
    return Slot(MANIFEST_NAME, "U8", (len(frame),), len(frame), MANIFEST_NAME, varies=False)


def planned_manifest(manifest: Manifest, decisions: Sequence[Decision], *, compact: bool) -> Manifest:
    """The manifest with the entries of a plan and with nothing in the place of the numbers that only data tell."""
    stored = [d for d in decisions if not d.compresses and d.tied_to is None]
    tensors = {d.tensor.name: planned_entry(d) for d in decisions if d.compresses}
    pool = [POOL_NAME] if pool_names(tensors) else []
    kept = {d.tensor.name: d.stored_as for d in stored if d.coding is None}
    coded = {d.tensor.name: d.stored_as for d in stored if d.coding is not None}
    return replace(
        manifest,
        tensors=tensors,
        kept=kept if compact else None,
        coded=coded,
        crc32s=dict.fromkeys([*([DATA_NAME] if compact else kept), *coded, *pool, *manifest.tied], 0),
    )


def compact_order(slot: Slot, entries: Mapping[str, Entry], pool: Container[str]) -> tuple[int, int, str, int]:
    """Where a stored tensor of a compact file lies: kept ones, then grids, then codes, those that are written last
    behind the others, the pool's side information, and the codes of kept tensors."""
    entry = entries.get(slot.tensor)
    if entry is None:
        return (4 if slot.name == POOL_NAME else 5 if slot.name != slot.tensor else 0, 0, slot.tensor, 0)
    part = slot.name.removeprefix(part_name(slot.tensor, ""))
    if part != "codes":
        return (1, 0, slot.tensor, PARTS.index(part))
    last = {"constant": 0, "unbounded": 2}.get(entry.form, 1) + (slot.tensor in pool)
    return (2, last, slot.tensor, 0)


def stored_slots(manifest: Manifest) -> list[Slot]:
    """The stored tensors of a compact file in their order, as its manifest tells them."""
    slots = [
        Slot(info.name, info.dtype, info.shape, info.n_bytes, info.name) for info in (manifest.kept or {}).values()
    ]
    for name in manifest.coded:
        stored = part_name(name, "codes")
        size = manifest.lengths[stored]
        slots.append(Slot(stored, "U8", (size,), size, name))
    for name, entry in manifest.tensors.items():
        for part, (dtype, shape) in entry.parts().items():
            stored = part_name(name, part)
            shape = (manifest.lengths[stored],) if stored in manifest.lengths else shape
            slots.append(Slot(stored, dtype, shape, math.prod(shape) * DTYPE_BITS[dtype] // 8, name))
    pool = pool_names(manifest.tensors)
    if pool:
        size = manifest.lengths[POOL_NAME]
        slots.append(Slot(POOL_NAME, "U8", (size,), size, POOL_NAME))
    return sorted(slots, key=lambda slot: compact_order(slot, manifest.tensors, pool))


def expand_file(file: StoredFile, manifest: Manifest) -> StoredFile:
    """A compact file as if its header had named every stored tensor. Raises ManifestError where they do not fit."""
    found = file.by_name.get(DATA_NAME)
    if set(file.by_name) - {DATA_NAME, MANIFEST_NAME} or found is None or (found.dtype, len(found.shape)) != ("U8", 1):
        raise ManifestError(f"it is compact, and its tensors are not just {DATA_NAME!r} and {MANIFEST_NAME!r}")
    manifest_info, manifest_span = file.by_name[MANIFEST_NAME], file.spans[MANIFEST_NAME]
    tensors, spans, position = [], {}, 0
    for slot in stored_slots(manifest):
        tensors.append(TensorInfo(slot.name, slot.shape, slot.dtype))
        spans[slot.name] = (position, position + slot.n_bytes)
        position += slot.n_bytes
    if position != found.n_bytes:
        raise ManifestError(f"its tensors take {position} bytes, and {DATA_NAME!r} has {found.n_bytes}")
    return replace(file, tensors=(*tensors, manifest_info), spans={**spans, MANIFEST_NAME: manifest_span})


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


def _file_order(slot: Slot, pool: Container[str], coded: Container[str]) -> tuple[int, bool, bool, int, str]:
    # Codes, whose length may vary, come last, so that all else has its place; wide dtypes first keep that aligned.
    # Those of the pool come behind them, because they wait for one another, and then what they share; last of all
    # those of kept tensors, which are written piece by piece.
    last = 3 if slot.tensor in coded else 2 if slot.name == POOL_NAME else int(slot.name.endswith(".qc.codes"))
    return (last, slot.varies, slot.tensor in pool, -DTYPE_BITS[slot.dtype], slot.name)


def render_header(slots: Sequence[Slot], *, compact: bool) -> bytes:
    """The safetensors header of an artifact of `slots` in file order, without length and padding.

    compact  all but the manifest, which is the last, are one tensor there
    """
    if compact:
        size = sum(slot.n_bytes for slot in slots[:-1])
        slots = (Slot(DATA_NAME, "U8", (size,), size, DATA_NAME), slots[-1])
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
