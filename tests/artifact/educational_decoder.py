"""A second decoder, written from SPEC.md alone, slow and plain: what the first one is held against.

It shares no code with qcompress, so an error in the format's code cannot hide in both.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from artifact.educational_compact import compact_header
from artifact.educational_kept import kept_bytes
from artifact.educational_unbounded import pooled_names, unbounded_tensors

PARTS = ("codes", "scale", "zero_point", "offset", "exponent", "subscale", "suboffset", "codebook", "table")
NF4 = """-1 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036 0
         0.0795803 0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1"""
IQ4_NL = "-127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113"
E2M1 = "0 0.5 1 1.5 2 3 4 6 -0 -0.5 -1 -1.5 -2 -3 -4 -6"
MOST_EXPANSION = 4096


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
        checked = checksums(header, data, manifest)
        for name, found in checked.items():
            assert found == manifest["numbers"]["crc32"][name], name
        for name, stored, raw in kept_tensors(header, data, manifest):
            own = own_dtype(name, stored, manifest)
            if name in coded_names(manifest):
                raw = kept_bytes(raw, stored["dtype"], stored["shape"], read_varint, decode_payload)
            if own != stored["dtype"]:
                raw = np.frombuffer(raw, "<f2").astype({"F32": "<f4", "F64": "<f8"}[own]).tobytes()
            tensors[name] = Dense(own, tuple(stored["shape"]), raw)
        entries = manifest["tensors"]
        for name, (_, values) in unbounded_tensors(
            entries, lambda part, h=header, d=data: bytes_of(h[part], d)
        ).items():
            tensors[name] = Dense(
                entries[name]["dtype"], tuple(entries[name]["shape"]), in_order(entries[name], values)
            )
        for name, entry in entries.items():
            if entry["form"] != "unbounded":
                parts = parts_of(name, entry, header, data)
                tensors[name] = Dense(entry["dtype"], tuple(entry["shape"]), decode(entry, parts))
    return tensors | {name: tensors[twin] for name, twin in tied.items()}


def read_file(path: Path) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
    """Header without metadata, data, and manifest, after the checksums of the file were checked."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:start]), raw[start:]
    assert header.pop("__metadata__") == {"format": "pt", "qcompress": "2"}
    begin, end = header["qcompress.manifest"]["data_offsets"]
    assert end == len(data)
    manifest = read_manifest(data[begin:], header)
    if "kept" in manifest:
        assert set(header) == {"qcompress.data", "qcompress.manifest"}
        assert header["qcompress.data"] == {"dtype": "U8", "shape": [begin], "data_offsets": [0, begin]}
        header = compact_header(manifest) | {"qcompress.manifest": header["qcompress.manifest"]}
        assert begin == max((one["data_offsets"][1] for one in list(header.values())[:-1]), default=0)
    assert manifest["numbers"]["sha256"] == hashlib.sha256(data[:begin]).hexdigest()
    assert manifest["numbers"]["header_crc32"] == zlib.crc32(raw[:start])
    return header, data, manifest


