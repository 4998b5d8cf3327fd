"""Packed codes become the bytes that the disk holds and back, one payload a tensor.

    packed   the packed rows as they are
    zstd     one byte, the lane width; one zstd frame of the codes packed at that width
    ans      a table of integer frequencies, then chunks of codes, each a stream that decodes by itself

artifact/SPEC.md describes all three to the byte, "Codes on disk". The payload of no codes is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.ans import CHUNK_CODES, Tile, ans_tiles, bound_ans, encode_ans, fill_up, fit_table, least_ans
from qcompress.coding.frames import FrameReader, bound_frame, compress_frame
from qcompress.coding.packing import Bytes, byte_span, count_codes, pack, row_bytes, unpack
from qcompress.coding.rows import tiles
from qcompress.coding.stored import Stored, in_memory
from qcompress.types.config import Coding, CodingChoice

MOST_BITS = 12
ANS_BITS = 8
"""Codes of more bits have no table of frequencies: what they take is left to zstd."""
MAX_EXPANSION = 4096
"""Weights that one byte of codes stands for at most: part of the format."""
_SAVING_PERCENT = 2
_STRIPE_CODES = 1 << 17
_STRIPES = 4
_SAMPLE_DOUBT = 1.05
_ANS_DOUBT = 0.999


def least_bytes(weights: int) -> int:
    """The fewest bytes of codes that may stand for so many weights, so that no small file asks for much memory."""
    return -(-weights // MAX_EXPANSION)


def encode_payload(
    packed: Bytes, bits: int, columns: int, choice: CodingChoice, least: int = 0
) -> tuple[Coding, bytes | memoryview]:
    """The coding and the payload; equal inputs give equal bytes.

    packed  uint8 [rows, row_bytes(columns, bits)] as `pack` makes it; `packed` payloads share its memory
    choice  `auto` takes the smallest, if that saves at least 2 percent over `packed`
    least   the fewest bytes that it may have, see `least_bytes`: `ans` is filled up, `zstd` falls back to `packed`

    Raises ValueError where a row's bytes are not those of `columns` codes.
    """
    _check_width(bits)
    if packed.shape[1] != row_bytes(columns, bits):
        raise ValueError(f"{columns} codes of {bits} bits do not make rows of {packed.shape[1]} bytes")
    packed = np.ascontiguousarray(packed)
    if bits > ANS_BITS and choice == "ans":
        choice = "zstd"
    if choice == "auto":
        return _encode_smallest(packed, bits, columns, least)
    if not packed.size:
        return choice, b""
    match choice:
        case "packed":
            return choice, packed.reshape(-1).data
        case "zstd":
            frame = _encode_zstd(packed, bits, columns, _foretell_zstd(packed, bits, columns))
            return (choice, frame) if len(frame) >= least else ("packed", packed.reshape(-1).data)
        case "ans":
            return choice, fill_up(
                encode_ans(packed, bits, columns, fit_table(count_codes(packed, bits, columns))), least
            )
        case _:
            assert_never(choice)


def decode_payload(
    data: bytes | memoryview,
    coding: Coding,
    bits: int,
    rows: int,
    columns: int,
    executor: Executor | None = None,
    least: int = 0,
) -> Bytes:
    """The packed codes of a payload in memory, all at once: uint8 [rows, row_bytes(columns, bits)].

    Raises what `payload_tiles` raises, before anything is allocated where the length is wrong.
    """
    found = payload_tiles(in_memory(data), coding, bits, rows, columns, executor, least)
    packed: Bytes | None = None
    for row_span, column_span, tile in found:
        if packed is None:
            packed = np.empty((rows, row_bytes(columns, bits)), np.uint8)
        packed[row_span, byte_span(column_span, bits)] = tile
    return np.empty((rows, row_bytes(columns, bits)), np.uint8) if packed is None else packed


def payload_tiles(
    stored: Stored,
    coding: Coding,
    bits: int,
    rows: int,
    columns: int,
    executor: Executor | None = None,
    least: int = 0,
) -> Iterator[Tile]:
    """The packed codes of a payload, read and decoded piece by piece: those of `tiles(rows, columns, CHUNK_CODES)`.

    A piece may be read-only and share memory with what was read. Nothing is allocated before the payload's length makes
    its size possible. Raises ValueError where the payload is not that of a matrix of this shape, perhaps only behind
    the last piece; damage that leaves a valid payload of other codes is for a checksum to see.
    """
    found = _held_tiles(stored, coding, bits, rows, columns, executor, least)
    return (
        (down, along, held if lane == bits else pack(_unpacked(held, lane, along), bits))
        for down, along, held, lane in found
    )


def unpacked_tiles(
    stored: Stored,
    coding: Coding,
    bits: int,
    rows: int,
    columns: int,
    executor: Executor | None = None,
    least: int = 0,
) -> Iterator[Tile]:
    """The same, the codes not packed: [rows, columns] of uint8, above 8 bits of uint16. They come so from `ans`."""
    for down, along, held, lane in _held_tiles(stored, coding, bits, rows, columns, executor, least):
        codes = _unpacked(held, lane, along)
        if lane > bits and int(codes.max()) >> bits:
            raise ValueError(f"a code of {codes.max()} needs more than {bits} bits")
        yield down, along, codes


_CODES = 0
"""In place of a lane: what is held are codes."""


def _unpacked(held: NDArray[Any], lane: int, columns: slice) -> NDArray[Any]:
    return held if lane == _CODES else unpack(held, lane, columns.stop - columns.start)


def _held_tiles(
    stored: Stored, coding: Coding, bits: int, rows: int, columns: int, executor: Executor | None, least: int
) -> Iterator[tuple[slice, slice, NDArray[Any], int]]:
    """The pieces as the payload holds them, and the bits that a code takes there, or _CODES."""
    _check_width(bits)
    width = row_bytes(columns, bits)
    if not rows * width:
        if stored.size:
            raise ValueError(f"{stored.size} bytes of payload for no codes")
        return iter(())
    match coding:
        case "packed":
            if stored.size != rows * width:
                raise ValueError(f"the payload has {stored.size} bytes, not {rows * width}")
            return ((*tile, bits) for tile in _packed_tiles(stored.read, bits, rows, columns))
        case "zstd":
            return _zstd_tiles(stored, bits, rows, columns)
        case "ans":
            return ((*tile, _CODES) for tile in ans_tiles(stored, bits, rows, columns, executor, least))
        case _:
            assert_never(coding)


def bound_bytes(rows: int, columns: int, bits: int, choice: CodingChoice) -> int:
    """The most bytes that `encode_payload` can return for any codes of this shape; exact for `packed`."""
    size = rows * row_bytes(columns, bits)
    if choice in ("auto", "packed") or not size:
        return size
    if choice == "zstd" or bits > ANS_BITS:
        return 1 + min(bound_frame(rows * row_bytes(columns, lane)) for lane in _zstd_lanes(bits))
    return bound_ans(rows, columns, bits)


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """The order-0 entropy of codes that occur this often, in bits per code; 0 for no codes."""
    used = counts[counts > 0].astype(np.float64)
    total = used.sum()
    return float(-(used / total * np.log2(used / total)).sum()) + 0.0 if total else 0.0


def _encode_smallest(packed: Bytes, bits: int, columns: int, least: int) -> tuple[Coding, bytes | memoryview]:
    """The smallest payload; one that a sample or the entropy rules out is not made."""
    limit = packed.size * (100 - _SAVING_PERCENT) // 100
    best: tuple[Coding, bytes | memoryview] = ("packed", packed.reshape(-1).data)
    if not limit:
        return best
    foretold = _foretell_zstd(packed, bits, columns)
    if bits > ANS_BITS:
        if min(foretold.values()) > _SAMPLE_DOUBT * limit:
            return best
        frame = _encode_zstd(packed, bits, columns, foretold)
        return ("zstd", frame) if least <= len(frame) <= limit else best
    counts = count_codes(packed, bits, columns)
    # Fitting a table takes most of the time where codes are few.
    may_pay = _ANS_DOUBT * least_ans(counts) - 4 <= limit
    table = fit_table(counts) if may_pay else None
    if min(foretold.values()) <= _SAMPLE_DOUBT * (min(limit, table.expected_bytes) if table is not None else limit):
        frame = _encode_zstd(packed, bits, columns, foretold)
        if least <= len(frame) <= limit:
            best, limit = ("zstd", frame), len(frame) - 1
    if table is not None and _ANS_DOUBT * table.expected_bytes - 4 <= limit:
        streams = fill_up(encode_ans(packed, bits, columns, table), least)
        if len(streams) <= limit:
            best = ("ans", streams)
    return best


def _zstd_lanes(bits: int) -> tuple[int, ...]:
    """The widths at which codes may be packed before zstd sees them: it finds no symbols that straddle bytes."""
    if bits > 8:
        return (16,)
    if 8 % bits == 0:
        return (bits,)
    return (4, 8) if bits == 3 else (8,)


def _foretell_zstd(packed: Bytes, bits: int, columns: int) -> dict[int, float]:
    """The payload's bytes at each lane width: of a few stripes, scaled up, or of all the codes where they are few."""
    rows = len(packed)
    stripes = list(tiles(rows, columns, _STRIPE_CODES))
    if len(stripes) <= 2 * _STRIPES:
        return {lane: 1.0 + len(_zstd_frame(packed, bits, columns, lane)) for lane in _zstd_lanes(bits)}
    sampled = 0
    foretold = dict.fromkeys(_zstd_lanes(bits), 0.0)
    for row_span, column_span in [stripes[index * (len(stripes) - 1) // (_STRIPES - 1)] for index in range(_STRIPES)]:
        stripe = np.ascontiguousarray(packed[row_span, byte_span(column_span, bits)])
        sampled += stripe.size
        for lane in foretold:
            foretold[lane] += len(_zstd_frame(stripe, bits, column_span.stop - column_span.start, lane))
    return {lane: packed.size * coded / sampled for lane, coded in foretold.items()}


def _encode_zstd(packed: Bytes, bits: int, columns: int, foretold: dict[int, float]) -> bytes:
    """The payload at the lane width that is foretold to be smallest, unless that breaks the bound."""
    bound = bound_bytes(len(packed), columns, bits, "zstd")
    lanes = sorted(foretold, key=lambda lane: foretold[lane])
    payloads = (bytes([lane]) + _zstd_frame(packed, bits, columns, lane) for lane in lanes)
    return next(payload for payload in payloads if len(payload) <= bound)


def _zstd_frame(packed: Bytes, bits: int, columns: int, lane: int) -> bytes:
    if lane == bits:
        return compress_frame([packed.reshape(-1).data], packed.size)
    spans = tiles(len(packed), columns, CHUNK_CODES)
    lanes = (_repack(packed[rows, byte_span(span, bits)], bits, span.stop - span.start, lane) for rows, span in spans)
    return compress_frame(lanes, len(packed) * row_bytes(columns, lane))


def _repack(packed: Bytes, bits: int, columns: int, lane: int) -> memoryview:
    return pack(unpack(packed, bits, columns), lane).data.cast("B")


def _packed_tiles(read: Callable[[int, int], memoryview], bits: int, rows: int, columns: int) -> Iterator[Tile]:
    """The tiles of packed rows, which lie one behind another."""
    width = row_bytes(columns, bits)
    for row_span, column_span in tiles(rows, columns, CHUNK_CODES):
        inner = byte_span(column_span, bits)
        found = read(row_span.start * width + inner.start, (row_span.stop - 1) * width + inner.stop)
        packed = np.frombuffer(found, np.uint8).reshape(row_span.stop - row_span.start, -1)
        if column_span.stop == columns:
            _check_padding(packed, bits, columns)
        yield row_span, column_span, packed


def _zstd_tiles(stored: Stored, bits: int, rows: int, columns: int) -> Iterator[tuple[slice, slice, NDArray[Any], int]]:
    lane = stored.read(0, 1)[0] if stored.size else 0
    if lane not in _zstd_lanes(bits):
        raise ValueError(f"zstd lanes of {lane} bits for codes of {bits} bits")
    size = rows * row_bytes(columns, lane)
    frame = FrameReader(stored.anew(1), size, size)
    for row_span, column_span, lanes in _packed_tiles(frame.read, lane, rows, columns):
        if lane > 8 and (lanes.view("<u2") >> bits).any():
            raise ValueError(f"the zstd frame holds codes of more than {bits} bits")
        yield row_span, column_span, lanes, lane
    frame.finish()


def _check_width(bits: int) -> None:
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"codes have 1 to {MOST_BITS} bits, not {bits}")


def _check_padding(packed: Bytes, bits: int, columns: int) -> None:
    used = columns * bits % 8
    if used and (packed[:, -1] >> used).any():
        raise ValueError("the bits that fill up a row are not zero")
