"""A header is held against its manifest here: each compressed tensor has its parts, of fitting dtypes and shapes.

The unbounded codes of a file are read here too, as their grids lie in side information that many tensors share.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qcompress.artifact.layout import PARTS, POOL_NAME, part_name, pooled_names
from qcompress.artifact.manifest import EVERY, Entry, Manifest, ManifestError
from qcompress.checkpoint.safetensors_file import RESERVED, Container
from qcompress.coding.packing import row_bytes
from qcompress.coding.rows import kernel_positions
from qcompress.coding.unbounded.payload import decode_codes, split_side
from qcompress.coding.unbounded.side import Grid, Matrix, parse_side, unbounded_crc32
from qcompress.coding.unbounded.tables import Pool, class_uses, source_of_codes
from qcompress.errors import ArtifactError, Subject
from qcompress.types.encoded import ClassUse
from qcompress.types.plan import TensorInfo

REFETCH = "the file is damaged: fetch or make it again"

MAX_EXPANSION = 1 << 18
"""Weights that one stored byte of codes may stand for at most: a chunk that `ans` codes takes a byte of index."""

GRID_PARTS = {
    "lattice": ("codes",),
    "zero-point": ("codes", "scale", "zero_point"),
    "offset": ("codes", "scale", "offset"),
    "codebook": ("codes", "codebook"),
}
PART_DTYPES = {
    "codes": ("U8",),
    "scale": ("F16",),
    "zero_point": ("U8",),
    "offset": ("F16",),
    "codebook": ("F16", "F32", "I8"),
}


def check_parts(container: Container, manifest: Manifest) -> tuple[TensorInfo, ...]:
    """The tensors that are not parts of compressed ones. Raises ManifestError where header and manifest differ."""
    stored = dict(container.by_name)
    for name, entry in manifest.tensors.items():
        wanted = GRID_PARTS.get(entry.grid, ("codes", "scale")) if entry.codebook is None else ("codes",)
        found = find_parts(container, name)
        if "codebook" in found and found["codebook"].dtype == "I8":
            wanted = (*wanted, "scale")
        for info in found.values():
            del stored[info.name]
        if set(found) != set(wanted):
            odd = sorted(set(found) ^ set(wanted))[0]
            raise ManifestError(f"tensor {name!r} has its {odd} missing or too many")
        for part, info in found.items():
            if info.dtype not in PART_DTYPES[part]:
                raise ManifestError(f"tensor {name!r} has a {part} of {info.dtype}, not {PART_DTYPES[part][0]}")
        if entry.codebook is not None:
            found |= {"codebook": _shared_codebook(container, manifest, name, entry.codebook)}
        _check_shapes(name, entry, found)
    pool = stored.pop(POOL_NAME, None)
    if (pool is None) == bool(pool_names(manifest)):
        raise ManifestError(f"its pooled side information {POOL_NAME!r} is missing, or belongs to no tensor")
    if pool is not None and (pool.dtype != "U8" or len(pool.shape) != 1):
        raise ManifestError(f"tensor {POOL_NAME!r} is not a list of bytes")
    broken = next((name for name in stored if name in manifest.tensors or RESERVED in name), None)
    if broken is not None:
        raise ManifestError(f"tensor {broken!r} has no entry in the manifest, or stands beside its codes")
    kept = tuple(stored.values())
    halved_dtypes(kept, manifest)
    return kept


def find_parts(container: Container, name: str) -> dict[str, TensorInfo]:
    stored = {part: container.by_name.get(part_name(name, part)) for part in PARTS}
    return {part: info for part, info in stored.items() if info is not None}


def halved_dtypes(kept: Sequence[TensorInfo], manifest: Manifest) -> dict[str, str]:
    """Kept tensor that is stored as F16 -> its dtype in the checkpoint. Raises ManifestError where it is not."""
    halves = {info.name for info in kept if info.dtype == "F16"}
    named = {name: dtype for dtype, names in manifest.halved.items() if names != EVERY for name in names}
    odd = sorted(set(named) - halves)
    if odd:
        raise ManifestError(f"tensor {odd[0]!r} is in 'halved', and is not kept as F16")
    every = next((dtype for dtype, names in manifest.halved.items() if names == EVERY), None)
    return named if every is None else {name: named.get(name, every) for name in halves}


def _shared_codebook(container: Container, manifest: Manifest, name: str, owner: str) -> TensorInfo:
    """The stored codebook that a tensor shares. Raises ManifestError where `owner` has none, or another kind."""
    own, other = manifest.tensors[name], manifest.tensors.get(owner)
    if other is None or other.grid != "codebook" or other.codebook is not None:
        raise ManifestError(f"tensor {name!r} shares the codebook of {owner!r}, which has none of its own")
    if (own.bits, own.dim, own.exponent) != (other.bits, other.dim, other.exponent):
        raise ManifestError(f"tensor {name!r} shares the codebook of {owner!r}, whose bits, dim or exponent differ")
    info = container.by_name.get(part_name(owner, "codebook"))
    if info is None:
        raise ManifestError(f"tensor {owner!r} has its codebook missing or too many")
    return info


def _check_shapes(name: str, entry: Entry, found: Mapping[str, TensorInfo]) -> None:
    rows, columns, codes = entry.code_rows, entry.columns, found["codes"]
    packed = (rows, row_bytes(columns, entry.bits))
    if entry.coding == "packed" and not entry.is_unbounded and codes.shape != packed:
        raise ManifestError(f"tensor {name!r} has codes of shape {list(codes.shape)}, not {list(packed)}")
    if (entry.coding != "packed" or entry.is_unbounded) and len(codes.shape) != 1:
        raise ManifestError(f"tensor {name!r} has coded bytes of {len(codes.shape)} dimensions, not 1")
    if math.prod(entry.shape) > MAX_EXPANSION * max(codes.n_bytes, 1):
        raise ManifestError(
            f"tensor {name!r} declares {math.prod(entry.shape)} weights in {codes.n_bytes} bytes of codes"
        )
    if entry.is_unbounded:
        return
    if entry.grid == "codebook":
        _check_codebook(name, entry, found)
        return
    grid = found["scale"].shape
    if (
        len(grid) != 2
        or grid[0] not in (1, rows)
        or grid[1] < 1
        or columns % grid[1]
        or (grid[0] == 1 < grid[1] and rows != 1)
    ):
        raise ManifestError(f"tensor {name!r} has a scale of shape {list(grid)} for codes [{rows}, {columns}]")
    for part in ("zero_point", "offset"):
        if part in found and found[part].shape != grid:
            raise ManifestError(f"tensor {name!r} has a {part} of another shape than its scale")


def _check_codebook(name: str, entry: Entry, found: Mapping[str, TensorInfo]) -> None:
    shape = found["codebook"].shape
    if len(shape) != 3 or shape[2] != entry.dim or not 0 < shape[1] <= 2**entry.bits:
        raise ManifestError(f"tensor {name!r} has a codebook of shape {list(shape)} for {entry.bits} bits")
    if shape[0] < 1 or entry.code_rows % shape[0]:
        raise ManifestError(f"tensor {name!r} has {shape[0]} codebooks for {entry.code_rows} rows of codes")
    if "scale" in found and found["scale"].shape != (shape[0], 1):
        raise ManifestError(f"tensor {name!r} has a scale of another shape than one for each codebook")


def pool_names(manifest: Manifest) -> list[str]:
    """The tensors whose side information a file pools, in the order in which it has them."""
    return pooled_names(
        {name: math.prod(entry.shape) for name, entry in manifest.tensors.items() if entry.is_unbounded}
    )


@dataclass(frozen=True)
class UnboundedFile:
    """One file whose header and manifest were checked; its side information is read when it is first asked for."""

    container: Container
    manifest: Manifest
    executor: Executor | None = None

    @cached_property
    def _pool(self) -> tuple[dict[str, int], list[Grid], Pool]:
        """The place of each tensor in the file's pool, their grids, and the pool."""
        names = pool_names(self.manifest)
        if not names:
            return {}, [], Pool((), {})
        try:
            found = parse_side(self.container.bytes_of(POOL_NAME), [self._matrix(name) for name in names])
        except ValueError as error:
            raise self._damaged(POOL_NAME, str(error)) from None
        return {name: place for place, name in enumerate(names)}, *found

    def _matrix(self, name: str) -> Matrix:
        entry = self.manifest.tensors[name]
        return Matrix(entry.rows, entry.columns, kernel_positions(entry.shape, entry.axis))

    def codes(self, name: str) -> tuple[NDArray[np.int32], Grid]:
        """The codes [rows, columns] of an unbounded quantizer, checked, and its grid. Raises ArtifactError."""
        entry = self.manifest.tensors[name]
        grid, pool, place, data = self._found(name)
        try:
            shape = (entry.rows, entry.columns)
            codes = decode_codes(data, entry.coding, pool, place, grid.trellis, shape, self.executor)
        except ValueError as error:
            raise self._damaged(name, str(error)) from None
        if unbounded_crc32(codes, grid) != grid.crc32:
            raise self._damaged(name, "its checksum does not hold")
        return codes, grid

    def _found(self, name: str) -> tuple[Grid, Pool, int, memoryview]:
        """The grid of unbounded codes, its pool, its place there, and its payload. Raises ArtifactError."""
        data = self.container.bytes_of(part_name(name, "codes"))
        places, grids, pool = self._pool
        place = places.get(name, 0)
        if name not in places:
            try:
                side, data = split_side(data)
                grids, pool = parse_side(side, [self._matrix(name)])
            except ValueError as error:
                raise self._damaged(name, str(error)) from None
        return grids[place], pool, place, data

    def class_uses(self, name: str, codes: NDArray[np.int32]) -> tuple[ClassUse, ...] | None:
        """What unbounded codes [rows, columns], as read, take under each table; None where no table codes them."""
        entry = self.manifest.tensors[name]
        if entry.coding != "ans":
            return None
        grid, pool, place, _ = self._found(name)
        source = source_of_codes(codes, kernel_positions(entry.shape, entry.axis), trellis=grid.trellis)
        return class_uses(source, pool.levels[place], pool)

    def side_bytes(self, name: str) -> int:
        """The side information among a tensor's codes: none where the file pools it. Raises ArtifactError."""
        data = self.container.bytes_of(part_name(name, "codes"))
        if name in self._pool[0]:
            return 0
        try:
            return len(data) - len(split_side(data)[1])
        except ValueError as error:
            raise self._damaged(name, str(error)) from None

    def _damaged(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(str(self.container.path), what, REFETCH, Subject(name))
