"""The samples of an npz file are rows of its arrays, of which those of large ones are read when they are needed."""

from __future__ import annotations

import difflib
import io
import math
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from qcompress.data.batches import Batch, Reader, Source
from qcompress.data.foreign import reading, refuse_immense
from qcompress.errors import DataError
from qcompress.types.data_settings import NpzData

Array: TypeAlias = NDArray[Any]

LABELS = "y"
HELD_BYTES = 1 << 26
"""Of an array that is held in memory."""
CHECKED_BYTES = 1 << 22
"""Of the rows that are looked at together when an array is opened."""
LOCAL_HEADER_BYTES = 30
"""Of a member of a zip archive, before its name; the lengths of name and extra field end it."""


def read_npz(settings: NpzData, source: Source) -> tuple[int, Reader]:
    """The samples of the file, and how to read some of them as they are stored. Raises DataError."""
    path = source.find(settings.npz)
    keyword = settings.inputs if isinstance(settings.inputs, dict) else {}
    with _open(path, source.place) as file:
        names, labels = _names(settings, file)
        members = {name: _member(file, name, path) for name in (*names, labels, settings.lengths) if name is not None}
        total = _samples({name: member.shape for name, member in members.items()}, names[0], path)
        arrays = {name: _opened(file, name, member, path) for name, member in members.items()}

    def read(indices: Sequence[int]) -> Batch:
        chosen = slice(indices.start, indices.stop) if isinstance(indices, range) else [*indices]
        inputs = {name: _as_tensor(arrays[name][chosen], settings) for name in names}
        return Batch(
            args=() if keyword else tuple(inputs[name] for name in names),
            kwargs={key: inputs[name] for key, name in keyword.items()},
            labels=None if labels is None else _as_labels(arrays[labels][chosen]),
            lengths=None if settings.lengths is None else _as_labels(arrays[settings.lengths][chosen]).long(),
        )

    return total, read


def count_npz(settings: NpzData, source: Source) -> int:
    """The samples of the file, from the headers of its arrays alone. Raises DataError."""
    path = source.find(settings.npz)
    with _open(path, source.place) as file:
        names, labels = _names(settings, file)
        wanted = [name for name in (*names, labels, settings.lengths) if name is not None]
        return _samples({name: _member(file, name, path).shape for name in wanted}, names[0], path)


def _names(settings: NpzData, file: NpzFile) -> tuple[list[str], str | None]:
    """The arrays of the inputs, and that of the labels where there are some."""
    inputs = settings.inputs
    names = [inputs] if isinstance(inputs, str) else [*(inputs.values() if isinstance(inputs, dict) else inputs)]
    labels = settings.labels
    if labels is None and LABELS in file.files and LABELS not in names:
        labels = LABELS
    return names, labels


def _samples(shapes: Mapping[str, tuple[int, ...]], first: str, path: Path) -> int:
    """As many as the first array has, and all others too. Raises DataError."""
    total = shapes[first][0] if shapes[first] else 0
    for name, shape in shapes.items():
        if not shape or shape[0] != total:
            what = f"array {name!r} has the shape {list(shape)}, and {first!r} has {total} samples"
            raise DataError(str(path), what, "give arrays with as many samples each")
    return total


def _open(path: Path, place: str) -> NpzFile:
    with reading(path, "is no npz file", f"see {place}"):
        file = np.load(path, allow_pickle=False)
    if not isinstance(file, NpzFile):
        raise DataError(str(path), "is a single array, not an npz file", "save it with numpy.savez")
    return file


