"""The tensors of an artifact as exporters see them: dense bytes, rows of codes, grids in float32, and what fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.artifact.artifact_file import ArtifactFile
from qcompress.artifact.entry import Entry
from qcompress.artifact.layout import Slot, header_room, header_text, index_text
from qcompress.artifact.reader import Artifact
from qcompress.artifact.stored_tensor import StoredTensor
from qcompress.coding.grids import decode, middle
from qcompress.coding.packing import unpack
from qcompress.errors import ArtifactError, Subject
from qcompress.types.export import ExportFile, Target
from qcompress.types.plan import DTYPE_BITS, TensorInfo

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Grid:
    """What decodes the codes of an affine weight, a line a row: weight = scale * (code - zero) + offset.

    scale   float32 [rows, groups]
    zero    float32 [rows, groups], integers or, of a mid-rise grid, halves
    offset  float32 [rows, groups], or None
    """

    scale: NDArray[np.float32]
    zero: NDArray[np.float32]
    offset: NDArray[np.float32] | None


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint that an artifact stands for.

    info    of the tensor as the checkpoint had it
    stored  the tensor of the artifact's `file` that holds its values: another where it is a tied copy
    """

    info: TensorInfo
    file: ArtifactFile
    stored: str

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def entry(self) -> Entry | None:
        """What the manifest says of its codes; None of a tensor that is kept."""
        return self.file.manifest.tensors.get(self.stored)

    @property
    def is_copy(self) -> bool:
        return self.stored != self.name

    @property
    def tensor(self) -> StoredTensor:
        """Its codes, to be read by one reader."""
        return self.file.tensor(self.stored)

    def dense(self) -> Iterator[memoryview]:
        """Its bytes as the checkpoint had them, or would have them after decoding; in pieces. Raises ArtifactError."""
        if self.entry is None:
            yield from self.file.kept_pieces(self.stored)
            return
        tensor = self.tensor
        if tensor.in_order:
            for block in tensor.blocks():
                yield _raw(decode(block.encoded))
            return
        doing = "decoding it, whose rows do not lie one behind another,"
        self.file.refuse_memory(self.stored, 2 * self.info.n_bytes, doing)
        yield _raw(tensor.weight())

    def dense_target(self, name: str = "") -> Target:
        """The tensor as the checkpoint had it, under its own name or another."""
        info = self.info
        return Target(
            name or info.name, info.dtype, info.shape, info.n_bytes, info.name, info.dtype, info.numel, self.dense
        )

    def refused(self, what: str, hint: str) -> ArtifactError:
        """The error that a format cannot hold this tensor."""
        return ArtifactError(str(self.file.path), what, hint, Subject(self.name, self.info.shape))

    # What follows is for codes of grids that are affine or a table.

    @property
    def grid(self) -> Grid:
        """The grid of a weight. Its checksum is checked when the codes are read, which is never left out."""
        entry = self.entry
        assert entry is not None
        parts = self.tensor.grids()
        shape = (entry.rows, entry.grid_shape[1])
        exponent: Any = parts["exponent"][:, None].astype(np.int32) if "exponent" in parts else entry.exponent

        def spread(values: NDArray[Any]) -> NDArray[np.float32]:
            return np.ascontiguousarray(np.broadcast_to(values.astype(np.float32), shape))

        scale = spread(np.ldexp(parts["scale"].astype(np.float32), exponent))
        if "offset" in parts:
            offset = spread(np.ldexp(parts["offset"].astype(np.float32), exponent))
            return Grid(scale, np.zeros(shape, np.float32), offset)
        if "zero_point" in parts:
            return Grid(scale, spread(parts["zero_point"]), None)
        if entry.form == "table":
            return Grid(scale, np.zeros(shape, np.float32), None)
        assert entry.grid == "full" or entry.grid == "narrow" or entry.grid == "mid-rise"
        return Grid(scale, spread(np.array([middle(entry.grid, entry.bits)])), None)

    def code_rows(self) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """The codes, some whole rows [rows, columns] at a time, checked. Raises ArtifactError."""
        entry = self.entry
        assert entry is not None
        parts: list[NDArray[np.uint8]] = []
        for rows, columns, packed in self.tensor.packed_tiles():
            parts.append(unpack(packed, entry.bits, columns.stop - columns.start))
            if columns.stop == entry.columns:
                yield rows, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
                parts = []

    @property
    def group(self) -> int:
        """Columns that share a scale: all of them where that is a row or the tensor."""
        assert self.entry is not None
        return self.entry.group_size or max(self.entry.columns, 1)


def _raw(weight: Tensor) -> memoryview:
    # Flat first: a scalar cannot be seen as bytes.
    return weight.reshape(-1).view(torch.uint8).numpy().data


def find_sources(artifact: Artifact) -> list[tuple[ArtifactFile, list[Source]]]:
    """Each file with the tensors that the checkpoint's file stored, tied copies included.

    raises  ArtifactError where outputs of modules are bounded, which a checkpoint cannot say
    """
    if artifact.caps:
        what = f"bounds the outputs of {len(artifact.caps)} modules, which a dense checkpoint cannot hold"
        raise ArtifactError(str(artifact.path), what, "quantize with dfq's relu6: skip, or use qcompress.load_into")
    found = []
    for file in artifact.files:
        own = [*(info.name for info in file.kept), *file.manifest.tensors]
        sources = [Source(file.original(name), file, name) for name in own]
        sources += [Source(info, artifact.file_of(twin), twin) for info, twin in artifact.copies_of(file).items()]
        found.append((file, sources))
    return found


def activation_notes(artifact: Artifact) -> list[str]:
    """What the formats of weights lose of an artifact."""
    count = len(artifact.activations)
    return [f"the quantizers of activations at {count} modules are left out"] if count else []


def safetensors_file(name: str, targets: list[Target], metadata: Mapping[str, str]) -> ExportFile:
    """A safetensors file of these tensors, wide dtypes first and then by name."""
    targets = sorted(targets, key=lambda target: (-DTYPE_BITS[target.dtype], target.name))
    header = header_text([_slot(target) for target in targets], metadata)
    room = header_room(header) - 8
    return ExportFile(name, room.to_bytes(8, "little") + header.ljust(room), tuple(targets))


def safetensors_index(files: list[ExportFile]) -> dict[str, bytes]:
    """The index of several safetensors files; none of a single one."""
    if len(files) < 2:
        return {}
    slots = {file.name: [_slot(target) for target in file.targets] for file in files}
    return {INDEX_NAME: index_text(slots).encode()}


def _slot(target: Target) -> Slot:
    return Slot(target.name, target.dtype, target.shape, target.n_bytes, target.source)
