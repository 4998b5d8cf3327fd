"""Unbounded codes become the bytes that the disk holds and back: a payload a tensor, and their pool's side information.

    ans      streams under the tables of the pool
    packed   tokens in lanes of a few bits, then those that do not fit, then raw bits
    zstd     one zstd frame of that

artifact/SPEC.md describes all three to the byte, "Unbounded codes on disk".
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from qcompress.coding.ans import fill_up, parse_varint, varint
from qcompress.coding.frames import bound_frame, compress_frame, expand_frame
from qcompress.coding.packing import pack, row_bytes, unpack
from qcompress.coding.payload import least_bytes
from qcompress.coding.unbounded.side import grid_of_unbounded, side_bytes
from qcompress.coding.unbounded.streams import decode_streams, encode_streams
from qcompress.coding.unbounded.tables import Pool, Source, class_uses, fit_pool, make_source
from qcompress.coding.unbounded.tokens import (
    TOKENS,
    Codes,
    Levels,
    Tokens,
    codes_from_tokens,
    raw_bits,
)
from qcompress.types.config import Coding, CodingChoice
from qcompress.types.encoded import ClassUse, Unbounded

LANES = (2, 3, 4, 5, 6, 7, 8)
ZSTD_LANES = (2, 4, 8)
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
    payloads: tuple[bytes, ...]
    uses: tuple[tuple[ClassUse, ...] | None, ...]


def encode_pool(unbounded_tensors: Sequence[Unbounded], choice: CodingChoice) -> CodedPool:
    """The bytes of tensors that share tables; equal inputs give equal bytes.

    choice  `auto` takes the smaller of `ans` and `zstd`, tensor by tensor; a `zstd` frame that stands for more weights
            than its bytes may is stored as `packed`, and `ans` is filled up, see `least_bytes`
    raises  ValueError for a code beyond 2**31 - 1, and for a trellis on rows of more than 2**18 codes
    """
    sources = [make_source(unbounded) for unbounded in unbounded_tensors]
    grids = [grid_of_unbounded(unbounded) for unbounded in unbounded_tensors]
    streamed = list(range(len(sources))) if choice in ("auto", "ans") else []
    plain: dict[int, tuple[Coding, bytes]] = {}
    if choice != "ans":
        plain = {place: _plain(source, choice) for place, source in enumerate(sources)}
    pool, streams = _encode_streamed(sources, streamed)
    if choice == "auto":
        smaller = [place for place, stream in streams.items() if len(stream) <= len(plain[place][1])]
        if len(smaller) < len(streamed):
            pool, streams = _encode_streamed(sources, smaller)
    coded = {**plain, **{place: ("ans", stream) for place, stream in streams.items()}}
    uses = [
        class_uses(source, pool.levels[place], pool) if place in streams else None
        for place, source in enumerate(sources)
    ]
    codings, payloads = zip(*(coded[place] for place in range(len(sources))), strict=True)
    return CodedPool(side_bytes(grids, pool), codings, payloads, tuple(uses))


def _encode_streamed(sources: Sequence[Source], places: Sequence[int]) -> tuple[Pool, dict[int, bytes]]:
    """The pool of all sources, with tables and levels for those at `places`, and their streams."""
    levels = [Levels(0)] * len(sources)
    if not places:
        return Pool(tuple(levels), {}), {}
    pool, _ = fit_pool([sources[place] for place in places])
    streams = {}
    for place, own in zip(places, pool.levels, strict=True):
        levels[place] = own
        source = sources[place]
        streams[place] = fill_up(encode_streams(source, own, pool.tables), least_bytes(source.codes.size))
    return Pool(tuple(levels), pool.slopes), streams


def _plain(source: Source, choice: CodingChoice) -> tuple[Coding, bytes]:
    """The smallest frame of a `packed` payload; where none may be that small, or none is wanted, that payload."""
    if choice != "packed":
        contents = (_packed(source, lane) for lane in ZSTD_LANES)
        frame = min((compress_frame([content], len(content)) for content in contents), key=len)
        if len(frame) >= least_bytes(source.codes.size):
            return "zstd", frame
    counts = np.bincount(source.tokens.reshape(-1), minlength=TOKENS)
    best = min(LANES, key=lambda lane: source.tokens.size * lane + 8 * int(counts[2**lane - 1 :].sum()))
    return "packed", _packed(source, best)


def _packed(source: Source, lane: int) -> bytes:
    escape = 2**lane - 1
    flat = source.tokens.reshape(-1)
    lanes = pack(np.minimum(flat, escape).reshape(1, -1), lane)
    raw = raw_bits(source.codes, source.tokens)
    return b"".join([bytes([lane]), lanes.tobytes(), flat[flat >= escape].tobytes(), raw.tobytes()])


def join_side(side: bytes, payload: bytes) -> bytes:
    """The codes of a tensor that has a pool of its own: the side information, its length before it, and the payload."""
    return b"".join([varint(len(side)), side, payload])


def split_side(data: memoryview) -> tuple[memoryview, memoryview]:
    """The side information and the payload that `join_side` has joined. Raises ValueError where there are not both."""
    length, at = parse_varint(data, 0)
    if length > len(data) - at:
        raise ValueError("its side information is longer than its codes")
    return data[at : at + length], data[at + length :]


def bound_payload(codes: int) -> int:
    """More bytes than a payload of so many codes takes, its side information included, whatever the coding."""
    return bound_frame(1 + (1 + _WIDEST_CODE) * codes) + bound_side([codes])


def bound_side(sizes: Sequence[int]) -> int:
    """More bytes than the side information of tensors of so many weights takes."""
    return _LARGEST_TABLES + sum(64 + 12 * size for size in sizes)


def decode_codes(
    data: memoryview,
    coding: Coding,
    pool: Pool,
    place: int,
    trellis: bool,
    shape: tuple[int, int],
    executor: Executor | None = None,
) -> Codes:
    """The codes, int32 [rows, columns], of the tensor at `place` of its pool.

    Nothing is allocated before the payload's length makes that size possible. Raises ValueError where the payload is
    not that of a matrix of this shape; damage that leaves a valid payload of other codes is for the checksum to see.
    """
    if coding == "ans":
        least = least_bytes(shape[0] * shape[1])
        return decode_streams(data, shape, pool.levels[place], pool.tables, trellis, executor, least)
    if coding == "zstd":
        count = shape[0] * shape[1]
        data = memoryview(expand_frame(data, 1 + row_bytes(count, LANES[0]), 1 + (1 + _WIDEST_CODE) * count))
    return _decode_packed(data, shape, ZSTD_LANES if coding == "zstd" else LANES)


def _decode_packed(data: memoryview, shape: tuple[int, int], lanes: Sequence[int]) -> Codes:
    lane = data[0] if len(data) else 0
    if lane not in lanes:
        raise ValueError(f"lanes of {lane} bits")
    count = shape[0] * shape[1]
    end = 1 + row_bytes(count, lane)
    if len(data) < end:
        raise ValueError(f"{len(data)} bytes of payload cannot hold {count} codes")
    packed = np.frombuffer(data[1:end], np.uint8).reshape(1, -1)
    if count * lane % 8 and packed[0, -1] >> count * lane % 8:
        raise ValueError("the bits that fill up the lanes are not zero")
    tokens: Tokens = np.array(unpack(packed, lane, count)[0])
    escape = 2**lane - 1
    wide = np.flatnonzero(tokens == escape)
    if len(data) - end < len(wide):
        raise ValueError("the tokens that do not fit their lanes are cut off")
    tokens[wide] = np.frombuffer(data[end : end + len(wide)], np.uint8)
    if (tokens[wide] < escape).any():
        raise ValueError("a token stands outside a lane that it fits")
    codes, left = codes_from_tokens(tokens, data[end + len(wide) :])
    if len(left):
        raise ValueError("the payload has raw bits that no code needs")
    return codes.reshape(shape)
