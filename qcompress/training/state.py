"""A training run is saved as it stands in one safetensors file: tensors, and JSON in its metadata. Never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.checkpoint.checkpoint import read_tensors, write_checkpoint
from qcompress.data.foreign import first_line
from qcompress.errors import CheckpointError, TrainingError
from qcompress.training.penalties import Penalties

KEY, DIGEST = "qcompress-training", "qcompress-training-sha256"
"""Keys of the file's metadata: the JSON document, and the SHA-256 of all that the file says."""


class DamagedState(TrainingError):
    """A saved state does not hold what was written: it is of no use, whoever wrote it."""


@dataclass
class Progress:
    """How far a run is.

    step        optimizer steps that are done
    epoch       epochs that are done
    losses      sum of the losses of this epoch's steps so far, and their number
    log_bytes   length of the log at that moment
    metrics     after each epoch: metric -> value
    best_epoch  the epoch of the best headline metric so far, from 1; 0 for none
    best_state  the weights that had it, where those are kept
    seconds     that training took so far
    sizes       root mean square of each weight before training
    """

    step: int = 0
    epoch: int = 0
    losses: tuple[float, int] = (0.0, 0)
    log_bytes: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    sizes: dict[str, float] = field(default_factory=dict)


_PLAIN = tuple(one.name for one in fields(Progress) if one.name != "best_state")


@dataclass
class Trainee:
    """All that changes while training runs."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    penalties: Penalties
    progress: Progress
    scaler: torch.amp.GradScaler | None = None


def save_state(path: Path, trainee: Trainee, identity: str) -> None:
    """Replace the file at once: a reader finds this state or the one before."""
    progress = trainee.progress
    tensors = {f"model.{name}": value for name, value in _stored(trainee.module).items()}
    tensors |= {f"best.{name}": value for name, value in progress.best_state.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, parameter in enumerate(_parameters(trainee.optimizer)):
        for key, value in trainee.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            elif value is not None:
                scalars.setdefault(str(index), {})[key] = value
    terms, values = trainee.penalties.state()
    tensors |= {f"terms.{name}": value for name, value in terms.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    device = next(trainee.module.parameters()).device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    document = {
        "identity": identity,
        "optimizer": scalars,
        "penalties": values,
        "scaler": trainee.scaler.state_dict() if trainee.scaler is not None else None,
        "progress": {name: getattr(progress, name) for name in _PLAIN},
    }
    new = path.with_name(path.name + ".new")
    # Each tensor gets storage of its own: the format stores none twice.
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(document)
    write_checkpoint(copies, new, {KEY: text, DIGEST: _digest(copies, text)})
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


def load_state(path: Path, trainee: Trainee, identity: str) -> None:
    """Bring a run to where a saved state says it was.

    raises  DamagedState, before the run is touched, for a file that does not hold what was written; TrainingError for
            one that is foreign, or of another recipe or checkpoint
    """
    hint = "start again without --resume"
    try:
        tensors, document = _read(path)
        if document["identity"] != identity:
            what = "was saved by a run with another recipe, checkpoint or number of processes"
            raise TrainingError(str(path), what, hint)
        _load(trainee, tensors, document)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(str(path), f"is no saved state of this run: {first_line(error)}", hint) from None


def last_good(path: Path) -> tuple[dict[str, Tensor], int] | None:
    """The weights of a saved state and their step; None where there is none that can be read."""
    try:
        tensors, document = _read(path)
        return _below(tensors, "model."), int(document["progress"]["step"])
    except (TrainingError, KeyError, ValueError, TypeError):
        return None


def _read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the document of a saved state, as they were written. Raises DamagedState; KeyError, ValueError
    where the file is something else."""
    hint = "start again without --resume"
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError as error:
        raise DamagedState(str(path), error.what, hint) from None
    if metadata[DIGEST] != _digest(tensors, metadata[KEY]):
        raise DamagedState(str(path), "does not hold what was written: its checksum is another", hint)
    return tensors, json.loads(metadata[KEY])


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256, in hex, over names, types, shapes and values of CPU tensors, and over the document."""
    found = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"\n{name} {value.dtype} {list(value.shape)} ".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _load(trainee: Trainee, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    own = _stored(trainee.module)
    saved = _below(tensors, "model.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])
    optimizer = trainee.optimizer
    for index, parameter in enumerate(_parameters(optimizer)):
        state: dict[str, Any] = dict(document["optimizer"].get(str(index), {}))
        for key, value in _below(tensors, f"optimizer.{index}.").items():
            alike = value.shape == parameter.shape
            state[key] = torch.empty_like(parameter).copy_(value) if alike else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
    trainee.penalties.load(_below(tensors, "terms."), document["penalties"])
    if trainee.scaler is not None and document["scaler"] is not None:
        trainee.scaler.load_state_dict(document["scaler"])
    torch.set_rng_state(tensors["random.cpu"])
    device = next(trainee.module.parameters()).device
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    for name in _PLAIN:
        setattr(trainee.progress, name, document["progress"][name])
    total, steps = document["progress"]["losses"]
    trainee.progress.losses = (total, steps)
    trainee.progress.best_state = _below(tensors, "best.")


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, each shared tensor once."""
    seen: set[int] = set()
    found = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
