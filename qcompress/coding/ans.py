"""Codes become streams of an asymmetric numeral system and back, under a static table of integer frequencies.

artifact/SPEC.md describes the bytes, "Codes on disk"; the coder is constriction's. Chunks decode by themselves, so that
they can be shared: among threads where loops are compiled, else among processes, since the coder holds the
interpreter's lock.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar

import constriction
import numpy as np
from numpy.typing import NDArray

from qcompress.coding.compiled import COMPILER
from qcompress.coding.in_step import decode_in_step
from qcompress.coding.packing import Bytes, byte_span, unpack
from qcompress.coding.rows import tiles
from qcompress.coding.stored import Stored
from qcompress.errors import ResourceError

Job = TypeVar("Job")
Done = TypeVar("Done")
Tile: TypeAlias = tuple[slice, slice, Any]
"""Rows and columns of a piece of a matrix, and its codes, [rows, columns] of uint8 or of 16 bits, or packed."""
Model: TypeAlias = Any
"""What constriction codes under; the library names no types."""

CHUNK_CODES = 1 << 18
"""Codes of one stream; part of the format."""
MAX_PRECISION = 20
"""Frequencies sum to at most 2**20; part of the format."""
JOB_CHUNKS = 8
"""Chunks that are handed to a process together: some 50 ms of work."""
JOBS_AHEAD = 16
"""Jobs that wait for a process, or for their turn, at most."""
MODEL_BYTES, STATE_BYTES = 3, 16
"""More than a stream takes: bytes a code, and for its state."""
LONGEST_VARINT = 5
LEAST_CODES = 1 << 28
"""An artifact of fewer codes is decoded in some six seconds, and a process takes one or two to start."""
_MODEL_BITS = 24
_LONGEST_TABLE = 1 << 12
"""A byte, and at most ten for each of 256 codes."""


@dataclass(frozen=True, slots=True)
class Table:
    """Integer frequencies of the codes that occur.

    codes           uint8 [used], ascending
    frequencies     int64 [used], each at least 1, together 2**precision
    expected_bytes  of a payload, from the cross-entropy; 0 where the table was read
    """

    precision: int
    codes: Bytes
    frequencies: NDArray[np.int64]
    expected_bytes: int = 0

    def model(self) -> Model | None:
        """The coder's model, exact on both sides because these quotients are; None where one code needs no stream."""
        if len(self.codes) == 1:
            return None
        return constriction.stream.model.Categorical(self.frequencies * 2.0**-self.precision, perfect=False)


def least_ans(counts: NDArray[np.int64]) -> int:
    """A bound below the bytes that table and streams together are expected to take; close to them."""
    codes = np.flatnonzero(counts)
    if len(codes) == 1:
        return 0
    used = counts[codes].astype(np.float64)
    # No table gives fewer bits than the entropy, of which the sum may be off by a rounding, nor has fewer bytes than
    # one a frequency.
    entropy_bits = float((used * np.log2(used.sum() / used)).sum()) - 1e-3
    return 1 + _run_bytes(codes) + len(codes) + int(max(entropy_bits, 0.0) / 8)


def fit_table(counts: NDArray[np.int64]) -> Table:
    """The table under which table and streams together take the fewest bytes."""
    codes = np.flatnonzero(counts).astype(np.uint8)
    used = counts[codes].astype(np.float64)
    if len(codes) == 1:
        return Table(0, codes, np.ones(1, np.int64), 0)
    best: Table | None = None
    least = least_ans(counts)
    # Below 2**7 a frequency takes no fewer bytes.
    for precision in range(max(7, (len(codes) - 1).bit_length()), MAX_PRECISION + 1):
        frequencies = integer_frequencies(used, precision)
        code_bits = float((used * (precision - np.log2(frequencies))).sum())
        size = _table_size(codes, frequencies) + int(code_bits / 8)
        if best is None or size < best.expected_bytes:
            best = Table(precision, codes, frequencies, size)
        if best.expected_bytes <= least:
            break
    assert best is not None
    return best


