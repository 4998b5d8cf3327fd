"""Unbounded codes: what they stand for, and that any codes at all come back from every coding."""

from __future__ import annotations

import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from streamed import bytes_of, streams_of

from qcompress.coding.ans import CHUNK_CODES, varint
from qcompress.coding.grids import FACTORS, decode, decode_rows, row_spans, steps, take_rows, trellis_values
from qcompress.coding.payload import entropy_bits
from qcompress.coding.stored import in_memory
from qcompress.coding.trellis import NEXT_STATE, trellis_states
from qcompress.coding.unbounded.lengths import class_costs, coded_bits, make_pools
from qcompress.coding.unbounded.payload import (
    decode_codes,
    encode_pool,
    encode_sources,
    join_side,
    split_side,
)
from qcompress.coding.unbounded.side import Matrix, grid_of_unbounded, parse_side, side_bytes
from qcompress.coding.unbounded.streams import stream_tiles
from qcompress.coding.unbounded.tables import (
    PRECISION,
    ClassCounter,
    Pool,
    Source,
    fit_pool,
    fit_slopes,
    make_source,
    pooled,
    table_from_slopes,
)
from qcompress.coding.unbounded.tokens import (
    CLASSES,
    LARGEST_CODE,
    TOKEN_BITS,
    TOKENS,
    Levels,
    class_matrix,
    codes_from_tokens,
    raw_bits,
    tokens_from_codes,
)
from qcompress.types.encoded import Unbounded

CODINGS = ["ans", "zstd", "packed", "auto"]


def make(codes: NDArray[np.int32], *, trellis: bool = False, shape: tuple[int, ...] | None = None) -> Unbounded:
    matrix = torch.from_numpy(np.ascontiguousarray(codes, np.int32))
    return Unbounded(matrix, torch.tensor(0.75).half(), -3, shape or tuple(matrix.shape), trellis=trellis)


