"""Unbounded codes become the bytes that the disk holds and back: a payload a tensor, and their pool's side information.

    ans      streams under the tables of the pool
    packed   tokens in lanes of a few bits, then those that do not fit, then raw bits
    zstd     one zstd frame of that

artifact/SPEC.md describes all three to the byte, "Unbounded codes on disk".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.ans import CHUNK_CODES, LONGEST_VARINT, parse_varint, varint
from qcompress.coding.frames import FrameReader, bound_frame, frame_parts
from qcompress.coding.packing import pack, row_bytes, unpack
from qcompress.coding.payload import least_bytes
from qcompress.coding.rows import tiles
from qcompress.coding.spool import Spool
from qcompress.coding.stored import Stored, behind, in_memory
from qcompress.coding.unbounded.side import Grid, grid_of_unbounded, side_bytes
from qcompress.coding.unbounded.streams import CodeTile, encode_streams, refuse_long_rows, stream_tiles
from qcompress.coding.unbounded.tables import ClassCounter, Pool, Source, fit_pool, make_source
from qcompress.coding.unbounded.tokens import (
    TOKEN_BITS,
    TOKENS,
    Codes,
    Levels,
    Tokens,
    codes_from_bits,
    count_raw_bits,
    open_bits,
)
from qcompress.types.config import Coding, CodingChoice
from qcompress.types.encoded import ClassUse, Unbounded

LANES = (2, 3, 4, 5, 6, 7, 8)
ZSTD_LANES = (2, 4, 8)
SAMPLED_CODES = 1 << 17
SAMPLE_DOUBT = 1.05
"""How much longer a sample may be, to its share, than what is made in full."""
_LARGEST_TABLES = 1 << 16
_WIDEST_CODE = 5
"""Bytes that a code takes at most behind its lane: its token, and up to 28 raw bits."""


@dataclass(frozen=True)
class CodedPool:
    """The side information of a pool, and of each of its tensors in turn the coding, the payload, and the tables' use.

    uses  None of a tensor that no table codes
    """

    side: bytes
    codings: tuple[Coding, ...]
    payloads: tuple[Stored, ...]
    uses: tuple[tuple[ClassUse, ...] | None, ...]


def encode_pool(unbounded_tensors: Sequence[Unbounded], choice: CodingChoice) -> CodedPool:
    """The bytes of tensors that share tables, in memory. Raises as `encode_sources` does."""
    grids = [grid_of_unbounded(unbounded) for unbounded in unbounded_tensors]
    return encode_sources([make_source(unbounded) for unbounded in unbounded_tensors], grids, choice)


def encode_sources(
    sources: Sequence[Source], grids: Sequence[Grid], choice: CodingChoice, folder: Path | None = None
) -> CodedPool:
    """The bytes of matrices of codes that share tables; equal inputs give equal bytes.

    choice  `auto` takes the smaller of `ans` and `zstd`, tensor by tensor; a `zstd` frame that stands for more weights
            than its bytes may is stored as `packed`, and `ans` is filled up, see `least_bytes`
    folder  where payloads wait that are too long for the memory; None: there is room for all
    raises  ValueError for a code beyond 2**31 - 1, and for a trellis on rows of more than 2**18 codes
    """
    streamed = list(range(len(sources))) if choice in ("auto", "ans") else []
    pool, streams = _encode_streamed(sources, streamed, folder)
    plain: dict[int, tuple[Coding, Stored]] = {}
    if choice != "ans":
        known = {place: stream for place, (stream, _) in streams.items()}
        hopeful = [place for place, source in enumerate(sources) if _may_be_shorter(source, known.get(place))]
        plain = {place: _plain(sources[place], choice, folder) for place in hopeful}
    if choice == "auto":
        smaller = [p for p, (stream, _) in streams.items() if p not in plain or stream.size <= plain[p][1].size]
        if len(smaller) < len(streamed):
            pool, streams = _encode_streamed(sources, smaller, folder)
    coded = {**plain, **{place: ("ans", stream) for place, (stream, _) in streams.items()}}
    uses = tuple(streams[place][1] if place in streams else None for place in range(len(sources)))
    codings, payloads = zip(*(coded[place] for place in range(len(sources))), strict=True)
    return CodedPool(side_bytes(grids, pool), codings, payloads, uses)


def _encode_streamed(
    sources: Sequence[Source], places: Sequence[int], folder: Path | None
) -> tuple[Pool, dict[int, tuple[Stored, tuple[ClassUse, ...]]]]:
    """The pool of all sources, with tables and levels for those at `places`, and their streams and use of tables."""
    levels = [Levels(0)] * len(sources)
    if not places:
        return Pool(tuple(levels), {}), {}
    pool, counts = fit_pool([sources[place] for place in places])
    streams = {}
    for place, own, counted in zip(places, pool.levels, counts, strict=True):
        levels[place], source = own, sources[place]
        counter, body = ClassCounter(counted), Spool(folder)
        index = encode_streams(source, own, pool.tables, body, counter)
        # Zeros behind the last stream, which ends in none.
        body.write(bytes(max(0, least_bytes(math.prod(source.shape)) - len(index) - body.size)))
        streams[place] = (body.stored(index), counter.uses(pool))
    return Pool(tuple(levels), pool.slopes), streams


def _may_be_shorter(source: Source, stream: Stored | None) -> bool:
    """Whether a frame of zstd might be no longer than the stream, as far as the first rows tell of many."""
    codes, columns = math.prod(source.shape), source.shape[1]
    if stream is None or codes <= 2 * SAMPLED_CODES:
        return True
    first = next(source.read())[: -(-SAMPLED_CODES // columns)]
    sample = Source((len(first), columns), source.taps, source.trellis, lambda: iter([first]))
    return _plain(sample, "zstd", None)[1].size * codes <= SAMPLE_DOUBT * stream.size * first.size


def _plain(source: Source, choice: CodingChoice, folder: Path | None) -> tuple[Coding, Stored]:
    """The smallest frame of a `packed` payload; where none may be that small, or none is wanted, that payload."""
    counts: NDArray[np.int64] = sum(
        (np.bincount(piece.tokens.reshape(-1), minlength=TOKENS) for piece in source.pieces()),
        start=np.zeros(TOKENS, np.int64),
    )
    codes = math.prod(source.shape)
    if choice != "packed":
        frames = [
            _spooled(frame_parts(_packed(source, lane), _packed_size(counts, lane)), folder) for lane in ZSTD_LANES
        ]
        frame = min(frames, key=lambda stored: stored.size)
        if frame.size >= least_bytes(codes):
            return "zstd", frame
    best = min(LANES, key=lambda lane: codes * lane + 8 * int(counts[2**lane - 1 :].sum()))
    return "packed", _spooled(_packed(source, best), folder)


def _spooled(parts: Iterable[bytes], folder: Path | None) -> Stored:
    spool = Spool(folder)
    for part in parts:
        spool.write(part)
    return spool.stored()


def _packed_size(counts: NDArray[np.int64], lane: int) -> int:
    """The bytes of a `packed` payload, from how often each token occurs."""
    return 1 + row_bytes(int(counts.sum()), lane) + int(counts[2**lane - 1 :].sum()) + -(-int(counts @ TOKEN_BITS) // 8)


def _packed(source: Source, lane: int) -> Iterator[bytes]:
    """A `packed` payload, in parts."""
    escape = 2**lane - 1
    yield bytes([lane])
    for tokens in _in_eights(piece.tokens.reshape(-1) for piece in source.pieces()):
        yield pack(np.minimum(tokens, escape).reshape(1, -1), lane).tobytes()
    for piece in source.pieces():
        yield piece.tokens[piece.tokens >= escape].tobytes()
    for bits in _in_eights(open_bits(piece.codes, piece.tokens) for piece in source.pieces()):
        yield np.packbits(bits, bitorder="little").tobytes()


def _in_eights(parts: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """The numbers of all parts, in parts of multiples of eight but for the last; none is empty."""
    left = np.zeros(0, np.uint8)
    for part in parts:
        part = np.concatenate([left, part]) if left.size else part
        whole = len(part) // 8 * 8
        left = part[whole:]
        if whole:
            yield part[:whole]
    if left.size:
        yield left


def join_side(side: bytes, payload: Stored) -> Stored:
    """The codes of a tensor that has a pool of its own: the side information, its length before it, and the payload."""
    return behind(b"".join([varint(len(side)), side]), payload)


def split_side(stored: Stored) -> tuple[memoryview, Stored]:
    """The side information and the payload that `join_side` has joined. Raises ValueError where there are not both."""
    length, at = parse_varint(stored.read(0, min(stored.size, LONGEST_VARINT)), 0)
    if length > stored.size - at:
        raise ValueError("its side information is longer than its codes")
    return stored.read(at, at + length), stored.anew(at + length)


def bound_payload(codes: int) -> int:
    """More bytes than a payload of so many codes takes, its side information included, whatever the coding."""
    return bound_frame(1 + (1 + _WIDEST_CODE) * codes) + bound_side([codes])


def bound_side(sizes: Sequence[int]) -> int:
    """More bytes than the side information of tensors of so many weights takes."""
    return _LARGEST_TABLES + sum(64 + 12 * size for size in sizes)


def decode_codes(
    data: bytes | memoryview,
    coding: Coding,
    pool: Pool,
    place: int,
    trellis: bool,
    shape: tuple[int, int],
    executor: Executor | None = None,
) -> Codes:
    """The codes, int32 [rows, columns], of a payload in memory, all at once. Raises what `code_tiles` raises."""
    codes: Codes | None = None
    for row_span, column_span, tile in code_tiles(in_memory(data), coding, pool, place, trellis, shape, executor):
        if codes is None:
            codes = np.empty(shape, np.int32)
        codes[row_span, column_span] = tile
    return np.empty(shape, np.int32) if codes is None else codes


def code_tiles(
    stored: Stored,
    coding: Coding,
    pool: Pool,
    place: int,
    trellis: bool,
    shape: tuple[int, int],
    executor: Executor | None = None,
) -> Iterator[CodeTile]:
    """The codes of the tensor at `place` of its pool, read and decoded piece by piece, as `tiles` cuts the matrix.

    Nothing is allocated before the payload's length makes that size possible. Raises ValueError where the payload is
    not that of a matrix of this shape, perhaps only behind the last piece; damage that leaves a valid payload of other
    codes is for the checksum to see.
    """
    count = shape[0] * shape[1]
    refuse_long_rows(shape[1], trellis=trellis)
    match coding:
        case "ans":
            least = least_bytes(count)
            return stream_tiles(stored, shape, pool.levels[place], pool.tables, trellis, executor, least)
        case "zstd":
            sizes = (1 + row_bytes(count, LANES[0]), 1 + (1 + _WIDEST_CODE) * count)
            return _lane_tiles(lambda: FrameReader(stored.anew(), *sizes), shape, ZSTD_LANES)
        case "packed":
            return _lane_tiles(stored.anew, shape, LANES)
        case _:
            assert_never(coding)


def _lane_tiles(
    read: Callable[[], Stored | FrameReader], shape: tuple[int, int], lanes: Sequence[int]
) -> Iterator[CodeTile]:
    """The codes of a `packed` payload, whose three parts are read side by side: `read` gives ever new readers of it."""
    first = read()
    lane = first.read(0, 1)[0] if first.size else 0
    if lane not in lanes:
        raise ValueError(f"lanes of {lane} bits")
    escape, wide_at, size = 2**lane - 1, 1 + row_bytes(shape[0] * shape[1], lane), first.size
    if size < wide_at:
        raise ValueError(f"{size} bytes of payload cannot hold {shape[0] * shape[1]} codes")
    # Where the raw bits begin follows from how many tokens do not fit their lanes.
    raw_at = wide_at + sum(int((tokens == escape).sum()) for *_, tokens in _lane_tokens(first, lane, shape))
    if size < raw_at:
        raise ValueError("the tokens that do not fit their lanes are cut off")
    wide, raw = read(), read()
    bit = 0
    for row_span, column_span, tokens in _lane_tokens(read(), lane, shape):
        places = np.flatnonzero(tokens == escape)
        tokens[places] = np.frombuffer(wide.read(wide_at, wide_at + len(places)), np.uint8)
        wide_at += len(places)
        if (tokens[places] < escape).any():
            raise ValueError("a token stands outside a lane that it fits")
        end = bit + count_raw_bits(tokens)
        if raw_at + -(-end // 8) > size:
            raise ValueError(f"{size - raw_at} bytes of raw bits, and the tokens need more")
        held = np.frombuffer(raw.read(raw_at + bit // 8, raw_at + -(-end // 8)), np.uint8)
        bits = np.unpackbits(held, bitorder="little")[bit % 8 :]
        if bits[end - bit :].any() and column_span.stop == shape[1] and row_span.stop == shape[0]:
            raise ValueError("the bits that fill up the raw bits are not zero")
        codes = codes_from_bits(tokens, bits[: end - bit])
        yield row_span, column_span, codes.reshape(row_span.stop - row_span.start, -1)
        bit = end
    if raw_at + -(-bit // 8) != size:
        raise ValueError("the payload has raw bits that no code needs")
    if isinstance(raw, FrameReader):
        raw.finish()


def _lane_tokens(
    stored: Stored | FrameReader, lane: int, shape: tuple[int, int]
) -> Iterator[tuple[slice, slice, Tokens]]:
    """Rows and columns of every piece of a matrix, and the tokens of its codes as their lanes hold them, uint8 [n]."""
    rows, columns = shape
    for row_span, column_span in tiles(rows, columns, CHUNK_CODES):
        start = row_span.start * columns + column_span.start
        stop = (row_span.stop - 1) * columns + column_span.stop
        # Eight lanes are whole bytes.
        before = start % 8
        data = stored.read(1 + (start - before) * lane // 8, 1 + row_bytes(stop, lane))
        packed = np.frombuffer(data, np.uint8).reshape(1, -1)
        if stop == rows * columns and stop * lane % 8 and packed[0, -1] >> stop * lane % 8:
            raise ValueError("the bits that fill up the lanes are not zero")
        yield row_span, column_span, np.array(unpack(packed, lane, stop - start + before)[0, before:])