def integer_frequencies(used: NDArray[np.float64], precision: int) -> NDArray[np.int64]:
    """The integers of least cross-entropy, int64 [used], each at least 1, together 2**precision.

    The cost -sum(used * log2(f)) is separable and convex, so the integers are best when no unit that moves from one
    code to another lowers it: units are spread by gain, and then moved while that helps.
    """
    wanted = 1 << precision
    frequencies: NDArray[np.float64] = np.maximum(np.floor(used * (wanted / used.sum())), 1.0)
    while (missing := int(wanted - frequencies.sum())) != 0:
        if missing > 0:
            order = np.argsort(-used * np.log1p(1 / frequencies), kind="stable")
            frequencies[order[:missing]] += 1
        else:
            order = np.argsort(_loss_of_one(used, frequencies), kind="stable")
            frequencies[order[: min(-missing, int((frequencies > 1).sum()))]] -= 1
    while True:
        gain = used * np.log1p(1 / frequencies)
        loss = _loss_of_one(used, frequencies)
        taker, giver = int(gain.argmax()), int(loss.argmin())
        # A move that helps by no more than rounding could be taken back for ever.
        if gain[taker] <= loss[giver] * (1 + 1e-9):
            return frequencies.astype(np.int64)
        frequencies[taker] += 1
        frequencies[giver] -= 1