def read_manifest(frame: bytes, header: dict[str, Any]) -> dict[str, Any]:
    """The JSON with every entry whole, and its numbers by kind and name under `numbers`."""
    text, _, numbers = zstandard.ZstdDecompressor().decompress(frame).partition(b"\n")
    manifest = json.loads(text)
    assert manifest["format"] == 2
    for name, own in manifest["tensors"].items():
        manifest["tensors"][name] = whole_entry(manifest["defaults"], {"shape": own} if isinstance(own, list) else own)
    entries = dict(sorted(manifest["tensors"].items()))
    others = [name for name in header if name == ".qc.side" or (".qc." not in name and name != "qcompress.manifest")]
    if "kept" in manifest:
        others = ["qcompress.data", *([".qc.side"] if pooled_names(entries) else [])]
    others += coded_names(manifest)
    rest = sorted([*(name for name in others if name != "__metadata__"), *manifest.get("tied", {})])
    found: dict[str, Any] = {"sha256": numbers[:32].hex(), "input_sha256": numbers[32:64].hex()}
    (found["header_crc32"],), at = struct.unpack_from("<I", numbers, 64), 68
    for kind, letter, names in (
        ("coding", "B", list(entries)),
        ("exponent", "b", [name for name, entry in entries.items() if has_exponent(entry)]),
        ("entries", "H", [name for name, entry in entries.items() if stores_values(entry)]),
        ("value", "d", [name for name, entry in entries.items() if entry["form"] == "constant"]),
        ("crc32", "I", [*entries, *rest]),
    ):
        values = struct.unpack_from(f"<{len(names)}{letter}", numbers, at)
        found[kind], at = dict(zip(names, values, strict=True)), at + struct.calcsize(f"<{len(names)}{letter}")
    found["lengths"] = {}
    if "kept" in manifest:
        coded = [f"{name}.qc.codes" for name, code in found["coding"].items() if code or is_unbounded(entries[name])]
        coded += [f"{name}.qc.codes" for name in coded_names(manifest)]
        for name in sorted([*coded, *([".qc.side"] if pooled_names(entries) else [])]):
            found["lengths"][name], at = read_varint(numbers, at)
    assert at == len(numbers)
    for kind in ("coding", "exponent", "entries", "value"):
        for name, value in found[kind].items():
            entries[name][kind] = ("packed", "zstd", "ans")[value] if kind == "coding" else value
    manifest["numbers"] = found
    return manifest


