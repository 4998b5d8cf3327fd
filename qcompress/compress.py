"""Checkpoint and plan -> artifact and report: the arrows of the design in a row, streamed tensor by tensor."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qcompress.artifact.layout import (
    PARTS,
    POOL_NAME,
    Slot,
    lattice_entry,
    make_slots,
    part_name,
    pool_of,
    render_header,
)
from qcompress.artifact.manifest import artifact_hash, input_hash
from qcompress.artifact.writer import (
    SlotWriter,
    Written,
    copy_companions,
    refuse_own_input,
    staged_output,
    write_index,
)
from qcompress.books import Evidence, make_shared_books, unweighed, with_entries_counted
from qcompress.checkpoint import Checkpoint, tensor_bytes, tensor_view
from qcompress.coding.lattice_payload import encode_pool
from qcompress.coding.packing import row_bytes
from qcompress.coding.payload import CodingChoice
from qcompress.errors import CheckpointError, InputError, ResourceError, raise_all
from qcompress.halves import halve_what_bears_it
from qcompress.journal import Journal, Record, run_key
from qcompress.recipe import recipe_hash
from qcompress.report.assemble import compressed_layer, kept_layer, run_figures
from qcompress.report.document import ArtifactFile, LayerReport, Report, RunFigures, make_size
from qcompress.shards import Shard, make_shards
from qcompress.types import Decision, Fitted, Kept, Plan, TensorInfo
from qcompress.worker import (
    BLOCK_WEIGHTS,
    Finished,
    Job,
    count_nonfinite,
    encode_tensor,
    nonfinite_error,
    survey_bytes,
)

COPY_BYTES = 1 << 22
BLOCK_COPIES = 24
"""Float32 copies of a block that the most memory-hungry method holds at once."""

Progress = Callable[[str, int], None]
"""Called with a tensor's name and its bytes in the checkpoint once it is done."""


@dataclass(frozen=True)
class Options:
    """How to run, not what: none of it changes the bytes, but for `choice`, `device` and the files.

    statistics       a file of the layers' input statistics, for the methods that can work from them
    representatives  a file of what finetune-reg has learned, for the methods that take it up
    rate             bits a weight that the codes of methods without widths may take; a budget's search sets it
    """

    output: Path
    choice: CodingChoice = "auto"
    force: bool = False
    threads: int = 1
    device: str = "cpu"
    max_memory: int | None = None
    resume: bool = False
    statistics: Path | None = None
    representatives: Path | None = None
    rate: float | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class _Run:
    """What all files of one run have in common."""

    fitted: Fitted
    evidence: Evidence
    options: Options


@dataclass(frozen=True)
class _Done:
    shard: Shard
    written: Written
    finished: Mapping[str, Finished]
    input_sha256: str


