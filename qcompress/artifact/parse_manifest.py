"""A manifest is read here, each value of it checked before anything is done with it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeGuard, TypeVar

from qcompress.artifact.entry import COMMON_FIELDS, FORM_FIELDS, FORMS, GRIDS, STORED_VALUES, USUAL, Entry, Group
from qcompress.artifact.manifest import (
    EVERY,
    FORMAT,
    Manifest,
    ManifestError,
    NewerFormatError,
    unpack_numbers,
)
from qcompress.checkpoint.safetensors_file import MAX_DIMENSIONS, RESERVED, is_sizes, parse_json
from qcompress.coding.frames import open_frame
from qcompress.coding.planes import PLANE_DTYPES
from qcompress.coding.tables import GIVEN_BITS
from qcompress.types.encoded import ActivationGrid
from qcompress.types.plan import DTYPE_BITS, WEIGHT_DTYPES, TensorInfo

Fields = Mapping[str, object]
"""A JSON object by its keys."""
Word = TypeVar("Word", bound=str)

LIMITS = {"bits": (1, 8), "dim": (1, 8), "exponent": (-126, 112), "sub_blocks": (1, 2**31), "subzero": (0, 255)}
"""Under an exponent of 112 every scale and offset is a finite float32."""
CODEBOOK_BITS = 12
GROUPS: tuple[Literal["tensor", "channel"], ...] = ("tensor", "channel")
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
MOST_BYTES = 2**63
REQUIRED = {"defaults", "format", "input_bytes", "recipe", "recipe_sha256", "tensors", "tool"}
OPTIONAL = {"activations", "adjusted", "caps", "coded", "halved", "kept", "metadata", "tied"}
HALVED = ("F32", "F64")
ACTIVATION_BITS = (1, 8)


def open_manifest(frame: memoryview, others: Callable[[Manifest], Sequence[str]]) -> Manifest:
    """The manifest in a frame, each value checked.

    others  what it has a checksum of besides compressed tensors and tied names, once its text is known
    raises  ManifestError
    """
    try:
        text, newline, numbers = open_frame(frame).partition(b"\n")
        decoded = text.decode("utf-8")
    except ValueError as problem:
        raise ManifestError(f"its manifest is damaged: {str(problem)[:80]}") from None
    if not newline:
        raise ManifestError("its manifest is cut off")
    manifest = parse_manifest(decoded)
    manifest = unpack_numbers(manifest, numbers, others(manifest))
    for name, entry in manifest.tensors.items():
        _check_numbers(name, entry)
    return manifest


def _check_numbers(name: str, entry: Entry) -> None:
    """Hold against the entry what is known only when a tensor is written."""
    if entry.has_exponent:
        _number(name, "exponent", entry.exponent)
    if entry.has_entries and not 0 < entry.entries <= 2**entry.bits:
        raise ManifestError(f"tensor {name!r} has {entry.entries} entries for {entry.bits} bits")
    if entry.form == "constant" and entry.coding != "packed":
        raise ManifestError(f"tensor {name!r} is constant and has the coding {entry.coding!r}")
    largest = {"F16": 65504.0, "BF16": (2.0 - 2.0**-7) * 2.0**127, "F32": FLOAT32_MAX}.get(entry.dtype, math.inf)
    if not math.isfinite(entry.value) or abs(entry.value) > largest:
        raise ManifestError(f"tensor {name!r} has the value {entry.value}, which {entry.dtype} has not")


def parse_manifest(text: str) -> Manifest:
    """What a manifest's text holds, each value checked. Raises ManifestError."""
    try:
        document = parse_json(text)
    except ValueError as problem:
        raise ManifestError(f"its manifest is not JSON ({str(problem)[:80]})") from None
    if not isinstance(document, dict):
        raise ManifestError("its manifest is not a JSON object")
    version = document.get("format")
    if type(version) is not int or version < 1:
        raise ManifestError("its manifest has no format number")
    refuse_other_format(version)
    odd = sorted((REQUIRED - set(document)) | (set(document) - REQUIRED - OPTIONAL))
    if odd:
        raise ManifestError(f"its manifest has {odd[0]!r} missing or unknown")
    defaults = _object(document, "defaults")
    known = {*COMMON_FIELDS, *(key for keys in FORM_FIELDS.values() for key in keys)} - {*USUAL, "shape"}
    odd = sorted(set(defaults) - known)
    if odd:
        raise ManifestError(f"its manifest has {odd[0]!r} unknown among its defaults")
    tensors = {name: _parse_entry(name, defaults, entry) for name, entry in _object(document, "tensors").items()}
    recipe, recipe_sha256 = _object(document, "recipe"), _digest(document, "recipe_sha256")
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(canonical.encode()).hexdigest() != recipe_sha256:
        raise ManifestError("its manifest has a recipe of another hash than it names")
    return Manifest(
        tool=_text(document, "tool"),
        recipe=recipe,
        recipe_sha256=recipe_sha256,
        input_bytes=_size(document, "input_bytes"),
        tensors=tensors,
        tied=_text_map(document, "tied"),
        metadata=_text_map(document, "metadata"),
        adjusted=_names(document, "adjusted"),
        kept=_parse_kept(_object(document, "kept"), DTYPE_BITS) if "kept" in document else None,
        coded=_parse_coded(_object(document, "coded", {})),
        halved=_parse_halved(_object(document, "halved", {})),
        activations={
            name: _parse_activation(name, grid) for name, grid in _object(document, "activations", {}).items()
        },
        caps={name: _parse_caps(name, caps) for name, caps in _object(document, "caps", {}).items()},
    )


