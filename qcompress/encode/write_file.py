"""One file of the artifact is written here: kept tensors are copied, weights encoded on threads, in slot order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from qcompress.artifact.entry import PARTS, part_name, seal_all_kept, seal_kept, seal_pool, seal_tied
from qcompress.artifact.hashes import input_hash
from qcompress.artifact.layout import render_header
from qcompress.artifact.manifest import DATA_NAME, POOL_NAME, manifest_frame, pool_names, unknown_lengths
from qcompress.artifact.writer import SlotWriter, Written
from qcompress.checkpoint.staging import staging_folder
from qcompress.coding.packing import row_bytes
from qcompress.coding.stored import in_memory
from qcompress.coding.unbounded.payload import encode_pool
from qcompress.encode.encode_tensor import encode_tensors, stack_key
from qcompress.encode.encode_unbounded import sealed_unbounded
from qcompress.encode.encode_weight import ContextSources
from qcompress.encode.job import BLOCK_WEIGHTS, Finished, Job
from qcompress.encode.journal import Journal, Record, run_key
from qcompress.encode.write_kept import coded_decisions, copy_kept, is_adjusted, report_progress, write_coded
from qcompress.plan.files import Shard
from qcompress.types.encoded import Fitted
from qcompress.types.plan import Decision
from qcompress.types.run import Options

SMALL_WEIGHTS = 1 << 14
"""Tensors of fewer weights on average take mostly Python's own time, which a second thread makes longer."""


@dataclass(frozen=True)
class Run:
    """What all files of one run have in common."""

    fitted: Fitted
    sources: ContextSources
    options: Options


@dataclass(frozen=True)
class WrittenShard:
    """One finished file, and what report and index say of it.

    finished      tensor name -> how it was encoded, of those that were compressed
    input_sha256  over the tensors of the input file, see `input_hash`
    """

    shard: Shard
    written: Written
    finished: Mapping[str, Finished]
    input_sha256: str


def write_shard(shard: Shard, path: Path, run: Run) -> WrittenShard:
    """Write one file to `path` and say what it holds; with `resume` go on from what an earlier run finished of it.

    raises  what `encode_tensor` raises, and ResourceError where the disk holds other bytes than were written
    """
    journal = journal_of(shard, run)
    with SlotWriter(path, shard.layout, reopen=journal is not None) as writer, journal or contextlib.nullcontext():
        crcs = copy_kept(shard, writer, run.fitted, run.options)
        finished = encode_resumed(shard, writer, journal, run)
        return finish_file(shard, writer, finished, crcs | code_kept(shard, writer, run))


def encode_resumed(shard: Shard, writer: SlotWriter, journal: Journal | None, run: Run) -> dict[str, Finished]:
    """Every weight of a file, encoded and written: what the journal has of an earlier run, then the others."""
    finished: dict[str, Finished] = {}
    if journal is not None:
        for record, decision in _restored(shard, writer, journal, in_order(shard), run.options):
            finished[record.tensor] = finished_of(record, decision)
    sharing = set(pool_names(shard.manifest.tensors))
    for one in encode_all(shard, writer, finished, run):
        finished[one.decision.tensor.name] = one
        # Pooled codes are nothing without what is written after the last of them.
        if journal is not None and one.decision.tensor.name not in sharing:
            journal.append(record_of(writer, one))
    return finished


def code_kept(shard: Shard, writer: SlotWriter, run: Run) -> dict[str, int]:
    """Code the kept tensors that are to be, but for those that a journal of their own has of an earlier run, behind all
    that was written before; the CRC-32 of each input."""
    decisions = coded_decisions(shard)
    journal = journal_of(shard, run, ".kept") if decisions else None
    crcs: dict[str, int] = {}
    with journal or contextlib.nullcontext():
        if journal is not None:
            # What a method has adjusted is other than the input, whatever that holds.
            same = [decision for decision in decisions if not is_adjusted(decision, run.fitted)]
            for record, _ in _restored(shard, writer, journal, same, run.options):
                crcs[record.tensor] = record.input_crc32
        for decision in decisions:
            name = decision.tensor.name
            if name not in crcs:
                run.options.world.check()
                crcs[name] = write_coded(decision, shard, writer, run.fitted, run.options)
                if journal is not None and not is_adjusted(decision, run.fitted):
                    journal.append(Record(name, None, None, crcs[name], writer.filled([part_name(name, "codes")])))
    return crcs


