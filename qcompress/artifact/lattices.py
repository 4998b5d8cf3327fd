"""The lattices of one file: their codes, checked, and their side information. Imports no torch."""

from __future__ import annotations

import math
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qcompress.artifact.layout import POOL_NAME, part_name, pooled_names
from qcompress.artifact.manifest import Manifest
from qcompress.coding.lattice_payload import decode_lattice, split_side
from qcompress.coding.pool import Pool, class_uses, source_of_codes
from qcompress.coding.rows import tap_count
from qcompress.coding.side import Grid, Matrix, lattice_crc32, parse_side
from qcompress.container import Container
from qcompress.encoded import ClassUse
from qcompress.errors import ArtifactError

REFETCH = "the file is damaged: fetch or make it again"


def pool_names(manifest: Manifest) -> list[str]:
    """The tensors whose side information a file pools, in the order in which it has them."""
    return pooled_names({name: math.prod(entry.shape) for name, entry in manifest.tensors.items() if entry.is_lattice})


@dataclass(frozen=True)
class LatticeFile:
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
        return Matrix(entry.rows, entry.columns, tap_count(entry.shape, entry.axis))

    def codes(self, name: str) -> tuple[NDArray[np.int32], Grid]:
        """The codes [rows, columns] of a lattice, checked, and its grid. Raises ArtifactError."""
        entry = self.manifest.tensors[name]
        grid, pool, place, data = self._found(name)
        try:
            shape = (entry.rows, entry.columns)
            codes = decode_lattice(data, entry.coding, pool, place, grid.trellis, shape, self.executor)
        except ValueError as error:
            raise self._damaged(name, str(error)) from None
        if lattice_crc32(codes, grid) != grid.crc32:
            raise self._damaged(name, "its checksum does not hold")
        return codes, grid

    def _found(self, name: str) -> tuple[Grid, Pool, int, memoryview]:
        """The grid of a lattice, its pool, its place there, and its payload. Raises ArtifactError."""
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
        """What a lattice's codes [rows, columns], as read, take under each table; None where no table codes them."""
        entry = self.manifest.tensors[name]
        if entry.coding != "ans":
            return None
        grid, pool, place, _ = self._found(name)
        source = source_of_codes(codes, tap_count(entry.shape, entry.axis), trellis=grid.trellis)
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
        return ArtifactError(f"{self.container.path}: tensor {name!r}", what, REFETCH)
