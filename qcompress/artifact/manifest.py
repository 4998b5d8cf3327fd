"""A manifest says of an artifact what each compressed tensor is, and ties it to other files by hashes.

It is written as JSON under the metadata key `qcompress`: what most entries share stands once, and a field that is as
usual is left out, SPEC.md says how. What is read is checked. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, TypeAlias, TypeGuard, TypeVar, get_args

from qcompress.checkpoint.safetensors_file import RESERVED, is_sizes, parse_json
from qcompress.types.config import Coding, Convention, Shape
from qcompress.types.encoded import ActivationGrid
from qcompress.types.plan import WEIGHT_DTYPES, TensorInfo, row_shape

Placement: TypeAlias = Literal["zero-point", "offset", "codebook", "lattice"] | Convention
"""What places a grid: a stored zero point, a stored offset, or a symmetric convention; or what is in its place."""

Fields: TypeAlias = Mapping[str, object]
"""A JSON object by its keys."""
Word = TypeVar("Word", bound=str)

FORMAT = 1
METADATA_KEY = "qcompress"
UNBOUNDED_VALUES = {"bits": 0, "exponent": 0, "crc32": 0, "dim": 1}
"""What stands in the fields that the entry of unbounded codes has not: their side information has what they say."""
BLANK_CRC32 = "0" * 8
"""Stands where the header's CRC-32 will, while that is computed."""
EVERY = "*"
"""Stands in `halved` for every kept F16 tensor that no other dtype names."""

GRIDS: tuple[Placement, ...] = (*get_args(get_args(Placement)[0]), *get_args(Convention))
CODINGS: tuple[Coding, ...] = get_args(Coding)
LIMITS = {"exponent": (-126, 112), "crc32": (0, 2**32 - 1), "bits": (1, 12), "dim": (1, 8)}
"""Under an exponent of 112 every scale and offset is a finite float32."""
AFFINE_BITS = 8
UNBOUNDED_LACKS = {*UNBOUNDED_VALUES, "codebook"}
"""Fields that the entry of unbounded codes has not."""
MAX_DIMENSIONS = 64
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
HASHES = {"header_crc32", "input_sha256", "recipe_sha256", "sha256"}
REQUIRED = HASHES | {"defaults", "format", "input_bytes", "recipe", "tensors", "tool"}
OPTIONAL = {"activations", "adjusted", "caps", "halved", "metadata", "tied"}
HALVED = ("F32", "F64")
ACTIVATION_BITS = (1, 8)


class ManifestError(ValueError):
    """What is wrong with a manifest; the reader adds where."""


class NewerFormatError(ManifestError):
    """The manifest is of a format that came after this version."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the manifest says of one compressed tensor.

    bits      of a code; 0 of unbounded codes
    exponent  of scale, offset and codebook; 0 of unbounded codes, whose side information has it
    crc32     of the packed codes, scale, zero point, offset and codebook, in this order, as bytes; 0 of unbounded
              codes, whose side information has theirs
    dim       rows that have one code together
    codebook  the tensor of the same file whose codebook this one has, where that is another
    """

    shape: Shape
    dtype: str
    axis: tuple[int, ...]
    bits: int
    grid: Placement
    coding: Coding
    exponent: int
    crc32: int
    dim: int = 1
    codebook: str | None = None

    @property
    def is_unbounded(self) -> bool:
        return self.grid == "lattice"

    @property
    def rows(self) -> int:
        return row_shape(self.shape, self.axis)[0]

    @property
    def code_rows(self) -> int:
        return self.rows // self.dim

    @property
    def columns(self) -> int:
        return math.prod(row_shape(self.shape, self.axis)[1:])


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything under the metadata key `qcompress`.

    recipe        the resolved recipe as JSON data, and its SHA-256
    input         its bytes, and SHA-256 over names, dtypes, shapes and CRC-32s of its tensors
    sha256        of this file's data
    header_crc32  of all before the data, taken with BLANK_CRC32 in its place
    tied          name -> the tensor that stands for it
    metadata      of the input file
    adjusted      kept tensors whose values a method changed
    halved        dtype -> the kept tensors that had it and are stored as F16: their names, or EVERY
    activations   module -> the quantizer at its input
    caps          module -> the largest value that each channel of its output may take
    """

    tool: str
    recipe: Mapping[str, object]
    recipe_sha256: str
    input_bytes: int
    input_sha256: str
    sha256: str
    tensors: Mapping[str, Entry]
    header_crc32: str = BLANK_CRC32
    tied: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    adjusted: Sequence[str] = ()
    halved: Mapping[str, Sequence[str] | str] = field(default_factory=dict)
    activations: Mapping[str, ActivationGrid] = field(default_factory=dict)
    caps: Mapping[str, Sequence[float]] = field(default_factory=dict)


def make_halved(kept: Mapping[str, tuple[str, str]]) -> dict[str, Sequence[str] | str]:
    """`halved` of kept tensors: name -> (dtype in the input, dtype as stored)."""
    named: dict[str, list[str]] = {}
    for name, (own, stored) in kept.items():
        if own != stored:
            named.setdefault(own, []).append(name)
    halved: dict[str, Sequence[str] | str] = dict(named)
    if named and not any(own == "F16" for own, _ in kept.values()):
        halved[max(named, key=lambda dtype: len(named[dtype]))] = EVERY
    return halved


def input_hash(tensors: Sequence[TensorInfo], crcs: Mapping[str, int]) -> str:
    """SHA-256 over a JSON line [name, dtype, shape, crc32] for each tensor, sorted by name."""
    digest = hashlib.sha256()
    for info in sorted(tensors, key=lambda info: info.name):
        line = json.dumps([info.name, info.dtype, list(info.shape), crcs[info.name]], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def artifact_hash(files: Sequence[tuple[str, str]]) -> str:
    """What ties a report to its artifact: the SHA-256 of its data; of several files, that of their names and hashes."""
    if len(files) == 1:
        return files[0][1]
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(files)).encode()).hexdigest()


def header_crc32(start: bytes, written: str = BLANK_CRC32) -> str:
    """The CRC-32 of all before an artifact's data, as 8 digits; `written` are those that stand in it already."""
    field = '\\"header_crc32\\":\\"'
    blanked = start.replace(f"{field}{written}".encode(), f"{field}{BLANK_CRC32}".encode())
    return f"{zlib.crc32(blanked):08x}"


