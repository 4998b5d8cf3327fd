"""The second decoder's part for compact files, written from SPEC.md alone: the header that such a file has not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from artifact.educational_unbounded import pooled_names

BITS = {"64": ("F64", "I64", "U64", "C64"), "32": ("F32", "I32", "U32"), "16": ("F16", "BF16", "I16", "U16")}
BITS |= {"8": ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL")}
BITS |= {"6": ("F6_E2M3", "F6_E3M2"), "4": ("F4",)}
ORDER = ("scale", "zero_point", "offset", "exponent", "subscale", "suboffset", "codebook", "table")


def compact_header(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Every stored tensor with its dtype, shape and place, as the header of a plain file has them."""
    entries, lengths, pool = manifest["tensors"], manifest["numbers"]["lengths"], pooled_names(manifest["tensors"])
    kept = {name: (dtype, shape) for dtype, of in manifest["kept"].items() for name, shape in of.items()}
    found = dict(sorted(kept.items()))
    for name in sorted(entries):
        parts = parts_of(entries[name])
        found |= {f"{name}.qc.{part}": parts[part] for part in ORDER if part in parts}
    for wanted in range(4):
        for name in sorted(entries):
            kind = {"constant": 0, "unbounded": 2}.get(entries[name]["form"], 1) + (name in pool)
            if kind == wanted:
                codes = f"{name}.qc.codes"
                found[codes] = ("U8", [lengths[codes]] if codes in lengths else codes_shape(entries[name]))
    if pool:
        found[".qc.side"] = ("U8", [lengths[".qc.side"]])
    for name in sorted(name for of in manifest.get("coded", {}).values() for name in of):
        found[f"{name}.qc.codes"] = ("U8", [lengths[f"{name}.qc.codes"]])
    header, at = {}, 0
    for name, (dtype, shape) in found.items():
        bits = next(int(bits) for bits, dtypes in BITS.items() if dtype in dtypes)
        size = math.ceil(math.prod(shape) * bits / 8)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header


def matrix_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    shape = entry["shape"]
    rows = math.prod(shape[index] for index in entry["axis"]) if len(shape) > 1 else 1
    return rows, math.prod(shape) // rows


def codes_shape(entry: Mapping[str, Any]) -> list[int]:
    if entry["form"] == "constant":
        return [math.ceil(math.prod(entry["shape"]) / 4096)]
    rows, columns = matrix_of(entry)
    return [rows // entry.get("dim", 1), math.ceil(columns * entry["bits"] / 8)]


def parts_of(entry: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """part -> dtype and shape, of all but the codes."""
    rows, columns = matrix_of(entry)
    group = entry.get("group")
    if entry["form"] == "codebook":
        tables = {"tensor": 1, "channel": rows}.get(group, 0) or rows // group
        own = {"codebook": (entry["values"], [tables, entry.get("entries"), entry["dim"]])}
        own |= {"scale": ("F16", [tables, 1])} if entry["values"] == "I8" else {}
        return own if entry["shared"] is None else {}
    if entry["form"] in ("unbounded", "constant"):
        return {}
    r, g = (1, 1) if group == "tensor" else (rows, 1 if group == "channel" else math.ceil(columns / group))
    blocks = math.ceil(g / entry.get("sub_blocks", 1))
    found = {"scale": ("F16", [r, blocks])}
    if entry["form"] == "blocked":
        found["subscale"] = ("U8", [r, g])
        found |= {"suboffset": ("U8", [r, g])} if entry["grid"] == "offset" else {}
    found |= {"offset": ("F16", [r, blocks])} if entry.get("grid") == "offset" else {}
    found |= {"zero_point": ("U8", [r, g])} if entry.get("grid") == "zero-point" else {}
    found |= {"exponent": ("I8", [r])} if entry["row_exponents"] else {}
    found |= {"table": (entry["values"], [entry["entries"]])} if "entries" in entry else {}
    return found
