"""The second decoder's part for unbounded codes, written from SPEC.md alone, slow and plain."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import zstandard

EIGHTHS = ("1.000000", "1.172b84", "1.306fe0", "1.4bfdae", "1.6a09e6", "1.8ace54", "1.ae89fa", "1.d5818e")
WEIGHTS = (32768, 35734, 38968, 42495, 46341, 50535, 55109, 60097)
BINS = [(b, 0) for b in range(16)] + [((4 + j) << i + 2, i + 2) for i in range(27) for j in range(4)]
Table = list[int]


class Tensor:
    """One tensor: its sizes from the manifest, then what side information says of it."""

    def __init__(self, name: str, entry: Mapping[str, Any]) -> None:
        self.name, self.shape, self.coding = name, entry["shape"], entry["coding"]
        if len(self.shape) < 2:
            self.rows, rest = 1, [math.prod(self.shape)]
        else:
            self.rows = math.prod(self.shape[axis] for axis in entry["axis"])
            rest = [size for axis, size in enumerate(self.shape) if axis not in entry["axis"]]
        self.columns, self.taps = math.prod(rest), math.prod(rest[1:])
        self.parts: dict[str, list[int]] = {}
        self.flags = self.exponent = self.base = 0
        self.step = 0.0

    @property
    def trellis(self) -> bool:
        return bool(self.flags & 32)

    def wanted(self) -> dict[str, int]:
        """How many numbers of each kind the flags promise."""
        channels = self.columns // self.taps
        own = channels if self.flags & 16 else self.columns
        return {
            "level rows": self.rows * (self.flags & 1),
            "level channels": channels * (self.flags >> 1 & 1),
            "level taps": self.taps * (self.flags >> 1 & 1),
            "rows": self.rows * (self.flags >> 2 & 1),
            "channels": own * (self.flags >> 3 & 1),
            "taps": self.taps * (self.flags >> 4 & 1),
        }


def unbounded_tensors(
    entries: Mapping[str, Mapping[str, Any]], stored: Callable[[str], bytes]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> codes and values float32, both [rows, columns]; `stored` gives the bytes of a stored tensor."""
    tensors = [Tensor(name, entry) for name, entry in sorted(entries.items()) if entry["form"] == "unbounded"]
    names = pooled_names(entries)
    shared = [tensor for tensor in tensors if tensor.name in names]
    tables = read_side(stored(".qc.side"), shared) if shared else {}
    found = {}
    for tensor in tensors:
        data = stored(f"{tensor.name}.qc.codes")
        if tensor in shared:
            codes = read_codes(data, tensor, tables)
        else:
            length, at = varint(data, 0)
            codes = read_codes(data[at + length :], tensor, read_side(data[at : at + length], [tensor]))
        found[tensor.name] = (codes, values(codes, tensor))
    return found


