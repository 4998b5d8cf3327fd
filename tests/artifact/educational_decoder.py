"""A second decoder, written from SPEC.md alone, slow and plain: what the first one is held against.

It shares no code with qcompress, so an error in the format's code cannot hide in both.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from artifact.educational_unbounded import unbounded_tensors


class Dense(NamedTuple):
    """A tensor as the checkpoint had it, or as its codes decode."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def expand(path: Path) -> dict[str, Dense]:
    """Every tensor of an artifact by its original name, tied names included."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors: dict[str, Dense] = {}
    tied: dict[str, str] = {}
    for file in files:
        header, data, manifest = read_file(file)
        tied.update(manifest.get("tied", {}))
        for name, stored in header.items():
            if ".qc." not in name:
                dtype, raw = stored["dtype"], bytes_of(stored, data)
                named = {one: kind for kind, names in manifest.get("halved", {}).items() for one in names}
                own = named.get(name, named.get("*")) if dtype == "F16" else None
                if own:
                    raw = np.frombuffer(raw, "<f2").astype({"F32": "<f4", "F64": "<f8"}[own]).tobytes()
                tensors[name] = Dense(own or dtype, tuple(stored["shape"]), raw)
        entries = {
            name: manifest["defaults"] | ({"shape": own} if isinstance(own, list) else own)
            for name, own in manifest["tensors"].items()
        }
        for name, (_, values) in unbounded_tensors(
            entries, lambda part, h=header, d=data: bytes_of(h[part], d)
        ).items():
            entry = entries[name]
            tensors[name] = Dense(entry["dtype"], tuple(entry["shape"]), in_order(entry, values))
        for name, entry in entries.items():
            if entry["grid"] == "lattice":
                continue
            owner = entry.get("codebook", name)
            parts = {
                part: bytes_of(header[f"{owner}.qc.{part}"], data)
                for part in ("scale", "zero_point", "offset", "codebook")
                if f"{owner}.qc.{part}" in header
            }
            parts["codes"] = bytes_of(header[f"{name}.qc.codes"], data)
            grid = "codebook" if entry["grid"] == "codebook" else "scale"
            about = header[f"{owner}.qc.{grid}"]
            tensors[name] = Dense(entry["dtype"], tuple(entry["shape"]), decode(entry, parts, about))
    return tensors | {name: tensors[twin] for name, twin in tied.items()}


def read_file(path: Path) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
    """Header without metadata, data, and manifest, after their checksums were checked."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    manifest = json.loads(header.pop("__metadata__")["qcompress"])
    assert manifest["format"] == 1
    assert hashlib.sha256(raw[start:]).hexdigest() == manifest["sha256"]
    before = b'\\"header_crc32\\":\\"'
    place = raw.index(before) + len(before)
    assert raw[place : place + 8].decode() == manifest["header_crc32"]
    assert zlib.crc32(raw[:place] + b"00000000" + raw[place + 8 : start]) == int(manifest["header_crc32"], 16)
    return header, raw[start:], manifest


def bytes_of(stored: dict[str, Any], data: bytes) -> bytes:
    begin, end = stored["data_offsets"]
    return data[begin:end]


