"""A compressed tensor of a file is checked and then decoded block by block, so that it need not fit the memory.

Nothing is decoded before the CRC-32 of all that decides the tensor's values is known to be right. Importing imports no
torch; blocks of weights need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qcompress.artifact.entry import Entry, seal
from qcompress.artifact.parse_manifest import LIMITS
from qcompress.artifact.parts import REFETCH, UnboundedCodes, UsesOfClasses
from qcompress.coding.ans import CHUNK_CODES, Tile
from qcompress.coding.packing import count_codes
from qcompress.coding.payload import least_bytes, payload_tiles, unpacked_tiles
from qcompress.coding.rows import cut, tiles
from qcompress.coding.stored import Stored
from qcompress.coding.tables import given_values
from qcompress.coding.unbounded.payload import code_tiles
from qcompress.coding.unbounded.streams import CodeTile
from qcompress.errors import ArtifactError, Subject
from qcompress.types.config import Shape
from qcompress.types.plan import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from qcompress.types.encoded import Compressed

NUMPY_DTYPES = {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4"}


GRID_COPIES = 8
"""What a grid takes in all, as large as its parts, where all of it is looked at: float32, and sorted."""


class Block(NamedTuple):
    """A piece of a weight [rows, columns]: which, and its codes as a weight of their own of two dimensions."""

    rows: slice
    columns: slice
    encoded: Compressed


@dataclass(frozen=True)
class StoredTensor:
    """A compressed tensor as one reader sees it.

    infos           part -> its stored tensor; grids may be another tensor's
    parts           part -> its bytes
    executor        of processes that share the work of decoding
    find_unbounded  gives the side information of unbounded codes, and their payload
    refuse_memory   raises ResourceError where so many bytes are too many for what is named
    """

    path: Path
    name: str
    entry: Entry
    infos: Mapping[str, TensorInfo]
    parts: Mapping[str, Stored]
    executor: Executor | None
    find_unbounded: Callable[[Stored], UnboundedCodes]
    refuse_memory: Callable[[int, str], None]

    def check_seal(self) -> None:
        """Hold the parts and the fields of the tensor against its CRC-32. Raises ArtifactError."""
        crc32 = 0
        for part in self.parts.values():
            crc32 = part.crc32(crc32)
        if seal(self.name, self.entry, crc32) != self.entry.crc32:
            raise self._damaged("its checksum does not hold")

    def check(self) -> None:
        """Decode the tensor, to see that it can be. Raises ArtifactError."""
        if self.entry.form == "constant":
            self.check_constant()
            return
        for _ in self.unbounded_tiles() if self.entry.is_unbounded else self.packed_tiles():
            pass

    def check_constant(self) -> None:
        """Hold a constant tensor against its CRC-32. Raises ArtifactError, where it has codes too."""
        self.check_seal()
        if any(np.frombuffer(piece, np.uint8).any() for piece in self.parts["codes"].pieces()):
            raise self._damaged("it is constant and has codes")

    @cached_property
    def unbounded(self) -> UnboundedCodes:
        """The grid, tables and payload of unbounded codes, checked. Raises ArtifactError."""
        self.check_seal()
        return self.find_unbounded(self.parts["codes"])

    def uses_of_classes(self) -> UsesOfClasses | None:
        """What counts how the tables of unbounded codes are used; None where no table codes them. As `unbounded`."""
        return UsesOfClasses(self.unbounded, self.entry) if self.entry.coding == "ans" else None

    def unbounded_tiles(self) -> Iterator[CodeTile]:
        """The unbounded codes piece by piece, checked. Raises ArtifactError."""
        found = self.unbounded
        try:
            yield from code_tiles(
                found.payload,
                self.entry.coding,
                found.pool,
                found.place,
                found.grid.trellis,
                (self.entry.rows, self.entry.columns),
                self.executor,
            )
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def packed_tiles(self) -> Iterator[Tile]:
        """The packed codes piece by piece, checked with their grid. Raises ArtifactError."""

        def holds(packed: NDArray[Any], columns: slice, wanted: NDArray[np.bool_]) -> bool:
            return bool(count_codes(packed, self.entry.bits, columns.stop - columns.start)[wanted].any())

        return self._tiles(payload_tiles, holds)

    def unpacked_tiles(self) -> Iterator[Tile]:
        """The same, codes by themselves: [rows, columns] of uint8, above 8 bits of uint16."""
        return self._tiles(unpacked_tiles, lambda codes, _, wanted: bool(wanted.take(codes, mode="clip").any()))

    def _tiles(
        self,
        read: Callable[..., Iterator[Tile]],
        holds: Callable[[NDArray[Any], slice, NDArray[np.bool_]], bool],
    ) -> Iterator[Tile]:
        """The pieces that `read` gives; `holds` says whether one has any of the codes that are wanted."""
        entry = self.entry
        self.check_seal()
        self._check_grids()
        unnamed = self._unnamed_codes()
        found = read(
            self.parts["codes"],
            entry.coding,
            entry.bits,
            entry.code_rows,
            entry.columns,
            self.executor,
            least_bytes(entry.numel),
        )
        try:
            for rows, columns, codes in found:
                if unnamed is not None and holds(codes, columns, unnamed):
                    raise self._damaged(f"a code is beyond its {entry.form}")
                yield rows, columns, codes
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _check_grids(self) -> None:
        """Raise ArtifactError where a number of the grid is none, or an exponent out of range."""
        low, high = LIMITS["exponent"]
        for part, stored in self.parts.items():
            if part == "codes":
                continue
            dtype = np.dtype(NUMPY_DTYPES[self.infos[part].dtype])
            for piece in stored.pieces():
                values = np.frombuffer(piece, dtype)
                if not np.isfinite(values).all():
                    raise self._damaged("its grid holds NaN or Inf")
                if part == "exponent" and not ((values >= low) & (values <= high)).all():
                    raise self._damaged(f"an exponent of its rows is not in [{low}, {high}]")

    def _unnamed_codes(self) -> NDArray[np.bool_] | None:
        """Which codes name no entry of the codebook or table, or one that is no number; None where all do."""
        entry = self.entry
        if entry.form not in ("codebook", "table"):
            return None
        if entry.given is not None:
            unnamed = ~np.isfinite(given_values(entry.given))
        else:
            part, place = ("codebook", 1) if entry.form == "codebook" else ("table", 0)
            unnamed = np.arange(2**entry.bits) >= self.infos[part].shape[place]
        return unnamed if unnamed.any() else None

    def blocks(self) -> Iterator[Block]:
        """The weight [rows, columns] in blocks of about 2**18 codes, in the order of the rows, checked.

        A block is some whole rows or, of rows longer than that, a part of `dim` rows. Raises ArtifactError.
        """
        from qcompress.types.encoded import Constant

        entry = self.entry
        if entry.form == "constant":
            self.check_constant()
            for rows, columns in tiles(entry.rows, entry.columns, CHUNK_CODES):
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                yield Block(rows, columns, Constant(entry.value, shape, (0,), entry.dtype))
        elif entry.is_unbounded:
            for rows, columns, codes in self.unbounded_tiles():
                yield Block(rows, columns, self.unbounded.grid.block(codes, rows, columns, entry.columns, entry.dtype))
        else:
            for rows, columns, codes in self.unpacked_tiles():
                yield from self._code_blocks(rows, columns, codes)

    @property
    def in_order(self) -> bool:
        """Whether the blocks lie one behind another in the weight: not where each is a part of several rows."""
        return self.entry.leads and (self.entry.dim == 1 or self.entry.columns <= CHUNK_CODES)

    def weight(self) -> Tensor:
        """The weight in its own shape and dtype; beside it, where its rows do not lead, once more. As for `blocks`."""
        import torch

        from qcompress.coding.grids import TORCH_DTYPES, decode_into
        from qcompress.coding.rows import weight_from_rows

        entry = self.entry
        found = torch.empty((entry.rows, entry.columns), dtype=TORCH_DTYPES[entry.dtype])
        for rows, columns, encoded in self.blocks():
            decode_into(encoded, found[rows, columns])
        return weight_from_rows(found, entry.shape, entry.axis)

    def _code_blocks(self, rows: slice, columns: slice, codes: NDArray[Any]) -> Iterator[Block]:
        """A tile of codes with the grids of its rows and columns; in several blocks where grids begin in it."""
        entry = self.entry
        for down in cut(rows, entry.code_rows // entry.tables if entry.form == "codebook" else 1):
            for along in self._cut_columns(columns):
                part = codes[
                    down.start - rows.start : down.stop - rows.start,
                    along.start - columns.start : along.stop - columns.start,
                ]
                shape = (part.shape[0] * entry.dim, part.shape[1])
                encoded = encoded_of(entry, part, self._grids_of(down, along), shape, (0,))
                yield Block(slice(down.start * entry.dim, down.stop * entry.dim), along, encoded)

    def _cut_columns(self, columns: slice) -> Iterator[slice]:
        """Parts of the columns in each of which all groups but the last of the row are whole, or lie in one block."""
        entry = self.entry
        whole = columns.stop - columns.start == entry.columns
        if entry.group_size is None or entry.form == "codebook" or whole:
            yield columns
            return
        for block in cut(columns, entry.group_size * entry.sub_blocks):
            yield from cut(block, entry.group_size)

    def _grids_of(self, rows: slice, columns: slice) -> dict[str, NDArray[Any]]:
        """part -> its values for some rows and columns of codes; of one for all rows that one."""
        entry = self.entry
        found = {}
        for part, info in self.infos.items():
            if part == "codes":
                continue
            lines, places = slice(0, info.shape[0]), slice(0, math.prod(info.shape[1:]))
            if entry.form == "codebook":
                tall = entry.code_rows // entry.tables
                lines = slice(rows.start // tall, -(-rows.stop // tall))
            elif part != "table":
                lines = rows if info.shape[0] > 1 else lines
                if entry.group_size is not None and len(info.shape) == 2:
                    per_block = entry.form == "blocked" and part in ("scale", "offset")
                    width = entry.group_size * (entry.sub_blocks if per_block else 1)
                    places = slice(columns.start // width, -(-columns.stop // width))
            found[part] = self._values(part, lines, places)
        return found

    def _values(self, part: str, lines: slice, places: slice) -> NDArray[Any]:
        """The values of some lines of a part; of several lines all places of each."""
        info = self.infos[part]
        dtype, width = np.dtype(NUMPY_DTYPES[info.dtype]), math.prod(info.shape[1:])
        start, stop = lines.start * width + places.start, (lines.stop - 1) * width + places.stop
        values = np.frombuffer(self.parts[part].read(start * dtype.itemsize, stop * dtype.itemsize), dtype)
        inner = info.shape[1:] if places.stop - places.start == width else (places.stop - places.start,)
        return values.reshape(lines.stop - lines.start, *inner)

    def grids(self) -> dict[str, NDArray[Any]]:
        """part -> all of its values, of all parts but the codes. Raises ResourceError where they do not fit."""
        sizes = sum(info.n_bytes for part, info in self.infos.items() if part != "codes")
        self.refuse_memory(GRID_COPIES * sizes, "reading its grid")
        return {
            part: self._values(part, slice(0, info.shape[0]), slice(0, math.prod(info.shape[1:])))
            for part, info in self.infos.items()
            if part != "codes"
        }

    def centroids(self) -> NDArray[np.float32]:
        """What the entries of a codebook decode to, float32 [tables, entries, dim]."""
        import torch

        from qcompress.coding.grids import stored_values

        grids = {part: torch.from_numpy(values.copy()) for part, values in self.grids().items()}
        values: NDArray[np.float32] = stored_values(grids["codebook"], grids.get("scale"), self.entry.exponent).numpy()
        return values

    def read(self) -> Compressed:
        """All codes at once with what decodes them, checked. Raises ArtifactError."""
        from qcompress.coding.unbounded.side import unbounded_of_grid
        from qcompress.types.encoded import Constant

        entry = self.entry
        if entry.form == "constant":
            self.check_constant()
            return Constant(entry.value, entry.shape, entry.axis, entry.dtype)
        if entry.is_unbounded:
            codes = np.empty((entry.rows, entry.columns), np.int32)
            for rows, columns, part in self.unbounded_tiles():
                codes[rows, columns] = part
            return unbounded_of_grid(codes, self.unbounded.grid, entry.shape, entry.axis, entry.dtype)
        held = np.empty((entry.code_rows, entry.columns), np.uint8 if entry.bits <= 8 else np.uint16)
        for rows, columns, tile in self.unpacked_tiles():
            held[rows, columns] = tile
        return encoded_of(entry, held, self.grids(), entry.shape, entry.axis)

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(str(self.path), what, REFETCH, Subject(self.name))


def encoded_of(
    entry: Entry, codes: NDArray[Any], grids: Mapping[str, NDArray[Any]], shape: Shape, axis: tuple[int, ...]
) -> Compressed:
    """The form of an entry with codes [rows, columns], all or some of them, and the parts that decode these.

    shape, axis  of the weight that they are
    """
    import torch

    from qcompress.types.encoded import Affine, Blocked, Codebook, Table

    parts = {part: torch.from_numpy(values.copy()) for part, values in grids.items()}
    held = torch.from_numpy(codes if entry.bits <= 8 else codes.astype(np.int16))
    common: dict[str, Any] = {
        "codes": held,
        "bits": entry.bits,
        "exponent": entry.exponent,
        "shape": shape,
        "axis": axis,
        "dtype": entry.dtype,
    }
    if entry.form == "codebook":
        return Codebook(**common, centroids=parts["codebook"], scale=parts.get("scale"))
    common |= {"scale": parts["scale"], "row_exponents": parts.get("exponent")}
    convention = entry.grid if entry.grid in ("narrow", "full", "mid-rise") else None
    match entry.form:
        case "affine":
            zero_point, offset = parts.get("zero_point"), parts.get("offset")
            return Affine(
                **common,
                zero_point=zero_point,
                offset=offset,
                convention=convention,
                group_size=entry.group_size,
            )
        case "table":
            values = parts["table"] if entry.given is None else torch.from_numpy(given_values(entry.given))
            return Table(**common, values=values, given=entry.given, group_size=entry.group_size)
        case "blocked":
            assert entry.group_size is not None
            return Blocked(
                **common,
                subscale=parts["subscale"],
                offset=parts.get("offset"),
                suboffset=parts.get("suboffset"),
                convention=convention,
                group_size=entry.group_size,
                sub_blocks=entry.sub_blocks,
                subzero=entry.subzero,
            )
        case _:
            raise AssertionError(f"{entry.form} has no codes of {entry.bits} bits")