def whole_entry(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """All fields of an entry of its form."""
    form = own.get("form", defaults.get("form"))
    own_fields = {
        "affine": ["bits", "grid", "group", "row_exponents"],
        "codebook": ["bits", "dim", "group", "shared", "values"],
        "table": ["bits", "group", "row_exponents", "values"],
        "blocked": ["bits", "grid", "group", "row_exponents", "sub_blocks", "subzero"],
    }
    fields = ["axis", "dtype", "form", "shape", *own_fields.get(form, [])]
    usual = {"dim": 1, "row_exponents": False, "shared": None, "subzero": 0}
    every = usual | defaults | own
    assert set(own) <= set(fields)
    return {field: every[field] for field in fields}


def is_unbounded(entry: dict[str, Any]) -> bool:
    return bool(entry["form"] == "unbounded")


def has_exponent(entry: dict[str, Any]) -> bool:
    return entry["form"] not in ("unbounded", "constant") and not entry.get("row_exponents")


def stores_values(entry: dict[str, Any]) -> bool:
    if entry["form"] == "codebook":
        return entry["shared"] is None
    return entry["form"] == "table" and entry["values"] in ("F16", "F32", "I8")


def coded_names(manifest: dict[str, Any]) -> list[str]:
    return [name for names in manifest.get("coded", {}).values() for name in names]


def kept_tensors(
    header: dict[str, Any], data: bytes, manifest: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Name, dtype and shape as stored, and bytes or codes, of each kept tensor."""
    for name, stored in header.items():
        if ".qc." not in name and name != "qcompress.manifest":
            yield name, stored, bytes_of(stored, data)
    for dtype, names in manifest.get("coded", {}).items():
        for name, shape in names.items():
            yield name, {"dtype": dtype, "shape": shape}, bytes_of(header[f"{name}.qc.codes"], data)


def own_dtype(name: str, stored: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The dtype in which a kept tensor is given back."""
    named = {one: kind for kind, names in manifest.get("halved", {}).items() for one in names}
    return named.get(name, named.get("*", "F16")) if stored["dtype"] == "F16" else stored["dtype"]


def checksums(header: dict[str, Any], data: bytes, manifest: dict[str, Any]) -> dict[str, int]:
    """The CRC-32 of everything that has one in the manifest."""
    entries, found = manifest["tensors"], {}
    for name, entry in entries.items():
        parts = parts_of(name, entry, header, data)
        raw = b"".join(parts[part][1] for part in PARTS if part in parts)
        if entry["form"] == "constant":
            raw += struct.pack("<d", entry["value"])
        said = {key: value for key, value in entry.items() if key != "value"}
        found[name] = zlib.crc32(raw + words(name, said))
    kept, together, coded = [], b"", coded_names(manifest)
    for name, stored, raw in kept_tensors(header, data, manifest):
        own, form = own_dtype(name, stored, manifest), "coded" if name in coded else "kept"
        said = {"dtype": own, "form": form, "shape": stored["shape"], "stored": stored["dtype"]}
        found[name] = zlib.crc32(raw + words(name, said))
        if form == "kept":
            kept.append([name, own, stored["dtype"], stored["shape"]])
            together += raw
    if "kept" in manifest:
        found = {name: crc32 for name, crc32 in found.items() if name in entries or name in coded}
        found["qcompress.data"] = zlib.crc32(together + words("", {"form": "kept", "of": kept}))
    for name, twin in manifest.get("tied", {}).items():
        found[name] = zlib.crc32(words(name, {"form": "tied", "to": twin}))
    if ".qc.side" in header:
        said = {"form": "pool", "of": pooled_names(entries)}
        found[".qc.side"] = zlib.crc32(bytes_of(header[".qc.side"], data) + words("", said))
    return found


def words(name: str, said: dict[str, Any]) -> bytes:
    return json.dumps([name, said], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parts_of(name: str, entry: dict[str, Any], header: dict[str, Any], data: bytes) -> dict[str, Any]:
    """part -> (what the header says of it, its bytes); of a shared codebook those of the tensor that stores it."""
    owner = entry.get("shared") or name
    found = {part: header[f"{owner}.qc.{part}"] for part in PARTS if f"{owner}.qc.{part}" in header}
    found["codes"] = header[f"{name}.qc.codes"]
    return {part: (stored, bytes_of(stored, data)) for part, stored in found.items()}


def bytes_of(stored: dict[str, Any], data: bytes) -> bytes:
    begin, end = stored["data_offsets"]
    return data[begin:end]


def array(parts: dict[str, Any], part: str) -> np.ndarray:
    """The numbers of a part, in float32 but for codes and exponents."""
    stored, raw = parts[part]
    dtype = {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4"}[stored["dtype"]]
    return np.frombuffer(raw, dtype).reshape(stored["shape"]).astype(np.float32)


def decode(entry: dict[str, Any], parts: dict[str, Any]) -> bytes:
    """The bytes of a weight in its own dtype and order."""
    shape, form = entry["shape"], entry["form"]
    codes_of, raw = parts["codes"]
    assert math.prod(shape) <= MOST_EXPANSION * len(raw)
    if form == "constant":
        assert codes_of["shape"] == [math.ceil(math.prod(shape) / MOST_EXPANSION)]
        assert not any(raw)
        value = np.full(shape, entry["value"], "<f8")
        return (
            value.astype("<f8").tobytes() if entry["dtype"] == "F64" else in_dtype(value.astype("<f4"), entry["dtype"])
        )
    rows = math.prod(shape[index] for index in entry["axis"]) if len(shape) > 1 else 1
    columns = math.prod(shape) // rows
    dim = entry.get("dim", 1)
    codes = decode_payload(raw, entry["coding"], entry["bits"], rows // dim, columns, math.prod(shape))
    with np.errstate(over="ignore"):
        values = entries_of(codes, parts, entry) if form == "codebook" else values_of(codes, parts, entry)
    return in_order(entry, values)


def in_order(entry: dict[str, Any], values: np.ndarray) -> bytes:
    """Values [rows, columns] as the bytes of the weight."""
    shape, axis = entry["shape"], entry["axis"]
    order = [*axis, *(index for index in range(len(shape)) if index not in axis)] if len(shape) > 1 else []
    order = order or list(range(len(shape)))
    permuted = values.reshape([shape[index] for index in order])
    return in_dtype(np.moveaxis(permuted, range(len(order)), order) if order else permuted, entry["dtype"])


def entries_of(codes: np.ndarray, parts: dict[str, Any], entry: dict[str, Any]) -> np.ndarray:
    """float32 [rows, columns] of vectors, one entry at a time."""
    codebook = array(parts, "codebook")
    codebooks, _, dim = codebook.shape
    if parts["codebook"][0]["dtype"] == "I8":
        codebook = codebook * array(parts, "scale").reshape(codebooks, 1, 1)
    codebook = codebook * np.float32(2.0 ** entry["exponent"])
    vectors, columns = codes.shape
    values = np.zeros((vectors * dim, columns), np.float32)
    for v, c in itertools.product(range(vectors), range(columns)):
        values[v * dim : (v + 1) * dim, c] = codebook[v // (vectors // codebooks), codes[v, c]]
    return values


def values_of(codes: np.ndarray, parts: dict[str, Any], entry: dict[str, Any]) -> np.ndarray:
    """float32 [rows, columns] of a form whose groups have scales, one code at a time."""
    rows, columns = codes.shape
    size = {"tensor": columns, "channel": columns}.get(entry["group"], entry["group"])
    blocks = size * entry.get("sub_blocks", 1)
    values = np.zeros((rows, columns), np.float32)
    table = table_of(entry, parts) if entry["form"] == "table" else None
    arrays = {part: array(parts, part) for part in parts if part != "codes"}
    for r, c in itertools.product(range(rows), range(columns)):
        row = r if entry["group"] != "tensor" else 0
        power = np.float32(2.0 ** (arrays["exponent"][row] if entry["row_exponents"] else entry["exponent"]))
        s = arrays["scale"][row, c // blocks] * power
        o = arrays["offset"][row, c // blocks] * power if "offset" in arrays else None
        if entry["form"] == "blocked":
            s = s * (arrays["subscale"][row, c // size] - np.float32(entry["subzero"]))
            o = o * arrays["suboffset"][row, c // size] if o is not None else None
        code = np.float32(codes[r, c])
        if table is not None:
            values[r, c] = table[codes[r, c]] * s
        elif entry["grid"] == "offset":
            exponent = arrays["exponent"][row] if entry["row_exponents"] else entry["exponent"]
            less = np.float32(2.0**-8 if exponent > 104 else 1.0)
            with np.errstate(over="ignore"):
                values[r, c] = (code * (s * less) + o * less) / less
        elif entry["grid"] == "zero-point":
            values[r, c] = (code - arrays["zero_point"][row, c // size]) * s
        else:
            half = 2 ** (entry["bits"] - 1)
            middle = {"narrow": half - 1, "full": half, "mid-rise": half - 0.5}[entry["grid"]]
            values[r, c] = (code - np.float32(middle)) * s
    return values


def table_of(entry: dict[str, Any], parts: dict[str, Any]) -> np.ndarray:
    """The values that codes name, float32."""
    given = {"nf4": NF4, "iq4_nl": IQ4_NL, "e2m1": E2M1}
    if entry["values"] in given:
        return np.array([float(text) for text in given[entry["values"]].split()], np.float32)
    if entry["values"] in ("e4m3", "e5m2"):
        return np.array([small_float(code, entry["values"]) for code in range(256)], np.float32)
    return array(parts, "table")


def small_float(code: int, kind: str) -> float:
    """The number of a byte; NaN where it has none."""
    mantissa_bits = {"e4m3": 3, "e5m2": 2}[kind]
    sign, exponent, mantissa = (
        code >> 7,
        code >> mantissa_bits & (127 >> mantissa_bits),
        code & (1 << mantissa_bits) - 1,
    )
    if (kind == "e5m2" and exponent == 31) or (kind == "e4m3" and code & 127 == 127):
        return math.nan
    bias = {"e4m3": 7, "e5m2": 15}[kind]
    size = math.ldexp(mantissa + ((exponent > 0) << mantissa_bits), max(exponent, 1) - bias - mantissa_bits)
    return -size if sign else size


def in_dtype(values: np.ndarray, dtype: str) -> bytes:
    """float32 of any shape to the bytes of `dtype`, row-major."""
    limit = {"F16": 65504.0, "BF16": 2.0**128 - 2.0**120}.get(dtype, float(np.finfo(np.float32).max))
    values = values.clip(np.float32(-limit), np.float32(limit))
    if dtype == "BF16":
        words = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return ((words + 0x7FFF + (words >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()
    return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def decode_payload(data: bytes, coding: str, bits: int, rows: int, columns: int, weights: int) -> np.ndarray:
    """The codes [rows, columns]."""
    if coding == "ans":
        return decode_ans(data, rows, columns, len(data) == math.ceil(weights / MOST_EXPANSION))
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


def decode_ans(data: bytes, rows: int, columns: int, filled: bool = False) -> np.ndarray:
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
        if filled and at == len(data):
            stream = stream.rstrip(b"\0")
        assert not stream.endswith(b"\0")
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
