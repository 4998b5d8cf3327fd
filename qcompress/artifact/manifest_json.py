"""A manifest as the JSON under the metadata key `qcompress`, in both directions; what is read is checked. No torch.

What most entries share stands once, and a field that is as usual is left out: SPEC.md says how.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, get_args

from qcompress.artifact.manifest import (
    EVERY,
    LATTICE_VALUES,
    Entry,
    Manifest,
    ManifestError,
    NewerFormatError,
    Placement,
)
from qcompress.coding.payload import Coding
from qcompress.container import RESERVED, parse_json
from qcompress.encoded import ActivationGrid
from qcompress.types import WEIGHT_DTYPES, Convention

FORMAT = 1

GRIDS = (*get_args(get_args(Placement)[0]), *get_args(Convention))
CODINGS: tuple[Coding, ...] = get_args(Coding)
LIMITS = {"exponent": (-126, 112), "crc32": (0, 2**32 - 1), "bits": (1, 12), "dim": (1, 8)}
"""Under an exponent of 112 every scale and offset is a finite float32."""
AFFINE_BITS = 8
LATTICE_LACKS = {*LATTICE_VALUES, "codebook"}
"""Fields that the entry of a lattice has not."""
MAX_DIMENSIONS = 64
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
HASHES = {"header_crc32", "input_sha256", "recipe_sha256", "sha256"}
REQUIRED = HASHES | {"defaults", "format", "input_bytes", "recipe", "tensors", "tool"}
OPTIONAL = {"activations", "adjusted", "caps", "halved", "metadata", "tied"}
HALVED = ("F32", "F64")
ACTIVATION_BITS = (1, 8)


def manifest_text(manifest: Manifest) -> str:
    """The manifest as sorted JSON without spaces; what most entries share stands once under `defaults`."""
    shares = any(entry.codebook is not None for entry in manifest.tensors.values())
    entries = {name: _entry_json(name, entry, shares) for name, entry in manifest.tensors.items()}
    defaults = _common(list(entries.values()))
    document: dict[str, Any] = {
        "defaults": defaults,
        "format": FORMAT,
        "header_crc32": manifest.header_crc32,
        "input_bytes": manifest.input_bytes,
        "input_sha256": manifest.input_sha256,
        "recipe": manifest.recipe,
        "recipe_sha256": manifest.recipe_sha256,
        "sha256": manifest.sha256,
        "tensors": {
            name: _short({key: value for key, value in entry.items() if key not in defaults or defaults[key] != value})
            for name, entry in entries.items()
        },
        "tool": manifest.tool,
    }
    if manifest.tied:
        document["tied"] = dict(manifest.tied)
    if manifest.metadata:
        document["metadata"] = dict(manifest.metadata)
    if manifest.adjusted:
        document["adjusted"] = sorted(manifest.adjusted)
    if manifest.halved:
        document["halved"] = {k: v if v == EVERY else sorted(v) for k, v in manifest.halved.items()}
    if manifest.activations:
        document["activations"] = {name: asdict(grid) for name, grid in manifest.activations.items()}
    if manifest.caps:
        document["caps"] = {name: list(caps) for name, caps in manifest.caps.items()}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _entry_json(name: str, entry: Entry, shares: bool) -> dict[str, Any]:
    """The entry's fields; where any tensors share a codebook, each names the one that stores its own."""
    left_out = LATTICE_LACKS if entry.is_lattice else set() if entry.dim > 1 else {"dim"}
    values = {part.name: getattr(entry, part.name) for part in fields(entry) if part.name not in left_out}
    if shares and not entry.is_lattice:
        values["codebook"] = entry.codebook or name
    else:
        values.pop("codebook", None)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _short(entry: Mapping[str, Any]) -> Any:
    """An entry of a shape alone is that shape."""
    return entry["shape"] if set(entry) == {"shape"} else entry