def _loss_of_one(used: NDArray[np.float64], frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each code's bits grow by, in nats, when its frequency falls by one; never below one."""
    lower = np.maximum(frequencies - 1, 1.0)
    loss: NDArray[np.float64] = np.where(frequencies > 1, used * np.log1p(1 / lower), np.inf)
    return loss


def _run_bytes(codes: NDArray[Any]) -> int:
    """What the runs of absent codes, ascending ones, take in a table."""
    if not len(codes) or int(codes[-1]) == len(codes) - 1:
        return 0
    runs = np.diff(codes.astype(np.int64), prepend=-1) - 1
    return int(2 * (runs > 0).sum() + (runs > 128).sum())


def _table_size(codes: Bytes, frequencies: NDArray[np.int64]) -> int:
    """The length of `table_bytes`."""
    longer = sum(int((frequencies >> 7 * more > 0).sum()) for more in range(1, LONGEST_VARINT))
    return 1 + _run_bytes(codes) + len(codes) + longer


def table_bytes(table: Table) -> bytes:
    """Precision, then for every code in turn its frequency, or 0 and the length less one of a run of absent codes."""
    parts = [bytes([table.precision])]
    following = 0
    for code, frequency in zip(table.codes.tolist(), table.frequencies.tolist(), strict=True):
        if code > following:
            parts += [b"\0", varint(code - following - 1)]
        parts.append(varint(frequency))
        following = code + 1
    return b"".join(parts)


def parse_table(data: memoryview, bits: int) -> tuple[Table, int]:
    """The table at the start of an ans payload, and where it ends. Raises ValueError where it breaks the format."""
    if not len(data) or data[0] > MAX_PRECISION:
        raise ValueError("the frequency table is missing or of unknown precision")
    codes: list[int] = []
    frequencies: list[int] = []
    at, code, missing = 1, 0, 1 << data[0]
    absent_before = False
    while missing:
        value, at = parse_varint(data, at)
        if value == 0:
            if absent_before:
                raise ValueError("the frequency table has two runs of absent codes in a row")
            run, at = parse_varint(data, at)
            code += run + 1
        else:
            codes.append(code)
            frequencies.append(value)
            code += 1
            missing -= value
        absent_before = value == 0
        if code > 1 << bits or missing < 0:
            raise ValueError(f"the frequency table does not sum to 2**{data[0]} within {1 << bits} codes")
    return Table(data[0], np.array(codes, np.uint8), np.array(frequencies, np.int64)), at


def encode_ans(packed: Bytes, bits: int, columns: int, table: Table) -> bytes:
    """The payload: table, index and streams.

    packed  uint8 [rows, row_bytes(columns, bits)], not empty
    table   of all the codes that occur
    """
    streams = []
    for row_span, column_span in tiles(len(packed), columns, CHUNK_CODES):
        width = column_span.stop - column_span.start
        codes = unpack(packed[row_span, byte_span(column_span, bits)], bits, width).reshape(-1)
        streams.append(encode_runs([(codes, table)]))
    index = b"".join(varint(len(stream)) for stream in streams[:-1])
    return b"".join([table_bytes(table), index, *streams])


def fill_up(payload: bytes, least: int) -> bytes:
    """The payload with zero bytes behind its last stream, which ends in none, up to so many bytes."""
    return payload.ljust(least, b"\0")


def without_filling(stream: memoryview, size: int, least: int) -> memoryview:
    """The last stream of a payload of `size` bytes without what `fill_up` has added."""
    return memoryview(bytes(stream).rstrip(b"\0")) if size == least else stream


def ans_tiles(
    stored: Stored, bits: int, rows: int, columns: int, executor: Executor | None = None, least: int = 0
) -> Iterator[Tile]:
    """The codes of every chunk of a payload that is not empty, uint8 [rows, columns].

    Raises ValueError where the payload is not that of a matrix of this shape.

    executor  of processes, among which the chunks of a large matrix are shared
    least     the bytes to which a shorter payload was filled up
    """
    table, at = parse_table(stored.read(0, min(stored.size, _LONGEST_TABLE)), bits)
    chunks = chunk_count(rows, columns)
    # One byte of index a chunk: what bounds how far a small payload can expand.
    if stored.size - at < chunks - 1:
        raise ValueError(f"{stored.size} bytes of payload cannot hold {chunks} chunks")
    spans = list(tiles(rows, columns, CHUNK_CODES))
    ends = stream_ends(stored.read(0, min(stored.size, at + LONGEST_VARINT * (chunks - 1))), at, chunks, stored.size)

    def job(first: int) -> _Job:
        parts = []
        for place in range(first, min(first + JOB_CHUNKS, chunks)):
            tall, wide = spans[place]
            shape = (tall.stop - tall.start, wide.stop - wide.start)
            last = place == chunks - 1
            parts.append((read_stream(stored, ends[place], shape[0] * shape[1], least if last else 0), *shape))
        return _Job(tuple(parts), table)

    found = run_jobs(_decode_job, map(job, range(0, chunks, JOB_CHUNKS)), chunks, executor)
    for span, part in zip(spans, (part for done in found for part in done), strict=True):
        yield (*span, part)


def read_stream(stored: Stored, ends: tuple[int, int], count: int, least: int) -> bytes:
    """The bytes of the stream of so many codes, without what fills up the payload. Raises ValueError where too long."""
    start, stop = ends
    filled = stored.size == least
    if stop - start > MODEL_BYTES * count + STATE_BYTES and not filled:
        raise ValueError("a chunk does not end where its codes do")
    stream = stored.read(start, stop)
    return bytes(without_filling(stream, stored.size, least))


@dataclass(frozen=True)
class _Job:
    """Some chunks of a payload, each (its stream, rows, columns), and what they are decoded with."""

    chunks: tuple[tuple[bytes, int, int], ...]
    table: Table


def _decode_job(job: _Job) -> list[Bytes]:
    """The codes of every chunk."""
    chunks = [(stream, rows * columns) for stream, rows, columns in job.chunks]
    found = None
    if COMPILER.pays(sum(count for _, count in chunks)):
        table = job.table
        found = decode_in_step(COMPILER.of, chunks, (table.frequencies, table.codes, table.precision))
    if found is None:
        model = job.table.model()
        found = [decode_chunk(memoryview(stream), job.table, model, count) for stream, count in chunks]
    return [codes.reshape(rows, columns) for codes, (_, rows, columns) in zip(found, job.chunks, strict=True)]


def stream_ends(head: memoryview, at: int, chunks: int, size: int) -> list[tuple[int, int]]:
    """Where the stream of every chunk begins and ends; the last has all that the others leave of `size` bytes.

    head    what the payload begins with, the index, which stands at `at`, within it
    raises  ValueError where they do not fit
    """
    lengths = []
    for _ in range(chunks - 1):
        length, at = parse_varint(head, at)
        lengths.append(length)
    left = size - at - sum(lengths)
    if left < 0:
        raise ValueError(f"the chunks are longer than the payload by {-left} bytes")
    starts = list(accumulate([at, *lengths]))
    return list(zip(starts, [*starts[1:], size], strict=True))


def decode_chunk(stream: memoryview, table: Table, model: Model | None, count: int) -> Bytes:
    """The codes of one chunk, uint8 [count]; an empty stream is the lowest code throughout.

    Raises ValueError where the stream does not end with its codes.
    """
    if not len(stream):
        return np.full(count, table.codes[0])
    if model is None or stream[-1] == 0:
        raise ValueError("a chunk has bytes that no code needs")
    coder = constriction.stream.stack.AnsCoder(_words(stream))
    indices: NDArray[np.int32] = coder.decode(model, count)
    if not coder.is_empty():
        raise ValueError("a chunk does not end where its codes do")
    return table.codes.take(indices, mode="clip")


def _words(stream: memoryview) -> NDArray[np.uint32]:
    words = np.zeros(-(-len(stream) // 4), "<u4")
    words.view(np.uint8)[: len(stream)] = stream
    return words.astype(np.uint32)


def encode_runs(runs: Sequence[tuple[Bytes, Table]]) -> bytes:
    """One stream of several runs of codes, each under a table that has all of its codes."""
    coder = constriction.stream.stack.AnsCoder()
    for codes, table in reversed(runs):
        model = table.model()
        if model is not None and codes.size:
            index_of = np.zeros(256, np.int32)
            index_of[table.codes] = np.arange(len(table.codes))
            coder.encode_reverse(index_of.take(codes, mode="clip"), model)
    words: NDArray[np.uint32] = coder.get_compressed()
    # The zero bytes at the end need not be stored.
    return words.astype("<u4").tobytes().rstrip(b"\0")


class RunReader:
    """The runs of a stream that `encode_runs` made, in the same order. Raises ValueError where it was not."""

    def __init__(self, stream: memoryview) -> None:
        if len(stream) and stream[-1] == 0:
            raise ValueError("a stream has bytes that no code needs")
        self._coder = constriction.stream.stack.AnsCoder(_words(stream))

    def read(self, table: Table, model: Model | None, count: int) -> Bytes:
        """The codes of the next run, uint8 [count]; `model` is the table's."""
        if model is None or not count:
            return np.full(count, table.codes[0])
        indices: NDArray[np.int32] = self._coder.decode(model, count)
        return table.codes.take(indices, mode="clip")

    def finish(self) -> None:
        """Check that nothing is left."""
        if not self._coder.is_empty():
            raise ValueError("a stream does not end where its codes do")


def bound_ans(rows: int, columns: int, bits: int) -> int:
    """The most bytes of a payload of any codes of this shape, which is not empty."""
    used = min(1 << bits, rows * columns)
    # A table of 2**16, each frequency at least 1 + floor(p * (2**16 - used)), is among those that are tried.
    table_loss = -math.log2(1 - used / 2**16) - math.log2(1 - used / 2**_MODEL_BITS)
    # A stream's state keeps at least 8 bits more than the model, so a step rounds up by at most 1 + 2**-8.
    code_bits = math.log2(used) + table_loss + math.log2(1 + 2**-8)
    table_bytes = 1 + used * (3 + 3)
    return table_bytes + chunk_count(rows, columns) * (3 + 16) + math.ceil(rows * columns * code_bits / 8)


def chunk_count(rows: int, columns: int) -> int:
    return -(-rows // max(1, CHUNK_CODES // columns)) * -(-columns // CHUNK_CODES)


@contextmanager
def decoding_processes(codes: int, workers: int) -> Iterator[Executor | None]:
    """An executor for an artifact of so many entropy-coded codes; None where it would not pay.

    It is one of threads where loops are compiled. Processes start with the first job that is large enough.
    """
    if workers < 2 or codes < LEAST_CODES:
        yield None
        return
    if COMPILER.pays(codes):
        with ThreadPoolExecutor(workers) as threads:
            yield threads
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        yield executor


def run_jobs(do: Callable[[Job], Done], jobs: Iterable[Job], chunks: int, executor: Executor | None) -> Iterator[Done]:
    """What `do` makes of every job, in their order; in this process where the matrix has too few chunks to share.

    Jobs are made when they are due, so that only some are in memory.

    raises  what `do` raises; ResourceError where a process has died
    """
    if executor is None or chunks < 2 * JOB_CHUNKS:
        yield from map(do, jobs)
        return
    waiting: deque[Future[Done]] = deque()
    try:
        for job in jobs:
            waiting.append(executor.submit(do, job))
            if len(waiting) == JOBS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ResourceError("memory", "a decoding process was ended", "use --threads 1") from None
    finally:
        for future in waiting:
            future.cancel()


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the high bit set on all but the last."""
    coded = bytearray()
    while value > 127:
        coded.append(value & 127 | 128)
        value >>= 7
    coded.append(value)
    return bytes(coded)


def parse_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The integer at `at`, and where it ends; at most five bytes, and no more than it needs."""
    value = 0
    for place, byte in enumerate(data[at : at + LONGEST_VARINT]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            if byte == 0 and place:
                break
            return value, at + place + 1
    raise ValueError(f"no integer at byte {at} of the payload")
