"""Chunks read in step: the values and the refusals of the slower way, by compiled loops and by the loops uncompiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed import streams_of

from qcompress.coding import ans, compiled, kernels
from qcompress.coding.ans import decode_chunk, encode_runs, fit_table
from qcompress.coding.compiled import COMPILER, LEAST_CODES, Compiler
from qcompress.coding.in_step import Loops, decode_in_step
from qcompress.coding.packing import pack
from qcompress.coding.payload import decode_payload, encode_payload
from qcompress.coding.rows import tiles
from qcompress.coding.stored import in_memory
from qcompress.coding.unbounded import streams
from qcompress.coding.unbounded.tables import fit_pool, make_source
from qcompress.coding.unbounded.tokens import Classes
from qcompress.types.encoded import Unbounded

Loop = Callable[..., Any]


def uncompiled(kernel: Loop) -> Loop:
    return kernel


def by_numba(kernel: Loop) -> Loop | None:
    pytest.importorskip("numba", reason="numba is not installed: pip install 'qcompress[rd]'")
    return COMPILER.of(kernel)


LOOPS = pytest.mark.parametrize("loops", [uncompiled, by_numba])
FEW = settings(deadline=None, max_examples=12)


def spoil(data: bytes, draw: np.random.Generator) -> bytes:
    """Bytes changed, cut off or added, as often as not at the end, where a stream is read first."""
    kind = draw.integers(5)
    place = int(draw.integers(len(data))) if len(data) else 0
    if kind == 0 or not data:
        return data + draw.integers(0, 256, int(draw.integers(1, 9)), np.uint8).tobytes()
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[: max(0, len(data) - int(draw.integers(1, 5)))]
    place = len(data) - 1 if kind == 3 else place
    return data[:place] + bytes([data[place] ^ int(draw.integers(1, 256))]) + data[place + 1 :]


def said(call: Callable[[], Any]) -> tuple[str | None, Any]:
    """What a call raises, and what it returns."""
    try:
        return None, call()
    except ValueError as error:
        return str(error), None


def assert_same(found: list[Any] | None, error: str | None, expected: list[Any] | None) -> None:
    """In step either all chunks are what the slower way gives, or none is and that way says why."""
    assert (found is None) == (error is not None)
    for one, other in zip(found or [], expected or [], strict=True):
        assert one.shape == other.shape
        assert np.array_equal(one, other)


@LOOPS
@given(st.integers(1, 8), st.lists(st.integers(1, 150), min_size=1, max_size=7), st.integers(0, 2**32 - 1))
@FEW
def test_codes_under_one_table(loops: Loops, bits: int, counts: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    parts = [draw.binomial((1 << bits) - 1, draw.beta(0.3, 0.3), count).astype(np.uint8) for count in counts]
    table = fit_table(np.bincount(np.concatenate(parts), minlength=1 << bits))
    model, about = table.model(), (table.frequencies, table.codes, table.precision)
    chunks = [(encode_runs([(part, table)]), len(part)) for part in parts]
    assert_same(decode_in_step(loops, chunks, about), None, parts)
    place = int(draw.integers(len(chunks)))
    chunks[place] = (spoil(chunks[place][0], draw), chunks[place][1])
    error, expected = said(lambda: [decode_chunk(memoryview(part), table, model, count) for part, count in chunks])
    assert_same(decode_in_step(loops, chunks, about), error, expected)


@LOOPS
@pytest.mark.parametrize("stream", [b"\1", b"\0\0\0\0\1", b"\xff" * 4, b"\xff" * 8, b"\xff" * 12, b"\1\0\0\0", b"\0"])
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("frequencies", [[1], [1, 1], [1, 127], [2**19, 2**19 - 1, 1]])
def test_streams_that_no_coder_made(loops: Loops, stream: bytes, count: int, frequencies: list[int]) -> None:
    """Beside one that is as it should be, and in its place."""
    precision = sum(frequencies).bit_length() - 1
    table = ans.Table(precision, np.arange(len(frequencies), dtype=np.uint8), np.array(frequencies, np.int64))
    model = table.model()
    for chunks in ([(stream, count)], [(b"", 4), (stream, count)]):
        error, expected = said(
            lambda chunks=chunks: [decode_chunk(memoryview(part), table, model, size) for part, size in chunks]
        )
        found = decode_in_step(loops, chunks, (table.frequencies, table.codes, precision))
        assert_same(found, error, expected)


def unbounded_chunks(
    seed: int, rows: int, columns: int, size: float, *, trellis: bool
) -> tuple[list[tuple[bytes, bytes, Any]], streams.Tables, list[Any]]:
    """Chunks of some 48 codes, the tables of their pool, and their codes."""
    draw = np.random.default_rng(seed)
    scales = np.exp2(draw.normal(0, 1.5, (rows, 1)) + draw.normal(0, 1, columns)) * size
    codes = np.round(draw.standard_normal((rows, columns)) * scales).astype(np.int32)
    unbounded = Unbounded(torch.from_numpy(codes), torch.tensor(1.0).half(), 0, codes.shape, trellis=trellis)
    source = make_source(unbounded)
    pool, _ = fit_pool([source])
    classes = Classes(pool.levels[0], *source.shape)
    with patch.object(streams, "CHUNK_CODES", 48):
        payload = streams_of(source, pool)
        spans = list(tiles(*source.shape, 48))
    places = streams._parse_index(memoryview(payload), len(spans), len(payload))
    chunks = [
        (payload[start:middle], payload[middle:stop], classes[span])
        for (start, middle, stop), span in zip(places, spans, strict=True)
    ]
    return chunks, pool.tables, [codes[span] for span in spans]


def in_turn(chunks: Any, tables: streams.Tables, trellis: bool) -> tuple[str | None, Any]:
    return said(lambda: streams._decode_in_turn(streams._Job(tuple(chunks), tables, trellis, narrow=False)))


@LOOPS
@pytest.mark.parametrize("trellis", [False, True])
@given(st.integers(1, 9), st.integers(1, 24), st.sampled_from([0.1, 1.0, 20.0, 1e7]), st.integers(0, 2**32 - 1))
@FEW
def test_unbounded_codes(loops: Loops, trellis: bool, rows: int, columns: int, size: float, seed: int) -> None:
    chunks, tables, expected = unbounded_chunks(seed, rows, columns, size, trellis=trellis)
    assert_same(streams.decode_in_step(loops, chunks, tables, trellis), None, expected)
    draw = np.random.default_rng(seed + 1)
    place, part = int(draw.integers(len(chunks))), int(draw.integers(2))
    spoiled = [*chunks[place]]
    spoiled[part] = spoil(spoiled[part], draw)
    chunks[place] = (spoiled[0], spoiled[1], spoiled[2])
    error, other = in_turn(chunks, tables, trellis)
    assert_same(streams.decode_in_step(loops, chunks, tables, trellis), error, other)


@LOOPS
@pytest.mark.parametrize("trellis", [False, True])
def test_a_class_without_a_table(loops: Loops, trellis: bool) -> None:
    chunks, tables, _ = unbounded_chunks(5, 4, 12, 1.0, trellis=trellis)
    for context in tables:
        fewer = {other: table for other, table in tables.items() if other != context}
        error, _ = in_turn(chunks, fewer, trellis)
        assert error is not None and "no table" in error
        assert streams.decode_in_step(loops, chunks, fewer, trellis) is None


@LOOPS
@pytest.mark.parametrize("trellis", [False, True])
def test_raw_bits_too_many_or_not_zero(loops: Loops, trellis: bool) -> None:
    chunks, tables, _ = unbounded_chunks(2, 3, 20, 300.0, trellis=trellis)
    raw, stream, classes = chunks[0]
    for wrong in (raw + b"\0", raw[:-1], b""):
        error, _ = in_turn([(wrong, stream, classes)], tables, trellis)
        assert error is not None
        assert streams.decode_in_step(loops, [(wrong, stream, classes)], tables, trellis) is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Loop]:
    """The loops that decoding asks for, and gets uncompiled, however little there is to decode."""
    found: list[Loop] = []
    monkeypatch.setattr(Compiler, "pays", lambda *_: True)
    monkeypatch.setattr(Compiler, "of", lambda _, kernel: found.append(kernel) or kernel)
    return found


def test_payloads_are_read_in_step_and_refused_as_ever(asked: list[Loop]) -> None:
    codes = np.random.default_rng(1).binomial(7, 0.3, (30, 40)).astype(np.uint8)
    packed = pack(codes, 3)
    payload = encode_payload(packed, 3, 40, "ans")[1]
    assert np.array_equal(decode_payload(payload, "ans", 3, 30, 40), packed)
    assert asked == [kernels.make_intervals, kernels.decode_codes]
    with pytest.raises(ValueError, match="a chunk does not end where its codes do"):
        decode_payload(bytes(payload) + b"\1\2\3\4", "ans", 3, 30, 40)
    with pytest.raises(ValueError, match="a chunk has bytes that no code needs"):
        decode_payload(bytes(payload) + b"\0", "ans", 3, 30, 40)


@pytest.mark.parametrize("trellis", [False, True])
def test_unbounded_payloads_are_read_in_step_and_refused_as_ever(asked: list[Loop], trellis: bool) -> None:
    codes = np.random.default_rng(1).geometric(0.2, (12, 30)).astype(np.int32)
    unbounded = Unbounded(torch.from_numpy(codes), torch.tensor(1.0).half(), 0, codes.shape, trellis=trellis)
    source = make_source(unbounded)
    pool, _ = fit_pool([source])
    payload = streams_of(source, pool)
    about = (source.shape, pool.levels[0], pool.tables, trellis)
    ((_, _, found),) = streams.stream_tiles(in_memory(payload), *about)
    assert found.dtype == np.int32
    assert np.array_equal(found, codes)
    assert asked == [kernels.make_intervals, kernels.decode_trellis if trellis else kernels.decode_plain]
    with pytest.raises(ValueError, match=r"fewer raw bits than|does not end where"):
        list(streams.stream_tiles(in_memory(payload + b"\1\2\3\4"), *about))


def test_few_codes_are_decoded_without_asking_for_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "_load", lambda _: 1 / 0)
    compiler = Compiler()
    assert not compiler.pays(LEAST_CODES - 1)
    with pytest.raises(ZeroDivisionError):
        compiler.pays(1)


def test_without_numba_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    compiler = Compiler()
    assert not compiler.pays(LEAST_CODES)
    assert compiler.of(kernels.decode_codes) is None


def test_numba_that_shall_not_compile_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed: pip install 'qcompress[rd]'")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert not Compiler().pays(LEAST_CODES)


@pytest.mark.parametrize(
    ("platform", "variable", "value", "folder"),
    [
        ("linux", "XDG_CACHE_HOME", "/cache", "/cache/qcompress/numba"),
        ("linux", "HOME", "/own", "/own/.cache/qcompress/numba"),
        ("darwin", "HOME", "/own", "/own/Library/Caches/qcompress/numba"),
        ("win32", "LOCALAPPDATA", "/own/Local", "/own/Local/qcompress/numba"),
    ],
)
def test_the_cache_is_the_user_s(
    monkeypatch: pytest.MonkeyPatch, platform: str, variable: str, value: str, folder: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert compiled.user_cache() == Path(folder)


@pytest.mark.slow
def test_loops_are_compiled_into_the_cache_or_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed: pip install 'qcompress[rd]'")
    before = numba.config.CACHE_DIR
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(compiled, "user_cache", lambda: tmp_path / "cache")
    assert Compiler().of(kernels.make_intervals) is not None
    (index,) = (tmp_path / "cache").rglob("*.nbi")
    assert numba.config.CACHE_DIR == ""
    index.write_bytes(index.read_bytes()[:-7])
    assert Compiler().of(kernels.make_intervals) is not None, "a damaged cache is left alone"
    monkeypatch.setattr(numba.config, "CACHE_DIR", before)


def test_counts_of_what_was_decoded_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small tensors are worth compiled loops as one large one is."""
    monkeypatch.setattr(Compiler, "_load", lambda _: object())
    compiler = Compiler()
    assert [compiler.pays(LEAST_CODES // 4) for _ in range(5)] == [False, False, False, True, True]


def test_intervals_are_those_of_the_spec() -> None:
    """An interval a code, in ascending order, without gaps: what SPEC.md writes."""
    for used, precision in ((1, 0), (2, 7), (256, 8), (256, 20), (7, 16)):
        counts = np.random.default_rng(used).integers(1, 1000, used)
        frequencies = (
            ans.integer_frequencies(counts.astype(np.float64), precision) if used > 1 else np.ones(1, np.int64)
        )
        starts = np.zeros(used + 1, np.uint32)
        buckets = np.zeros(kernels.BUCKETS, np.uint64)
        kernels.make_intervals(frequencies, np.array([used]), np.array([precision]), starts, used + 1, buckets)
        before = np.concatenate([[0], np.cumsum(frequencies)])
        expected = [int(total) * (2**24 - used) // 2**precision + place for place, total in enumerate(before[:-1])]
        assert starts.tolist() == [*expected, 2**24]
        step = 2**24 // kernels.BUCKETS
        for place, bucket in enumerate(buckets.tolist()):
            number = bucket >> 49
            assert starts[number] <= place * step < starts[number + 1]
            assert bucket & 2**24 - 1 == starts[number]
            assert bucket >> 24 & 2**25 - 1 == starts[number + 1] - starts[number]
