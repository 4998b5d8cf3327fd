"""What was chosen for the blocks that are done lies in files beside the output, from which a later run may go on.

One safetensors file a block, read tensor by tensor when asked for, and a small one beside it that says, once the first
is whole, what run it belongs to and its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from qcompress.checkpoint.checkpoint import write_checkpoint
from qcompress.checkpoint.safetensors_file import Container, read_container
from qcompress.checkpoint.staging import reporting_resources
from qcompress.coding.kept import tensor_of
from qcompress.coding.message import flatten, restore
from qcompress.errors import CheckpointError
from qcompress.types.encoded import ActivationGrid, Encoded, Fitted
from qcompress.types.run import Say

REFERENCE, MEASURED = "reference.", "measured."
"""What stands before the names of weights that codes stand for, and of what a method has measured."""
KEY = "qcompress-block"
"""The key of a file's metadata with the JSON document of all that is no tensor."""

Value = TypeVar("Value")


class OnDemand(Mapping[str, Value]):
    """Values by name, each made anew whenever it is asked for."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], Value]] = {}

    def add(self, name: str, make: Callable[[], Value]) -> None:
        self._makers[name] = make

    def beside(self, others: OnDemand[Value]) -> OnDemand[Value]:
        """All that both have, those of the first before the others."""
        both: OnDemand[Value] = OnDemand()
        both._makers = {**self._makers, **others._makers}
        return both

    def __getitem__(self, name: str) -> Value:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Shelf:
    """What was chosen for the blocks that are done, by numbers; `fitted` is all of it together.

    key       of the run: what another run has left is dropped
    measured  what methods have measured of these blocks, read when it is asked for
    """

    def __init__(self, folder: Path, key: str, say: Say = lambda _: None) -> None:
        self._folder = folder
        self._key = key
        self._done: set[int] = set()
        self._encoded: OnDemand[Encoded] = OnDemand()
        self._references: OnDemand[Tensor] = OnDemand()
        self.measured: OnDemand[Tensor] = OnDemand()
        self._activations: dict[str, ActivationGrid] = {}
        self._notes: list[str] = []
        with reporting_resources(folder):
            folder.mkdir(exist_ok=True)
        dropped = [index for index in self._found() if not self._take_up(index)]
        if dropped:
            say(f"{len(dropped)} finished blocks are damaged or of another run, and done again")
        if self._done:
            say(f"{len(self._done)} finished blocks are taken up")

    @property
    def fitted(self) -> Fitted:
        """Codes and references are read when they are asked for."""
        return Fitted(self._encoded, self._references, self._activations, notes=tuple(self._notes))

    def has(self, index: int) -> bool:
        """Whether a block is done."""
        return index in self._done

    def add(self, index: int, fitted: Fitted) -> None:
        """Write down what was chosen for a block, to stay. Raises ResourceError."""
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, object]] = []
        for name, encoded in fitted.encoded.items():
            document, parts = flatten(encoded)
            tensors |= {f"{len(entries)}.{key}": one for key, one in parts.items()}
            entries.append({"name": name, **document})
        tensors |= {f"{REFERENCE}{name}": value for name, value in fitted.references.items()}
        tensors |= {f"{MEASURED}{name}": value for name, value in fitted.measured.items()}
        activations = {name: asdict(grid) for name, grid in fitted.activations.items()}
        document = {"entries": entries, "activations": activations, "notes": fitted.notes}
        # Each tensor gets storage of its own: the format stores none twice.
        copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        path = self._path(index)
        with reporting_resources(self._folder):
            write_checkpoint(copies, path, {KEY: json.dumps(document)})
            with path.open("rb") as file:
                os.fsync(file.fileno())
            seal, new = path.with_suffix(".json"), path.with_suffix(".new")
            with new.open("w", encoding="utf-8") as file:
                file.write(json.dumps({"key": self._key, "sha256": _sha256(path)}))
                file.flush()
                os.fsync(file.fileno())
            new.replace(seal)
        self._open(index)

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:05}.safetensors"

    def _found(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdigit())

    def _take_up(self, index: int) -> bool:
        """Take over a block of an earlier run, if it is of this one and holds what was written."""
        path = self._path(index)
        try:
            seal = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if seal != {"key": self._key, "sha256": _sha256(path)}:
                return False
        except (OSError, ValueError):
            return False
        self._open(index)
        return True

    def _open(self, index: int) -> None:
        container = read_container(self._path(index), CheckpointError)
        document = json.loads(container.metadata[KEY])
        for place, entry in enumerate(document["entries"]):
            self._encoded.add(entry["name"], partial(_encoded, container, f"{place}.", entry))
        for prefix, mapping in ((REFERENCE, self._references), (MEASURED, self.measured)):
            for info in container.tensors:
                if info.name.startswith(prefix):
                    mapping.add(info.name.removeprefix(prefix), partial(_tensor, container, info.name))
        self._activations |= {name: ActivationGrid(**grid) for name, grid in document["activations"].items()}
        self._notes += [note for note in document["notes"] if note not in self._notes]
        self._done.add(index)


def _encoded(container: Container, prefix: str, entry: Mapping[str, Any]) -> Encoded:
    names = [info.name for info in container.tensors if info.name.startswith(prefix)]
    return restore(entry, {name.removeprefix(prefix): _tensor(container, name) for name in names})


def _tensor(container: Container, name: str) -> Tensor:
    return tensor_of(container.pieces_of(name), container.by_name[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
