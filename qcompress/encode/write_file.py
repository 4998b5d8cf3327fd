"""One file of the artifact is written here: kept tensors are copied, weights encoded on threads, in slot order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

from qcompress.artifact.entry import PARTS, Entry, part_name, seal_all_kept, seal_kept, seal_pool, seal_tied
from qcompress.artifact.hashes import input_hash
from qcompress.artifact.layout import Layout, render_header
from qcompress.artifact.manifest import DATA_NAME, POOL_NAME, Manifest, manifest_frame, pool_names, unknown_lengths
from qcompress.artifact.writer import Filled, SlotWriter, Written
from qcompress.checkpoint.checkpoint import tensor_bytes, tensor_view
from qcompress.checkpoint.staging import staging_folder
from qcompress.coding.packing import row_bytes
from qcompress.coding.stored import in_memory
from qcompress.coding.unbounded.payload import encode_pool
from qcompress.encode.encode_tensor import BLOCK_WEIGHTS, Finished, Job, encode_tensors, sealed_unbounded, stack_key
from qcompress.encode.encode_weight import ContextSources
from qcompress.plan.files import Shard
from qcompress.report.document import LayerFigures
from qcompress.types.encoded import ClassUse, Fitted, Kept
from qcompress.types.plan import Decision, TensorInfo
from qcompress.types.run import Options, Say

SMALL_WEIGHTS = 1 << 14
"""Tensors of fewer weights on average take mostly Python's own time, which a second thread makes longer."""


@dataclass(frozen=True)
class Record:
    """One finished tensor: all that the run needs to know of it later."""

    tensor: str
    entry: Entry
    figures: LayerFigures
    input_crc32: int
    slots: Mapping[str, Filled]
    side_bytes: int = 0


def run_key(layout: Layout, manifest: Manifest, more: str) -> str:
    """SHA-256 of everything but the weights that decides a file's bytes: recipe, headers, layout, tool, and `more`: the
    device, and what was made of all weights together."""
    parts = [
        render_header(layout.slots, compact=layout.compact),
        manifest_frame(manifest),
        f"{layout.header_bytes}\n{more}".encode(),
    ]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


