"""A header is held against its manifest here: each compressed tensor has its parts, of fitting dtypes and shapes.

The unbounded codes of a file are read here too, as their grids lie in side information that many tensors share.
Imports no torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qcompress.artifact.entry import PARTS, Entry, part_name, seal_pool
from qcompress.artifact.manifest import DATA_NAME, EVERY, MANIFEST_NAME, POOL_NAME, Manifest, ManifestError, pool_names
from qcompress.artifact.memory import ALLOW, NUMBER_BYTES, block_bytes, refuse_memory
from qcompress.checkpoint.safetensors_file import RESERVED, Container
from qcompress.coding.payload import MAX_EXPANSION
from qcompress.coding.rows import kernel_positions
from qcompress.coding.stored import Stored
from qcompress.coding.unbounded.payload import split_side
from qcompress.coding.unbounded.side import Grid, Matrix, count_numbers, parse_side
from qcompress.coding.unbounded.tables import ClassCounter, Pool, make_piece
from qcompress.coding.unbounded.tokens import Classes, Codes
from qcompress.errors import ArtifactError, Subject
from qcompress.types.encoded import ClassUse
from qcompress.types.plan import TensorInfo

REFETCH = "the file is damaged: fetch or make it again"


def other_names(container: Container, manifest: Manifest) -> list[str]:
    """What has a checksum and is neither compressed nor tied: what is kept, of a compact file in one, and the pool."""
    if manifest.is_compact:
        return [DATA_NAME, *manifest.coded, *([POOL_NAME] if pool_names(manifest.tensors) else [])]
    names = (info.name for info in container.tensors)
    found = [name for name in names if name == POOL_NAME or (RESERVED not in name and name != MANIFEST_NAME)]
    return [*found, *manifest.coded]


def check_parts(container: Container, manifest: Manifest) -> tuple[TensorInfo, ...]:
    """The tensors that were kept. Raises ManifestError where header and manifest differ."""
    stored = {name: info for name, info in container.by_name.items() if name != MANIFEST_NAME}
    for name, entry in manifest.tensors.items():
        found = find_parts(container, name)
        for info in found.values():
            del stored[info.name]
        if entry.shared is not None:
            _check_shared(manifest, name, entry.shared)
        _check_stored(name, entry, found)
    pool = stored.pop(POOL_NAME, None)
    if (pool is None) == bool(pool_names(manifest.tensors)):
        raise ManifestError(f"its pooled side information {POOL_NAME!r} is missing, or belongs to no tensor")
    if pool is not None and (pool.dtype != "U8" or len(pool.shape) != 1):
        raise ManifestError(f"tensor {POOL_NAME!r} is not a list of bytes")
    for name, info in manifest.coded.items():
        _check_coded(info, stored.pop(part_name(name, "codes"), None), beside=name in stored)
    broken = next((name for name in stored if RESERVED in name), None)
    if broken is not None:
        raise ManifestError(f"tensor {broken!r} has no entry in the manifest")
    kept = (*stored.values(), *manifest.coded.values())
    halved_dtypes(kept, manifest)
    return kept


def find_parts(container: Container, name: str) -> dict[str, TensorInfo]:
    stored = {part: container.by_name.get(part_name(name, part)) for part in PARTS}
    return {part: info for part, info in stored.items() if info is not None}


def _check_stored(name: str, entry: Entry, found: Mapping[str, TensorInfo]) -> None:
    """Hold the parts of a tensor that a file has against those that follow from its entry."""
    wanted = entry.parts()
    if set(found) != set(wanted):
        raise ManifestError(f"tensor {name!r} has its {sorted(set(found) ^ set(wanted))[0]} missing or too many")
    if entry.numel > MAX_EXPANSION * found["codes"].n_bytes:
        raise ManifestError(
            f"tensor {name!r} declares {entry.numel} weights in {found['codes'].n_bytes} bytes of codes"
        )
    for part, (dtype, shape) in wanted.items():
        info = found[part]
        if info.dtype != dtype:
            raise ManifestError(f"tensor {name!r} has a {part} of {info.dtype}, not {dtype}")
        # Only what was coded has a length that no field tells.
        if info.shape != shape and (shape != (0,) or len(info.shape) != 1):
            raise ManifestError(f"tensor {name!r} has a {part} of shape {list(info.shape)}, not {list(shape)}")


def _check_coded(info: TensorInfo, codes: TensorInfo | None, *, beside: bool) -> None:
    """Hold the codes of a kept tensor, which may not stand beside them, against its shape. Raises ManifestError."""
    if codes is None or beside:
        raise ManifestError(f"tensor {info.name!r} is coded, and has no codes or stands beside them")
    if codes.dtype != "U8" or len(codes.shape) != 1:
        raise ManifestError(f"tensor {codes.name!r} is not a list of bytes")
    if codes.n_bytes > info.n_bytes or info.numel > MAX_EXPANSION * codes.n_bytes:
        what = f"declares {info.n_bytes} bytes, which {codes.n_bytes} bytes of codes do not stand for"
        raise ManifestError(f"tensor {info.name!r} {what}")


def _check_shared(manifest: Manifest, name: str, owner: str) -> None:
    """Raise ManifestError where a tensor cannot have the codebook of `owner`: it has none, or one of another kind."""
    own, other = manifest.tensors[name], manifest.tensors.get(owner)
    if other is None or other.form != "codebook" or other.shared is not None:
        raise ManifestError(f"tensor {name!r} shares the codebook of {owner!r}, which has none of its own")
    if (own.bits, own.dim, own.exponent, own.values) != (other.bits, other.dim, other.exponent, other.values):
        raise ManifestError(f"tensor {name!r} shares the codebook of {owner!r}, whose bits, dim or exponent differ")
    if own.tables != other.tables:
        raise ManifestError(f"tensor {name!r} shares the codebook of {owner!r}, which has {other.tables} tables")


def halved_dtypes(kept: Sequence[TensorInfo], manifest: Manifest) -> dict[str, str]:
    """Kept tensor that is stored as F16 -> its dtype in the checkpoint. Raises ManifestError where it is not."""
    halves = {info.name for info in kept if info.dtype == "F16"}
    named = {name: dtype for dtype, names in manifest.halved.items() if names != EVERY for name in names}
    odd = sorted(set(named) - halves)
    if odd:
        raise ManifestError(f"tensor {odd[0]!r} is in 'halved', and is not kept as F16")
    every = next((dtype for dtype, names in manifest.halved.items() if names == EVERY), None)
    return named if every is None else {name: named.get(name, every) for name in halves}


@dataclass(frozen=True)
class UnboundedCodes:
    """What unbounded codes of one tensor are decoded by: the grid, the pool and the place there; and their payload."""

    grid: Grid
    pool: Pool
    place: int
    payload: Stored


class UsesOfClasses:
    """Counts what the unbounded codes of a tensor, as read, take under each of the tables that code them."""

    def __init__(self, found: UnboundedCodes, entry: Entry) -> None:
        self._found = found
        self._classes = Classes(found.pool.levels[found.place], entry.rows, entry.columns)
        self._counter = ClassCounter()

    def add(self, rows: slice, columns: slice, codes: Codes) -> None:
        """Count the codes of some rows and columns; on a trellis of whole rows."""
        piece = make_piece(codes, trellis=self._found.grid.trellis)
        self._counter.add(piece, piece.contexts(self._classes[rows, columns]))

    def result(self) -> tuple[ClassUse, ...]:
        """What they take, by table."""
        return self._counter.uses(self._found.pool)


@dataclass(frozen=True)
class UnboundedFile:
    """One file whose header and manifest were checked; its side information is read when it is first asked for.

    max_memory  bytes that reading may take; None: all that there is
    """

    container: Container
    manifest: Manifest
    max_memory: int | None = None

    @cached_property
    def _pool(self) -> tuple[dict[str, int], list[Grid], Pool]:
        """The place of each tensor in the file's pool, their grids, and the pool."""
        names = pool_names(self.manifest.tensors)
        if not names:
            return {}, [], Pool((), {})
        side = self.container.bytes_of(POOL_NAME)
        if seal_pool(names, zlib.crc32(side)) != self.manifest.crc32s[POOL_NAME]:
            raise self._damaged(POOL_NAME, "its checksum does not hold")
        return {name: place for place, name in enumerate(names)}, *self._parse(POOL_NAME, side, names)

    def check_pool(self) -> None:
        """Hold what the tensors pool against its CRC-32, and read it. Raises ArtifactError."""
        _ = self._pool

    def _parse(self, owner: str, side: memoryview, names: Sequence[str]) -> tuple[list[Grid], Pool]:
        """The grids and the pool of some tensors. Raises ArtifactError, ResourceError where they do not fit."""
        matrices = [self._matrix(name) for name in names]
        try:
            needed = block_bytes(sum(one.rows * one.columns for one in matrices)) + NUMBER_BYTES * count_numbers(
                side, matrices
            )
            refuse_memory(self.max_memory, needed, self.container.path, owner, "reading its side information", ALLOW)
            return parse_side(side, matrices)
        except ValueError as error:
            raise self._damaged(owner, str(error)) from None

    def _matrix(self, name: str) -> Matrix:
        entry = self.manifest.tensors[name]
        return Matrix(entry.rows, entry.columns, kernel_positions(entry.shape, entry.axis))

    def find(self, name: str, codes: Stored) -> UnboundedCodes:
        """What the codes of an unbounded tensor, as the file has them, are decoded by. Raises ArtifactError."""
        places, grids, pool = self._pool
        if name in places:
            return UnboundedCodes(grids[places[name]], pool, places[name], codes)
        side, payload = self._split(name, codes)
        grids, pool = self._parse(name, side, [name])
        return UnboundedCodes(grids[0], pool, 0, payload)

    def side_bytes(self, name: str, codes: Stored) -> int:
        """The side information among a tensor's codes: none where the file pools it. Raises ArtifactError."""
        return 0 if name in self._pool[0] else codes.size - self._split(name, codes)[1].size

    def _split(self, name: str, codes: Stored) -> tuple[memoryview, Stored]:
        try:
            return split_side(codes)
        except ValueError as error:
            raise self._damaged(name, str(error)) from None

    def _damaged(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(str(self.container.path), what, REFETCH, Subject(name))
