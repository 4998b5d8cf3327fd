"""The files of an artifact are written here, by one process or by several ranks, to the same bytes.

Ranks take whole files, where there are as many as ranks; else they encode the tensors of one file after another. Where
the plan knows the place of every byte, each rank writes its tensors there. Where lengths are known only once codes are
coded, each rank writes a part of its own beside the file, and the first rank puts the parts together in the order of
the plan. What all ranks write lies in one folder, which all of them see.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qcompress.artifact.layout import Layout, Slot
from qcompress.artifact.manifest import pool_names
from qcompress.artifact.writer import Filled, SlotWriter, Written
from qcompress.checkpoint.staging import staging_folder
from qcompress.coding.stored import Stored
from qcompress.encode.journal import Record, parse_record
from qcompress.encode.write_file import (
    Run,
    WrittenShard,
    code_kept,
    encode_all,
    encode_resumed,
    finish_file,
    finished_of,
    in_order,
    journal_of,
    record_of,
    write_shard,
)
from qcompress.encode.write_kept import copy_kept
from qcompress.errors import ResourceError
from qcompress.plan.files import Shard
from qcompress.types.plan import Decision
from qcompress.types.ranks import deal
from qcompress.types.run import Options


def write_files(shards: Sequence[Shard], path_of: Callable[[Shard], Path], run: Run) -> list[WrittenShard]:
    """Write every file to its path; each rank then knows what all of them hold.

    raises  what `write_shard` raises
    """
    world, options = run.options.world, run.options
    if world.size == 1:
        return [write_shard(shard, path_of(shard), run) for shard in shards]
    if len(shards) < world.size:
        return [_write_together(shard, path_of(shard), run) for shard in shards]
    sizes = [shard.source.file_bytes for shard in shards]
    own = world.share(sizes)
    run = replace(run, options=_for_all(options, sum(sizes[place] for place in own), sum(sizes)))
    done = {str(place): _document(write_shard(shards[place], path_of(shards[place]), run)) for place in own}
    found = {place: document for part in world.tell(done) for place, document in part.items()}
    return [_parse_written(shard, found[str(place)]) for place, shard in enumerate(shards)]


def _for_all(options: Options, own: int, everything: int) -> Options:
    """The options of a rank whose progress, on so many bytes of its own, stands for that of all ranks."""
    advance = options.progress
    if advance is None:
        return options
    return replace(options, progress=lambda name, n_bytes: advance(name, n_bytes * everything // max(own, 1)))


def _write_together(shard: Shard, path: Path, run: Run) -> WrittenShard:
    """Write one file by all ranks."""
    world = run.options.world
    # Those that share a pool wait for one another: the first rank encodes them, who has the parts.
    sharing = set(pool_names(shard.manifest.tensors))
    parted = [decision for decision in in_order(shard) if decision.tensor.name not in sharing]
    hands = deal([decision.tensor.numel for decision in parted], world.size)
    own = tuple(parted[place] for place in hands[world.rank])
    if shard.layout.exact and world.is_first:
        path.touch()
    world.wait()
    sizes = [sum(decision.tensor.n_bytes for decision in some) for some in (own, parted)]
    records = _write_part(shard, own, path, replace(run, options=_for_all(run.options, *sizes)))
    told = world.tell([asdict(record) for record in records])
    document = None
    if world.is_first:
        parts = [[parse_record(line) for line in lines] for lines in told]
        document = _document(_put_together(shard, path, parts, run))
    return _parse_written(shard, world.tell(document)[0])


def _part_path(shard: Shard, path: Path, rank: int, options: Options) -> Path:
    """Where a rank writes its tensors: into the file where their places are known, else into a part beside it."""
    if shard.layout.exact:
        return path
    return staging_folder(options.output) / f"{shard.file}.part-{rank}"


def _write_part(shard: Shard, own: tuple[Decision, ...], path: Path, run: Run) -> list[Record]:
    """Encode a rank's tensors and write them; with `resume` go on from what the same rank of as many has finished."""
    world, layout = run.options.world, shard.layout
    if not layout.exact:
        names = {decision.tensor.name for decision in own}
        layout = Layout(tuple(slot for slot in layout.slots if slot.tensor in names), header_bytes=0)
    part = replace(shard, decisions=own, layout=layout)
    journal = journal_of(part, run, f".{world.rank}-of-{world.size}")
    place = _part_path(shard, path, world.rank, run.options)
    with SlotWriter(place, layout, reopen=True) as writer, journal or contextlib.nullcontext():
        return [record_of(writer, one) for one in encode_resumed(part, writer, journal, run).values()]


def _put_together(shard: Shard, path: Path, parts: Sequence[Sequence[Record]], run: Run) -> WrittenShard:
    """Finish a file of which each rank has written, or holds in its part, the tensors of its records."""
    records = {record.tensor: record for part in parts for record in part}
    places = {
        record.tensor: _part_path(shard, path, rank, run.options) for rank, part in enumerate(parts) for record in part
    }
    with SlotWriter(path, shard.layout, reopen=True) as writer:
        crcs = copy_kept(shard, writer, run.fitted, run.options)
        others = encode_all(shard, writer, records, run)
        finished = {}
        for decision in in_order(shard):
            name = decision.tensor.name
            if name in records:
                _take(writer, records[name], None if shard.layout.exact else places[name])
                finished[name] = finished_of(records[name], decision)
            else:
                finished[name] = next(others)
        # What pooled codes share is written behind the last of them.
        assert next(others, None) is None
        return finish_file(shard, writer, finished, crcs | code_kept(shard, writer, run))


def _take(writer: SlotWriter, record: Record, part: Path | None) -> None:
    """Take over what a rank has written of a tensor, from its part where it has one.

    raises  ResourceError where this rank reads other bytes there than were written
    """
    whole = part is not None or writer.restore(record.slots)
    if part is not None:
        with part.open("rb") as file:
            for name, filled in record.slots.items():
                stored = _stored(file.fileno(), filled)
                whole = whole and stored.crc32() == filled.crc32
                if whole:
                    writer.put_planned(name, stored, filled.shape)
    if not whole:
        what = f"the first rank reads other bytes of tensor {record.tensor!r} than another rank wrote"
        raise ResourceError(str(part or writer.path), what, "let all ranks write to one folder that all of them see")


def _stored(descriptor: int, filled: Filled) -> Stored:
    """What a slot of a part holds, read when it is asked for."""

    def fetch(start: int, stop: int) -> memoryview:
        return memoryview(os.pread(descriptor, stop - start, filled.start + start))

    return Stored(filled.n_bytes, fetch)


def _document(one: WrittenShard) -> dict[str, Any]:
    """What other ranks are told of a finished file."""
    records = [Record(name, f.entry, f.figures, f.input_crc32, {}, f.side_bytes) for name, f in one.finished.items()]
    return {
        "written": asdict(one.written),
        "finished": [asdict(record) for record in records],
        "input_sha256": one.input_sha256,
    }


def _parse_written(shard: Shard, document: Mapping[str, Any]) -> WrittenShard:
    decisions = {decision.tensor.name: decision for decision in shard.decisions}
    records = map(parse_record, document["finished"])
    slots = tuple(Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in document["written"]["slots"])
    written = Written(**{**document["written"], "slots": slots})
    finished = {record.tensor: finished_of(record, decisions[record.tensor]) for record in records}
    return WrittenShard(shard, written, finished, document["input_sha256"])