def drawn(seed: int, rows: int, columns: int, scale: float, *, heavy: bool = False) -> NDArray[np.int32]:
    """Codes whose rows and columns differ in scale; heavy: of a Cauchy distribution."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_cauchy((rows, columns)) if heavy else generator.standard_normal((rows, columns))
    sizes = np.exp2(generator.normal(0, 0.7, (rows, 1)) + generator.normal(0, 0.4, (1, columns)))
    return np.rint(np.clip(noise * sizes * scale, -LARGEST_CODE, LARGEST_CODE)).astype(np.int32)


def read_back(unbounded_tensors: list[Unbounded], choice: str) -> list[NDArray[np.int32]]:
    """The codes of a pool after all of its bytes were written and read."""
    coded = encode_pool(unbounded_tensors, choice)  # type: ignore[arg-type]
    sources = [make_source(one) for one in unbounded_tensors]
    grids, pool = parse_side(memoryview(coded.side), [Matrix(*one.shape, one.taps) for one in sources])
    return [
        decode_codes(bytes_of(payload), coding, pool, place, grid.trellis, source.shape)
        for place, (payload, coding, grid, source) in enumerate(
            zip(coded.payloads, coded.codings, grids, sources, strict=True)
        )
    ]


def decode_streams(
    payload: bytes, shape: tuple[int, int], levels: Levels, pool: Pool, *, trellis: bool
) -> NDArray[np.int32]:
    """The codes of all chunks together."""
    codes = np.full(shape, LARGEST_CODE, np.int32)
    for rows, columns, tile in stream_tiles(in_memory(payload), shape, levels, pool.tables, trellis):
        codes[rows, columns] = tile
    return codes


def test_factors_are_the_nearest_float32_to_eighths_of_an_octave() -> None:
    for index, factor in enumerate(FACTORS.tolist()):
        exact = Fraction(2) ** index
        below, above = (Fraction(float(np.nextafter(np.float32(factor), np.float32(end)))) for end in (0, 4))
        middle = Fraction(factor)
        # The eighth power grows with its base: halfway to either neighbour lies on the other side of 2**index.
        assert ((below + middle) / 2) ** 8 < exact < ((above + middle) / 2) ** 8


@given(
    st.integers(-126, 112),
    st.lists(st.integers(-127, 127), min_size=3, max_size=3),
    st.lists(st.integers(-127, 127), min_size=2, max_size=2),
    st.lists(st.integers(-127, 127), min_size=4, max_size=4),
    st.floats(2.0**-24, 65504, width=16),
)
def test_steps_are_the_exact_product_rounded_once(
    exponent: int, rows: list[int], channels: list[int], taps: list[int], step: float
) -> None:
    parts = (torch.tensor(part, dtype=torch.int8) for part in (rows, channels, taps))
    half = torch.tensor(step).half()
    unbounded = Unbounded(torch.zeros(3, 8, dtype=torch.int32), half, exponent, (3, 2, 2, 2), *parts)
    found = steps(unbounded)
    most = Fraction(float(np.finfo(np.float32).max))
    for row, by_row in enumerate(rows):
        for column in range(8):
            e = by_row + channels[column // 4] + taps[column % 4]
            factor = Fraction(float(FACTORS[e % 8])) * Fraction(2) ** (e // 8 + exponent)
            exact = min(Fraction(float(half)) * factor, most)
            one = float(found[row, column])
            near = [Fraction(float(np.nextafter(np.float32(one), np.float32(end)))) for end in (-np.inf, 3e38)]
            assert abs(Fraction(one) - exact) <= min(abs(other - exact) for other in near if other != Fraction(one))


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=60))
def test_the_trellis_obeys_its_parity_check(row: list[int]) -> None:
    codes = np.array([row, row[::-1]], np.int32)
    states = trellis_states(codes)
    assert not states[:, 0].any()
    for line, inputs in zip(states & 1, codes & 1, strict=True):
        z0, z1 = [0, 0, 0, *line.tolist()], [0, 0, 0, *inputs.tolist()]
        # z0 * (1 + D + D**3) = z1 * D**2 modulo 2.
        assert all((z0[n] + z0[n - 1] + z0[n - 3] + z1[n - 2]) % 2 == 0 for n in range(3, len(z0)))
    values = trellis_values(torch.from_numpy(codes)).numpy()
    assert np.array_equal(values, 2 * codes - np.sign(codes) * (states & 1))


def test_every_state_leads_to_two_and_is_reached_from_two() -> None:
    assert all(len(set(row)) == 2 for row in NEXT_STATE.tolist())
    assert sorted(NEXT_STATE.reshape(-1).tolist()) == sorted([*range(8), *range(8)])


@pytest.mark.slow
def test_the_trellis_beats_rounding_by_most_of_a_decibel() -> None:
    """Marcellin and Fischer's eight states gain some 0.9 dB on a uniform source; plain rounding has step**2 / 12."""
    source = np.random.default_rng(0).uniform(-40, 40, 20_000)
    cost = np.where(np.arange(8) == 0, 0.0, np.inf)
    for x in source:
        following = np.full(8, np.inf)
        for state in range(8):
            for code in range(round(x / 2) - 2, round(x / 2) + 3):
                value = 2 * code - np.sign(code) * (state & 1)
                to = NEXT_STATE[state, code & 1]
                following[to] = min(following[to], cost[state] + (x - value) ** 2)
        cost = following
    # In half-steps the step is 2: rounding has an error of 4 / 12.
    assert 10 * np.log10(4 / 12 / (cost.min() / len(source))) > 0.75


@pytest.mark.parametrize("trellis", [False, True])
def test_rows_decode_by_themselves(trellis: bool) -> None:
    unbounded = make(drawn(3, 30, 40, 2.0), trellis=trellis)
    whole = decode_rows(unbounded)
    parts = [decode_rows(take_rows(unbounded, start, stop)) for start, stop in row_spans(unbounded, 300)]
    assert len(parts) > 3
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(decode(unbounded), whole)


def test_values_without_a_trellis_are_codes_times_steps() -> None:
    codes = np.array([[0, 1, -1, 7, -(2**24)]], np.int32)
    assert decode(make(codes)).tolist() == [[0.0, 0.09375, -0.09375, 0.65625, -(2**24) * 0.09375]]


EXTREMES = st.sampled_from([0, 1, -1, 15, 16, -16, 31, 4095, 4096, -4097, LARGEST_CODE, -LARGEST_CODE])
CODE = st.integers(-LARGEST_CODE, LARGEST_CODE) | st.integers(-20, 20) | EXTREMES