def manifest_text(manifest: Manifest) -> str:
    """The manifest as sorted JSON without spaces; what most entries share stands once under `defaults`."""
    shares = any(entry.codebook is not None for entry in manifest.tensors.values())
    entries = {name: _entry_json(name, entry, shares) for name, entry in manifest.tensors.items()}
    defaults = _common(list(entries.values()))
    document: dict[str, object] = {
        "defaults": defaults,
        "format": FORMAT,
        "header_crc32": manifest.header_crc32,
        "input_bytes": manifest.input_bytes,
        "input_sha256": manifest.input_sha256,
        "recipe": manifest.recipe,
        "recipe_sha256": manifest.recipe_sha256,
        "sha256": manifest.sha256,
        "tensors": {
            name: _own_json(
                {key: value for key, value in entry.items() if key not in defaults or defaults[key] != value}
            )
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


def _entry_json(name: str, entry: Entry, shares: bool) -> dict[str, object]:
    """The entry's fields; where any tensors share a codebook, each names the one that stores its own."""
    left_out = UNBOUNDED_LACKS if entry.is_unbounded else set() if entry.dim > 1 else {"dim"}
    values = {part.name: getattr(entry, part.name) for part in fields(entry) if part.name not in left_out}
    if shares and not entry.is_unbounded:
        values["codebook"] = entry.codebook or name
    else:
        values.pop("codebook", None)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _own_json(entry: Fields) -> object:
    """What stands in the manifest of an entry that differs from the defaults in these fields: of one shape, that."""
    return entry["shape"] if set(entry) == {"shape"} else entry


def _common(entries: Sequence[Fields]) -> dict[str, object]:
    """The most frequent value of each field that is known before any data; of equals the first as text.

    So the order in which tensors were finished says nothing, and the header keeps to the room that was foretold.
    """
    if not entries:
        return {}
    common: dict[str, object] = {}
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
    if type(value) is not int or not 0 <= value < 2**63:
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
    if RESERVED in name:
        raise ManifestError(f"tensor {name!r} has {RESERVED!r} in its name, which only parts of tensors have")
    if isinstance(own, list):
        own = {"shape": own}
    if not isinstance(own, dict):
        raise ManifestError(f"tensor {name!r} has no entry in the manifest")
    values: dict[str, object] = {"dim": 1, "codebook": name, **defaults, **own}
    unbounded = values.get("grid") == "lattice"
    if unbounded:
        if UNBOUNDED_LACKS & set(own):
            raise ManifestError(
                f"tensor {name!r} has {sorted(UNBOUNDED_LACKS & set(own))[0]!r}, which a lattice has not"
            )
        values |= {**UNBOUNDED_VALUES, "codebook": name}
    wanted = {part.name for part in fields(Entry)}
    if set(values) != wanted:
        odd = sorted(set(values) ^ wanted)[0]
        raise ManifestError(f"tensor {name!r} has an entry with {odd!r} missing or unknown")
    numbers = UNBOUNDED_VALUES if unbounded else {key: _number(name, key, values[key]) for key in LIMITS}
    dtype = _known(name, "dtype", values["dtype"], WEIGHT_DTYPES)
    grid = _known(name, "grid", values["grid"], GRIDS)
    coding = _known(name, "coding", values["coding"], CODINGS)
    if grid not in ("codebook", "lattice") and (numbers["bits"] > AFFINE_BITS or numbers["dim"] > 1):
        raise ManifestError(
            f"tensor {name!r} has {numbers['bits']} bits and dim {numbers['dim']}, which a grid has not"
        )
    owner = values["codebook"]
    if not isinstance(owner, str) or (grid != "codebook" and owner != name):
        raise ManifestError(f"tensor {name!r} has the codebook {owner!r}, not the name of a tensor")
    shape, axis = (_numbers(name, key, values[key]) for key in ("shape", "axis"))
    if 0 in shape or len(shape) > MAX_DIMENSIONS:
        raise ManifestError(f"tensor {name!r} has the shape {list(shape)[:MAX_DIMENSIONS]}, which is not compressed")
    # A vector or scalar is one row, whatever its axis.
    rank = max(len(shape), 2)
    if len(set(axis)) != len(axis) or not (0 < len(axis) < rank and max(axis) < rank):
        raise ManifestError(f"tensor {name!r} of shape {list(shape)} has the channel axes {list(axis)}")
    shared = None if owner == name else owner
    entry = Entry(shape, dtype, axis, grid=grid, coding=coding, codebook=shared, **numbers)
    if entry.rows % entry.dim:
        raise ManifestError(f"tensor {name!r} has {entry.rows} rows in vectors of {entry.dim}")
    return entry


def _number(name: str, key: str, value: object) -> int:
    low, high = LIMITS[key]
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
