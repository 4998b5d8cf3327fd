"""An artifact becomes an ordinary checkpoint: every tensor dense, in its original name, shape and dtype, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qcompress.artifact.artifact_file import ArtifactFile
from qcompress.artifact.layout import Layout, Slot, header_room, header_text, plain_name
from qcompress.artifact.reader import Artifact
from qcompress.artifact.writer import SlotWriter, copy_companions, find_companions, unmark_config, write_index
from qcompress.checkpoint.outputs import refuse_own_input
from qcompress.checkpoint.staging import staged_output
from qcompress.coding.grids import decode
from qcompress.errors import ArtifactError
from qcompress.types.plan import DTYPE_BITS

INDEX_NAME = "model.safetensors.index.json"


def export(artifact: Artifact, output: Path, *, force: bool) -> int:
    """Write the dense checkpoint, a file for each file of the artifact; the bytes written.

    Tied copies that the checkpoint stored are stored again. Raises ArtifactError where a tensor is damaged and where
    there are caps, OutputError and ResourceError where the output cannot be written; nothing is left behind then.
    """
    refuse_own_input(artifact.path, output)
    if artifact.caps:
        what = f"bounds the outputs of {len(artifact.caps)} modules, which a dense checkpoint cannot hold"
        raise ArtifactError(str(artifact.path), what, "quantize with dfq's relu6: skip, or use qcompress.load_into")
    folder = artifact.path.is_dir()
    find_companions(artifact.path)
    with staged_output(output, force=force, folder=folder) as staged:
        layouts = {
            plain_name(file.path.name): _export_file(
                artifact, file, staged / plain_name(file.path.name) if folder else staged
            )
            for file in artifact.files
        }
        if folder:
            copy_companions(artifact.path, staged)
            unmark_config(staged)
        if len(layouts) > 1:
            write_index(staged, {name: layout.slots for name, layout in layouts.items()}, INDEX_NAME)
        return sum(path.stat().st_size for path in (staged.iterdir() if folder else [staged]))


def _export_file(artifact: Artifact, file: ArtifactFile, path: Path) -> Layout:
    """Write one file, wide dtypes first and then by name; where its bytes lie."""
    copies = artifact.copies_of(file)
    originals = [*(file.original(info.name) for info in file.kept), *map(file.original, file.manifest.tensors), *copies]
    originals.sort(key=lambda info: (-DTYPE_BITS[info.dtype], info.name))
    slots = [Slot(info.name, info.dtype, info.shape, info.n_bytes, copies.get(info, info.name)) for info in originals]
    layout = Layout(tuple(slots), header_room(_render_header(slots, file)))
    with SlotWriter(path, layout) as writer:
        for slot in slots:
            for data in _dense_bytes(artifact.file_of(slot.tensor), slot.tensor):
                writer.put(slot.name, data)
        writer.finish(lambda final: _render_header(final, file))
    return layout


def _render_header(slots: Sequence[Slot], file: ArtifactFile) -> bytes:
    return header_text(slots, {"format": "pt", **file.manifest.metadata})


def _dense_bytes(file: ArtifactFile, name: str) -> Iterator[memoryview]:
    """The tensor's bytes as the checkpoint had them, or would have them after decoding; in pieces."""
    if name not in file.manifest.tensors:
        yield from file.kept_pieces(name)
        return
    tensor = file.tensor(name)
    if tensor.in_order:
        for block in tensor.blocks():
            yield _raw(decode(block.encoded))
        return
    doing = "decoding it, whose rows do not lie one behind another,"
    file.refuse_memory(name, 2 * file.original(name).n_bytes, doing)
    yield _raw(tensor.weight())


def _raw(weight: Tensor) -> memoryview:
    # Flat first: a scalar cannot be seen as bytes.
    return weight.reshape(-1).view(torch.uint8).numpy().data