@dataclass(frozen=True)
class _Member:
    """An array of numbers as the archive declares it.

    name    in the archive
    start   of its data behind its header
    by_row  whether the last dimension runs fastest
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    by_row: bool

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Rows:
    """An array in a file, of which the rows that are asked for are read."""

    def __init__(self, file: BinaryIO, start: int, member: _Member) -> None:
        self._file = file
        self._start = start
        self._member = member
        weakref.finalize(self, file.close)

    def __getitem__(self, chosen: slice | list[int]) -> Array:
        """These rows, in memory of their own. Raises DataError where the file has become shorter."""
        member = self._member
        places = [*range(*chosen.indices(member.shape[0]))] if isinstance(chosen, slice) else chosen
        rows = np.empty((len(places), *member.shape[1:]), member.dtype)
        # Rows that lie side by side are read at once.
        breaks = [at for at in range(1, len(places)) if places[at] != places[at - 1] + 1]
        for first, last in pairwise([0, *breaks, len(places)]):
            if last > first:
                self._fill(rows[first:last], self._start + places[first] * member.row_bytes)
        return rows

    def _fill(self, rows: Array, place: int) -> None:
        flat = rows.reshape(-1).view(np.uint8)
        while len(flat):
            data = os.pread(self._file.fileno(), min(len(flat), CHECKED_BYTES), place)
            if not data:
                what = f"array {self._member.name!r} has lost rows since it was opened"
                raise DataError(str(self._file.name), what, "let no other program write to it")
            flat[: len(data)] = np.frombuffer(data, np.uint8)
            flat, place = flat[len(data) :], place + len(data)


def _opened(file: NpzFile, name: str, member: _Member, path: Path) -> Array | _Rows:
    """The array, or what reads rows of it. All of it is read once: its checksum must be right and its numbers finite.

    raises  DataError for others; ResourceError for a compressed array that this machine's memory could not hold
    """
    archive = file.zip
    assert archive is not None
    stored = archive.getinfo(member.name).compress_type == 0
    if not stored or not member.by_row:
        refuse_immense(member.n_bytes, path)
    if not member.by_row:
        with reading(path, f"array {name!r} cannot be read", "save it again, as numbers"):
            array: Array = np.ascontiguousarray(file[name])
        _refuse_broken(name, array, 0, path)
        return array
    held = member.n_bytes <= HELD_BYTES
    # A compressed array has no places to read from: a file without a name holds it, until nothing reads it any more.
    copy: BinaryIO | None = io.BytesIO() if held else None if stored else tempfile.TemporaryFile()  # noqa: SIM115
    first = 0
    for rows in _parts(file, name, member, path):
        _refuse_broken(name, rows, first, path)
        first += len(rows)
        if copy is not None:
            copy.write(rows.data.cast("B") if rows.size else b"")
    if isinstance(copy, io.BytesIO):
        return np.frombuffer(copy.getbuffer(), member.dtype).reshape(member.shape)
    if copy is not None:
        copy.flush()
        return _Rows(copy, 0, member)
    own = path.open("rb")
    return _Rows(own, _data_start(own, archive.getinfo(member.name).header_offset) + member.start, member)


def _parts(file: NpzFile, name: str, member: _Member, path: Path) -> Iterator[Array]:
    """All rows of an array, some at a time."""
    archive = file.zip
    assert archive is not None
    few = max(1, CHECKED_BYTES // max(1, member.row_bytes))
    with reading(path, f"array {name!r} cannot be read", "save it again, as numbers"):
        stream = archive.open(member.name)
    with stream:
        stream.read(member.start)
        for start in range(0, member.shape[0], few):
            count = min(few, member.shape[0] - start)
            with reading(path, f"array {name!r} cannot be read", "save it again, as numbers"):
                data = stream.read(count * member.row_bytes)
                rows = np.frombuffer(data, member.dtype).reshape(count, *member.shape[1:])
            yield rows
        with reading(path, f"array {name!r} cannot be read", "save it again, as numbers"):
            # The checksum is held against what was read once the end is seen.
            if stream.read(1):
                raise ValueError("it goes on behind its last row")


def _data_start(file: BinaryIO, header: int) -> int:
    """Where a member's data begin, whose local header is at this place."""
    lengths = os.pread(file.fileno(), 4, header + LOCAL_HEADER_BYTES - 4)
    return header + LOCAL_HEADER_BYTES + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))


def _member(file: NpzFile, name: str, path: Path) -> _Member:
    """What the archive declares of an array of numbers. Raises DataError."""
    if name not in file:
        close = difflib.get_close_matches(name, [*file], n=1, cutoff=0.0)
        raise DataError(str(path), f"has no array {name!r}", f"did you mean {close[0]!r}?" if close else "it is empty")
    with reading(path, f"array {name!r} cannot be read", "save it again, as numbers"):
        member = _declared(file, name)
    if member.dtype.kind not in "biuf":
        raise DataError(str(path), f"array {name!r} is of {member.dtype}, not of numbers", "save it as numbers")
    return member


def _declared(file: NpzFile, name: str) -> _Member:
    """What an array's header says; ValueError where its member of the archive has another length."""
    archive = file.zip
    assert archive is not None
    place = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(place) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        member = _Member(place, shape, dtype, stream.tell(), not fortran or len(shape) < 2)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if member.start + member.n_bytes != archive.getinfo(place).file_size:
        raise ValueError(f"its header declares {member.n_bytes} bytes of data")
    return member


def _refuse_broken(name: str, rows: Array, first: int, path: Path) -> None:
    """Raise DataError for NaN and Inf; `first` is the number of the first of these rows."""
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        sample = first + int(np.argwhere(~np.isfinite(rows))[0][0])
        raise DataError(str(path), f"array {name!r} holds NaN or Inf, first in sample {sample}", "repair the data")


def finish_npz(batch: Batch, settings: NpzData, source: Source) -> Batch:
    """What `read_npz` reads, scaled and standardized: float32, token ids int64. Raises DataError."""
    return replace(
        batch,
        args=tuple(_finished(x, settings, source) for x in batch.args),
        kwargs={name: _finished(x, settings, source) for name, x in batch.kwargs.items()},
    )


def _as_tensor(values: Array, settings: NpzData) -> Tensor:
    """Images in bytes with channels first; other integers as int64."""
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32))
    if values.dtype == np.uint8 and values.ndim == 4:
        return torch.from_numpy(values).permute(0, 3, 1, 2)
    return torch.from_numpy(values.astype(np.int64))


def _finished(x: Tensor, settings: NpzData, source: Source) -> Tensor:
    if x.is_floating_point():
        return source.standardized(x)
    scaled = settings.scale is not None or settings.zero_point is not None
    if x.dtype == torch.uint8:
        return source.standardized(_scaled(x, settings) if scaled else x.float() / 255).contiguous()
    if scaled:
        x = _scaled(x, settings)
        return source.standardized(x) if source.normalize is not None and x.ndim > 2 else x
    return x


def _scaled(x: Tensor, settings: NpzData) -> Tensor:
    return (x.float() - (settings.zero_point or 0.0)) * (1.0 if settings.scale is None else settings.scale)


def _as_labels(values: Array) -> Tensor:
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(values.astype(np.int64))
