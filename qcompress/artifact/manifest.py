"""What an artifact says of itself: an entry for each compressed tensor, and the hashes that tie it to other files."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from qcompress.coding.payload import Coding
from qcompress.encoded import ActivationGrid
from qcompress.types import Convention, Shape, TensorInfo, row_shape

METADATA_KEY = "qcompress"

Placement: TypeAlias = Literal["zero-point", "offset", "codebook", "lattice"] | Convention
"""What places a grid: a stored zero point, a stored offset, or a symmetric convention; or what is in its place."""
LATTICE_VALUES = {"bits": 0, "exponent": 0, "crc32": 0, "dim": 1}
"""What stands in the fields that the entry of a lattice has not: its side information has what they say."""
BLANK_CRC32 = "0" * 8
"""Stands where the header's CRC-32 will, while that is computed."""
EVERY = "*"
"""Stands in `halved` for every kept F16 tensor that no other dtype names."""


class ManifestError(ValueError):
    """What is wrong with a manifest; the reader adds where."""


class NewerFormatError(ManifestError):
    """The manifest is of a format that came after this version."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the manifest says of one compressed tensor.

    bits      of a code; 0 of a lattice, whose codes have no bound
    exponent  of scale, offset and codebook; 0 of a lattice, whose side information has it
    crc32     of the packed codes, scale, zero point, offset and codebook, in this order, as bytes; 0 of a lattice,
              whose side information has that of its codes
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
    def is_lattice(self) -> bool:
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
    recipe: Mapping[str, Any]
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
