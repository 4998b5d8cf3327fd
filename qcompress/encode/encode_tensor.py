"""One tensor of a file is surveyed, cut into row blocks, encoded, packed, measured, and handed to the writer here.

Runs on a thread of its own for each tensor. Every block fits the cache, so that the passes over it cost little.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from qcompress.artifact.entry import PARTS, Entry, part_name, planned_entry, seal
from qcompress.artifact.writer import SlotWriter
from qcompress.checkpoint.checkpoint import tensor_view
from qcompress.coding.grids import (
    centroid_values,
    decode_rows,
    exponent_for,
    row_spans,
    take_rows,
    with_entries,
)
from qcompress.coding.packing import pack, row_bytes
from qcompress.coding.payload import encode_payload, least_bytes
from qcompress.coding.rows import row_slices, stored_codebook_shape
from qcompress.coding.stored import Stored, in_memory
from qcompress.encode.encode_unbounded import finish_unbounded
from qcompress.encode.encode_weight import encode_codes, encode_weight
from qcompress.encode.job import (
    BLOCK_WEIGHTS,
    Finished,
    Job,
    Rows,
    Stopped,
    Survey,
    coded_on_cpu,
    float_rows,
    rows_of,
    survey_of,
)
from qcompress.registry import METHODS
from qcompress.report.counts import codebook_figures
from qcompress.report.figures import LayerMeter, unclipped_range
from qcompress.types.config import Coding, CodingChoice
from qcompress.types.encoded import Codebook, Coded, Compressed, Constant, Kept, Unbounded
from qcompress.types.plan import Decision, row_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


STACKED_WEIGHTS = 1 << 15
"""Above so many the call that encodes a weight costs little beside the work in it."""

FIELDS = {**{part: part for part in PARTS}, "codebook": "centroids", "exponent": "row_exponents", "table": "values"}
"""Part of a stored tensor -> the field of the encoded one that it holds."""
OF_ALL_ROWS = ("table",)
"""Parts of which all row blocks of a tensor have the same."""


class _Block(NamedTuple):
    """Some rows of a weight, encoded.

    weights, decoded  float32 [rows, columns] on the CPU
    packed            uint8 [rows, bytes], the codes as `pack` makes them
    within            see report.figures.unclipped_range
    """

    weights: Tensor
    encoded: Coded
    decoded: Tensor
    packed: NDArray[np.uint8]
    within: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, weights: Tensor, encoded: Coded) -> _Block:
        assert not isinstance(encoded, Unbounded)
        packed = pack(encoded.codes.numpy(), encoded.bits)
        return cls(weights, encoded, decode_rows(encoded), packed, unclipped_range(encoded))

    def rows(self, start: int, stop: int) -> _Block:
        """Some of the rows, of grids that no two rows share."""
        within = self.within
        return _Block(
            self.weights[start:stop],
            take_rows(self.encoded, start, stop),
            self.decoded[start:stop],
            self.packed[start:stop],
            None if within is None else (within[0][start:stop], within[1][start:stop]),
        )


def has_rows_of_grids(decision: Decision) -> bool:
    """Whether no two rows of a weight share a grid."""
    config = decision.config
    return config.unit != "tensor" and config.form not in ("codebook", "constant", "unbounded")


def goes_by_rows(decision: Decision) -> bool:
    """Whether a weight is encoded row block by row block, from itself alone."""
    method = METHODS[decision.method or ""]
    return method.needs == "weights" and method.family == "quantize" and has_rows_of_grids(decision)


def stack_key(job: Job) -> object:
    """Equal for small weights whose rows one call may encode together; None for a weight that is encoded by itself."""
    decision, sources = job.decision, job.sources
    tensor, config = decision.tensor, decision.config
    leads = len(tensor.shape) > 1 and decision.axis == tuple(range(len(decision.axis)))
    alone = job.ready is not None or job.reference is not None or job.pooled or sources.statistics is not None
    by_rows = goes_by_rows(decision) and not decision.row_exponents
    if not by_rows or not leads or alone or not 0 < tensor.numel <= STACKED_WEIGHTS:
        return None
    return decision.method, config, row_shape(tensor.shape, decision.axis)[1:]


def encode_tensors(jobs: Sequence[Job], stop: threading.Event) -> list[Finished]:
    """Encode weights, those of one `stack_key` and one exponent in one call, whose cost they share; in their order.

    Raises as `encode_tensor`.
    """
    if len(jobs) == 1:
        return [encode_tensor(jobs[0], stop)]
    stacks: dict[object, list[tuple[Job, Survey]]] = {}
    for job in jobs:
        survey = survey_of(job)
        stacks.setdefault((stack_key(job), exponent_for(survey.largest)), []).append((job, survey))
    finished = [one for stack in stacks.values() for one in _encode_stack(stack, stop)]
    order = {job.decision.tensor.name: place for place, job in enumerate(jobs)}
    return sorted(finished, key=lambda one: order[one.decision.tensor.name])


def _encode_stack(stack: Sequence[tuple[Job, Survey]], stop: threading.Event) -> Iterator[Finished]:
    """Weights as the rows of one: a row is encoded by itself, and gets the codes and the grid that it gets alone."""
    first, survey = stack[0]
    exponent, start = exponent_for(survey.largest), 0
    blocks = [float_rows(rows_of(job)[:]) for job, _ in stack]
    context = first.sources.context_of(first.decision, exponent)
    rows = torch.cat(blocks)
    found = coded_on_cpu(encode_codes(rows.to(first.device), first.decision, context))
    whole = _Block.of(rows.flatten(1), found)
    for (job, survey), block in zip(stack, blocks, strict=True):
        part = whole.rows(start, start + len(block))
        start += len(block)
        yield _finish_blocks(job, survey, exponent, [part], stop)


def encode_tensor(job: Job, stop: threading.Event) -> Finished:
    """Encode one weight. Its grid goes to the writer, and its codes too where nothing but packing awaits them.

    Raises CheckpointError where the weight holds NaN or Inf; Stopped once `stop` is set.
    """
    survey = survey_of(job)
    rows = rows_of(job)
    if job.ready is None and job.decision.config.form == "unbounded":
        return finish_unbounded(job, rows, None, survey, stop)
    whole = _whole_codes(job, survey.largest)
    if isinstance(whole, Constant):
        return _finish_constant(job, rows, whole, survey)
    if isinstance(whole, Unbounded):
        return finish_unbounded(job, rows, whole, survey, stop)
    if whole is None:
        exponent = exponent_for(survey.largest)
        return _finish_blocks(job, survey, exponent, starmap(_Block.of, _encoded_blocks(rows, job, exponent)), stop)
    about: dict[str, Any] = {}
    if isinstance(whole, Codebook):
        whole = with_entries(whole, stored_codebook_shape(job.decision)[1])
        about = codebook_figures(whole.codes.numpy(), centroid_values(whole).cpu().numpy())
    # What is encoded whole knows its exponent, which of float32 centroids is 0.
    finished = _finish_blocks(job, survey, whole.exponent, starmap(_Block.of, _row_blocks(rows, whole)), stop)
    return replace(finished, figures=replace(finished.figures, **about))


def _finish_blocks(
    job: Job, survey: Survey, exponent: int, blocks: Iterable[_Block], stop: threading.Event
) -> Finished:
    """A weight whose row blocks come with their codes: measured, written."""
    decision, writer, tensor = job.decision, job.writer, job.decision.tensor
    entry = planned_entry(decision)
    meter = LayerMeter(tensor.numel, decision.config.bits)
    codes = _Codes(writer, tensor.name, job.choice, entry)
    grids: dict[str, list[Tensor]] = {}
    for block in blocks:
        if stop.is_set():
            raise Stopped
        encoded = block.encoded
        assert not isinstance(encoded, Unbounded)
        counts = torch.bincount(encoded.codes.reshape(-1), minlength=2**encoded.bits).numpy()
        meter.add(block.weights, block.decoded, counts, within=block.within)
        codes.add(block.packed)
        _collect_grid(grids, encoded, once=decision.config.unit == "tensor")
    # The order of a checksum: codes, then the other parts.
    coding, payload = codes.finish()
    crc32 = codes.crc32
    for part in PARTS[1:]:
        if part in grids:
            data = torch.cat(grids[part]).numpy().data
            crc32 = zlib.crc32(data, crc32)
            if entry.shared is None:
                writer.put(part_name(tensor.name, part), data)
    entry = replace(entry, coding=coding, exponent=exponent if entry.has_exponent else 0)
    entry = replace(entry, crc32=seal(tensor.name, entry, crc32))
    return Finished(decision, entry, meter.result(), survey.crc32, payload)


def _whole_codes(job: Job, largest: float) -> Compressed | None:
    """The codes of a weight that is encoded in one piece, on the CPU; None for one that goes by row blocks."""
    decision, method = job.decision, METHODS[job.decision.method or ""]
    if job.ready is not None:
        assert not isinstance(job.ready, Kept)
        return coded_on_cpu(job.ready)
    if goes_by_rows(decision):
        return None
    # What stands in for a live model is on the CPU.
    device = job.device if method.needs == "weights" else "cpu"
    weight = tensor_view(job.source, decision.tensor)
    return coded_on_cpu(encode_weight(weight, decision, job.sources, device, largest))


def _finish_constant(job: Job, rows: Rows, constant: Constant, survey: Survey) -> Finished:
    """A weight of one value, which has no codes."""
    decision = job.decision
    entry = replace(planned_entry(decision), value=constant.value)
    meter = LayerMeter(decision.tensor.numel)
    for span in row_slices(rows.shape[0], decision.tensor.numel // rows.shape[0], BLOCK_WEIGHTS):
        block = float_rows(rows[span]).reshape(span.stop - span.start, -1)
        meter.add(block, torch.full_like(block, constant.value), None)
    codes = bytes(least_bytes(entry.numel))
    job.writer.put(part_name(decision.tensor.name, "codes"), codes)
    entry = replace(entry, crc32=seal(decision.tensor.name, entry, zlib.crc32(codes)))
    counts = np.array([decision.tensor.numel], np.int64)
    return Finished(decision, entry, meter.result(counts), survey.crc32, None)


def _encoded_blocks(rows: Rows, job: Job, exponent: int) -> Iterator[tuple[Tensor, Coded]]:
    """Row blocks as float32 [rows, columns] on the CPU, each encoded by itself."""
    count, context = rows.shape[0], job.sources.context_of(job.decision, exponent)
    step = max(1, BLOCK_WEIGHTS * count // max(rows.numel(), 1))
    for start in range(0, count, step):
        block = float_rows(rows[start : start + step])
        found = encode_codes(block.to(job.device), job.decision, context)
        yield block.reshape(len(block), -1), coded_on_cpu(found)


def _row_blocks(rows: Rows, whole: Coded) -> Iterator[tuple[Tensor, Coded]]:
    """Row blocks of a weight that has its codes already, as `_encoded_blocks` gives them."""
    for start, stop in row_spans(whole, BLOCK_WEIGHTS):
        block = float_rows(rows[start:stop])
        yield block.reshape(len(block), -1), take_rows(whole, start, stop)


def _collect_grid(grids: dict[str, list[Tensor]], encoded: Coded, *, once: bool) -> None:
    """Add the parts of one row block; `once` where all blocks have the same."""
    for part in PARTS[1:]:
        value = getattr(encoded, FIELDS[part], None)
        given = part == "table" and getattr(encoded, "given", None) is not None
        if value is not None and not given and not (part in grids and (once or part in OF_ALL_ROWS)):
            grids.setdefault(part, []).append(value)


class _Codes:
    """Packed codes of one tensor: straight to their slot, or gathered until entropy coding can see them all.

    crc32  of all that was written
    """

    def __init__(self, writer: SlotWriter, tensor: str, choice: CodingChoice, entry: Entry) -> None:
        self.crc32 = 0
        self._entry = entry
        self._slot = part_name(tensor, "codes")
        self._writer = writer
        self._choice = choice
        self._gathered: list[NDArray[np.uint8]] = []

    def add(self, packed: NDArray[np.uint8]) -> None:
        if self._choice == "packed":
            self.crc32 = zlib.crc32(packed.data, self.crc32)
            self._writer.put(self._slot, packed.data)
        else:
            self._gathered.append(packed)

    def finish(self) -> tuple[Coding, Stored | None]:
        """The coding that was chosen, and the payload unless it is written already."""
        if self._choice == "packed":
            return "packed", None
        entry = self._entry
        packed = np.concatenate(self._gathered)
        self._gathered.clear()
        assert packed.shape == (entry.code_rows, row_bytes(entry.columns, entry.bits))
        coding, payload = encode_payload(packed, entry.bits, entry.columns, self._choice, least_bytes(entry.numel))
        self.crc32 = zlib.crc32(payload)
        return coding, in_memory(payload)