@given(st.lists(CODE, max_size=80))
def test_tokens_and_raw_bits_hold_every_code(values: list[int]) -> None:
    codes = np.array(values, np.int32)
    tokens = tokens_from_codes(codes)
    raw = raw_bits(codes, tokens)
    assert len(raw) == -(-int(TOKEN_BITS[tokens].sum()) // 8)
    found, left = codes_from_tokens(tokens, raw.tobytes() + b"xy")  # type: ignore[arg-type]
    assert np.array_equal(found, codes)
    assert bytes(left) == b"xy"


def test_a_code_that_no_token_has_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond 2147483647"):
        tokens_from_codes(np.array([-(2**31)], np.int32))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40), st.floats(0, 12), st.booleans()), min_size=1, max_size=4),
    st.sampled_from(CODINGS),
    st.booleans(),
    st.integers(0, 1000),
)
def test_codes_come_back_whatever_their_tails(
    sizes: list[tuple[int, int, float, bool]], choice: str, trellis: bool, seed: int
) -> None:
    unbounded_tensors = [
        make(drawn(seed + place, rows, columns, 2.0**octaves - 1, heavy=heavy), trellis=trellis)
        for place, (rows, columns, octaves, heavy) in enumerate(sizes)
    ]
    for unbounded, codes in zip(unbounded_tensors, read_back(unbounded_tensors, choice), strict=True):
        assert np.array_equal(codes, unbounded.codes.numpy())