def _common(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The most frequent value of each field that is known before any data; of equals the first as text.

    So the order in which tensors were finished says nothing, and the header keeps to the room that was foretold.
    """
    if not entries:
        return {}
    common = {}
    for key in ("axis", "bits", "codebook", "dtype", "grid"):
        counts = Counter(json.dumps(entry[key]) for entry in entries if key in entry)
        if counts:
            common[key] = json.loads(min(counts, key=lambda text: (-counts[text], text)))
    # Not the most frequent coding: that is known only when all is written, and the header's room is needed before.
    common["coding"] = "ans" if all(entry["grid"] == "lattice" for entry in entries) else "packed"
    return common


def parse_manifest(text: str) -> Manifest:
    """The manifest that `text` holds, each value checked. Raises ManifestError."""
    try:
        document = parse_json(text)
    except ValueError as problem:
        raise ManifestError(f"its manifest is not JSON ({str(problem)[:80]})") from None
    if not isinstance(document, dict):
        raise ManifestError("its manifest is not a JSON object")
    version = document.get("format")
    if type(version) is not int or version < 1:
        raise ManifestError("its manifest has no format number")
    if version > FORMAT:
        raise NewerFormatError(f"its format {version} is newer than the {FORMAT} that this version reads")
    odd = sorted((REQUIRED - set(document)) | (set(document) - REQUIRED - OPTIONAL))
    if odd:
        raise ManifestError(f"its manifest has {odd[0]!r} missing or unknown")
    defaults = _object(document, "defaults")
    tensors = {name: _parse_entry(name, defaults, entry) for name, entry in _object(document, "tensors").items()}
    return Manifest(
        tool=_text(document, "tool"),
        recipe=_object(document, "recipe"),
        recipe_sha256=_digest(document, "recipe_sha256"),
        input_bytes=_size(document, "input_bytes"),
        input_sha256=_digest(document, "input_sha256"),
        sha256=_digest(document, "sha256"),
        header_crc32=_digest(document, "header_crc32", 8),
        tensors=tensors,
        tied=_text_map(document, "tied"),
        metadata=_text_map(document, "metadata"),
        adjusted=_names(document, "adjusted"),
        halved=_parse_halved(_object(document, "halved", {})),
        activations={
            name: _parse_activation(name, grid) for name, grid in _object(document, "activations", {}).items()
        },
        caps={name: _parse_caps(name, caps) for name, caps in _object(document, "caps", {}).items()},
    )


def _object(document: Mapping[str, Any], key: str, default: Any = None) -> dict[str, Any]:
    value = document.get(key, default)
    if not isinstance(value, dict):
        raise ManifestError(f"its manifest has no object {key!r}")
    return value


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise ManifestError(f"its manifest has no text {key!r}")
    return value


def _digest(document: Mapping[str, Any], key: str, digits: int = 64) -> str:
    value = _text(document, key)
    if not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise ManifestError(f"its manifest has a {key!r} that is not {digits} hexadecimal digits")
    return value


def _size(document: Mapping[str, Any], key: str) -> int:
    value = document.get(key)
    if type(value) is not int or value < 0:
        raise ManifestError(f"its manifest has no size {key!r}")
    return value


def _text_map(document: Mapping[str, Any], key: str) -> dict[str, str]:
    value = document.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ManifestError(f"its manifest has a {key!r} that is not a map from text to text")
    return value


def _names(document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = document.get(key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ManifestError(f"its manifest has a {key!r} that is not a list of names")
    return tuple(value)


def _parse_halved(value: Mapping[str, Any]) -> dict[str, Sequence[str] | str]:
    for dtype, names in value.items():
        if dtype not in HALVED or not (names == EVERY or isinstance(names, list)):
            raise ManifestError(f"its manifest has a 'halved' of {dtype!r} that is no list of tensors")
    if list(value.values()).count(EVERY) > 1:
        raise ManifestError("its manifest has two dtypes of all tensors in 'halved'")
    return {dtype: EVERY if names == EVERY else _names(value, dtype) for dtype, names in value.items()}


def _parse_activation(name: str, value: Any) -> ActivationGrid:
    """One activation quantizer. Raises ManifestError."""
    wanted = {part.name for part in fields(ActivationGrid)}
    if not isinstance(value, dict) or set(value) != wanted:
        raise ManifestError(f"the activation quantizer of {name!r} has not just {', '.join(sorted(wanted))}")
    bits, scale, zero_point = value["bits"], value["scale"], value["zero_point"]
    low, high = ACTIVATION_BITS
    if type(bits) is not int or not low <= bits <= high:
        raise ManifestError(f"the activation quantizer of {name!r} has {bits!r} bits, not {low} to {high}")
    if not _is_float32(scale) or scale <= 0:
        raise ManifestError(f"the activation quantizer of {name!r} has the scale {scale!r}, not a float32 above 0")
    if type(zero_point) is not int or not 0 <= zero_point < 2**bits:
        raise ManifestError(f"the activation quantizer of {name!r} has the zero point {zero_point!r}")
    return ActivationGrid(bits, float(scale), zero_point)


def _parse_caps(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or not value or not all(_is_float32(cap) and cap >= 0 for cap in value):
        raise ManifestError(f"the caps of {name!r} are not a list of float32 numbers")
    return tuple(float(cap) for cap in value)


def _is_float32(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= FLOAT32_MAX


def _parse_entry(name: str, defaults: Mapping[str, Any], own: Any) -> Entry:
    if RESERVED in name:
        raise ManifestError(f"tensor {name!r} has {RESERVED!r} in its name, which only parts of tensors have")
    if isinstance(own, list):
        own = {"shape": own}
    if not isinstance(own, dict):
        raise ManifestError(f"tensor {name!r} has no entry in the manifest")
    values = {"dim": 1, "codebook": name, **defaults, **own}
    if values.get("grid") == "lattice":
        if LATTICE_LACKS & set(own):
            raise ManifestError(f"tensor {name!r} has {sorted(LATTICE_LACKS & set(own))[0]!r}, which a lattice has not")
        values |= {**LATTICE_VALUES, "codebook": name}
    wanted = {part.name for part in fields(Entry)}
    if set(values) != wanted:
        odd = sorted(set(values) ^ wanted)[0]
        raise ManifestError(f"tensor {name!r} has an entry with {odd!r} missing or unknown")
    for key, (low, high) in LIMITS.items():
        if values["grid"] == "lattice":
            break
        if type(values[key]) is not int or not low <= values[key] <= high:
            raise ManifestError(f"tensor {name!r} has the {key} {values[key]!r}, not a number in [{low}, {high}]")
    for key, known in (("dtype", WEIGHT_DTYPES), ("grid", GRIDS), ("coding", CODINGS)):
        if not isinstance(values[key], str) or values[key] not in known:
            raise ManifestError(f"tensor {name!r} has the unknown {key} {values[key]!r}")
    if values["grid"] not in ("codebook", "lattice") and (values["bits"] > AFFINE_BITS or values["dim"] > 1):
        raise ManifestError(f"tensor {name!r} has {values['bits']} bits and dim {values['dim']}, which a grid has not")
    if not isinstance(values["codebook"], str) or (values["grid"] != "codebook" and values["codebook"] != name):
        raise ManifestError(f"tensor {name!r} has the codebook {values['codebook']!r}, not the name of a tensor")
    for key in ("shape", "axis"):
        value = values[key]
        if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 2**63 for size in value):
            raise ManifestError(f"tensor {name!r} has the {key} {value!r}, not a list of numbers")
    shape, axis = tuple(values["shape"]), tuple(values["axis"])
    if 0 in shape or len(shape) > MAX_DIMENSIONS:
        raise ManifestError(f"tensor {name!r} has the shape {list(shape)[:MAX_DIMENSIONS]}, which is not compressed")
    # A vector or scalar is one row, whatever its axis.
    rank = max(len(shape), 2)
    if len(set(axis)) != len(axis) or not (0 < len(axis) < rank and max(axis) < rank):
        raise ManifestError(f"tensor {name!r} of shape {list(shape)} has the channel axes {list(axis)}")
    shared = None if values["codebook"] == name else values["codebook"]
    entry = Entry(**{**values, "shape": shape, "axis": axis, "codebook": shared})
    if entry.rows % entry.dim:
        raise ManifestError(f"tensor {name!r} has {entry.rows} rows in vectors of {entry.dim}")
    return entry