def pooled_names(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tensors that share the pool of their file."""
    sizes = [(math.prod(entry["shape"]), name) for name, entry in entries.items() if entry["form"] == "unbounded"]
    names, left = [], 2**22
    for size, name in sorted(sizes):
        if size <= min(left, 2**18):
            names.append(name)
            left -= size
    return sorted(names)


def read_side(data: bytes, tensors: list[Tensor]) -> dict[int, Table]:
    at = 0
    for tensor in tensors:
        tensor.flags, tensor.exponent, tensor.base, tensor.step = struct.unpack_from("<Bbbe", data, at)
        at += 5
    bins: dict[int, int] = {}
    for group in (0, 32, 64):
        count, at = data[at], at + 1
        if count:
            first, at = data[at], at + 1
            bins |= {group + first + place: size for place, size in enumerate(data[at : at + count]) if size}
            at += count
    kinds = ["level rows", "level channels", "level taps", "rows", "channels", "taps"]
    counts = [sum(tensor.wanted()[kind] for tensor in tensors) for kind in kinds]
    counts.append(sum(size - 1 for size in bins.values()))
    offsets, tables = [], []
    for count in counts:
        if not count:
            offsets.append(0)
            tables.append([1])
            continue
        offset, at = varint(data, at)
        slopes, at = [0] * data[at], at + 1
        for place in range(len(slopes)):
            coded, at = varint(data, at)
            slopes[place] = unzigzag(coded)
        offsets.append(unzigzag(offset))
        tables.append(table(slopes))
    length, at = varint(data, at)
    raw, stream = data[at : at + length], Stream(data[at + length :])
    fields = []
    for count, offset, own in zip(counts, offsets, tables, strict=True):
        tokens = [stream.next(own) for _ in range(count)]
        bits = Bits(raw)
        fields.append([bits.code(token) + offset for token in tokens])
        raw = raw[math.ceil(bits.at / 8) :]
    assert stream.done()
    assert not raw
    for kind, field in zip(kinds, fields, strict=False):
        for tensor in tensors:
            count = tensor.wanted()[kind]
            tensor.parts[kind], field[:count] = field[:count], []
    found = {}
    for context, size in bins.items():
        found[context] = table(fields[-1][: size - 1])
        del fields[-1][: size - 1]
    return found


def table(slopes: list[int]) -> Table:
    """The frequency of each token."""
    q, weights = 0, [WEIGHTS[0] << 64]
    for b, slope in enumerate(slopes, 1):
        q += slope
        weights += [WEIGHTS[-q % 8] * 2 ** (64 + BINS[b][1] - math.ceil(q / 8))] * 2
    if not slopes:
        return [1]
    frequencies = [max(1, weight * 2**16 // sum(weights)) for weight in weights]
    frequencies[frequencies.index(max(frequencies))] += 2**16 - sum(frequencies)
    return frequencies


class Stream:
    """One stack of words."""

    def __init__(self, data: bytes) -> None:
        assert not data.endswith(b"\0")
        self.words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        self.x = 0
        while self.words and self.x < 2**32:
            self.x = self.x * 2**32 + self.words.pop()

    def next(self, frequencies: Table) -> int:
        n, total = len(frequencies), sum(frequencies)
        if n == 1:
            return 0
        q, below = self.x % 2**24, 0
        for token, frequency in enumerate(frequencies):
            start = below * (2**24 - n) // total + token
            below += frequency
            end = below * (2**24 - n) // total + token + 1 if token < n - 1 else 2**24
            if start <= q < end:
                self.x = self.x // 2**24 * (end - start) + q - start
                if self.x < 2**32 and self.words:
                    self.x = self.x * 2**32 + self.words.pop()
                return token
        raise AssertionError

    def done(self) -> bool:
        return self.x == 0 and not self.words


class Bits:
    """Raw bits, lowest first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> int:
        window = int.from_bytes(self.data[self.at // 8 : self.at // 8 + 5], "little")
        self.at += count
        return window >> (self.at - count) % 8 & (1 << count) - 1

    def code(self, token: int) -> int:
        start, count = BINS[(token + 1) // 2]
        magnitude = start + self.take(count)
        return magnitude if token % 2 else -magnitude


def read_codes(data: bytes, tensor: Tensor, tables: Mapping[int, Table]) -> np.ndarray:
    if tensor.coding == "zstd":
        data = zstandard.ZstdDecompressor().decompress(data)
    if tensor.coding != "ans":
        return read_lanes(data, tensor)
    rows, columns = tensor.rows, tensor.columns
    tall = max(1, 2**18 // columns)
    chunks = [
        (range(row, min(row + tall, rows)), range(column, min(column + 2**18, columns)))
        for row in range(0, rows, tall)
        for column in range(0, columns, 2**18)
    ]
    sizes, at = [], 0
    for place in range(len(chunks)):
        raw, at = varint(data, at)
        stream, at = varint(data, at) if place < len(chunks) - 1 else (len(data), at)
        sizes.append((raw, stream))
    codes = np.zeros((rows, columns), np.int64)
    filled = len(data) == math.ceil(rows * columns / 4096)
    for chunk, (raw, stream) in zip(chunks, sizes, strict=True):
        streamed = data[at + raw : at + raw + stream]
        if filled and chunk is chunks[-1]:
            streamed = streamed.rstrip(b"\0")
        read_chunk(codes, chunk, Bits(data[at : at + raw]), Stream(streamed), tensor, tables)
        at += raw + stream
    return codes


def read_chunk(
    codes: np.ndarray,
    chunk: tuple[range, range],
    bits: Bits,
    stream: Stream,
    tensor: Tensor,
    tables: Mapping[int, Table],
) -> None:
    classes = {place: class_of(tensor, *place) for place in itertools.product(*chunk)}
    if not tensor.trellis:
        tokens = {
            place: stream.next(tables[classes[place]]) for place in sorted(classes, key=lambda at: (classes[at], at))
        }
        for place in sorted(tokens):
            codes[place] = bits.code(tokens[place])
    else:
        states = dict.fromkeys(chunk[0], 0)
        for column in chunk[1]:
            context = [(classes[row, column] + 32 * (1 + states[row] % 2), row) for row in chunk[0]]
            found = {row: stream.next(tables[number]) for number, row in sorted(context)}
            for row in chunk[0]:
                codes[row, column] = bits.code(found[row])
                states[row] = after(states[row], int(codes[row, column]))
    assert stream.done()


def class_of(tensor: Tensor, row: int, column: int) -> int:
    level = tensor.base
    if tensor.parts["level rows"]:
        level += tensor.parts["level rows"][row]
    if tensor.parts["level taps"]:
        level += (
            tensor.parts["level channels"][column // tensor.taps] + tensor.parts["level taps"][column % tensor.taps]
        )
    return min(max((level + 1) // 2 + 8, 0), 31)


def after(state: int, code: int) -> int:
    s0, s1, s2 = state & 1, state >> 1 & 1, state >> 2
    return (s0 ^ s1) + 2 * (s2 ^ code % 2) + 4 * s0


def read_lanes(data: bytes, tensor: Tensor) -> np.ndarray:
    count, lane = tensor.rows * tensor.columns, data[0]
    end = 1 + math.ceil(count * lane / 8)
    lanes = Bits(data[1:end])
    tokens = [lanes.take(lane) for _ in range(count)]
    for place, token in enumerate(tokens):
        if token == (1 << lane) - 1:
            tokens[place], end = data[end], end + 1
    bits = Bits(data[end:])
    return np.array([bits.code(token) for token in tokens], np.int64).reshape(tensor.rows, tensor.columns)


def values(codes: np.ndarray, tensor: Tensor) -> np.ndarray:
    """float32 [rows, columns], one code at a time."""
    found = np.zeros(codes.shape, np.float32)
    most = float(np.finfo(np.float32).max)
    factors = [float.fromhex(f"0x{text}p0") for text in EIGHTHS]
    for row, codes_of_row in enumerate(codes.tolist()):
        state = 0
        for column, code in enumerate(codes_of_row):
            taps, channels = tensor.parts["taps"], tensor.parts["channels"]
            e = tensor.parts["rows"][row] if tensor.parts["rows"] else 0
            e += taps[column % tensor.taps] if taps else 0
            e += channels[column // (tensor.taps if taps else 1)] if channels else 0
            s = np.float32(min(tensor.step * factors[e % 8] * 2.0 ** (e // 8 + tensor.exponent), most))
            with np.errstate(over="ignore"):
                if tensor.trellis:
                    sign = (code > 0) - (code < 0)
                    found[row, column] = np.float32(2 * code - sign * (state % 2)) * (s * np.float32(0.5))
                    state = after(state, code)
                else:
                    found[row, column] = np.float32(code) * s
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def unzigzag(value: int) -> int:
    return -((value + 1) // 2) if value % 2 else value // 2
