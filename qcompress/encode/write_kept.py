"""Kept tensors go into a file here: as they are, in half precision, as they were adjusted, or coded without loss."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from qcompress.artifact.entry import part_name
from qcompress.artifact.writer import SlotWriter
from qcompress.checkpoint.checkpoint import tensor_bytes, tensor_view
from qcompress.coding.planes import BLOCK_VALUES, encode_values
from qcompress.coding.stored import Stored, in_memory
from qcompress.plan.files import Shard
from qcompress.types.encoded import Fitted, Kept
from qcompress.types.plan import Decision, TensorInfo
from qcompress.types.run import Options


def copy_kept(shard: Shard, writer: SlotWriter, fitted: Fitted, options: Options) -> dict[str, int]:
    """Copy the kept tensors that are not coded; the CRC-32 of each input, dropped copies too."""
    crcs = {}
    for decision in shard.decisions:
        if decision.compresses or decision.coding is not None:
            continue
        tensor = decision.tensor
        value = None if decision.tied_to is not None else _changed(decision, shard, fitted)
        crc32 = 0
        for piece in shard.source.pieces_of(tensor.name):
            crc32 = zlib.crc32(piece, crc32)
            if value is None and decision.tied_to is None:
                writer.put(tensor.name, piece)
        crcs[tensor.name] = crc32
        if value is not None:
            writer.put(tensor.name, value)
        report_progress(options, tensor)
    return crcs


def is_adjusted(decision: Decision, fitted: Fitted) -> bool:
    """Whether a method has changed the values of a kept tensor."""
    return isinstance(fitted.encoded.get(decision.tensor.name), Kept)


def _changed(decision: Decision, shard: Shard, fitted: Fitted) -> memoryview | None:
    """The bytes to be stored of a kept tensor, where they are other than the checkpoint's."""
    adjusted = fitted.encoded.get(decision.tensor.name)
    if isinstance(adjusted, Kept):
        return memoryview(tensor_bytes(adjusted.value, decision.stored_as))
    if decision.stored is None:
        return None
    return memoryview(tensor_bytes(tensor_view(shard.source, decision.tensor), decision.stored_as))


def coded_decisions(shard: Shard) -> list[Decision]:
    """The kept tensors whose bytes are coded, in the order of their codes in the file."""
    by_name = {d.tensor.name: d for d in shard.decisions if d.coding is not None}
    return [by_name[slot.tensor] for slot in shard.layout.slots if slot.tensor in by_name]


def write_coded(decision: Decision, shard: Shard, writer: SlotWriter, fitted: Fitted, options: Options) -> int:
    """Code a kept tensor into its slot, block by block; the CRC-32 of its input. Where that saves nothing, copy it."""
    assert decision.coding is not None
    name, changed = decision.tensor.name, _changed(decision, shard, fitted)
    stored, slot = decision.stored_as, part_name(name, "codes")
    raw = shard.source.stored(name) if changed is None else in_memory(changed)
    coded = _with_progress(encode_values(raw, stored.dtype, decision.coding), decision.tensor, options)
    if not writer.put_pieces(slot, coded, stored.n_bytes - 1):
        writer.put_pieces(slot, _copied(raw), stored.n_bytes)
    return shard.source.crc32_of(name)


def _copied(raw: Stored) -> Iterator[memoryview]:
    return raw.anew().pieces()


def _with_progress(blocks: Iterable[bytes], tensor: TensorInfo, options: Options) -> Iterator[bytes]:
    """The blocks of a tensor, each told once it is coded."""
    done = 0
    for place, block in enumerate(blocks, 1):
        yield block
        now = tensor.n_bytes * min(place * BLOCK_VALUES, tensor.numel) // tensor.numel
        if options.progress is not None:
            options.progress(tensor.name, now - done)
        done = now


def report_progress(options: Options, tensor: TensorInfo) -> None:
    """Say that a tensor is done."""
    if options.progress is not None:
        options.progress(tensor.name, tensor.n_bytes)