def keep_nonfinite(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan with every weight that holds NaN or Inf kept as it is. Reads all weights once."""
    decisions = []
    for decision in plan.decisions:
        if decision.compresses:
            source = checkpoint.shard_of(decision.tensor.name)
            if not survey_bytes(source.bytes_of(decision.tensor.name), decision.tensor.dtype).finite:
                count = count_nonfinite(tensor_view(source, decision.tensor))
                reason = f"{count} values are NaN or Inf (--skip-nonfinite)"
                decision = replace(decision, method=None, config=None, reason=reason)
        decisions.append(decision)
    return replace(plan, decisions=tuple(decisions))


def refuse_nonfinite(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise CheckpointError (Refusals where several) for every weight to compress that holds NaN or Inf."""
    errors: list[InputError] = []
    for decision in plan.decisions:
        if decision.compresses:
            source, tensor = checkpoint.shard_of(decision.tensor.name), decision.tensor
            if not survey_bytes(source.bytes_of(tensor.name), tensor.dtype).finite:
                errors.append(nonfinite_error(source, tensor, count_nonfinite(tensor_view(source, tensor))))
    raise_all(errors)


def compress(checkpoint: Checkpoint, plan: Plan, options: Options, fitted: Fitted | None = None) -> Report:
    """Write the artifact that `plan` describes and return its report, which has no gates yet.

    fitted  what methods on a live model chose; the others encode here, tensor by tensor
    raises  CheckpointError where a weight is not finite or tied tensors differ; OutputError where the output is in the
            way; ResourceError where disk or memory do not suffice. Nothing is left behind then.
    """
    with staged(checkpoint, options) as place:
        return compress_to(place, checkpoint, plan, options, fitted)


def staged(checkpoint: Checkpoint, options: Options) -> AbstractContextManager[Path]:
    """Where to build an artifact, which becomes the output on leaving without an error; see `staged_output`.

    raises  OutputError where the output is in the way, or is the input
    """
    refuse_own_input(checkpoint.path, options.output)
    return staged_output(options.output, force=options.force, folder=checkpoint.is_folder, resume=options.resume)


def compress_to(
    staged: Path, checkpoint: Checkpoint, plan: Plan, options: Options, fitted: Fitted | None = None
) -> Report:
    """`compress` where the output is staged already."""
    started, cpu_started = time.monotonic(), time.process_time()
    torch.set_num_threads(1)
    _refuse_untrue_ties(checkpoint, plan)
    options = replace(options, threads=_fitting_threads(plan, options))
    fitted = fitted or Fitted({})
    plan = halve_what_bears_it(checkpoint, plan, fitted)
    plan, evidence = _settle_books(checkpoint, plan, fitted, options)
    shards = make_shards(checkpoint, plan, options.choice, fitted)
    folder = checkpoint.is_folder
    _refuse_full_disk(options.output, sum(shard.layout.file_bytes for shard in shards))
    common = _Run(fitted, evidence, options)
    done = [_write_shard(shard, staged / shard.file if folder else staged, common) for shard in shards]
    index_bytes = 0
    if folder:
        copy_companions(checkpoint.path, staged)
    if len(done) > 1:
        index_bytes = write_index(staged, {one.shard.file: one.written.slots for one in done})
    run = run_figures(time.monotonic() - started, time.process_time() - cpu_started, options.device)
    report = _make_report(checkpoint, _with_adjusted(plan, fitted), done, index_bytes, options.output.name, run)
    return replace(report, warnings=tuple(unweighed(plan, options.statistics)))


def _settle_books(checkpoint: Checkpoint, plan: Plan, fitted: Fitted, options: Options) -> tuple[Plan, Evidence]:
    """The plan with what its codebooks will store, and what encoding draws on, shared codebooks included."""

    def weight_of(decision: Decision) -> Tensor:
        return tensor_view(checkpoint.shard_of(decision.tensor.name), decision.tensor)

    evidence = Evidence(plan.recipe.seed, options.statistics, options.representatives)
    shared = [d for d in plan.decisions if d.book.shared is not None and d.tensor.name not in fitted.encoded]
    refuse_nonfinite(checkpoint, replace(plan, decisions=tuple(shared)))
    evidence = replace(evidence, books=make_shared_books(shared, weight_of, evidence))
    return with_entries_counted(plan, weight_of, evidence, fitted.encoded), evidence


def _with_adjusted(plan: Plan, fitted: Fitted) -> Plan:
    """The plan whose kept tensors say so where a method has changed their values."""
    adjusted = {name for name, value in fitted.encoded.items() if isinstance(value, Kept)}
    decisions = (
        replace(d, reason=f"{d.reason}; values adjusted") if d.tensor.name in adjusted else d for d in plan.decisions
    )
    return replace(plan, decisions=tuple(decisions))


def _refuse_untrue_ties(checkpoint: Checkpoint, plan: Plan) -> None:
    """A copy that is dropped must be one: compare the bytes of tied tensors that both lie in the checkpoint."""
    for decision in plan.decisions:
        if decision.tied_to is None:
            continue
        name, twin = decision.tensor.name, decision.tied_to
        one = checkpoint.shard_of(name).bytes_of(name)
        other = checkpoint.shard_of(twin).bytes_of(twin)
        if one != other:
            what = f"is called tied to {twin!r}, and their values differ"
            mend = "name it in a rule without a wildcard, which stores it by itself"
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r}", what, mend)


