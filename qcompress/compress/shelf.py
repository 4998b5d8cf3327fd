"""Codes that were chosen lie in files beside the output, block by block, from which a later run may go on.

One safetensors file a block, read tensor by tensor when asked for, and a small one beside it that says, once the first
is whole, what run it belongs to and its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view, write_checkpoint
from qcompress.checkpoint.safetensors_file import Container, read_container
from qcompress.checkpoint.staging import reporting_resources, staging_folder
from qcompress.coding.kept import tensor_of
from qcompress.encode.encode_weight import ContextSources, encode_weight
from qcompress.encode.job import refuse_out_of_range, survey_bytes
from qcompress.errors import CheckpointError
from qcompress.recipe import recipe_hash
from qcompress.registry import METHODS
from qcompress.types import VERSION
from qcompress.types.encoded import (
    ActivationGrid,
    Affine,
    Blocked,
    Codebook,
    Constant,
    Encoded,
    Fitted,
    Kept,
    Table,
    Unbounded,
)
from qcompress.types.plan import Plan
from qcompress.types.run import Options, Say

KEY = "qcompress-block"
"""The key of a file's metadata with the JSON document of all that is no tensor."""
KINDS = {kind.__name__: kind for kind in (Kept, Affine, Table, Blocked, Codebook, Unbounded, Constant)}

Value = TypeVar("Value")


class OnDemand(Mapping[str, Value]):
    """Values by name, each made anew whenever it is asked for."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], Value]] = {}

    def add(self, name: str, make: Callable[[], Value]) -> None:
        self._makers[name] = make

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

    key  of the run: what another run has left is dropped
    """

    def __init__(self, folder: Path, key: str, say: Say = lambda _: None) -> None:
        self._folder = folder
        self._key = key
        self._done: set[int] = set()
        self._encoded: OnDemand[Encoded] = OnDemand()
        self._references: OnDemand[Tensor] = OnDemand()
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
            values = {one.name: getattr(encoded, one.name) for one in fields(encoded)}
            tensors |= {f"{len(entries)}.{key}": one for key, one in values.items() if isinstance(one, Tensor)}
            plain = {key: one for key, one in values.items() if not isinstance(one, Tensor)}
            entries.append({"name": name, "kind": type(encoded).__name__, "values": plain})
        for name, value in fitted.references.items():
            tensors[f"reference.{name}"] = value
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
        for info in container.tensors:
            name = info.name.removeprefix("reference.")
            if name != info.name:
                self._references.add(name, partial(_tensor, container, info.name))
        self._activations |= {name: ActivationGrid(**grid) for name, grid in document["activations"].items()}
        self._notes += [note for note in document["notes"] if note not in self._notes]
        self._done.add(index)


def encode_unbounded(checkpoint: Checkpoint, plan: Plan, sources: ContextSources, options: Options) -> Fitted:
    """The codes without a width of a plan, each chosen by one rank and read by the first when they are asked for.

    They lie where the artifact is built; with --resume a run of as many ranks goes on with them.

    raises  CheckpointError for a weight that is not finite, and what methods raise
    """
    world, folder = options.world, staging_folder(options.output)
    unbounded = [decision for decision in plan.decisions if decision.compresses and decision.config.form == "unbounded"]
    if not unbounded:
        return Fitted({})
    own = [unbounded[place] for place in world.share([decision.tensor.numel for decision in unbounded])]
    crcs = [checkpoint.shard_of(one.tensor.name).crc32_of(one.tensor.name) for one in own]
    about = [VERSION, torch.__version__, options.device, recipe_hash(plan.recipe), [*map(repr, own)], crcs]
    key = hashlib.sha256(f"{about}".encode()).hexdigest()
    shelf = Shelf(folder / f"{options.output.name}.codes-{world.rank}-of-{world.size}", key, options.say)
    for index, decision in enumerate(own):
        world.check()
        if not shelf.has(index):
            source, tensor = checkpoint.shard_of(decision.tensor.name), decision.tensor
            survey = survey_bytes(source.pieces_of(tensor.name), tensor.dtype)
            refuse_out_of_range(source, tensor, survey)
            # What stands in for a live model is on the CPU.
            device = options.device if METHODS[decision.method or ""].needs == "weights" else "cpu"
            codes = encode_weight(tensor_view(source, tensor), decision, sources, device, survey.largest)
            shelf.add(index, Fitted({tensor.name: codes}))
    keys = world.tell(key)
    everything: OnDemand[Encoded] = OnDemand()
    for rank, own_key in enumerate(keys if world.is_first else ()):
        one = Shelf(folder / f"{options.output.name}.codes-{rank}-of-{world.size}", own_key)
        for name in one.fitted.encoded:
            everything.add(name, partial(one.fitted.encoded.__getitem__, name))
    return Fitted(everything)


def _encoded(container: Container, prefix: str, entry: Mapping[str, Any]) -> Encoded:
    values = {key: tuple(one) if isinstance(one, list) else one for key, one in entry["values"].items()}
    values |= {
        info.name.removeprefix(prefix): _tensor(container, info.name)
        for info in container.tensors
        if info.name.startswith(prefix)
    }
    kind: Any = KINDS[entry["kind"]]
    found: Encoded = kind(**values)
    return found


def _tensor(container: Container, name: str) -> Tensor:
    return tensor_of(container.pieces_of(name), container.by_name[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
