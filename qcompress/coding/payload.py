"""Packed codes to the bytes that the disk holds and back, one payload a tensor.

    packed   the packed rows as they are
    zstd     one byte, the lane width; one zstd frame of the codes packed at that width
    ans      a table of integer frequencies, then chunks of codes, each a stream that decodes by itself

artifact/SPEC.md describes all three to the byte, "Codes on disk". The payload of no codes is empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import constriction
import numpy as np
import zstandard
from numpy.typing import NDArray

from qcompress.coding.packing import Bytes, blocks, byte_span, count_codes, pack, row_bytes, unpack

Coding: TypeAlias = Literal["packed", "zstd", "ans"]
CodingChoice: TypeAlias = Literal["auto", "packed", "zstd", "ans"]

CHUNK_CODES = 1 << 18
"""Codes of one ANS stream; part of the format."""

MAX_PRECISION = 20
"""Frequencies sum to at most 2**20; part of the format."""

_MODEL_BITS = 24
_ZSTD_LEVEL = 1
_ZSTD_BLOCK = 1 << 17
_SAVING_PERCENT = 2
_STRIPE_CODES = 1 << 17
_STRIPES = 4
_SAMPLE_DOUBT = 1.05
_ANS_DOUBT = 0.999


def encode_payload(packed: Bytes, bits: int, columns: int, choice: CodingChoice) -> tuple[Coding, bytes | memoryview]:
    """The coding and the payload; equal inputs give equal bytes.

    packed  uint8 [rows, row_bytes(columns, bits)] as `pack` makes it; `packed` payloads share its memory
    choice  `auto` takes the smallest, if that saves at least 2 percent over `packed`

    Raises ValueError where a row's bytes are not those of `columns` codes.
    """
    _check_width(bits)
    if packed.shape[1] != row_bytes(columns, bits):
        raise ValueError(f"{columns} codes of {bits} bits do not make rows of {packed.shape[1]} bytes")
    packed = np.ascontiguousarray(packed)
    if choice == "auto":
        return _encode_smallest(packed, bits, columns)
    if not packed.size:
        return choice, b""
    match choice:
        case "packed":
            return choice, packed.reshape(-1).data
        case "zstd":
            return choice, _encode_zstd(packed, bits, columns, _foretell_zstd(packed, bits, columns))
        case "ans":
            return choice, _encode_ans(packed, bits, columns, _fit_table(count_codes(packed, bits, columns)))
        case _:
            assert_never(choice)


def decode_payload(data: bytes | memoryview, coding: Coding, bits: int, rows: int, columns: int) -> Bytes:
    """The packed codes: uint8 [rows, row_bytes(columns, bits)], perhaps read-only and sharing the payload's memory.

    Nothing is allocated before the payload's length makes that size possible. Raises ValueError where the payload is
    not that of a matrix of this shape; damage that leaves a valid payload of other codes is for a checksum to see.
    """
    _check_width(bits)
    data = memoryview(data).cast("B")
    width = row_bytes(columns, bits)
    if not rows * width:
        if len(data):
            raise ValueError(f"{len(data)} bytes of payload for no codes")
        return np.empty((rows, width), np.uint8)
    match coding:
        case "packed":
            if len(data) != rows * width:
                raise ValueError(f"the payload has {len(data)} bytes, not {rows * width}")
            packed = np.frombuffer(data, np.uint8).reshape(rows, width)
            _check_padding(packed, bits, columns)
            return packed
        case "zstd":
            return _decode_zstd(data, bits, rows, columns)
        case "ans":
            return _decode_ans(data, bits, rows, columns)
        case _:
            assert_never(coding)


def bound_bytes(rows: int, columns: int, bits: int, choice: CodingChoice) -> int:
    """The most bytes that `encode_payload` can return for any codes of this shape; exact for `packed`."""
    size = rows * row_bytes(columns, bits)
    if choice in ("auto", "packed") or not size:
        return size
    if choice == "zstd":
        return 1 + min(_zstd_bound(rows * row_bytes(columns, lane)) for lane in _zstd_lanes(bits))
    used = min(1 << bits, rows * columns)
    # A table of 2**16, each frequency at least 1 + floor(p * (2**16 - used)), is among those that are tried.
    table_loss = -math.log2(1 - used / 2**16) - math.log2(1 - used / 2**_MODEL_BITS)
    # A stream's state keeps at least 8 bits more than the model, so a step rounds up by at most 1 + 2**-8.
    code_bits = math.log2(used) + table_loss + math.log2(1 + 2**-8)
    table_bytes = 1 + used * (3 + 3)
    return table_bytes + _chunk_count(rows, columns) * (3 + 16) + math.ceil(rows * columns * code_bits / 8)


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """The order-0 entropy of codes that occur this often, in bits per code; 0 for no codes."""
    used = counts[counts > 0].astype(np.float64)
    total = used.sum()
    return float(-(used / total * np.log2(used / total)).sum()) + 0.0 if total else 0.0


def _encode_smallest(packed: Bytes, bits: int, columns: int) -> tuple[Coding, bytes | memoryview]:
    """The smallest payload; one that a sample or the entropy rules out is not made."""
    limit = packed.size * (100 - _SAVING_PERCENT) // 100
    best: tuple[Coding, bytes | memoryview] = ("packed", packed.reshape(-1).data)
    if not limit:
        return best
    table = _fit_table(count_codes(packed, bits, columns))
    foretold = _foretell_zstd(packed, bits, columns)
    if min(foretold.values()) <= _SAMPLE_DOUBT * min(limit, table.expected_bytes):
        frame = _encode_zstd(packed, bits, columns, foretold)
        if len(frame) <= limit:
            best, limit = ("zstd", frame), len(frame) - 1
    if _ANS_DOUBT * table.expected_bytes - 4 <= limit:
        streams = _encode_ans(packed, bits, columns, table)
        if len(streams) <= limit:
            best = ("ans", streams)
    return best


# --- zstd -------------------------------------------------------------------------------------------------------------


def _zstd_lanes(bits: int) -> tuple[int, ...]:
    """The widths at which codes may be packed before zstd sees them: it finds no symbols that straddle bytes."""
    if 8 % bits == 0:
        return (bits,)
    return (4, 8) if bits == 3 else (8,)


def _zstd_bound(size: int) -> int:
    """The most bytes of a frame of `size` bytes (ZSTD_COMPRESSBOUND in zstd.h)."""
    return size + (size >> 8) + (max(0, _ZSTD_BLOCK - size) >> 11)


def _foretell_zstd(packed: Bytes, bits: int, columns: int) -> dict[int, float]:
    """The payload's bytes at each lane width: of a few stripes, scaled up, or of all the codes where they are few."""
    rows = len(packed)
    stripes = list(blocks(rows, columns, _STRIPE_CODES))
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
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False, write_content_size=True)
    if lane == bits:
        return compressor.compress(packed.reshape(-1).data)
    rows = len(packed)
    stream = compressor.compressobj(size=rows * row_bytes(columns, lane))
    parts = []
    for row_span, column_span in blocks(rows, columns, CHUNK_CODES):
        width = column_span.stop - column_span.start
        codes = unpack(packed[row_span, byte_span(column_span, bits)], bits, width)
        parts.append(stream.compress(pack(codes, lane).data))
    return b"".join([*parts, stream.flush()])


