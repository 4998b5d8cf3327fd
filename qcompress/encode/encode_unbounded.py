"""Weights whose codes have no width are encoded block by block of rows; the codes wait in a spool for their tables."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qcompress.artifact.entry import Entry, planned_entry, seal
from qcompress.coding.grids import decode_rows, exponent_for, step_value, take_rows
from qcompress.coding.rows import kernel_positions, measure_whole
from qcompress.coding.spool import Spool
from qcompress.coding.stored import Stored
from qcompress.coding.unbounded.payload import encode_sources, join_side
from qcompress.coding.unbounded.side import grid_of_unbounded
from qcompress.coding.unbounded.tables import Source, chunk_rows
from qcompress.coding.unbounded.tokens import narrowed
from qcompress.encode.encode_weight import encode_codes
from qcompress.encode.job import BLOCK_WEIGHTS, Finished, Job, Rows, Stopped, Survey, coded_on_cpu, float_rows
from qcompress.registry import RdConfig
from qcompress.report.counts import ValueCounter
from qcompress.report.document import LayerFigures
from qcompress.report.figures import LayerMeter
from qcompress.types.config import Coding
from qcompress.types.encoded import Unbounded, for_tensor
from qcompress.types.plan import Decision

if TYPE_CHECKING:
    from torch import Tensor

JOINED_WEIGHTS = 1 << 21
"""Of a block where the columns of a row are coded one after another: each takes a call, however many rows there are."""


def block_weights(decision: Decision) -> int:
    """About the weights of a block of rows of a weight whose codes have no width."""
    config = decision.config
    joined = isinstance(config, RdConfig) and (config.trellis or len(decision.tensor.shape) > 2)
    return JOINED_WEIGHTS if joined else BLOCK_WEIGHTS


def finish_unbounded(job: Job, rows: Rows, ready: Unbounded | None, survey: Survey, stop: threading.Event) -> Finished:
    """A weight whose codes have no width; they are coded here unless they wait for others.

    ready   codes that were chosen already
    raises  Stopped once `stop` is set
    """
    decision, folder = job.decision, job.writer.path.parent
    columns = decision.tensor.numel // max(rows.shape[0], 1)
    meter, values, codes = LayerMeter(decision.tensor.numel), ValueCounter(), SpooledCodes(columns, folder)
    blocks = _encoded_blocks(rows, job, survey) if ready is None else _ready_blocks(rows, ready, decision)
    unbounded = ready
    for weights, part in blocks:
        if stop.is_set():
            raise Stopped
        meter.add(weights, decode_rows(part), None)
        found = narrowed(part.codes.numpy())
        values.add(found)
        codes.add(found)
        # The codes of a pool are few enough to be one block.
        unbounded = part if ready is None else ready
    assert unbounded is not None
    unbounded = for_tensor(unbounded, decision)
    figures = replace(meter.result(values.counts), step=step_value(unbounded))
    if job.pooled:
        return Finished(decision, planned_entry(decision), figures, survey.crc32, None, unbounded)
    return _coded(job, unbounded, codes, figures, survey)


def _coded(job: Job, grid: Unbounded, codes: SpooledCodes, figures: LayerFigures, survey: Survey) -> Finished:
    """A weight that has tables of its own."""
    decision = job.decision
    source = Source((codes.rows, codes.columns), kernel_positions(grid.shape, grid.axis), grid.trellis, codes.read)
    coded = encode_sources([source], [grid_of_unbounded(grid)], job.choice, job.writer.path.parent)
    payload = join_side(coded.side, coded.payloads[0])
    return Finished(
        decision,
        sealed_unbounded(decision, coded.codings[0], payload),
        replace(figures, classes=coded.uses[0]),
        survey.crc32,
        payload,
        side_bytes=payload.size - coded.payloads[0].size,
    )


def sealed_unbounded(decision: Decision, coding: Coding, payload: Stored) -> Entry:
    """The entry of unbounded codes that came to this payload."""
    entry = replace(planned_entry(decision), coding=coding)
    return replace(entry, crc32=seal(decision.tensor.name, entry, payload.crc32()))


def _spans(rows: Rows, decision: Decision) -> Iterator[slice]:
    """Blocks of whole chunks of rows, at least one block."""
    count = rows.shape[0]
    tall = chunk_rows(decision.tensor.numel // max(count, 1))
    step = tall * max(1, block_weights(decision) * count // max(tall * decision.tensor.numel, 1))
    return (slice(start, min(start + step, count)) for start in range(0, max(count, 1), step))


def _encoded_blocks(rows: Rows, job: Job, survey: Survey) -> Iterator[tuple[Tensor, Unbounded]]:
    """Row blocks as float32 [rows, columns] on the CPU, and their codes: each by itself, and what all rows tell."""
    whole = measure_whole(rows, job.device, BLOCK_WEIGHTS)
    context = replace(job.sources.context_of(job.decision, exponent_for(survey.largest)), whole=whole)
    for span in _spans(rows, job.decision):
        block = float_rows(rows[span])
        found = coded_on_cpu(encode_codes(block.to(job.device), job.decision, context))
        assert isinstance(found, Unbounded)
        yield block.reshape(len(block), -1), found


def _ready_blocks(rows: Rows, ready: Unbounded, decision: Decision) -> Iterator[tuple[Tensor, Unbounded]]:
    """The same of a weight that has its codes."""
    for span in _spans(rows, decision):
        block = float_rows(rows[span])
        part = take_rows(ready, span.start, span.stop)
        assert isinstance(part, Unbounded)
        yield block.reshape(len(block), -1), part


class SpooledCodes:
    """The codes of a weight of so many columns, chunk by chunk of rows."""

    def __init__(self, columns: int, folder: Path) -> None:
        self.columns = columns
        self.rows = 0
        self._spool = Spool(folder)
        self._chunks: list[tuple[int, np.dtype[np.signedinteger]]] = []

    def add(self, codes: NDArray[Any]) -> None:
        """Append whole chunks of rows, [rows, columns] of any integers, but for the last one."""
        tall = chunk_rows(self.columns)
        for start in range(0, len(codes), tall):
            chunk = codes[start : start + tall]
            self._spool.write(chunk.tobytes())
            self._chunks.append((len(chunk), chunk.dtype))
        self.rows += len(codes)

    def read(self) -> Iterator[NDArray[np.signedinteger]]:
        """Every chunk, [rows, columns]."""
        stored, at = self._spool.stored(), 0
        for rows, kind in self._chunks:
            end = at + rows * self.columns * kind.itemsize
            yield np.frombuffer(stored.read(at, end), kind).reshape(rows, self.columns)
            at = end
