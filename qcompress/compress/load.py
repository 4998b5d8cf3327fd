"""Artifacts and checkpoints are loaded: into tensors by name, or into a module of the original architecture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qcompress.artifact.artifact_file import ArtifactFile
from qcompress.artifact.memory import ALLOW, refuse_memory
from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.calibration.activations import attach_activations, attach_caps
from qcompress.coding.kept import KEPT_DTYPES, no_counterpart, tensor_of
from qcompress.errors import ArtifactError, CheckpointError, Subject
from qcompress.model.build import load_weights, refuse_misfit, take_shapes
from qcompress.runtime.load_packed import Held, Kernel, dense_bytes, held_bytes, make_packing, stored_shapes

if TYPE_CHECKING:
    from qcompress.checkpoint.checkpoint import Checkpoint


def load_state_dict(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    workers: int = 1,
    max_memory: int | None = None,
) -> dict[str, Tensor]:
    """Every tensor of the artifact by its original name, decoded to its original shape and dtype; tied names share one.

    workers     processes that share the entropy coded chunks of a large artifact; they import the main module anew, so
                a script needs the usual guard, `if __name__ == "__main__"`
    max_memory  bytes that this may take, the tensors included; None: all that there is
    raises      ArtifactError where the artifact is missing, damaged or foreign; ResourceError, before any tensor is
                read, where they do not fit in `max_memory`
    """
    return read_state(read_artifact(Path(path), max_memory), device, workers=workers)


def read_state(
    artifact: Artifact, device: str | torch.device = "cpu", *, workers: int = 1, held: int = 0
) -> dict[str, Tensor]:
    """The same of an artifact that was opened, where `held` bytes of what it may take are in use."""
    refuse_state(artifact, held)
    with artifact.decoding_with(workers) as shared:
        state = {name: tensor.to(device) for file in shared.files for name, tensor in _tensors(file)}
    state.update({name: state[twin] for name, twin in artifact.tied.items()})
    return state


def refuse_state(artifact: Artifact, held: int = 0) -> None:
    """Raise ResourceError, before any is read, where all tensors together do not fit beside `held` bytes."""
    sizes: dict[str, int] = {}
    moved = 0
    for file in artifact.files:
        for name in (*(info.name for info in file.kept), *file.manifest.tensors):
            sizes[name] = file.original(name).n_bytes
        # Of what does not lie as its rows do there are two for a while.
        moved = max([moved, *(sizes[name] for name, entry in file.manifest.tensors.items() if not entry.leads)])
    if sizes:
        largest = max(sizes, key=lambda name: sizes[name])
        file = artifact.file_of(largest)
        hint = f"{ALLOW}, or read it block by block: qcompress export ARTIFACT --to safetensors"
        file.refuse_memory(largest, sum(sizes.values()) + moved + held, _loading(sizes, held), hint)


def _loading(sizes: Mapping[str, int], held: int) -> str:
    others = f"all {len(sizes)} tensors, it the largest," if len(sizes) > 1 else "it"
    return f"loading {others} beside the network" if held else f"loading {others}"


def _tensors(file: ArtifactFile) -> Iterator[tuple[str, Tensor]]:
    for info in file.kept:
        yield info.name, file.kept_tensor(info.name)
    for name in file.manifest.tensors:
        yield name, file.tensor(name).weight()


def checkpoint_state(checkpoint: Checkpoint, max_memory: int | None = None, held: int = 0) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, copied out of its files; names without data of their own share one.

    max_memory  bytes that they may take beside `held`; None: all that there is
    raises      CheckpointError for a dtype that torch does not have; ResourceError
    """
    sizes = {info.name: info.n_bytes for shard in checkpoint.shards for info in shard.tensors}
    if sizes:
        largest = max(sizes, key=lambda name: sizes[name])
        where = checkpoint.shard_of(largest).path
        refuse_memory(max_memory, sum(sizes.values()) + held, where, largest, _loading(sizes, held), ALLOW)
    state: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        for info in shard.tensors:
            if info.dtype not in KEPT_DTYPES:
                hint = "convert it to a dtype that torch has"
                raise CheckpointError(str(shard.path), no_counterpart(info.dtype), hint, Subject(info.name))
            state[info.name] = tensor_of(shard.pieces_of(info.name), info)
    return state | {name: state[twin] for name, twin in checkpoint.tied.items() if name not in state}


def load_into(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    activations: bool = False,
    packed: bool = False,
    kernel: Kernel = "decode",
    workers: int = 1,
    max_memory: int | None = None,
) -> None:
    """Put the artifact's weights into a module of the original architecture, and the caps that they need.

    A network of transformers takes them as `from_pretrained` would: renamed, merged, tied.

    strict       refuse names that only one side has, as torch.nn.Module.load_state_dict does
    activations  also quantize the inputs of the layers, where the artifact says how
    packed       hold compressed weights as their codes, and decode them whenever they are read: the network is as small
                 in memory as its artifact packed, slower, and computes exactly the same. It may lie on the meta device
    kernel       of packed linear layers: "auto" lets torch's 4-bit kernel compute, where the module is bfloat16 and the
                 grids have 4 bits and groups of 32, 64, 128 or 256, from scales rounded to bfloat16
    workers      as for load_state_dict, as is max_memory, besides what the module itself takes
    raises       ArtifactError where the artifact is missing or damaged, or does not fit the module; ResourceError as
                 load_state_dict does
    """
    artifact = read_artifact(Path(path), max_memory)
    try:
        if packed:
            hold_packed(module, artifact, strict=strict, kernel=kernel)
        else:
            load_weights(module, read_state(artifact, workers=workers), str(path), strict=strict, error=ArtifactError)
        attach_caps(module, artifact.caps)
        if activations:
            attach_activations(module, artifact.activations)
    except (RuntimeError, AttributeError) as error:
        what = f"does not fit {type(module).__name__}: {' '.join(str(error).split())[:300]}"
        raise ArtifactError(str(path), what, "build the module that the checkpoint was saved from") from None


def hold_packed(module: nn.Module, artifact: Artifact, *, strict: bool = True, kernel: Kernel = "decode") -> Held:
    """Put an artifact's weights into a module of the original architecture as codes, see `load_into`.

    raises  ArtifactError (Refusals where several) where they do not fit, before anything is changed
    """
    taken = take_shapes(module, stored_shapes(artifact))
    refuse_misfit(module, taken, str(artifact.path), strict=strict, error=ArtifactError)
    packing = make_packing(module, artifact, taken)
    whole = dense_bytes(module)
    on_meta = any(value.is_meta for value in module.state_dict().values())
    by_kernel = packing.hold_codes(kernel)
    kept = {info.name: file.kept_tensor(info.name) for file in artifact.files for info in file.kept}
    module.load_state_dict(packing.values(kept), strict=False, assign=on_meta)
    if left := [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]:
        raise RuntimeError(f"{', '.join(left)} lies on the meta device, and the artifact does not hold it")
    return Held(tuple(packing.sites), by_kernel, packing.dense(), held_bytes(module), whole)
