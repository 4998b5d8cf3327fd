"""What a network that goes block by block is built from: which blocks, and what reads the weights of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qcompress.artifact.reader import Artifact
from qcompress.checkpoint.checkpoint import Checkpoint
from qcompress.coding.kept import KEPT_DTYPES, no_counterpart, tensor_of
from qcompress.errors import ArtifactError, CheckpointError, ModelError, Subject
from qcompress.model.build import build_skeleton
from qcompress.model.offload import Blueprint, Read, find_blocks, make_blueprint
from qcompress.model.stages import glob_modules
from qcompress.runtime.load_packed import stored_shapes
from qcompress.types.run import ModelRun

FLOAT_BYTES = 4


def choose_blocks(model_run: ModelRun, networks: int, max_memory: int | None) -> tuple[str, ...]:
    """The names of the blocks that a recipe's network is to go by; none where all of it is to be in memory.

    networks    how many of it there are to be at once
    max_memory  bytes that they may take; None: all that there is
    raises      ModelError where the recipe asks for blocks and names none, or wrong ones; what building it raises
    """
    settings = model_run.recipe.model
    assert settings is not None
    asked = settings.offload == "blocks"
    if settings.offload == "none" or not (asked or max_memory is not None):
        return ()
    module, place = build_skeleton(model_run), model_run.place("model")
    # A tensor of several names is there once.
    values = {id(value): value for value in module.state_dict(keep_vars=True).values()}
    needed = networks * FLOAT_BYTES * sum(value.numel() for value in values.values())
    if not asked and max_memory is not None and needed <= max_memory:
        return ()
    blocks = tuple(glob_modules(module, settings.blocks, place)) if settings.blocks else find_blocks(module)
    inner = next((one for one in blocks for other in blocks if one.startswith(f"{other}.")), None)
    if asked and not blocks:
        what = f"{type(module).__name__} has no list of modules of one kind that could be its blocks"
        raise ModelError(place, what, "name them under `model.blocks`")
    if asked and inner is not None:
        raise ModelError(place, f"block {inner!r} lies in another block", "name either under `model.blocks`")
    return () if inner is not None else blocks


def refuse_blocks(model_run: ModelRun) -> None:
    """Raise ModelError where a recipe asks for blocks in a run that needs the whole network in memory."""
    settings = model_run.recipe.model
    if settings is not None and settings.offload == "blocks":
        what = "this needs the whole network at once, and `offload: blocks` has a block of it"
        raise ModelError(model_run.place("model"), what, "leave it out; quantize and eval go by blocks")


def checkpoint_reader(checkpoint: Checkpoint) -> Read:
    """Reads a tensor of a checkpoint, also by a name that another one stands for. Raises CheckpointError."""
    held = {info.name: (shard, info) for shard in checkpoint.shards for info in shard.tensors}

    def read(name: str) -> Tensor:
        shard, info = held[name if name in held else checkpoint.tied[name]]
        if info.dtype not in KEPT_DTYPES:
            hint = "convert it to a dtype that torch has"
            raise CheckpointError(str(shard.path), no_counterpart(info.dtype), hint, Subject(info.name))
        return tensor_of(shard.pieces_of(info.name), info)

    return read


def checkpoint_blueprint(checkpoint: Checkpoint, model_run: ModelRun, blocks: Sequence[str]) -> Blueprint:
    """The network with the places of a checkpoint's tensors. Raises as `make_blueprint`."""
    own = {info.name: info.shape for info in checkpoint.tensors}
    shapes = own | {name: own[twin] for name, twin in checkpoint.tied.items() if name not in own}
    return make_blueprint(model_run, blocks, shapes, [*own], checkpoint_reader(checkpoint), str(checkpoint.path))


def artifact_reader(artifact: Artifact) -> Read:
    """Reads a tensor of an artifact as its checkpoint had it. Raises ArtifactError."""

    def read(name: str) -> Tensor:
        stored = artifact.tied.get(name, name)
        file = artifact.file_of(stored)
        return file.tensor(stored).weight() if stored in file.manifest.tensors else file.kept_tensor(stored)

    return read


def artifact_blueprint(artifact: Artifact, model_run: ModelRun, blocks: Sequence[str]) -> Blueprint:
    """The network with the places of the tensors that an artifact decodes to. Raises as `make_blueprint`."""
    shapes, read = stored_shapes(artifact), artifact_reader(artifact)
    return make_blueprint(model_run, blocks, shapes, [*shapes], read, str(artifact.path), ArtifactError)
