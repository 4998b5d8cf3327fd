"""Payloads: a second decoder on Python's integers, frames written by hand, bounds, and every way a payload can lie."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.coding import ans
from qcompress.coding.ans import CHUNK_CODES
from qcompress.coding.frames import compress_frame
from qcompress.coding.packing import count_codes, pack, row_bytes, unpack
from qcompress.coding.payload import (
    bound_bytes,
    decode_payload,
    encode_payload,
    entropy_bits,
    payload_tiles,
    unpacked_tiles,
)
from qcompress.coding.stored import in_memory
from qcompress.types.config import Coding, CodingChoice

CODINGS = get_args(Coding)
SHAPES = [(0, 5), (5, 0), (0, 0), (1, 1), (1, 8), (7, 3), (5, 9), (64, 27), (33, 130)]


def bell_codes(rows: int, columns: int, bits: int, seed: int = 0, spread: float = 7.0) -> np.ndarray:
    levels = 1 << bits
    drawn = np.random.default_rng(seed).normal((levels - 1) / 2, levels / spread, (rows, columns))
    return np.clip(np.round(drawn), 0, levels - 1).astype(np.uint8)


def constant(rows: int, columns: int, bits: int) -> np.ndarray:
    return np.full((rows, columns), (1 << bits) - 1, np.uint8)


def one_rare(rows: int, columns: int, bits: int) -> np.ndarray:
    codes = np.zeros((rows, columns), np.uint8)
    codes[rows // 2, columns // 2] = (1 << bits) - 1
    return codes


def uniform(rows: int, columns: int, bits: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)


def every_other(rows: int, columns: int, bits: int) -> np.ndarray:
    """Only even codes, so that the frequency table has a run of absent codes after each."""
    return uniform(rows, columns, bits) & 0xFE


def all_codes_once(rows: int, columns: int, bits: int) -> np.ndarray:
    return (np.arange(rows * columns) % (1 << bits)).astype(np.uint8).reshape(rows, columns)


ADVERSARIES = [constant, one_rare, uniform, every_other, all_codes_once]


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    end = at
    while data[end] & 128:
        end += 1
    return sum((byte & 127) << 7 * place for place, byte in enumerate(data[at : end + 1])), end + 1


def slow_ans(data: bytes, rows: int, columns: int) -> np.ndarray:
    """The codes of an `ans` payload, decoded from the format's description alone, with Python's integers."""
    precision, at, code, table = data[0], 1, 0, []
    while sum(frequency for _, frequency in table) < 2**precision:
        value, at = read_varint(data, at)
        if value:
            table.append((code, value))
            code += 1
        else:
            run, at = read_varint(data, at)
            code += run + 1
    starts, total = [], 0
    for index, (_, frequency) in enumerate(table):
        starts.append(total * (2**24 - len(table)) // 2**precision + index)
        total += frequency
    starts.append(2**24)
    pieces = [
        (range(row, min(row + tall, rows)), range(column, min(column + CHUNK_CODES, columns)))
        for tall in [max(1, CHUNK_CODES // columns)]
        for row in range(0, rows, tall)
        for column in range(0, columns, CHUNK_CODES)
    ]
    lengths = []
    for _ in pieces[1:]:
        length, at = read_varint(data, at)
        lengths.append(length)
    lengths.append(len(data) - at - sum(lengths))
    codes = np.zeros((rows, columns), np.uint8)
    for (piece_rows, piece_columns), length in zip(pieces, lengths, strict=True):
        stream, at = data[at : at + length], at + length
        words = [int.from_bytes(stream[start : start + 4], "little") for start in range(0, length, 4)]
        state = 0
        while words and state < 2**32:
            state = state << 32 | words.pop()
        for row, column in itertools.product(piece_rows, piece_columns):
            place = state % 2**24
            index = next(i for i in range(len(table)) if starts[i] <= place < starts[i + 1])
            codes[row, column] = table[index][0]
            state = (state >> 24) * (starts[index + 1] - starts[index]) + place - starts[index]
            if state < 2**32 and words:
                state = state << 32 | words.pop()
        assert state == 0
        assert not words
    return codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("coding", [*CODINGS, "auto"])
def test_round_trips(bits: int, coding: str) -> None:
    for rows, columns in SHAPES:
        packed = pack(bell_codes(rows, columns, bits), bits)
        chosen, data = encode_payload(packed, bits, columns, coding)
        assert chosen in CODINGS
        assert coding in ("auto", chosen)
        decoded = decode_payload(data, chosen, bits, rows, columns)
        assert decoded.dtype == np.uint8
        assert decoded.shape == (rows, row_bytes(columns, bits))
        assert np.array_equal(decoded, packed)
        assert len(data) > 0 or not packed.size


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(2, 60))
@settings(deadline=None, max_examples=100)
def test_round_trips_of_any_codes(bits: int, rows: int, columns: int, seed: int, spread: float) -> None:
    codes = bell_codes(rows, columns, bits, seed, spread)
    packed = pack(codes, bits)
    for coding in (*CODINGS, "auto"):
        chosen, data = encode_payload(packed, bits, columns, coding)
        assert np.array_equal(decode_payload(data, chosen, bits, rows, columns), packed)
        assert len(data) <= bound_bytes(rows, columns, bits, coding)
        if chosen == "ans":
            assert np.array_equal(slow_ans(bytes(data), rows, columns), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, CHUNK_CODES + 1), (3, CHUNK_CODES // 2 + 5), (2, 2 * CHUNK_CODES)])
def test_round_trips_of_several_chunks(bits: int, shape: tuple[int, int]) -> None:
    packed = pack(bell_codes(*shape, bits), bits)
    for coding in CODINGS:
        _, data = encode_payload(packed, bits, shape[1], coding)
        assert np.array_equal(decode_payload(data, coding, bits, *shape), packed)


def test_second_decoder_agrees_over_chunks() -> None:
    rows, columns = 2, CHUNK_CODES // 2 + 1
    codes = bell_codes(rows, columns, 2)
    _, data = encode_payload(pack(codes, 2), 2, columns, "ans")
    assert np.array_equal(slow_ans(bytes(data), rows, columns), codes)


def test_ans_bytes_stay() -> None:
    """A payload of the first version: whatever changes, it must decode to these codes for ever."""
    codes = np.array([[3, 4, 4, 5, 4, 3, 9], [4, 4, 3, 5, 4, 4, 4]], np.uint8)
    data = bytes.fromhex("0700021c491200020922771734c20b")
    assert np.array_equal(slow_ans(data, 2, 7), codes)
    assert np.array_equal(decode_payload(data, "ans", 4, 2, 7), pack(codes, 4))
    assert encode_payload(pack(codes, 4), 4, 7, "ans")[1] == data


def test_ans_of_one_code_by_hand() -> None:
    codes = np.full((3, 5), 2, np.uint8)
    assert encode_payload(pack(codes, 2), 2, 5, "ans") == ("ans", bytes([0, 0, 1, 1]))
    wide = np.zeros((2, CHUNK_CODES), np.uint8)
    assert encode_payload(pack(wide, 8), 8, CHUNK_CODES, "ans") == ("ans", bytes([0, 1, 0]))


def zstd_frame_by_hand(content: bytes) -> bytes:
    """One raw block in a single segment whose size is one byte (RFC 8878)."""
    return bytes.fromhex("28b52ffd20") + bytes([len(content)]) + (1 | len(content) << 3).to_bytes(3, "little") + content


@pytest.mark.parametrize(
    ("bits", "lane", "content"),
    [(3, 4, "2103" + "5407"), (3, 8, "010203" + "040507"), (2, 2, "39" + "39"), (6, 8, "01023f" + "3f0201")],
)
def test_zstd_frames_by_hand(bits: int, lane: int, content: str) -> None:
    rows = {(3, 4): [[1, 2, 3], [4, 5, 7]], (3, 8): [[1, 2, 3], [4, 5, 7]], (2, 2): [[1, 2, 3]] * 2}
    codes = np.array(rows.get((bits, lane), [[1, 2, 63], [63, 2, 1]]), np.uint8)
    data = bytes([lane]) + zstd_frame_by_hand(bytes.fromhex(content))
    assert np.array_equal(decode_payload(data, "zstd", bits, 2, 3), pack(codes, bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_zstd_reads_with_any_zstd(bits: int) -> None:
    codes = bell_codes(50, 77, bits)
    _, data = encode_payload(pack(codes, bits), bits, 77, "zstd")
    content = zstandard.ZstdDecompressor().decompress(data[1:])
    assert content == pack(codes, data[0]).tobytes()


def test_the_limit_on_expansion_lets_every_real_frame_through() -> None:
    packed = np.zeros((16, CHUNK_CODES), np.uint8)
    for coding in ("zstd", "ans"):
        _, data = encode_payload(packed, 8, CHUNK_CODES, coding)
        assert len(data) < 1000
        assert np.array_equal(decode_payload(data, coding, 8, *packed.shape), packed)


def test_packed_is_the_packed_bytes_themselves() -> None:
    packed = pack(bell_codes(9, 11, 3), 3)
    _, data = encode_payload(packed, 3, 11, "packed")
    assert bytes(data) == packed.tobytes()
    assert np.shares_memory(np.frombuffer(data, np.uint8), packed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_ans_is_as_short_as_the_entropy_allows(bits: int) -> None:
    codes = bell_codes(1000, 1050, bits, spread=7.0 if bits > 1 else 1.0)
    codes[:, :300] = bell_codes(1000, 300, bits, seed=2, spread=20.0)
    counts = np.bincount(codes.ravel(), minlength=1 << bits)
    _, data = encode_payload(pack(codes, bits), bits, 1050, "ans")
    least = codes.size * entropy_bits(counts) / 8
    assert least <= len(data) <= 1.001 * least + 64


def test_the_table_loses_next_to_nothing() -> None:
    counts = np.bincount(bell_codes(1000, 1000, 8).ravel(), minlength=256)
    table = ans.fit_table(counts)
    used = counts[table.codes]
    cross = -(used * np.log2(table.frequencies / 2.0**table.precision)).sum() / used.sum()
    assert cross <= entropy_bits(counts) * 1.0001


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=256), st.booleans())
@settings(deadline=None, max_examples=60)
def test_no_precision_makes_table_and_streams_shorter(counts: list[int], few: bool) -> None:
    """The search ends early where nothing can be better; the reference tries every precision."""
    every = np.array([count // 1000 if few else count for count in counts])
    codes = np.flatnonzero(every).astype(np.uint8)
    if len(codes) < 2:
        return
    used = every[codes].astype(np.float64)

    def size(precision: int) -> int:
        frequencies = ans.integer_frequencies(used, precision)
        code_bits = float((used * (precision - np.log2(frequencies))).sum())
        return len(ans.table_bytes(ans.Table(precision, codes, frequencies))) + int(code_bits / 8)

    sizes = [size(precision) for precision in range(max(7, (len(codes) - 1).bit_length()), ans.MAX_PRECISION + 1)]
    assert ans.fit_table(every).expected_bytes == min(sizes)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=4), st.integers(2, 4))
@settings(deadline=None, max_examples=60)
def test_frequencies_are_the_best_of_all(counts: list[int], precision: int) -> None:
    def cost(frequencies: tuple[int, ...]) -> float:
        return -sum(count * math.log2(frequency) for count, frequency in zip(counts, frequencies, strict=True))

    total = 2**precision
    others = itertools.product(range(1, total), repeat=len(counts) - 1)
    least = min(cost((*rest, total - sum(rest))) for rest in others if sum(rest) < total)
    found = ans.integer_frequencies(np.array(counts, np.float64), precision)
    assert found.sum() == total
    assert found.min() >= 1
    assert cost(tuple(found.tolist())) == pytest.approx(least, rel=1e-9)


@given(st.lists(st.floats(0, 25), min_size=2, max_size=60), st.integers(6, 9))
@settings(deadline=None, max_examples=60)
def test_frequencies_are_those_of_unit_after_unit(log_counts: list[float], precision: int) -> None:
    """Handing out one unit at a time, each to the code that gains most, is the best for a concave gain."""
    counts = np.round(2.0 ** np.array(log_counts))
    greedy = np.ones(len(counts))
    for _ in range(2**precision - len(counts)):
        greedy[(counts * np.log1p(1 / greedy)).argmax()] += 1
    found = ans.integer_frequencies(counts, precision)
    assert (counts * np.log2(found)).sum() == pytest.approx((counts * np.log2(greedy)).sum(), rel=1e-9)


@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=256), st.integers(8, 20))
@settings(deadline=None, max_examples=60)
def test_frequencies_always_sum(counts: list[int], precision: int) -> None:
    found = ans.integer_frequencies(np.array(counts, np.float64), precision)
    assert found.sum() == 2**precision
    assert found.min() >= 1


@given(st.sets(st.integers(0, 255), min_size=1), st.integers(8, 20), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_tables_round_trip(used: set[int], precision: int, seed: int) -> None:
    codes = np.array(sorted(used), np.uint8)
    counts = np.random.default_rng(seed).lognormal(0, 3, len(codes))
    table = ans.Table(precision, codes, ans.integer_frequencies(counts, precision))
    data = ans.table_bytes(table)
    parsed, end = ans.parse_table(memoryview(data + b"\xff\xff"), 8)
    assert end == len(data)
    assert np.array_equal(parsed.codes, table.codes)
    assert np.array_equal(parsed.frequencies, table.frequencies)


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("coding", CODINGS)
def test_unpacked_tiles_are_the_packed_ones(bits: int, coding: Coding) -> None:
    """With rows of odd lengths and rows of several chunks; of the same types as `unpack` gives."""
    for rows, columns in ((5, 61), (2, CHUNK_CODES + 9)):
        codes = np.random.default_rng(bits).integers(0, 1 << bits, (rows, columns)).astype(f"u{1 + (bits > 8)}")
        kept, payload = encode_payload(pack(codes, bits), bits, columns, coding)
        about = (in_memory(payload), kept, bits, rows, columns)
        packed, unpacked = list(payload_tiles(*about)), list(unpacked_tiles(*about))
        assert len(packed) == len(unpacked) == (1 if rows == 5 else 4)
        for (down, along, tile), (*span, found) in zip(packed, unpacked, strict=True):
            assert span == [down, along]
            assert found.dtype == codes.dtype
            assert np.array_equal(found, codes[down, along])
            assert np.array_equal(found, unpack(tile, bits, along.stop - along.start))


@pytest.mark.parametrize(("bits", "lane"), [(3, 4), (3, 8), (5, 8), (7, 8), (12, 16)])
def test_codes_beyond_their_width_are_refused_packed_or_not(bits: int, lane: int) -> None:
    codes = np.full((3, 8), 1 << bits, f"u{1 + (bits > 8)}")
    frame = bytes([lane]) + compress_frame([pack(codes, lane).tobytes()], 3 * row_bytes(8, lane))
    said = []
    for read in (payload_tiles, unpacked_tiles):
        with pytest.raises(ValueError, match=rf"more than {bits} bits") as refused:
            list(read(in_memory(frame), "zstd", bits, 3, 8))
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_chunks_decode_alone() -> None:
    rows, columns, bits = 8, CHUNK_CODES // 2, 3
    codes = bell_codes(rows, columns, bits)
    data = memoryview(bytearray(encode_payload(pack(codes, bits), bits, columns, "ans")[1]))
    table, at = ans.parse_table(data, bits)
    streams = [data[start:stop] for start, stop in ans.stream_ends(data, at, 4, len(data))]
    for stream in (streams[0], streams[1], streams[3]):
        stream[:] = bytes(len(stream))
    third = ans.decode_chunk(streams[2], table, table.model(), CHUNK_CODES)
    assert np.array_equal(third, codes[4:6].ravel())


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_inputs_give_equal_bytes(bits: int) -> None:
    codes = bell_codes(40, 61, bits)
    packed = pack(codes, bits)
    for choice in (*CODINGS, "auto"):
        first, again = (encode_payload(matrix, bits, 61, choice) for matrix in (packed, np.asfortranarray(packed)))
        assert first[0] == again[0]
        assert bytes(first[1]) == bytes(again[1])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("make", [bell_codes, *ADVERSARIES])
@pytest.mark.parametrize("shape", [(1, 3), (6, 9), (40, 90), (400, 333)])
def test_auto_is_the_smallest_that_saves_two_percent(bits: int, make, shape: tuple[int, int]) -> None:
    packed = pack(make(*shape, bits), bits)
    sizes = {coding: len(encode_payload(packed, bits, shape[1], coding)[1]) for coding in CODINGS}
    chosen, data = encode_payload(packed, bits, shape[1], "auto")
    worth = [size for size in sizes.values() if 100 * size <= 98 * packed.size]
    assert len(data) == min(worth, default=packed.size)
    assert len(data) == sizes[chosen]
    assert chosen == "packed" or worth


@pytest.mark.parametrize(("saving", "worth"), [(0.017, False), (0.023, True)])
def test_two_percent_is_the_border(saving: float, worth: bool) -> None:
    uniform_codes = uniform(400, 512, 4)
    order = np.random.default_rng(3).random(uniform_codes.shape)
    shares = np.linspace(0, 0.3, 301)
    entropies = [entropy_bits(np.bincount(np.where(order < share, 7, uniform_codes).ravel())) for share in shares]
    share = np.interp(4 * (1 - saving), entropies[::-1], shares[::-1])
    packed = pack(np.where(order < share, 7, uniform_codes).astype(np.uint8), 4)
    assert (encode_payload(packed, 4, 512, "auto")[0] == "ans") == worth


def test_auto_samples_what_is_large() -> None:
    rows = uniform(1, 512, 4)
    repeated = pack(np.repeat(rows, 3000, axis=0), 4)
    assert encode_payload(repeated, 4, 512, "auto")[0] == "zstd"
    assert encode_payload(pack(uniform(3000, 512, 4), 4), 4, 512, "auto")[0] == "packed"
    bell = pack(bell_codes(3000, 512, 4), 4)
    assert encode_payload(bell, 4, 512, "auto")[0] == "ans"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (16, 16), (100, 1001)])
def test_bounds_hold(bits: int, shape: tuple[int, int]) -> None:
    for make in ADVERSARIES:
        packed = pack(make(*shape, bits), bits)
        assert bound_bytes(*shape, bits, "packed") == packed.size
        assert bound_bytes(*shape, bits, "auto") <= packed.size
        for choice in (*CODINGS, "auto"):
            assert len(encode_payload(packed, bits, shape[1], choice)[1]) <= bound_bytes(*shape, bits, choice)


def test_bounds_are_of_use() -> None:
    size = bound_bytes(1000, 1000, 4, "packed")
    assert bound_bytes(1000, 1000, 4, "ans") < 1.01 * size
    assert bound_bytes(1000, 1000, 4, "zstd") < 1.01 * size
    assert [bound_bytes(0, 9, 4, choice) for choice in (*CODINGS, "auto")] == [0, 0, 0, 0]


def test_entropy() -> None:
    assert entropy_bits(np.array([5, 5])) == 1
    assert entropy_bits(np.array([0, 9, 0])) == 0
    assert entropy_bits(np.zeros(4, np.int64)) == 0
    assert entropy_bits(np.array([1, 1, 2])) == pytest.approx(1.5)
    assert str(entropy_bits(np.array([7]))) == "0.0"


BOMB = bytes([8]) + bytes.fromhex("28b52ffda0") + (2**30).to_bytes(4, "little") + bytes.fromhex("030000") + b"\0"


@pytest.mark.parametrize(
    ("coding", "data", "shape", "bits", "what"),
    [
        ("packed", b"", (1, 1), 1, "0 bytes, not 1"),
        ("packed", b"\1\2", (1, 1), 8, "2 bytes, not 1"),
        ("packed", b"\xff", (1, 3), 2, "fill up a row"),
        ("packed", b"\0", (0, 3), 2, "payload for no codes"),
        ("ans", b"\0", (3, 0), 2, "payload for no codes"),
        ("zstd", b"", (1, 1), 8, "lanes of 0 bits"),
        ("zstd", b"\3" + zstd_frame_by_hand(b"\1"), (1, 1), 3, "lanes of 3 bits"),
        ("zstd", b"\4" + zstd_frame_by_hand(b"\1"), (1, 3), 4, "declares 1 bytes, not 2"),
        ("zstd", b"\4" + zstd_frame_by_hand(b"\1") + b"\0", (1, 1), 4, "damaged"),
        ("zstd", b"\4" + zstd_frame_by_hand(b"\1") * 2, (1, 1), 4, "damaged"),
        ("zstd", b"\4" + zstd_frame_by_hand(b"\1")[:-1], (1, 1), 4, "damaged"),
        ("zstd", b"\4" + zstd_frame_by_hand(b"\x11"), (1, 1), 4, "fill up a row"),
        ("zstd", b"\4" + zstd_frame_by_hand(b"\x08"), (1, 1), 3, "a code of 8 needs more than 3 bits"),
        ("zstd", b"\4" + b"\x50\x2a\x4d\x18\0\0\0\0" + zstd_frame_by_hand(b"\1"), (1, 1), 4, "declares|damaged"),
        ("zstd", BOMB, (1 << 10, 1 << 20), 8, "cannot hold"),
        ("zstd", BOMB, (1, 1), 8, "declares 1073741824 bytes, not 1"),
        ("ans", b"", (1, 1), 4, "table is missing"),
        ("ans", b"\x15", (1, 1), 4, "unknown precision"),
        ("ans", b"\7", (1, 1), 4, "no integer at byte 1"),
        ("ans", b"\7\x80\x80\x80\x80\x80\1", (1, 1), 4, "no integer at byte 1"),
        ("ans", b"\7\x81\0", (1, 1), 4, "no integer at byte 1"),
        ("ans", b"\1\3", (1, 1), 4, "does not sum to"),
        ("ans", b"\1\1\0\2\1", (1, 2), 2, "does not sum to"),
        ("ans", b"\3\1\1\1\1\4", (1, 1), 2, "does not sum to"),
        ("ans", b"\1\1\0\0\0\0\1", (1, 1), 4, "two runs"),
        ("ans", b"\1\1\0\xff\xff\xff\xff\7\1", (1, 1), 4, "does not sum to"),
        ("ans", b"\0\1\5", (1, 1), 4, "no code needs"),
        ("ans", b"\1\1\1\5\0", (1, 1), 4, "no code needs"),
        ("ans", b"\1\1\1\5\5\5\5\5", (1, 1), 4, "does not end"),
        ("ans", b"\0\1", (1, CHUNK_CODES + 1), 4, "cannot hold 2 chunks"),
        ("ans", b"\0\1", (2**40, 2**40), 4, "cannot hold"),
        ("ans", b"\1\1\1\2\1", (1, CHUNK_CODES + 1), 4, "longer than the payload by 1"),
    ],
)
def test_every_lie_is_refused(coding: Coding, data: bytes, shape: tuple[int, int], bits: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        decode_payload(data, coding, bits, *shape)


@pytest.mark.parametrize("bits", [0, 13])
def test_widths_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 12 bits"):
        decode_payload(b"", "packed", bits, 1, 1)
    with pytest.raises(ValueError, match="1 to 12 bits"):
        encode_payload(np.zeros((1, 1), np.uint8), bits, 1, "auto")


def test_rows_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="do not make rows of 3 bytes"):
        encode_payload(np.zeros((2, 3), np.uint8), 4, 4, "packed")


def assert_harmless(data: bytes, coding: Coding, bits: int, rows: int, columns: int) -> None:
    """Damage is a ValueError, or a matrix of the right shape with clean padding; nothing else may escape."""
    try:
        decoded = decode_payload(data, coding, bits, rows, columns)
    except ValueError:
        return
    assert decoded.shape == (rows, row_bytes(columns, bits))
    used = columns * bits % 8
    assert not used or not (decoded[:, -1] >> used).any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("coding", CODINGS)
def test_truncation_anywhere(bits: int, coding: Coding) -> None:
    rows, columns = 23, 35
    packed = pack(bell_codes(rows, columns, bits), bits)
    data = bytes(encode_payload(packed, bits, columns, coding)[1])
    for length in range(0, len(data), 3):
        assert_harmless(data[:length], coding, bits, rows, columns)
    if coding != "ans":
        for length in range(len(data)):
            with pytest.raises(ValueError):
                decode_payload(data[:length], coding, bits, rows, columns)


@given(st.data())
@settings(deadline=None, max_examples=300)
@pytest.mark.slow
def test_damage_anywhere(data: st.DataObject) -> None:
    bits, coding = data.draw(st.integers(1, 8)), data.draw(st.sampled_from(CODINGS))
    rows, columns = data.draw(st.sampled_from([(3, 5), (30, 41)]))
    whole = bytearray(encode_payload(pack(bell_codes(rows, columns, bits), bits), bits, columns, coding)[1])
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    assert_harmless(bytes(whole), coding, bits, rows, columns)


@given(st.binary(max_size=60), st.sampled_from(CODINGS), st.integers(1, 8), st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None, max_examples=300)
def test_noise(data: bytes, coding: Coding, bits: int, rows: int, columns: int) -> None:
    assert_harmless(data, coding, bits, rows, columns)


def test_counts_of_a_payload_are_those_of_its_codes() -> None:
    codes = bell_codes(20, 31, 5)
    _, data = encode_payload(pack(codes, 5), 5, 31, "ans")
    decoded = decode_payload(data, "ans", 5, 20, 31)
    assert np.array_equal(count_codes(decoded, 5, 31), np.bincount(codes.ravel(), minlength=32))


@pytest.mark.parametrize("bits", [9, 10, 12])
@pytest.mark.parametrize("choice", ["packed", "zstd", "ans", "auto"])
@pytest.mark.parametrize("spread", [3, 4096])
def test_wide_codes_go_through_every_coding(bits: int, choice: CodingChoice, spread: int) -> None:
    codes = np.random.default_rng(bits).integers(0, min(spread, 1 << bits), (40, 333), dtype=np.uint16)
    packed = pack(codes, bits)
    coding, payload = encode_payload(packed, bits, 333, choice)
    assert coding == {"packed": "packed", "zstd": "zstd", "ans": "zstd"}.get(choice, coding)
    assert len(memoryview(payload).cast("B")) <= bound_bytes(40, 333, bits, choice)
    assert np.array_equal(decode_payload(payload, coding, bits, 40, 333), packed)
    if choice == "auto":
        assert coding == ("zstd" if spread == 3 else "packed")


def test_wide_codes_beyond_their_bits_are_refused() -> None:
    coding, payload = encode_payload(pack(np.full((1, 64), 1023, np.uint16), 10), 10, 64, "zstd")
    with pytest.raises(ValueError, match="more than 9 bits"):
        decode_payload(payload, coding, 9, 1, 64)
