"""What flows between blocks waits in a file where memory has no room for it."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompress.errors import ResourceError
from qcompress.model.anew import Anew
from qcompress.model.stages import BlockState

SMALLEST_BYTES = 1 << 12
"""Of a tensor that goes to the file; smaller ones take no more memory than their places there."""


@dataclass(frozen=True)
class _Piece:
    """Where a tensor lies in the file."""

    start: int
    like: Tensor


class FiledStates(Anew[BlockState]):
    """The states before a block, one a batch, each read anew whenever it is asked for.

    The file has no name, and goes with this object or with the process. Tensors that do not lie in one piece stay in
    memory.

    raises  ResourceError where the folder takes no file, or none so large
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._states: list[BlockState] = []
        self._bytes = 0
        with self._reporting():
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._states)

    def append(self, state: BlockState) -> None:
        known: dict[int, _Piece] = {}

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.nbytes < SMALLEST_BYTES or not value.is_contiguous():
                return value
            if id(value) not in known:
                known[id(value)] = self._write(value)
            return known[id(value)]

        self._states.append(state.changed(put))

    def make(self, index: int) -> BlockState:
        known: dict[int, Tensor] = {}

        def get(value: Any) -> Any:
            if not isinstance(value, _Piece):
                return value
            if value.start not in known:
                known[value.start] = self._read(value)
            return known[value.start]

        return self._states[index].changed(get)

    def _write(self, value: Tensor) -> _Piece:
        place = _Piece(self._bytes, torch.empty_like(value, device="meta"))
        with self._reporting():
            self._file.seek(place.start)
            self._file.write(_bytes_of(value.detach().cpu()))
            self._file.flush()
        self._bytes += value.nbytes
        self._device = value.device
        return place

    def _read(self, place: _Piece) -> Tensor:
        value = torch.empty_like(place.like, device="cpu")
        with self._reporting():
            self._file.seek(place.start)
            if self._file.readinto(_bytes_of(value)) != value.nbytes:
                raise OSError(0, "ends before what was written to it")
        return value.to(self._device)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "free some space, or write to another disk with -o"
            raise ResourceError(str(self._folder), error.strerror or str(error), hint) from error


def _bytes_of(value: Tensor) -> memoryview:
    flat: Any = value.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