def _fitting_threads(plan: Plan, options: Options) -> int:
    """As many threads as were asked for and --max-memory allows. Raises ResourceError where not even one fits."""
    needs = {d.tensor.name: _memory_needed(d, options.choice) for d in plan.decisions if d.compresses}
    if options.max_memory is None or not needs:
        return options.threads
    name, largest = max(needs.items(), key=lambda item: item[1])
    fitting = options.max_memory // largest
    if fitting < 1:
        what = f"needs about {largest} bytes of memory, more than --max-memory {options.max_memory}"
        mend = "allow more, or use --coding packed and granularity channel or group"
        raise ResourceError(f"tensor {name!r}", what, mend)
    return min(options.threads, fitting)


def _memory_needed(decision: Decision, choice: CodingChoice) -> int:
    """Bytes that encoding one tensor takes at most, roughly: its blocks, and its codes where they wait for coding."""
    weights = decision.tensor.numel
    block = weights if decision.config.granularity == "tensor" else min(weights, BLOCK_WEIGHTS)
    gathered = 0 if choice == "packed" else 3 * max(slot.n_bytes for slot in make_slots(decision, choice))
    copies = 6 if decision.config.granularity == "tensor" else BLOCK_COPIES
    return 4 * copies * block + gathered


def _refuse_full_disk(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        what = f"the artifact may need {needed} bytes and the disk has {free} left"
        raise ResourceError(str(output), what, "free some space, or write to another disk with -o")


def _journal(shard: Shard, run: _Run) -> Journal | None:
    if not run.options.resume:
        return None
    output = run.options.output
    key = run_key(shard.layout, shard.manifest, f"{run.options.device}{run.evidence.fingerprint}")
    return Journal(output.parent / f".{output.name}.partial" / f"{shard.file}.journal", key)


def _write_shard(shard: Shard, path: Path, run: _Run) -> _Done:
    fitted, options, journal = run.fitted, run.options, _journal(shard, run)
    with SlotWriter(path, shard.layout, reopen=journal is not None) as writer, journal or contextlib.nullcontext():
        finished = _restore(shard, writer, journal, options) if journal is not None else {}
        sharing = set(pool_of(shard.decisions))
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
        )

        def render(slots: Sequence[Slot], sha256: str, crc32: str) -> bytes:
            return render_header(slots, replace(manifest, sha256=sha256, header_crc32=crc32))

        written = writer.finish(render)
    return _Done(shard, written, finished, manifest.input_sha256)


def _record(writer: SlotWriter, one: Finished) -> Record:
    name = one.decision.tensor.name
    slots = writer.filled(part_name(name, part) for part in PARTS)
    return Record(name, one.entry, one.figures, one.input_crc32, slots, one.side_bytes)


def _restore(shard: Shard, writer: SlotWriter, journal: Journal, options: Options) -> dict[str, Finished]:
    """What an earlier run finished, as far as its input and its output still hold the same bytes."""
    finished: dict[str, Finished] = {}
    records = []
    for record, decision in zip(journal.read(), _in_order(shard), strict=False):
        tensor = decision.tensor
        same = survey_bytes(shard.source.bytes_of(tensor.name), tensor.dtype).crc32 == record.input_crc32
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
        raw = shard.source.bytes_of(tensor.name)
        crcs[tensor.name] = survey_bytes(raw, "bytes").crc32
        adjusted = fitted.encoded.get(tensor.name)
        if isinstance(adjusted, Kept):
            raw = tensor_bytes(adjusted.value, replace(tensor, dtype=decision.stored or tensor.dtype))
        elif decision.stored is not None:
            raw = tensor_bytes(tensor_view(shard.source, tensor), replace(tensor, dtype=decision.stored))
        if decision.tied_to is None:
            for start in range(0, len(raw), COPY_BYTES):
                writer.put(tensor.name, raw[start : start + COPY_BYTES])
        _report_progress(options, tensor)
    return crcs


def _report_progress(options: Options, tensor: TensorInfo) -> None:
    if options.progress is not None:
        options.progress(tensor.name, tensor.n_bytes)