class Journal:
    """The records of one unfinished file; only appended to.

    Each line begins with the SHA-256 of what follows and of the line before, so that no line can be changed, moved or
    taken out unseen; the first line's is over the key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._file: IO[str] | None = None
        self._last = key

    def read(self, say: Say = lambda _: None) -> list[Record]:
        """The records of an earlier run with the same key, in its order, up to the first line that does not hold.

        say  told how many lines are dropped; nothing of the last one, which a kill may have cut off
        """
        try:
            first, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return []
        if first != json.dumps({"key": self.key}):
            return []
        records: list[Record] = []
        last = self.key
        for line in lines:
            digest, _, text = line.partition(" ")
            last = _chained(last, text)
            if digest != last:
                break
            records.append(_parse_record(json.loads(text)))
        dropped = len(lines) - 1 - len(records)
        if dropped > 0:
            what = f"{dropped} of {len(lines) - 1} lines are damaged and dropped"
            say(f"{self.path.name}: {what}; those tensors are encoded again")
        return records

    def start(self, records: list[Record]) -> None:
        """Begin the file anew with the records that still hold."""
        self._last = self.key
        self._file = self.path.open("w", encoding="utf-8")
        self._file.write(json.dumps({"key": self.key}) + "\n")
        for record in records:
            self._write(record)
        self._flush()

    def append(self, record: Record) -> None:
        """Note a tensor whose data are written."""
        self._write(record)
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, record: Record) -> None:
        assert self._file is not None
        text = json.dumps(asdict(record), separators=(",", ":"))
        self._last = _chained(self._last, text)
        self._file.write(f"{self._last} {text}\n")

    def _flush(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())


def _chained(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def _parse_record(line: Mapping[str, Any]) -> Record:
    entry, figures = dict(line["entry"]), dict(line["figures"])
    entry |= {key: tuple(entry[key]) for key in ("shape", "axis")}
    figures = {key: tuple(value) if isinstance(value, list) else value for key, value in figures.items()}
    if figures["classes"] is not None:
        figures["classes"] = tuple(ClassUse(**one) for one in figures["classes"])
    slots = {name: Filled(**{**slot, "shape": tuple(slot["shape"])}) for name, slot in line["slots"].items()}
    return Record(
        str(line["tensor"]),
        Entry(**entry),
        LayerFigures(**figures),
        int(line["input_crc32"]),
        slots,
        int(line["side_bytes"]),
    )


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
    fitted, options, journal = run.fitted, run.options, _journal(shard, run)
    with SlotWriter(path, shard.layout, reopen=journal is not None) as writer, journal or contextlib.nullcontext():
        finished = _restore(shard, writer, journal, options) if journal is not None else {}
        sharing = set(pool_names(shard.manifest.tensors))
        crcs = _copy_kept(shard, writer, fitted, options)
        for one in _encode_all(shard, writer, finished, run):
            finished[one.decision.tensor.name] = one
            # Pooled codes are nothing without what is written after the last of them.
            if journal is not None and one.decision.tensor.name not in sharing:
                journal.append(_record(writer, one))
        crcs |= {name: one.input_crc32 for name, one in finished.items()}
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
        infos = shard.manifest.kept or {}
        of = [(infos[name], kept[name].tensor.dtype) for name in stored]
        found[DATA_NAME] = seal_all_kept(of, writer.crc32_over(stored))
    else:
        for name, decision in kept.items():
            tensor = decision.tensor
            own, dtype = tensor.dtype, decision.stored or tensor.dtype
            found[name] = seal_kept(name, own, dtype, tensor.shape, writer.crc32_of(name))
    pool = pool_names(shard.manifest.tensors)
    return found | ({POOL_NAME: seal_pool(pool, writer.crc32_of(POOL_NAME))} if pool else {})


def _journal(shard: Shard, run: Run) -> Journal | None:
    """Where a run that can be resumed notes what it has finished."""
    if not run.options.resume:
        return None
    key = run_key(shard.layout, shard.manifest, f"{run.options.device}{run.sources.fingerprint}")
    return Journal(staging_folder(run.options.output) / f"{shard.file}.journal", key)


def _record(writer: SlotWriter, one: Finished) -> Record:
    name = one.decision.tensor.name
    slots = writer.filled(part_name(name, part) for part in PARTS)
    return Record(name, one.entry, one.figures, one.input_crc32, slots, one.side_bytes)


def _restore(shard: Shard, writer: SlotWriter, journal: Journal, options: Options) -> dict[str, Finished]:
    """What an earlier run finished, as far as its input and its output still hold the same bytes."""
    finished: dict[str, Finished] = {}
    records = []
    for record, decision in zip(journal.read(options.say), _in_order(shard), strict=False):
        tensor = decision.tensor
        same = shard.source.crc32_of(tensor.name) == record.input_crc32
        if record.tensor != tensor.name or not same or not writer.restore(record.slots):
            break
        finished[tensor.name] = Finished(
            decision, record.entry, record.figures, record.input_crc32, None, side_bytes=record.side_bytes
        )
        records.append(record)
        _report_progress(options, tensor)
    journal.start(records)
    return finished


def _in_order(shard: Shard) -> list[Decision]:
    """The compressing decisions in the order of their codes in the file."""
    by_codes = {part_name(d.tensor.name, "codes"): d for d in shard.decisions if d.compresses}
    return [by_codes[slot.name] for slot in shard.layout.slots if slot.name in by_codes]


def _copy_kept(shard: Shard, writer: SlotWriter, fitted: Fitted, options: Options) -> dict[str, int]:
    """Copy the kept tensors, as they are or as they were adjusted; the CRC-32 of each input, dropped copies too."""
    crcs = {}
    for decision in shard.decisions:
        if decision.compresses:
            continue
        tensor = decision.tensor
        adjusted = fitted.encoded.get(tensor.name)
        value = adjusted.value if isinstance(adjusted, Kept) else None
        if value is None and decision.stored is not None:
            value = tensor_view(shard.source, tensor)
        crc32 = 0
        for piece in shard.source.pieces_of(tensor.name):
            crc32 = zlib.crc32(piece, crc32)
            if value is None and decision.tied_to is None:
                writer.put(tensor.name, piece)
        crcs[tensor.name] = crc32
        if value is not None and decision.tied_to is None:
            writer.put(tensor.name, tensor_bytes(value, replace(tensor, dtype=decision.stored or tensor.dtype)))
        _report_progress(options, tensor)
    return crcs


def _report_progress(options: Options, tensor: TensorInfo) -> None:
    if options.progress is not None:
        options.progress(tensor.name, tensor.n_bytes)


def _encode_all(shard: Shard, writer: SlotWriter, already: Container[str], run: Run) -> Iterator[Finished]:
    """Encode on worker threads, a few tensors ahead; write and yield in the order of the slots."""
    options = run.options
    waiting = [decision for decision in _in_order(shard) if decision.tensor.name not in already]
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
                for finished in running.pop(0).result():
                    if finished.unbounded is not None:
                        pooled.append(finished)
                        continue
                    if finished.payload is not None:
                        _put_payload(writer, finished)
                    _report_progress(options, finished.decision.tensor)
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
        _report_progress(options, finished.decision.tensor)
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