def _decode_zstd(data: memoryview, bits: int, rows: int, columns: int) -> Bytes:
    lane = data[0] if len(data) else 0
    if lane not in _zstd_lanes(bits):
        raise ValueError(f"zstd lanes of {lane} bits for codes of {bits} bits")
    size = rows * row_bytes(columns, lane)
    frame = data[1:]
    # A block takes at least 4 bytes, whatever it expands to.
    if size > (len(frame) // 4) * _ZSTD_BLOCK:
        raise ValueError(f"a zstd frame of {len(frame)} bytes cannot hold {size}")
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        if declared != size:
            raise ValueError(f"the zstd frame declares {declared} bytes, not {size}")
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"the zstd frame is damaged: {error}") from error
    if len(content) != size:
        raise ValueError(f"the zstd frame holds {len(content)} bytes, not {size}")
    lanes = np.frombuffer(content, np.uint8).reshape(rows, -1)
    _check_padding(lanes, lane, columns)
    if lane == bits:
        return lanes
    packed = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    for row_span, column_span in blocks(rows, columns, CHUNK_CODES):
        codes = unpack(lanes[row_span, byte_span(column_span, lane)], lane, column_span.stop - column_span.start)
        packed[row_span, byte_span(column_span, bits)] = pack(codes, bits)
    return packed


