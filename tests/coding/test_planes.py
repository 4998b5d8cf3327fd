"""Planes of bytes: any bits come back, as few bytes as their entropy asks for, and damage is seen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qcompress.coding import planes
from qcompress.coding.payload import MAX_EXPANSION, entropy_bits
from qcompress.coding.planes import PLANE_DTYPES, decode_values, encode_values, join_planes, split_planes
from qcompress.coding.stored import in_memory
from qcompress.types.plan import KEEP_CODINGS, KeepCoding

DTYPES = sorted(PLANE_DTYPES)


def encoded(raw: bytes, dtype: str, choice: KeepCoding = "auto") -> bytes:
    return b"".join(encode_values(in_memory(raw), dtype, choice))


def decoded(payload: bytes, dtype: str, count: int) -> bytes:
    return b"".join(decode_values(in_memory(payload), dtype, count))


def any_bits(count: int, dtype: str, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * PLANE_DTYPES[dtype].n_bytes)


def bell(count: int, dtype: str) -> bytes:
    """Values as weights are: a bell, wider in some places than in others."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal(count) * np.exp(rng.standard_normal(count // 50 + 1).repeat(50)[:count]) / 50
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_value_of_16_bits_comes_back(dtype: str) -> None:
    """NaN of every payload, both zeros, infinities and subnormal numbers among them."""
    raw = np.arange(2**16, dtype="<u2").tobytes()
    assert join_planes(split_planes(memoryview(raw), dtype), dtype).tobytes() == raw
    assert decoded(encoded(raw, dtype), dtype, 2**16) == raw


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_are_the_bits_in_their_new_order(dtype: str) -> None:
    """Against texts of bits, one value at a time."""
    kind, raw = PLANE_DTYPES[dtype], any_bits(300, dtype)
    for place, word in enumerate(np.frombuffer(raw, kind.words).tolist()):
        bits = f"{word:0{8 * kind.n_bytes}b}"
        exponent, mantissa = bits[1 : 1 + kind.exponent], bits[1 + kind.exponent :]
        wanted = int(exponent + bits[0] + mantissa, 2).to_bytes(kind.n_bytes, "big")
        assert bytes(plane[place] for plane in split_planes(memoryview(raw), dtype)) == wanted


@pytest.mark.parametrize("choice", KEEP_CODINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 7, 1000, 40_000])
def test_values_come_back_whatever_they_are(count: int, dtype: str, choice: KeepCoding) -> None:
    for raw in (any_bits(count, dtype), bell(count, dtype), bytes(len(any_bits(count, dtype)))):
        payload = encoded(raw, dtype, choice)
        assert payload == encoded(raw, dtype, choice)
        assert decoded(payload, dtype, count) == raw
        # A byte for the coding and at most three for the length of each plane are all that can come on top.
        assert len(payload) <= len(raw) + 4 * PLANE_DTYPES[dtype].n_bytes
        assert len(payload) * MAX_EXPANSION >= count


@pytest.mark.parametrize("count", [999, 1000, 1001, 3500])
def test_blocks_follow_one_another(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "BLOCK_VALUES", 1000)
    for dtype in DTYPES:
        raw = bell(count, dtype)
        payload = encoded(raw, dtype)
        assert decoded(payload, dtype, count) == raw
        blocks = [bytes(block) for block in decode_values(in_memory(payload), dtype, count)]
        size = PLANE_DTYPES[dtype].n_bytes
        assert [len(block) // size for block in blocks] == [min(1000, count - at) for at in range(0, count, 1000)]


def test_blocks_are_shared_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order; what is wrong with one of them is said here."""
    monkeypatch.setattr(planes, "BLOCK_VALUES", 1000)
    monkeypatch.setattr(planes, "chunk_count", lambda *_: 99)
    raw = bell(20_500, "BF16")
    payload = encoded(raw, "BF16")
    with ThreadPoolExecutor(2) as executor:
        assert b"".join(decode_values(in_memory(payload), "BF16", 20_500, executor)) == raw
        with pytest.raises(ValueError, match="behind its last block"):
            list(decode_values(in_memory(payload + b"1"), "BF16", 20_500, executor))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_payload_takes_hardly_more_than_the_entropy_of_its_planes(dtype: str) -> None:
    """Each plane at its order-0 entropy, or as it is where that saves less than 2 percent."""
    raw, count = bell(200_000, dtype), 200_000
    least = 0.0
    for plane in split_planes(memoryview(raw), dtype):
        bits = entropy_bits(np.bincount(plane, minlength=256))
        least += count * (bits if bits < 7.8 else 8.0) / 8
    assert least <= len(encoded(raw, dtype)) <= 1.01 * least + 400


def test_what_a_wider_dtype_does_not_use_costs_nothing() -> None:
    """float32 that holds bfloat16 numbers takes what these take, but for some bytes a plane."""
    raw = bell(100_000, "BF16")
    wide = (np.frombuffer(raw, "<u2").astype("<u4") << 16).tobytes()
    assert len(encoded(raw, "BF16")) <= len(encoded(wide, "F32")) <= len(encoded(raw, "BF16")) + 80


@pytest.mark.parametrize("dtype", DTYPES)
def test_damage_is_refused(dtype: str) -> None:
    raw = bell(5000, dtype)
    payload = encoded(raw, dtype)
    for wrong in (payload[:-1], payload[:1], b"", payload + b"\0", b"\3" + payload[1:], b"\2\5" + payload[2:]):
        with pytest.raises(ValueError, match=r"."):
            decoded(wrong, dtype, 5000)
    with pytest.raises(ValueError, match=r"declares 5\d\d\d bytes"):
        decoded(payload[:1] + b"\xff\x28" + payload[3:], dtype, 5000)
