"""Codes of one matrix become the streams of its chunks and back, under the tables of a pool.

Chunks decode by themselves and in any order. artifact/SPEC.md, "Unbounded codes on disk".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompress.coding import kernels
from qcompress.coding.ans import (
    CHUNK_CODES,
    JOB_CHUNKS,
    LONGEST_VARINT,
    Model,
    RunReader,
    Table,
    chunk_count,
    encode_runs,
    parse_varint,
    read_stream,
    run_jobs,
    varint,
)
from qcompress.coding.compiled import COMPILER
from qcompress.coding.in_step import Loops, ends_of, groups, make_intervals, streams_of
from qcompress.coding.rows import tiles
from qcompress.coding.spool import Spool
from qcompress.coding.stored import Stored
from qcompress.coding.trellis import NEXT_STATE
from qcompress.coding.unbounded.tables import ClassCounter, Source
from qcompress.coding.unbounded.tokens import (
    CLASSES,
    CONTEXTS,
    FIRST_OPEN,
    TOKEN_BITS,
    TOKEN_PARITY,
    TOKEN_START,
    Classes,
    Codes,
    Levels,
    Tokens,
    codes_from_tokens,
    narrowed,
    raw_bits,
)

Tables = Mapping[int, Table]
CodeTile: TypeAlias = tuple[slice, slice, Codes]
"""Rows and columns of a piece of a matrix, and its codes."""

_FLUSH_BITS = 18.5
"""What a stream takes beyond the information of its codes, about: its coder starts from a state of 24 bits."""
_INDEX_BITS = 36
_WIDEST_RAW = 4
"""Bytes of raw bits that a code leaves open at most."""


def encode_streams(
    source: Source, levels: Levels, tables: Tables, into: Spool, counter: ClassCounter | None = None
) -> bytes:
    """The index of the payload; what follows, of every chunk its raw bits and its stream, is written to `into`.

    counter  is shown all codes
    """
    trellis = source.trellis
    refuse_long_rows(source.shape[1], trellis=trellis)
    classes, sizes = Classes(levels, *source.shape), []
    for piece in source.pieces():
        contexts = piece.contexts(classes[piece.rows, :])
        if counter is not None:
            counter.add(piece, contexts)
        for span in tiles(len(piece.codes), source.shape[1], CHUNK_CODES):
            codes, tokens = piece.codes[span], piece.tokens[span]
            # On a trellis codes are read column by column, and so are their raw bits.
            raw = (raw_bits(codes.T, tokens.T) if trellis else raw_bits(codes, tokens)).tobytes()
            stream = encode_runs(_runs(tokens, contexts[span], tables, trellis))
            into.write(raw)
            into.write(stream)
            sizes += [len(raw), len(stream)]
    # The last stream ends where the payload does.
    return b"".join(map(varint, sizes[:-1]))


def refuse_long_rows(columns: int, *, trellis: bool) -> None:
    """Raise ValueError where rows drive a trellis that do not fit a chunk: each begins in state 0 and is read whole."""
    if trellis and columns > CHUNK_CODES:
        raise ValueError(f"rows of more than {CHUNK_CODES} codes cannot drive a trellis")


def _runs(tokens: Tokens, contexts: NDArray[np.uint8], tables: Tables, trellis: bool) -> list[tuple[Tokens, Table]]:
    """The tokens of a chunk in the order of their contexts; on a trellis, in that order within each column."""
    if not trellis:
        flat = contexts.reshape(-1)
        ordered = tokens.reshape(-1)[np.argsort(flat, kind="stable")]
        used = np.bincount(flat, minlength=CONTEXTS)
        ends = np.cumsum(used)
        return [(ordered[ends[c] - used[c] : ends[c]], tables[c]) for c in np.flatnonzero(used).tolist()]
    keys = (np.arange(contexts.shape[1])[:, None] * CONTEXTS + contexts.T).reshape(-1)
    order = np.argsort(keys, kind="stable")
    ordered, keys = tokens.T.reshape(-1)[order], keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    ends = np.append(starts[1:], len(keys))
    return [
        (ordered[start:end], tables[int(keys[start]) % CONTEXTS])
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class _Job:
    """Some chunks of a payload, each (raw bits, stream, classes of its codes), and what they are decoded with.

    narrow  whether codes are given in the narrowest integers that hold them, since many wait for their turn
    """

    chunks: tuple[tuple[bytes, bytes, NDArray[np.uint8]], ...]
    tables: Tables
    trellis: bool
    narrow: bool


def stream_tiles(
    stored: Stored,
    shape: tuple[int, int],
    levels: Levels,
    tables: Tables,
    trellis: bool,
    executor: Executor | None = None,
    least: int = 0,
) -> Iterator[CodeTile]:
    """The codes of every chunk of a payload that is all of `stored`, which was filled up to `least` bytes.

    Nothing is allocated before the payload's length makes the size possible. Raises ValueError where the payload is
    not that of a matrix of this shape under these tables.

    executor  of processes, among which the chunks of a large matrix are shared
    """
    refuse_long_rows(shape[1], trellis=trellis)
    chunks = chunk_count(*shape)
    if stored.size < 2 * chunks - 1:
        raise ValueError(f"{stored.size} bytes of payload cannot hold {chunks} chunks")
    places = _parse_index(stored.read(0, min(stored.size, 2 * LONGEST_VARINT * chunks)), chunks, stored.size)
    classes = Classes(levels, *shape)
    spans = list(tiles(*shape, CHUNK_CODES))

    def job(first: int) -> _Job:
        parts = []
        for place in range(first, min(first + JOB_CHUNKS, chunks)):
            start, middle, stop = places[place]
            own = classes[spans[place]]
            filled = least if place == chunks - 1 else 0
            if middle - start > _WIDEST_RAW * own.size:
                raise ValueError("a chunk has raw bits that no code needs")
            raw = bytes(stored.read(start, middle))
            parts.append((raw, read_stream(stored, (middle, stop), own.size, filled), own))
        return _Job(tuple(parts), tables, trellis, executor is not None)

    found = run_jobs(_decode_job, map(job, range(0, chunks, JOB_CHUNKS)), chunks, executor)
    for span, part in zip(spans, (part for done in found for part in done), strict=True):
        yield (*span, part.astype(np.int32, copy=False))


def _decode_job(job: _Job) -> list[NDArray[Any]]:
    """The codes of every chunk."""
    codes = None
    if COMPILER.pays(sum(classes.size for *_, classes in job.chunks)):
        codes = decode_in_step(COMPILER.of, job.chunks, job.tables, job.trellis)
    codes = _decode_in_turn(job) if codes is None else codes
    return [narrowed(part) for part in codes] if job.narrow else codes


def decode_in_step(
    loops: Loops, chunks: Sequence[tuple[bytes, bytes, NDArray[np.uint8]]], tables: Tables, trellis: bool
) -> list[Codes] | None:
    """The codes of chunks by the loops of kernels.py; None where that needs the slower way.

    chunks  of each its raw bits, its stream, and the classes of its codes, uint8 [rows, columns]
    """
    make, decode = loops(kernels.make_intervals), loops(kernels.decode_trellis if trellis else kernels.decode_plain)
    if make is None or decode is None:
        return None
    known = {number: (table.frequencies, table.codes, table.precision) for number, table in tables.items()}
    intervals = make_intervals(make, known, CONTEXTS)
    states = (NEXT_STATE.reshape(-1),) if trellis else ()
    done: list[Codes] = []
    for span in _same_heights(chunks) if trellis else groups(len(chunks)):
        raws, parts, classes = zip(*chunks[span], strict=True)
        streams = streams_of(parts)
        if streams is None:
            return None
        shapes = [own.shape for own in classes]
        ends = ends_of([rows * columns for rows, columns in shapes])
        contexts = np.concatenate([own.reshape(-1) for own in classes])
        codes = np.empty(len(contexts), np.int32)
        where = (*shapes[0], len(parts)) if trellis else (ends,)
        raw = np.frombuffer(b"".join([*raws, b"\0"]), np.uint8).copy()
        whole = decode(
            *(streams.words, streams.places, streams.bottoms),
            *(intervals.starts, intervals.buckets, intervals.names, intervals.stride, intervals.known),
            *(contexts, *where, raw, ends_of([len(own) for own in raws]), TOKEN_BITS, TOKEN_START, *states, codes),
        )
        if not whole:
            return None
        done.extend(codes[ends[place] : ends[place + 1]].reshape(shape) for place, shape in enumerate(shapes))
    return done


def _same_heights(chunks: Sequence[tuple[bytes, bytes, NDArray[np.uint8]]]) -> Iterator[slice]:
    """`groups`, in each of which chunks have one shape: only the last one of a matrix may have another."""
    whole = sum(classes.shape == chunks[0][2].shape for *_, classes in chunks)
    yield from groups(whole)
    yield from (slice(place, place + 1) for place in range(whole, len(chunks)))


def _decode_in_turn(job: _Job) -> list[Codes]:
    """The codes of every chunk, one behind another. Raises ValueError for one that is damaged."""
    models = {context: table.model() for context, table in job.tables.items()}
    done = []
    for raw, stream, classes in job.chunks:
        reader = RunReader(memoryview(stream))
        read = _read_trellis if job.trellis else _read_plain
        tokens = read(reader, memoryview(raw), classes, job.tables, models)
        reader.finish()
        found, left = codes_from_tokens(tokens, memoryview(raw))
        if len(left):
            raise ValueError("a chunk has raw bits that no code needs")
        done.append(found.T if job.trellis else found)
    return done


def _parse_index(head: memoryview, chunks: int, size: int) -> list[tuple[int, int, int]]:
    """Of every chunk where its raw bits begin, where its stream does, and where that ends: the last at `size`."""
    sizes = []
    at = 0
    for place in range(chunks):
        raw, at = parse_varint(head, at)
        stream, at = parse_varint(head, at) if place < chunks - 1 else (0, at)
        sizes.append((raw, stream))
    left = size - at - sum(raw + stream for raw, stream in sizes)
    if left < 0:
        raise ValueError(f"the chunks are longer than the payload by {-left} bytes")
    sizes[-1] = (sizes[-1][0], left)
    places = []
    for raw, stream in sizes:
        places.append((at, at + raw, at + raw + stream))
        at += raw + stream
    return places


def _read_runs(
    reader: RunReader, contexts: NDArray[np.uint8], tables: Tables, models: Mapping[int, Model | None], into: Tokens
) -> None:
    """Fill `into`, uint8 [n], with the tokens of codes in these contexts, uint8 [n]: one run of the stream for each."""
    used = np.bincount(contexts)
    runs = []
    for context in np.flatnonzero(used).tolist():
        if context not in tables:
            raise ValueError(f"class {context % CLASSES} has no table")
        runs.append(reader.read(tables[context], models[context], int(used[context])))
    into[np.argsort(contexts, kind="stable")] = np.concatenate(runs)


def _read_plain(
    reader: RunReader, _: memoryview, classes: NDArray[np.uint8], tables: Tables, models: Mapping[int, Model | None]
) -> Tokens:
    tokens = np.empty(classes.size, np.uint8)
    _read_runs(reader, classes.reshape(-1), tables, models, tokens)
    return tokens.reshape(classes.shape)


def _read_trellis(
    reader: RunReader, raw: memoryview, classes: NDArray[np.uint8], tables: Tables, models: Mapping[int, Model | None]
) -> Tokens:
    """The tokens as [columns, rows]: column by column, because a column's states follow from the one before."""
    rows, columns = classes.shape
    tokens = np.empty((columns, rows), np.uint8)
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
    place = 0
    state = np.zeros(rows, np.uint8)
    for column in range(columns):
        contexts = classes[:, column] + ((state & 1) + 1) * np.uint8(CLASSES)
        found = tokens[column]
        _read_runs(reader, contexts, tables, models, found)
        parity = TOKEN_PARITY.take(found, mode="clip")
        if int(found.max()) >= FIRST_OPEN:
            # The lowest raw bit is the parity of a code whose token leaves it open.
            is_open = found >= FIRST_OPEN
            ends = place + np.cumsum(TOKEN_BITS.take(found[is_open], mode="clip"))
            if ends[-1] > len(bits):
                raise ValueError("a chunk has fewer raw bits than its codes need")
            parity[is_open] = bits[np.append(place, ends[:-1])]
            place = int(ends[-1])
        state = NEXT_STATE.reshape(-1).take(state << 1 | parity)
    return tokens


def overhead_bits(chunks: int) -> float:
    """The bits of a payload of so many chunks beyond the information of its codes, on average."""
    return chunks * _FLUSH_BITS + (chunks - 1) * _INDEX_BITS + 12