def refuse_other_format(version: int) -> None:
    """Raise ManifestError, or NewerFormatError, where a file is of another format than is read."""
    if version > FORMAT:
        raise NewerFormatError(f"its format {version} is newer than the {FORMAT} that this version reads")
    if version < FORMAT:
        raise ManifestError(f"its format {version} is not read any more")


def _object(document: Fields, key: str, default: object = None) -> dict[str, object]:
    value = document.get(key, default)
    if not isinstance(value, dict):
        raise ManifestError(f"its manifest has no object {key!r}")
    return value


def _text(document: Fields, key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise ManifestError(f"its manifest has no text {key!r}")
    return value


def _digest(document: Fields, key: str, digits: int = 64) -> str:
    value = _text(document, key)
    if not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise ManifestError(f"its manifest has a {key!r} that is not {digits} hexadecimal digits")
    return value


def _size(document: Fields, key: str) -> int:
    value = document.get(key)
    if type(value) is not int or not 0 <= value < MOST_BYTES:
        raise ManifestError(f"its manifest has no size {key!r}")
    return value


def _text_map(document: Fields, key: str) -> dict[str, str]:
    value = document.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ManifestError(f"its manifest has a {key!r} that is not a map from text to text")
    return value


def _names(document: Fields, key: str) -> tuple[str, ...]:
    value = document.get(key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ManifestError(f"its manifest has a {key!r} that is not a list of names")
    return tuple(value)


def _parse_halved(value: Fields) -> dict[str, Sequence[str] | str]:
    for dtype, names in value.items():
        if dtype not in HALVED or not (names == EVERY or isinstance(names, list)):
            raise ManifestError(f"its manifest has a 'halved' of {dtype!r} that is no list of tensors")
    if list(value.values()).count(EVERY) > 1:
        raise ManifestError("its manifest has two dtypes of all tensors in 'halved'")
    return {dtype: EVERY if names == EVERY else _names(value, dtype) for dtype, names in value.items()}


def _parse_kept(value: Fields, dtypes: Container[str]) -> dict[str, TensorInfo]:
    """dtype -> name -> shape as tensors of these dtypes, by name. Raises ManifestError."""
    found: dict[str, TensorInfo] = {}
    for dtype in value:
        for name, shape in _object(value, dtype).items():
            if dtype not in dtypes or RESERVED in name or name in found:
                raise ManifestError(f"tensor {name!r} is kept twice, or under a dtype or name that cannot be")
            if not is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
                raise ManifestError(f"tensor {name!r} has the shape {shape!r}, not a list of numbers")
            found[name] = TensorInfo(name, tuple(shape), dtype)
    return found


def _parse_coded(value: Fields) -> dict[str, TensorInfo]:
    """The same of the kept tensors that are coded, none of which is empty. Raises ManifestError."""
    found = _parse_kept(value, PLANE_DTYPES)
    empty = next((name for name, info in found.items() if not info.numel), None)
    if empty is not None:
        raise ManifestError(f"tensor {empty!r} is coded and has no values")
    return found


def _parse_activation(name: str, value: object) -> ActivationGrid:
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


def _parse_caps(name: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or not value or not all(_is_float32(cap) and cap >= 0 for cap in value):
        raise ManifestError(f"the caps of {name!r} are not a list of float32 numbers")
    return tuple(float(cap) for cap in value)


def _is_float32(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _parse_entry(name: str, defaults: Fields, own: object) -> Entry:
    """One compressed tensor as its entry and the defaults tell. Raises ManifestError."""
    if RESERVED in name:
        raise ManifestError(f"tensor {name!r} has {RESERVED!r} in its name, which only parts of tensors have")
    if isinstance(own, list):
        own = {"shape": own}
    if not isinstance(own, dict):
        raise ManifestError(f"tensor {name!r} has no entry in the manifest")
    form = _known(name, "form", own.get("form", defaults.get("form")), FORMS)
    wanted = {*COMMON_FIELDS, *FORM_FIELDS[form]}
    shared = {key: value for key, value in {**USUAL, **defaults}.items() if key in wanted}
    values: dict[str, Any] = {**shared, **own}
    if set(values) != wanted:
        raise ManifestError(f"tensor {name!r} has an entry with {sorted(set(values) ^ wanted)[0]!r} missing or unknown")
    values |= {key: _numbers(name, key, values[key]) for key in ("shape", "axis")}
    values |= {key: _number(name, key, values[key]) for key in ("dim", "sub_blocks", "subzero") if key in values}
    values["dtype"] = _known(name, "dtype", values["dtype"], WEIGHT_DTYPES)
    _check_shape(name, values["shape"], values["axis"])
    if "bits" in values:
        most = CODEBOOK_BITS if form == "codebook" else LIMITS["bits"][1]
        values["bits"] = _number(name, "bits", values["bits"], most)
    if "grid" in values:
        grids = [grid for grid in GRIDS if form != "blocked" or grid != "zero-point"]
        values["grid"] = _known(name, "grid", values["grid"], grids)
    if "group" in values:
        values["group"] = _parse_group(name, values["group"])
    if type(values.get("row_exponents", False)) is not bool:
        raise ManifestError(f"tensor {name!r} has row_exponents {values['row_exponents']!r}, not true or false")
    if "values" in values:
        known = [*STORED_VALUES.values(), *(GIVEN_BITS if form == "table" else ())]
        values["values"] = _known(name, "values", values["values"], known)
    owner = values.get("shared")
    if owner is not None and (not isinstance(owner, str) or owner == name):
        raise ManifestError(f"tensor {name!r} shares the codebook {owner!r}, not that of another tensor")
    entry = Entry(**values)
    _check_fit(name, entry)
    return entry


def _check_shape(name: str, shape: tuple[int, ...], axis: tuple[int, ...]) -> None:
    if 0 in shape or len(shape) > MAX_DIMENSIONS:
        raise ManifestError(f"tensor {name!r} has the shape {list(shape)[:MAX_DIMENSIONS]}, which is not compressed")
    # A vector or scalar is one row, whatever its axis.
    rank = max(len(shape), 2)
    if len(set(axis)) != len(axis) or not (0 < len(axis) < rank and max(axis) < rank):
        raise ManifestError(f"tensor {name!r} of shape {list(shape)} has the channel axes {list(axis)}")


def _parse_group(name: str, value: object) -> Group:
    for group in GROUPS:
        if value == group:
            return group
    if type(value) is not int or not 0 < value < MOST_BYTES:
        raise ManifestError(f"tensor {name!r} has the group {value!r}, not tensor, channel or a number")
    return value


def _check_fit(name: str, entry: Entry) -> None:
    """Hold the fields of an entry against one another."""
    if entry.rows % entry.dim:
        raise ManifestError(f"tensor {name!r} has {entry.rows} rows in vectors of {entry.dim}")
    if entry.given is not None and entry.bits != GIVEN_BITS[entry.given]:
        raise ManifestError(f"tensor {name!r} has {entry.bits} bits for the table {entry.values!r}")
    if entry.form == "blocked" and entry.group_size is None:
        raise ManifestError(f"tensor {name!r} is blocked and has the group {entry.group!r}, not a number")
    if entry.form == "codebook":
        size = entry.group_size or 1
        if entry.rows % size or entry.code_rows % entry.tables:
            raise ManifestError(f"tensor {name!r} has {entry.rows} rows in codebooks of {entry.group!r}")


def _number(name: str, key: str, value: object, most: int | None = None) -> int:
    low, high = LIMITS[key]
    high = most or high
    if type(value) is not int or not low <= value <= high:
        raise ManifestError(f"tensor {name!r} has the {key} {value!r}, not a number in [{low}, {high}]")
    return value


def _numbers(name: str, key: str, value: object) -> tuple[int, ...]:
    if not is_sizes(value):
        raise ManifestError(f"tensor {name!r} has the {key} {value!r}, not a list of numbers")
    return tuple(value)


def _known(name: str, key: str, value: object, known: Iterable[Word]) -> Word:
    for one in known:
        if one == value:
            return one
    raise ManifestError(f"tensor {name!r} has the unknown {key} {value!r}")