def finish_file(
    shard: Shard, writer: SlotWriter, finished: Mapping[str, Finished], kept_crcs: Mapping[str, int]
) -> WrittenShard:
    """Read back a file whose data are written, and write its header and manifest.

    kept_crcs  the CRC-32 of each input tensor that is kept
    """
    crcs = {**kept_crcs, **{name: one.input_crc32 for name, one in finished.items()}}
    manifest = replace(
        shard.manifest,
        input_sha256=input_hash(shard.source.tensors, crcs),
        tensors={name: one.entry for name, one in finished.items()},
        crc32s=_other_crc32s(shard, writer),
    )
    if manifest.is_compact:
        lengths = {name: writer.size_of(name) for name in unknown_lengths(manifest)}
        manifest = replace(manifest, lengths=lengths)

    def make_manifest(sha256: str, header_crc32: int) -> bytes:
        return manifest_frame(replace(manifest, sha256=sha256, header_crc32=header_crc32))

    written = writer.finish(partial(render_header, compact=shard.layout.compact), make_manifest)
    return WrittenShard(shard, written, finished, manifest.input_sha256)


def _other_crc32s(shard: Shard, writer: SlotWriter) -> dict[str, int]:
    """The CRC-32 of what has one in the manifest and is not compressed: kept tensors, tied names, and the pool."""
    found = {name: seal_tied(name, twin) for name, twin in shard.manifest.tied.items()}
    kept = {d.tensor.name: d for d in shard.decisions if not d.compresses and d.tied_to is None}
    if shard.layout.compact:
        stored = [slot.name for slot in shard.layout.slots if slot.name in kept]
        of = [(kept[name].stored_as, kept[name].tensor.dtype) for name in stored]
        found[DATA_NAME] = seal_all_kept(of, writer.crc32_over(stored))
    for name, decision in kept.items():
        tensor, dtype, coded = decision.tensor, decision.stored_as.dtype, decision.coding is not None
        if coded or not shard.layout.compact:
            crc32 = writer.crc32_of(part_name(name, "codes") if coded else name)
            found[name] = seal_kept(name, tensor.dtype, dtype, tensor.shape, crc32, coded=coded)
    pool = pool_names(shard.manifest.tensors)
    return found | ({POOL_NAME: seal_pool(pool, writer.crc32_of(POOL_NAME))} if pool else {})


def journal_of(shard: Shard, run: Run, part: str = "") -> Journal | None:
    """Where a run that can be resumed notes what it has finished of a file; `part` names the part of it that it writes.

    None where it cannot be resumed.
    """
    if not run.options.resume:
        return None
    key = run_key(shard.layout, shard.manifest, f"{run.options.device}{run.sources.fingerprint}{part}")
    return Journal(staging_folder(run.options.output) / f"{shard.file}{part}.journal", key)


def record_of(writer: SlotWriter, one: Finished) -> Record:
    """What a journal holds of a tensor that is written."""
    name = one.decision.tensor.name
    slots = writer.filled(part_name(name, part) for part in PARTS)
    return Record(name, one.entry, one.figures, one.input_crc32, slots, one.side_bytes)


def finished_of(record: Record, decision: Decision) -> Finished:
    """The inverse of `record_of`."""
    entry, figures = record.entry, record.figures
    assert entry is not None and figures is not None
    return Finished(decision, entry, figures, record.input_crc32, None, side_bytes=record.side_bytes)


def _restored(
    shard: Shard, writer: SlotWriter, journal: Journal, decisions: Sequence[Decision], options: Options
) -> list[tuple[Record, Decision]]:
    """What an earlier run finished of these tensors, as far as its input and its output still hold the same bytes."""
    found = []
    for record, decision in zip(journal.read(options.say), decisions, strict=False):
        tensor = decision.tensor
        same = shard.source.crc32_of(tensor.name) == record.input_crc32
        if record.tensor != tensor.name or not same or not writer.restore(record.slots):
            break
        found.append((record, decision))
        report_progress(options, tensor)
    journal.start([record for record, _ in found])
    return found