# --- ans --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Table:
    """Integer frequencies of the codes that occur.

    codes           uint8 [used], ascending
    frequencies     int64 [used], each at least 1, together 2**precision
    expected_bytes  of a payload, from the cross-entropy; 0 where the table was read
    """

    precision: int
    codes: Bytes
    frequencies: NDArray[np.int64]
    expected_bytes: int = 0

    def model(self) -> Any | None:
        """The coder's model, exact on both sides because these quotients are; None where one code needs no stream."""
        if len(self.codes) == 1:
            return None
        return constriction.stream.model.Categorical(self.frequencies * 2.0**-self.precision, perfect=False)


def _chunk_count(rows: int, columns: int) -> int:
    return -(-rows // max(1, CHUNK_CODES // columns)) * -(-columns // CHUNK_CODES)


def _fit_table(counts: NDArray[np.int64]) -> _Table:
    """The table under which table and streams together take the fewest bytes."""
    codes = np.flatnonzero(counts).astype(np.uint8)
    used = counts[codes].astype(np.float64)
    if len(codes) == 1:
        return _Table(0, codes, np.ones(1, np.int64), 0)
    best: _Table | None = None
    # Below 2**7 a frequency takes no fewer bytes.
    for precision in range(max(7, (len(codes) - 1).bit_length()), MAX_PRECISION + 1):
        frequencies = _integer_frequencies(used, precision)
        code_bits = float((used * (precision - np.log2(frequencies))).sum())
        table = _Table(precision, codes, frequencies)
        size = len(_table_bytes(table)) + int(code_bits / 8)
        if best is None or size < best.expected_bytes:
            best = _Table(precision, codes, frequencies, size)
    assert best is not None
    return best


def _integer_frequencies(used: NDArray[np.float64], precision: int) -> NDArray[np.int64]:
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


def _table_bytes(table: _Table) -> bytes:
    """Precision, then for every code in turn its frequency, or 0 and the length less one of a run of absent codes."""
    parts = [bytes([table.precision])]
    following = 0
    for code, frequency in zip(table.codes.tolist(), table.frequencies.tolist(), strict=True):
        if code > following:
            parts += [b"\0", _varint(code - following - 1)]
        parts.append(_varint(frequency))
        following = code + 1
    return b"".join(parts)


def _parse_table(data: memoryview, bits: int) -> tuple[_Table, int]:
    """The table at the start of an ans payload, and where it ends."""
    if not len(data) or data[0] > MAX_PRECISION:
        raise ValueError("the frequency table is missing or of unknown precision")
    codes: list[int] = []
    frequencies: list[int] = []
    at, code, missing = 1, 0, 1 << data[0]
    absent_before = False
    while missing:
        value, at = _parse_varint(data, at)
        if value == 0:
            if absent_before:
                raise ValueError("the frequency table has two runs of absent codes in a row")
            run, at = _parse_varint(data, at)
            code += run + 1
        else:
            codes.append(code)
            frequencies.append(value)
            code += 1
            missing -= value
        absent_before = value == 0
        if code > 1 << bits or missing < 0:
            raise ValueError(f"the frequency table does not sum to 2**{data[0]} within {1 << bits} codes")
    return _Table(data[0], np.array(codes, np.uint8), np.array(frequencies, np.int64)), at


def _encode_ans(packed: Bytes, bits: int, columns: int, table: _Table) -> bytes:
    model = table.model()
    index_of = np.zeros(1 << bits, np.int32)
    index_of[table.codes] = np.arange(len(table.codes))
    streams = []
    for row_span, column_span in blocks(len(packed), columns, CHUNK_CODES):
        width = column_span.stop - column_span.start
        codes = unpack(packed[row_span, byte_span(column_span, bits)], bits, width).reshape(-1)
        streams.append(b"" if model is None else _encode_chunk(index_of.take(codes, mode="clip"), model))
    index = b"".join(_varint(len(stream)) for stream in streams[:-1])
    return b"".join([_table_bytes(table), index, *streams])


def _encode_chunk(indices: NDArray[np.int32], model: Any) -> bytes:
    """The stream of one chunk: the coder's words, little-endian, less the zero bytes at the end."""
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(indices, model)
    words: NDArray[np.uint32] = coder.get_compressed()
    return words.astype("<u4").tobytes().rstrip(b"\0")


def _decode_ans(data: memoryview, bits: int, rows: int, columns: int) -> Bytes:
    table, at = _parse_table(data, bits)
    chunks = _chunk_count(rows, columns)
    # One byte of index a chunk: what bounds how far a small payload can expand.
    if len(data) - at < chunks - 1:
        raise ValueError(f"{len(data)} bytes of payload cannot hold {chunks} chunks")
    model = table.model()
    streams = _parse_streams(data, at, chunks)
    packed = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    for (row_span, column_span), stream in zip(blocks(rows, columns, CHUNK_CODES), streams, strict=True):
        tall, wide = row_span.stop - row_span.start, column_span.stop - column_span.start
        codes = _decode_chunk(stream, table, model, tall * wide).reshape(tall, wide)
        packed[row_span, byte_span(column_span, bits)] = pack(codes, bits)
    return packed


def _parse_streams(data: memoryview, at: int, chunks: int) -> list[memoryview]:
    """The bytes of every chunk; the last has all that the others leave."""
    lengths = []
    for _ in range(chunks - 1):
        length, at = _parse_varint(data, at)
        lengths.append(length)
    left = len(data) - at - sum(lengths)
    if left < 0:
        raise ValueError(f"the chunks are longer than the payload by {-left} bytes")
    streams = []
    for length in [*lengths, left]:
        streams.append(data[at : at + length])
        at += length
    return streams


def _decode_chunk(stream: memoryview, table: _Table, model: Any | None, count: int) -> Bytes:
    """The `count` codes of one chunk, flat; an empty stream is the lowest code throughout."""
    if not len(stream):
        return np.full(count, table.codes[0])
    if model is None or stream[-1] == 0:
        raise ValueError("a chunk has bytes that no code needs")
    words = np.zeros(-(-len(stream) // 4), "<u4")
    words.view(np.uint8)[: len(stream)] = stream
    coder = constriction.stream.stack.AnsCoder(words.astype(np.uint32))
    indices: NDArray[np.int32] = coder.decode(model, count)
    if not coder.is_empty():
        raise ValueError("a chunk does not end where its codes do")
    return table.codes.take(indices, mode="clip")


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the high bit set on all but the last."""
    coded = bytearray()
    while value > 127:
        coded.append(value & 127 | 128)
        value >>= 7
    coded.append(value)
    return bytes(coded)


def _parse_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The integer at `at`, and where it ends; at most five bytes, and no more than it needs."""
    value = 0
    for place, byte in enumerate(data[at : at + 5]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            if byte == 0 and place:
                break
            return value, at + place + 1
    raise ValueError(f"no integer at byte {at} of the payload")


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")


def _check_padding(packed: Bytes, bits: int, columns: int) -> None:
    used = columns * bits % 8
    if used and (packed[:, -1] >> used).any():
        raise ValueError("the bits that fill up a row are not zero")
