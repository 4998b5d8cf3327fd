"""The samples of an npz file are rows of its arrays."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

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


def read_npz(settings: NpzData, source: Source) -> tuple[int, Reader]:
    """The samples of the file, and how to read some of them as they are stored. Raises DataError."""
    path = source.find(settings.npz)
    keyword = settings.inputs if isinstance(settings.inputs, dict) else {}
    with _open(path, source.place) as file:
        names, labels = _names(settings, file)
        arrays = {name: _array(file, name, path) for name in (*names, labels, settings.lengths) if name is not None}
    total = _samples({name: array.shape for name, array in arrays.items()}, names[0], path)
    _refuse_broken(arrays, path)

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
        return _samples({name: _header(file, name, path)[0] for name in wanted}, names[0], path)


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


def _array(file: NpzFile, name: str, path: Path) -> Array:
    shape, dtype = _header(file, name, path)
    refuse_immense(math.prod(shape) * dtype.itemsize, path)
    with reading(path, f"array {name!r} cannot be read", "save it again, as numbers"):
        array: Array = file[name]
    return array


def _header(file: NpzFile, name: str, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array of numbers. Raises DataError."""
    if name not in file:
        close = difflib.get_close_matches(name, [*file], n=1, cutoff=0.0)
        raise DataError(str(path), f"has no array {name!r}", f"did you mean {close[0]!r}?" if close else "it is empty")
    with reading(path, f"array {name!r} cannot be read", "save it again, as numbers"):
        shape, dtype = _declared(file, name)
    if dtype.kind not in "biuf":
        raise DataError(str(path), f"array {name!r} is of {dtype}, not of numbers", "save it as numbers")
    return shape, dtype


def _declared(file: NpzFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """What an array's header says; ValueError where its member of the archive has another length."""
    archive = file.zip
    assert archive is not None
    member = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        header = stream.tell()
    declared = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if header + declared != archive.getinfo(member).file_size:
        raise ValueError(f"its header declares {declared} bytes of data")
    return shape, dtype


def _refuse_broken(arrays: Mapping[str, Array], path: Path) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            sample = int(np.argwhere(~np.isfinite(array))[0][0])
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