def _encode_all(shard: Shard, writer: SlotWriter, already: Container[str], run: _Run) -> Iterator[Finished]:
    """Encode on worker threads, a few tensors ahead; write and yield in the order of the slots."""
    fitted, options = run.fitted, run.options
    waiting = [decision for decision in reversed(_in_order(shard)) if decision.tensor.name not in already]
    sharing = set(pool_of(shard.decisions))
    pooled: list[Finished] = []
    stop = threading.Event()
    running: list[Future[Finished]] = []
    with ThreadPoolExecutor(options.threads) as pool:
        try:
            while waiting or running:
                while waiting and len(running) <= options.threads:
                    decision = waiting.pop()
                    name = decision.tensor.name
                    ready, reference = fitted.encoded.get(name), fitted.references.get(name)
                    job = Job(
                        shard.source,
                        decision,
                        writer,
                        options.choice,
                        options.device,
                        ready,
                        reference,
                        run.evidence,
                        name in sharing,
                    )
                    running.append(pool.submit(encode_tensor, job, stop))
                finished = running.pop(0).result()
                if finished.lattice is not None:
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


def _encode_pool(pooled: Sequence[Finished], writer: SlotWriter, options: Options) -> Iterator[Finished]:
    """Code the lattices that share tables, now that all are known; write them and what they share."""
    coded = encode_pool([one.lattice for one in pooled if one.lattice is not None], options.choice)
    for one, coding, payload, uses in zip(pooled, coded.codings, coded.payloads, coded.uses, strict=True):
        entry, figures = lattice_entry(one.decision, coding), replace(one.figures, classes=uses)
        finished = replace(one, entry=entry, figures=figures, payload=payload, lattice=None)
        _put_payload(writer, finished)
        _report_progress(options, finished.decision.tensor)
        yield replace(finished, payload=None)
    writer.put_varying(POOL_NAME, coded.side, (len(coded.side),))


def _put_payload(writer: SlotWriter, finished: Finished) -> None:
    name = part_name(finished.decision.tensor.name, "codes")
    data = memoryview(finished.payload or b"")
    entry = finished.entry
    if entry.is_lattice:
        writer.put_varying(name, data, (data.nbytes,))
        return
    packed = (entry.code_rows, row_bytes(entry.columns, entry.bits))
    writer.put_varying(name, data, packed if entry.coding == "packed" else (data.nbytes,))


def _compressed_layer(one: Finished, sizes: Mapping[str, int]) -> LayerReport:
    return compressed_layer(one.decision, sizes, one.entry, one.figures, one.side_bytes)


def _make_report(
    checkpoint: Checkpoint, plan: Plan, done: Sequence[_Done], index_bytes: int, name: str, run: RunFigures
) -> Report:
    finished = {tensor: one for shard in done for tensor, one in shard.finished.items()}
    sizes: dict[str, dict[str, int]] = {}
    for shard in done:
        for slot in shard.written.slots:
            sizes.setdefault(slot.tensor, {})[slot.name] = slot.n_bytes
    layers = tuple(
        _compressed_layer(finished[d.tensor.name], sizes[d.tensor.name])
        if d.compresses
        else kept_layer(d, sum(sizes.get(d.tensor.name, {}).values()))
        for d in plan.decisions
    )
    size = make_size(
        checkpoint.file_bytes,
        sum(shard.written.file_bytes for shard in done) + index_bytes,
        layers,
        header_bytes=sum(shard.written.header_bytes for shard in done),
        index_bytes=index_bytes,
        # Of the same name in every file.
        pooled_bytes=sum(slot.n_bytes for shard in done for slot in shard.written.slots if slot.tensor == POOL_NAME),
    )
    return Report(
        artifact=ArtifactFile(name=name, sha256=artifact_hash([(s.shard.file, s.written.sha256) for s in done])),
        recipe_hash=recipe_hash(plan.recipe),
        input_sha256=artifact_hash([(s.shard.file, s.input_sha256) for s in done]),
        size=size,
        layers=layers,
        run=run,
    )