def in_order(shard: Shard) -> list[Decision]:
    """The compressing decisions in the order of their codes in the file."""
    by_codes = {part_name(d.tensor.name, "codes"): d for d in shard.decisions if d.compresses}
    return [by_codes[slot.name] for slot in shard.layout.slots if slot.name in by_codes]


def encode_all(shard: Shard, writer: SlotWriter, already: Container[str], run: Run) -> Iterator[Finished]:
    """Encode on worker threads, a few tensors ahead; write and yield in the order of the slots."""
    options = run.options
    waiting = [decision for decision in in_order(shard) if decision.tensor.name not in already]
    small = sum(decision.tensor.numel for decision in waiting) < SMALL_WEIGHTS * len(waiting)
    workers = 1 if small else options.threads
    sharing = set(pool_names(shard.manifest.tensors))
    windows = _windows(_make_job(decision, shard, writer, run, sharing) for decision in waiting)
    pooled: list[Finished] = []
    stop = threading.Event()
    running: list[Future[list[Finished]]] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                ahead = islice(windows, workers + 1 - len(running))
                running += [pool.submit(encode_tensors, jobs, stop) for jobs in ahead]
                if not running:
                    break
                options.world.check()
                for finished in running.pop(0).result():
                    if finished.unbounded is not None:
                        pooled.append(finished)
                        continue
                    if finished.payload is not None:
                        _put_payload(writer, finished)
                    report_progress(options, finished.decision.tensor)
                    yield replace(finished, payload=None)
            if pooled:
                yield from _encode_pool(pooled, writer, options)
        finally:
            stop.set()
            for future in running:
                future.cancel()


def _make_job(decision: Decision, shard: Shard, writer: SlotWriter, run: Run, pooled: Container[str]) -> Job:
    """`pooled` are the names of the weights whose codes wait for each other."""
    name, fitted, options = decision.tensor.name, run.fitted, run.options
    return Job(
        shard.source,
        decision,
        writer,
        options.choice,
        options.device,
        fitted.encoded.get(name),
        fitted.references.get(name),
        run.sources,
        name in pooled,
    )


def _windows(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """The jobs in their order, small ones that lie side by side together, no more than a block's weights of them."""
    window: list[Job] = []
    weights = 0
    for job in jobs:
        small, numel = stack_key(job) is not None, job.decision.tensor.numel
        if window and (not small or weights + numel > BLOCK_WEIGHTS):
            yield window
            window, weights = [], 0
        if small:
            window.append(job)
            weights += numel
        else:
            yield [job]
    if window:
        yield window


def _encode_pool(pooled: Sequence[Finished], writer: SlotWriter, options: Options) -> Iterator[Finished]:
    """Code the unbounded tensors that share tables, now that all are known; write them and what they share."""
    coded = encode_pool([one.unbounded for one in pooled if one.unbounded is not None], options.choice)
    for one, coding, payload, uses in zip(pooled, coded.codings, coded.payloads, coded.uses, strict=True):
        entry, figures = sealed_unbounded(one.decision, coding, payload), replace(one.figures, classes=uses)
        finished = replace(one, entry=entry, figures=figures, payload=payload, unbounded=None)
        _put_payload(writer, finished)
        report_progress(options, finished.decision.tensor)
        yield replace(finished, payload=None)
    writer.put_varying(POOL_NAME, in_memory(coded.side), (len(coded.side),))


def _put_payload(writer: SlotWriter, finished: Finished) -> None:
    name = part_name(finished.decision.tensor.name, "codes")
    payload, entry = finished.payload, finished.entry
    assert payload is not None
    shape: tuple[int, ...] = (payload.size,)
    if entry.coding == "packed" and not entry.is_unbounded:
        shape = (entry.code_rows, row_bytes(entry.columns, entry.bits))
    writer.put_varying(name, payload, shape)