@pytest.mark.parametrize("choice", CODINGS)
def test_tensors_with_and_without_a_trellis_share_a_pool(choice: str) -> None:
    unbounded_tensors = [
        make(drawn(1, 20, 36, 3.0), trellis=True, shape=(20, 4, 3, 3)),
        make(drawn(2, 7, 50, 1.0)),
        make(np.zeros((4, 5), np.int32), trellis=True),
        make(np.full((3, 3), -LARGEST_CODE, np.int32)),
    ]
    for unbounded, codes in zip(unbounded_tensors, read_back(unbounded_tensors, choice), strict=True):
        assert np.array_equal(codes, unbounded.codes.numpy())


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.slow
def test_chunks_decode_by_themselves(trellis: bool) -> None:
    rows, columns = 3 * (CHUNK_CODES // 3000) + 5, 3000
    codes = drawn(4, rows, columns, 1.0)
    source = make_source(make(codes, trellis=trellis))
    pool, _ = fit_pool([source])
    levels, tall = pool.levels[0], CHUNK_CODES // columns
    payload = streams_of(source, pool)
    whole = decode_streams(payload, source.shape, levels, pool, trellis=trellis)
    assert np.array_equal(whole, codes)
    lengths, at = [], 0
    for _ in range(7):
        value = shift = 0
        while True:
            byte, at = payload[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        lengths.append(value)
    ends = np.cumsum([at, *(raw + stream for raw, stream in zip(lengths[0::2], [*lengths[1::2], 0], strict=True))])
    # The third chunk alone, as a payload of its own for just these rows.
    own = varint(lengths[4]) + payload[ends[2] : ends[3]]
    by_row = None if levels.rows is None else levels.rows[2 * tall : 3 * tall]
    part = Levels(levels.base, by_row, levels.channels, levels.taps)
    assert np.array_equal(
        decode_streams(own, (tall, columns), part, pool, trellis=trellis),
        codes[2 * tall : 3 * tall],
    )


def test_rows_longer_than_a_chunk() -> None:
    codes = drawn(5, 1, CHUNK_CODES + 77, 2.0)
    source = make_source(make(codes))
    pool, _ = fit_pool([source])
    payload = streams_of(source, pool)
    found = decode_streams(payload, source.shape, pool.levels[0], pool, trellis=False)
    assert np.array_equal(found, codes)
    with pytest.raises(ValueError, match="cannot drive a trellis"):
        encode_pool([make(drawn(5, 1, CHUNK_CODES + 77, 2.0), trellis=True)], "ans")


@given(st.sampled_from(CODINGS), st.booleans(), st.data())
@settings(max_examples=60)
def test_damage_is_refused_or_leaves_codes_for_the_checksum(choice: str, trellis: bool, data: st.DataObject) -> None:
    unbounded = make(drawn(6, 9, 30, 6.0, heavy=True), trellis=trellis)
    coded = encode_pool([unbounded], choice)  # type: ignore[arg-type]
    joined = bytearray(bytes_of(join_side(coded.side, coded.payloads[0])))
    if data.draw(st.booleans()):
        del joined[data.draw(st.integers(0, len(joined) - 1)) :]
    else:
        joined[data.draw(st.integers(0, len(joined) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        side, payload = split_side(in_memory(bytes(joined)))
        grids, pool = parse_side(side, [Matrix(9, 30, 1)])
        codes = decode_codes(payload.read(0, payload.size), coded.codings[0], pool, 0, grids[0].trellis, (9, 30))
    except ValueError:
        return
    assert codes.shape == (9, 30)
    assert codes.dtype == np.int32


@given(st.dictionaries(st.integers(0, 80), st.integers(1, 10**6), min_size=1, max_size=40))
def test_a_smooth_table_is_one_of_frequencies(counts: dict[int, int]) -> None:
    counted = np.zeros(TOKENS, np.int64)
    for token, count in counts.items():
        counted[token] = count
    table = table_from_slopes(fit_slopes(counted))
    assert int(table.frequencies.sum()) == 2**table.precision
    assert table.frequencies.min() >= 1
    assert set(np.flatnonzero(counted).tolist()) <= set(table.codes.tolist())
    if len(table.codes) > 1:
        assert table.precision == PRECISION


def test_a_smooth_table_costs_next_to_nothing() -> None:
    for scale in (0.3, 1.0, 3.0):
        codes = np.rint(np.random.default_rng(7).laplace(0, scale, 200_000)).astype(np.int32)
        tokens = tokens_from_codes(codes)
        counts = np.bincount(tokens, minlength=TOKENS)
        table = table_from_slopes(fit_slopes(counts))
        bits = table.precision - np.log2(table.frequencies) + TOKEN_BITS[: len(table.codes)]
        found = float((counts[: len(bits)] * bits).sum()) / len(codes)
        _, occurring = np.unique(codes, return_counts=True)
        assert found <= entropy_bits(occurring) * 1.003 + 0.001


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0, 300.0])
def test_the_length_is_that_of_the_bytes(scale: float, trellis: bool) -> None:
    unbounded_tensors = [
        make(drawn(8, 64, 576, scale), trellis=trellis, shape=(64, 64, 3, 3)),
        make(drawn(9, 300, 1000, scale), trellis=trellis),
        make(drawn(10, 10, 64, scale, heavy=True), trellis=trellis),
    ]
    written = 0
    for members, own in make_pools(unbounded_tensors):
        coded = encode_pool([unbounded_tensors[member] for member in members], "ans")
        sizes = [payload.size for payload in coded.payloads]
        written += sum(sizes) + (join_side(coded.side, in_memory(b"")).size if own else len(coded.side))
    assert abs(coded_bits(unbounded_tensors) / 8 - written) <= 0.001 * written + 8


def test_classes_of_rows_and_columns_pay() -> None:
    """Codes whose rows and columns differ in scale take less than their own order-0 entropy."""
    unbounded = make(drawn(11, 128, 256, 1.5))
    _, occurring = np.unique(unbounded.codes.numpy(), return_counts=True)
    assert coded_bits([unbounded]) < 0.95 * entropy_bits(occurring) * unbounded.codes.numel()
    even = make(np.random.default_rng(12).integers(-3, 4, (128, 256)).astype(np.int32))
    # Where there is nothing to gain, next to nothing is lost.
    assert coded_bits([even]) < 1.003 * np.log2(7) * even.codes.numel() + 400


@pytest.mark.parametrize("trellis", [False, True])
def test_costs_of_all_codes_add_up_to_the_length(trellis: bool) -> None:
    unbounded_tensors = [make(drawn(13, 64, 300, 1.0), trellis=trellis), make(drawn(14, 32, 200, 2.0), trellis=trellis)]
    total, span = 0.0, 64
    for unbounded, (classes, costs) in zip(unbounded_tensors, class_costs(unbounded_tensors, span), strict=True):
        assert classes.shape == unbounded.codes.shape
        assert bool(torch.isfinite(costs).all())
        contexts = classes.long()
        if trellis:
            contexts += CLASSES * (1 + torch.from_numpy((trellis_states(unbounded.codes.numpy()) & 1).astype(np.int64)))
        total += float(costs[contexts, unbounded.codes.long() + span].double().sum())
        # Codes that no table has yet cost more the larger they are.
        used = costs[contexts.unique()]
        assert bool((used[:, -1] >= used[:, span + 40]).all())
    assert coded_bits(unbounded_tensors) * 0.93 < total < coded_bits(unbounded_tensors)


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("scale", [0.4, 60.0])
def test_codes_read_in_parts_have_the_bytes_that_they_have_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, trellis: bool
) -> None:
    """In pieces of 3 of 40 rows, each in the narrowest integers, and through a file, under every coding."""
    monkeypatch.setattr("qcompress.coding.spool.HELD_BYTES", 100)
    unbounded = make(drawn(18, 40, 150, scale), trellis=trellis, shape=(40, 50, 3))
    codes = unbounded.codes.numpy()
    narrow = [np.int8 if np.abs(codes[at : at + 3]).max() < 128 else np.int32 for at in range(0, 40, 3)]
    pieces = [codes[3 * place : 3 * place + 3].astype(kind) for place, kind in enumerate(narrow)]
    source = Source((40, 150), 3, trellis, lambda: iter(pieces))
    # Else chunks end where pieces do, which they do not here: 3 rows of 150 are a chunk then.
    for module in ("payload", "streams", "tables"):
        monkeypatch.setattr(f"qcompress.coding.unbounded.{module}.CHUNK_CODES", 450)
    for choice in CODINGS:
        whole = encode_pool([unbounded], choice)  # type: ignore[arg-type]
        parts = encode_sources([source], [grid_of_unbounded(unbounded)], choice, tmp_path)  # type: ignore[arg-type]
        assert (parts.side, parts.codings, parts.uses) == (whole.side, whole.codings, whole.uses)
        assert bytes_of(parts.payloads[0]) == bytes_of(whole.payloads[0])
    assert not any(tmp_path.iterdir())


def test_levels_of_very_many_kinds_are_counted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [make_source(make(drawn(19, 30, 64, 2.0), trellis=trellis)) for trellis in (False, True)]
    pool, counts = fit_pool(sources)
    monkeypatch.setattr("qcompress.coding.unbounded.tables.COUNTED_BINS", 0)
    again, recounted = fit_pool(sources)
    assert bytes(side_bytes([], Pool((), pool.slopes))) == bytes(side_bytes([], Pool((), again.slopes)))
    for one, other in zip(counts, recounted, strict=True):
        assert np.array_equal(one.places, other.places)
        assert np.array_equal(one.counts, other.counts)


def test_uses_of_tables_count_the_bits_that_large_codes_leave_open() -> None:
    codes = drawn(17, 64, 200, 40.0)
    source = make_source(make(codes))
    pool, counts = fit_pool([source])
    contexts = class_matrix(pool.levels[0], *source.shape)
    (piece,) = source.pieces()
    counter, knowing = ClassCounter(), ClassCounter(counts[0])
    counter.add(piece, contexts)
    knowing.add(piece, contexts)
    uses = counter.uses(pool)
    assert knowing.uses(pool) == uses
    assert max(use.magnitude for use in uses) > 32
    for use in uses:
        own = codes[contexts == use.context]
        sizes = np.abs(own.astype(np.int64))
        # A magnitude of 16 and more keeps its three leading bits and its sign.
        still_open = np.where(sizes < 16, 0, np.floor(np.log2(np.maximum(sizes, 1))) - 2).astype(np.int64)
        _, counts = np.unique(np.stack([own < 0, sizes >> still_open, still_open]), axis=1, return_counts=True)
        ideal = float((counts * np.log2(len(own) / counts)).sum() + still_open.sum()) / len(own)
        assert (use.count, use.magnitude) == (len(own), pytest.approx(float(sizes.mean())))
        assert use.ideal_bits == pytest.approx(ideal)


def test_a_single_weight_has_costs_without_a_warning() -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ((classes, costs),) = class_costs([make(np.array([[7]], np.int32))], 8)
    finally:
        torch.set_warn_always(False)
    assert classes.shape == (1, 1) and bool(costs.isfinite().all())


def test_a_pool_holds_small_tensors_while_it_has_room() -> None:
    assert pooled([5, 2**18, 2**18 + 1, 7]) == [True, True, False, True]
    many = pooled([2**18] * 20)
    assert sum(many) == 16
    assert many[:16] == [True] * 16


def test_side_information_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)

    def factors(count: int) -> torch.Tensor:
        return torch.randint(-127, 128, (count,), generator=generator).to(torch.int8)

    codes = torch.from_numpy(drawn(15, 12, 36, 2.0))
    step = torch.tensor(2.0**-24).half()
    unbounded_tensors = [
        Unbounded(codes, step, -126, (12, 4, 3, 3), factors(12), factors(4), factors(9)),
        Unbounded(codes, step, 112, (12, 36), None, factors(36), None, trellis=True),
        Unbounded(codes, step, 0, (12, 4, 3, 3), None, None, factors(9)),
        Unbounded(codes, step, 0, (12, 4, 3, 3), None, factors(36), None),
    ]
    coded = encode_pool(unbounded_tensors, "ans")
    grids, _ = parse_side(memoryview(coded.side), [Matrix(12, 36, taps) for taps in (9, 1, 9, 9)])
    for grid, unbounded in zip(grids, unbounded_tensors, strict=True):
        wanted = grid_of_unbounded(unbounded)
        assert (grid.step, grid.exponent, grid.trellis) == (wanted.step, wanted.exponent, wanted.trellis)
        for part in ("rows", "channels", "taps"):
            mine, theirs = getattr(grid, part), getattr(wanted, part)
            assert (mine is None) == (theirs is None)
            assert mine is None or np.array_equal(mine, theirs)