def decode(entry: dict[str, Any], parts: dict[str, bytes], about: dict[str, Any]) -> bytes:
    """The bytes of a weight in its own dtype and order."""
    shape, axis, bits = entry["shape"], entry["axis"], entry["bits"]
    rows = math.prod(shape[index] for index in axis) if len(shape) > 1 else 1
    columns = math.prod(shape) // rows
    dim = entry.get("dim", 1)
    codes = decode_payload(parts["codes"], entry["coding"], bits, rows // dim, columns)
    grids = ("scale", "zero_point", "offset", "codebook")
    checked = pack(codes, bits) + b"".join(parts.get(part, b"") for part in grids)
    assert zlib.crc32(checked) == entry["crc32"]
    with np.errstate(over="ignore"):
        if entry["grid"] == "codebook":
            values = entries_of(codes, parts, about, entry["exponent"])
        else:
            values = values_of(codes, parts, about["shape"], entry["grid"], bits, entry["exponent"])
    return in_order(entry, values)


def in_order(entry: dict[str, Any], values: np.ndarray) -> bytes:
    """Values [rows, columns] as the bytes of the weight."""
    shape, axis = entry["shape"], entry["axis"]
    order = [*axis, *(index for index in range(len(shape)) if index not in axis)] if len(shape) > 1 else []
    order = order or list(range(len(shape)))
    permuted = values.reshape([shape[index] for index in order])
    return in_dtype(np.moveaxis(permuted, range(len(order)), order) if order else permuted, entry["dtype"])


def entries_of(codes: np.ndarray, parts: dict[str, bytes], about: dict[str, Any], exponent: int) -> np.ndarray:
    """float32 [rows, columns] of vectors, one entry at a time."""
    codebooks, _, dim = about["shape"]
    dtype = {"F16": "<f2", "F32": "<f4", "I8": "i1"}[about["dtype"]]
    codebook = np.frombuffer(parts["codebook"], dtype).astype(np.float32).reshape(about["shape"])
    if about["dtype"] == "I8":
        codebook = codebook * np.frombuffer(parts["scale"], "<f2").astype(np.float32).reshape(codebooks, 1, 1)
    codebook = codebook * np.float32(2.0**exponent)
    vectors, columns = codes.shape
    values = np.zeros((vectors * dim, columns), np.float32)
    for v, c in itertools.product(range(vectors), range(columns)):
        values[v * dim : (v + 1) * dim, c] = codebook[v // (vectors // codebooks), codes[v, c]]
    return values


def values_of(
    codes: np.ndarray, parts: dict[str, bytes], grids: list[int], grid: str, bits: int, exponent: int
) -> np.ndarray:
    """float32 [rows, columns]."""
    rows, columns = codes.shape
    power = np.float32(2.0**exponent)
    scale = np.frombuffer(parts["scale"], "<f2").astype(np.float32).reshape(grids) * power
    row = np.arange(rows)[:, None] if grids[0] == rows else np.zeros((rows, 1), int)
    group = np.arange(columns)[None, :] // (columns // grids[1])
    s, code = scale[row, group], codes.astype(np.float32)
    if grid == "offset":
        offset = np.frombuffer(parts["offset"], "<f2").astype(np.float32).reshape(grids) * power
        return code * s + offset[row, group]
    if grid == "zero-point":
        zero = np.frombuffer(parts["zero_point"], np.uint8).astype(np.float32).reshape(grids)[row, group]
    else:
        zero = np.float32({"narrow": 2 ** (bits - 1) - 1, "full": 2 ** (bits - 1), "mid-rise": (2**bits - 1) / 2}[grid])
    return (code - zero) * s


def in_dtype(values: np.ndarray, dtype: str) -> bytes:
    """float32 of any shape to the bytes of `dtype`, row-major."""
    limit = {"F16": 65504.0, "BF16": 2.0**128 - 2.0**120}.get(dtype, float(np.finfo(np.float32).max))
    values = values.clip(np.float32(-limit), np.float32(limit))
    if dtype == "BF16":
        words = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return ((words + 0x7FFF + (words >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()
    return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def decode_payload(data: bytes, coding: str, bits: int, rows: int, columns: int) -> np.ndarray:
    """The codes [rows, columns]."""
    if coding == "ans":
        return decode_ans(data, rows, columns)
    if coding == "zstd":
        return unpack(zstandard.ZstdDecompressor().decompress(data[1:]), data[0], rows, columns)
    return unpack(data, bits, rows, columns)


def unpack(data: bytes, bits: int, rows: int, columns: int) -> np.ndarray:
    width = math.ceil(columns * bits / 8)
    assert len(data) == rows * width
    codes = np.zeros((rows, columns), np.uint16 if bits > 8 else np.uint8)
    for row in range(rows):
        string = int.from_bytes(data[row * width : (row + 1) * width], "little")
        for column in range(columns):
            codes[row, column] = string >> bits * column & (1 << bits) - 1
        assert string >> bits * columns == 0
    return codes


def pack(codes: np.ndarray, bits: int) -> bytes:
    rows, columns = codes.shape
    width = math.ceil(columns * bits / 8)
    strings = [sum(int(code) << bits * column for column, code in enumerate(codes[row])) for row in range(rows)]
    return b"".join(string.to_bytes(width, "little") for string in strings)


def decode_ans(data: bytes, rows: int, columns: int) -> np.ndarray:
    precision, at, code, table = data[0], 1, 0, []
    while sum(frequency for _, frequency in table) < 2**precision:
        value, at = read_varint(data, at)
        if value:
            table.append((code, value))
            code += 1
        else:
            run, at = read_varint(data, at)
            code += run + 1
    n, total, starts = len(table), 0, []
    for index, (_, frequency) in enumerate(table):
        starts.append(total * (2**24 - n) // 2**precision + index)
        total += frequency
    starts.append(2**24)
    tall = max(1, 2**18 // columns)
    chunks = [
        list(itertools.product(range(row, min(row + tall, rows)), range(column, min(column + 2**18, columns))))
        for row in range(0, rows, tall)
        for column in range(0, columns, 2**18)
    ]
    lengths = []
    for _ in chunks[1:]:
        length, at = read_varint(data, at)
        lengths.append(length)
    lengths.append(len(data) - at - sum(lengths))
    codes = np.full((rows, columns), table[0][0], np.uint8)
    for places, length in zip(chunks, lengths, strict=True):
        stream, at = data[at : at + length], at + length
        words = [int.from_bytes(stream[start : start + 4], "little") for start in range(0, length, 4)]
        if words:
            decode_stream(words, table, starts, codes, places)
    return codes


def decode_stream(
    words: list[int], table: list[tuple[int, int]], starts: list[int], codes: np.ndarray, places: list[tuple[int, int]]
) -> None:
    x = 0
    while words and x < 2**32:
        x = x * 2**32 + words.pop()
    for place in places:
        q = x % 2**24
        i = next(i for i in range(len(table)) if starts[i] <= q < starts[i + 1])
        codes[place] = table[i][0]
        x = x // 2**24 * (starts[i + 1] - starts[i]) + q - starts[i]
        if x < 2**32 and words:
            x = x * 2**32 + words.pop()
    assert x == 0
    assert not words


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
