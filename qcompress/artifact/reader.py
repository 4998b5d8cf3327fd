"""An artifact is read here: everything is checked against everything else before anything is allocated.

A tensor is decoded from its codes only after their length, their CRC-32 and their grid are known to be right.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.artifact.layout import INDEX_NAME, PARTS, POOL_NAME, Slot, part_name
from qcompress.artifact.manifest import (
    METADATA_KEY,
    Entry,
    Manifest,
    ManifestError,
    NewerFormatError,
    artifact_hash,
    header_crc32,
    parse_manifest,
)
from qcompress.artifact.parts import REFETCH, UnboundedFile, check_parts, find_parts, halved_dtypes
from qcompress.checkpoint.safetensors_file import Container, parse_json, read_container
from qcompress.coding.ans import decoding_processes
from qcompress.coding.packing import count_codes, unpack
from qcompress.coding.payload import decode_payload
from qcompress.errors import ArtifactError, InputError, Subject, raise_all
from qcompress.types.encoded import ActivationGrid
from qcompress.types.plan import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qcompress.types.encoded import Affine, Codebook, Unbounded

NUMPY_DTYPES = {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4"}


@dataclass(frozen=True)
class ArtifactFile:
    """One safetensors file with a manifest: a whole artifact, or one shard of it.

    executor  of processes that share the work of decoding
    """

    container: Container
    manifest: Manifest
    kept: tuple[TensorInfo, ...]
    executor: Executor | None = None

    @property
    def path(self) -> Path:
        return self.container.path

    def original(self, name: str) -> TensorInfo:
        """A tensor of this file as the checkpoint had it."""
        entry = self.manifest.tensors.get(name)
        if entry is not None:
            return TensorInfo(name, entry.shape, entry.dtype)
        info = self.container.by_name[name]
        return replace(info, dtype=self._halved.get(name, info.dtype))

    @cached_property
    def _halved(self) -> dict[str, str]:
        """Kept tensor that is stored as F16 -> its dtype in the checkpoint."""
        return halved_dtypes(self.kept, self.manifest)

    def kept_bytes(self, name: str) -> memoryview:
        """The bytes of a kept tensor as the checkpoint had it, in its own dtype."""
        raw = self.container.bytes_of(name)
        if name not in self._halved:
            return raw
        wide = np.frombuffer(raw, "<f2").astype({"F32": "<f4", "F64": "<f8"}[self._halved[name]])
        return memoryview(wide.tobytes())

    def parts_of(self, name: str) -> dict[str, TensorInfo]:
        """part -> its stored tensor, for a compressed tensor, in the order of PARTS."""
        return find_parts(self.container, name)

    def grid_of(self, name: str) -> dict[str, TensorInfo]:
        """part -> the stored tensor that a compressed tensor's codes are decoded by, perhaps another's codebook."""
        parts = self.parts_of(self.manifest.tensors[name].codebook or name)
        return {part: info for part, info in parts.items() if part != "codes"}

    def slots(self) -> list[Slot]:
        """What the file holds, as the writer's slots, in file order."""
        owner = {part_name(name, part): name for name in self.manifest.tensors for part in PARTS}
        return [
            Slot(info.name, info.dtype, info.shape, info.n_bytes, owner.get(info.name, info.name))
            for info in self.container.tensors
        ]

    @property
    def pooled_bytes(self) -> int:
        """Side information that several tensors share."""
        info = self.container.by_name.get(POOL_NAME)
        return info.n_bytes if info is not None else 0

    @cached_property
    def unbounded_tensors(self) -> UnboundedFile:
        """The tensors of this file whose codes are unbounded."""
        return UnboundedFile(self.container, self.manifest, self.executor)

    def check_codes(self, name: str) -> None:
        """Decode a compressed tensor, to see that it can be. Raises ArtifactError."""
        if self.manifest.tensors[name].is_unbounded:
            self.unbounded_tensors.codes(name)
        else:
            self.packed_codes(name)

    def packed_codes(self, name: str) -> NDArray[np.uint8]:
        """The packed codes [rows, row_bytes] of a compressed tensor, checked with its grid. Raises ArtifactError."""
        entry = self.manifest.tensors[name]
        payload = self.container.bytes_of(part_name(name, "codes"))
        try:
            packed = decode_payload(payload, entry.coding, entry.bits, entry.code_rows, entry.columns, self.executor)
        except ValueError as error:
            raise ArtifactError(str(self.path), str(error), REFETCH, Subject(name)) from None
        crc = zlib.crc32(np.ascontiguousarray(packed).data)
        for info in self.grid_of(name).values():
            crc = zlib.crc32(self.container.bytes_of(info.name), crc)
        if crc != entry.crc32:
            raise ArtifactError(str(self.path), "its checksum does not hold", REFETCH, Subject(name))
        if not all(np.isfinite(grid).all() for grid in self.grids(name).values()):
            raise ArtifactError(str(self.path), "its grid holds NaN or Inf", REFETCH, Subject(name))
        if entry.grid == "codebook":
            entries = self.grid_of(name)["codebook"].shape[1]
            if entries < 2**entry.bits and count_codes(packed, entry.bits, entry.columns)[entries:].any():
                raise ArtifactError(str(self.path), "a code is beyond its codebook", REFETCH, Subject(name))
        return packed

    def grids(self, name: str) -> dict[str, NDArray[Any]]:
        """part -> its values, of scale and zero point, offset or codebook; views of the file."""
        return {
            part: np.frombuffer(self.container.bytes_of(info.name), np.dtype(NUMPY_DTYPES[info.dtype])).reshape(
                info.shape
            )
            for part, info in self.grid_of(name).items()
        }

    def read_encoded(self, name: str) -> Affine | Codebook | Unbounded:
        """A compressed tensor's codes and grid or codebook. Raises ArtifactError."""
        import torch

        from qcompress.coding.unbounded.side import unbounded_of_grid
        from qcompress.types.encoded import Affine, Codebook

        entry = self.manifest.tensors[name]
        if entry.is_unbounded:
            return unbounded_of_grid(*self.unbounded_tensors.codes(name), entry.shape, entry.axis, entry.dtype)
        codes = unpack(self.packed_codes(name), entry.bits, entry.columns)
        grids = {part: torch.from_numpy(values.copy()) for part, values in self.grids(name).items()}
        if entry.grid == "codebook":
            return Codebook(
                codes=torch.from_numpy(codes if entry.bits <= 8 else codes.astype(np.int16)),
                bits=entry.bits,
                centroids=grids["codebook"],
                exponent=entry.exponent,
                shape=entry.shape,
                scale=grids.get("scale"),
                axis=entry.axis,
                dtype=entry.dtype,
            )
        return Affine(
            codes=torch.from_numpy(codes),
            bits=entry.bits,
            scale=grids["scale"],
            exponent=entry.exponent,
            shape=entry.shape,
            zero_point=grids.get("zero_point"),
            offset=grids.get("offset"),
            convention=entry.grid if entry.grid in ("narrow", "full", "mid-rise") else None,
            axis=entry.axis,
            dtype=entry.dtype,
        )

    def check_digests(self) -> None:
        """Hold header and data against the manifest's checksums of them. Raises ArtifactError."""
        start, mapped = self.container.data_start, self.container.mapped
        if header_crc32(mapped[:start], self.manifest.header_crc32) != self.manifest.header_crc32:
            raise ArtifactError(str(self.path), "its header does not have the CRC-32 that its manifest names", REFETCH)
        if hashlib.sha256(memoryview(mapped)[start:]).hexdigest() != self.manifest.sha256:
            raise ArtifactError(str(self.path), "its data do not have the SHA-256 that its manifest names", REFETCH)


@dataclass(frozen=True)
class Artifact:
    """A compressed checkpoint: one file, or a folder of them. The last part of `path` is its name."""

    path: Path
    files: tuple[ArtifactFile, ...]

    @property
    def file_bytes(self) -> int:
        return sum(file.container.file_bytes for file in self.files)

    @contextmanager
    def decoding_with(self, workers: int) -> Iterator[Artifact]:
        """This artifact while so many processes share the decoding of its large tensors, where it has enough of them.

        The processes import the main module anew: a script needs the usual guard, `if __name__ == "__main__"`.
        """
        entries = [entry for file in self.files for entry in file.manifest.tensors.values()]
        codes = sum(entry.code_rows * entry.columns for entry in entries if entry.coding == "ans")
        with decoding_processes(codes, workers) as executor:
            yield replace(self, files=tuple(replace(file, executor=executor) for file in self.files))

    @property
    def sha256(self) -> str:
        """What a report names this artifact by."""
        return artifact_hash([(file.path.name, file.manifest.sha256) for file in self.files])

    def file_of(self, name: str) -> ArtifactFile:
        """The file that stores a tensor, compressed or kept."""
        return next(file for file in self.files if name in file.manifest.tensors or name in file.container.spans)

    @property
    def tied(self) -> Mapping[str, str]:
        """Name -> the tensor that stands for it."""
        return {name: twin for file in self.files for name, twin in file.manifest.tied.items()}

    @property
    def activations(self) -> Mapping[str, ActivationGrid]:
        """Module -> the quantizer at its input."""
        return {name: grid for file in self.files for name, grid in file.manifest.activations.items()}

    @property
    def caps(self) -> Mapping[str, Sequence[float]]:
        """Module -> the largest value that each channel of its output may take."""
        return {name: caps for file in self.files for name, caps in file.manifest.caps.items()}

    def copies_of(self, file: ArtifactFile) -> dict[TensorInfo, str]:
        """Tied copies that the checkpoint stored in this file -> what stands for them; a name in metadata has none."""
        aliases = {name for each in self.files for name in each.manifest.metadata}
        copies = {name: twin for name, twin in file.manifest.tied.items() if name not in aliases}
        return {replace(self.file_of(twin).original(twin), name=name): twin for name, twin in copies.items()}

    def verify(self) -> Iterator[tuple[str, Entry]]:
        """Each compressed tensor that decodes to what was written.

        raises  ArtifactError at the end, Refusals where several are damaged; of a whole file where no tensor tells
        """
        errors: list[InputError] = []
        for file in self.files:
            damaged: list[InputError] = []
            for name, entry in file.manifest.tensors.items():
                try:
                    file.check_codes(name)
                except ArtifactError as error:
                    damaged.append(error)
                else:
                    yield name, entry
            if not damaged:
                try:
                    file.check_digests()
                except ArtifactError as error:
                    damaged.append(error)
            errors += damaged
        raise_all(errors)


def read_artifact(path: Path) -> Artifact:
    """The artifact at `path`, a file or a folder: headers and manifests, checked. Raises ArtifactError."""
    # `.` and `..` have no name of their own.
    path = path.resolve() if path.name in ("", "..") else path
    weight_map = _read_index(path / INDEX_NAME) if (path / INDEX_NAME).is_file() else None
    artifact = Artifact(path, tuple(read_artifact_file(file) for file in _find_files(path, weight_map)))
    held = {info.name: file.path.name for file in artifact.files for info in file.container.tensors}
    if weight_map is not None and held != weight_map:
        odd = sorted(dict(held.items() ^ weight_map.items()))[0]
        raise ArtifactError(str(path / INDEX_NAME), f"is wrong about the file that holds {odd!r}", REFETCH)
    names = [name for file in artifact.files for name in (*file.manifest.tensors, *(info.name for info in file.kept))]
    stored = set(names)
    if len(stored) != len(names):
        raise ArtifactError(str(path), "holds a tensor in two of its files", REFETCH)
    for name, twin in artifact.tied.items():
        if name in stored:
            raise ArtifactError(str(path), f"tensor {name!r} is called tied and is stored too", REFETCH)
        if twin not in stored:
            raise ArtifactError(str(path), f"ties {name!r} to {twin!r}, which it does not hold", REFETCH)
    return artifact


def _read_index(index: Path) -> dict[str, str]:
    """Stored tensor -> the file that holds it. Raises ArtifactError."""
    try:
        document = parse_json(index.read_text(encoding="utf-8"))
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        names = set(weight_map.values()) if isinstance(weight_map, dict) else None
    except (OSError, ValueError, TypeError):
        weight_map = names = None
    if weight_map is None or names is None:
        raise ArtifactError(str(index), "has no weight_map from tensor to file", REFETCH) from None
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ArtifactError(str(index), "names files outside its folder, or none", REFETCH)
    return dict(weight_map)


def _find_files(path: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    """The files of an artifact, those that its index need not name because all they held is tied to others included."""
    if not path.is_dir():
        return [path]
    files = {file.name for file in path.glob("*.safetensors")}
    if weight_map is not None:
        files |= set(weight_map.values())
    elif len(files) != 1:
        raise ArtifactError(str(path), f"holds {len(files)} .safetensors files and no {INDEX_NAME}", "name one file")
    return [path / name for name in sorted(files)]


def read_artifact_file(path: Path) -> ArtifactFile:
    """One file's header and manifest, checked. Raises ArtifactError."""
    container = read_container(path, ArtifactError)
    text = container.metadata.get(METADATA_KEY)
    if text is None:
        raise ArtifactError(
            str(path), "is a plain safetensors file, not an artifact", "compress it: qcompress quantize"
        )
    try:
        manifest = parse_manifest(text)
        kept = check_parts(container, manifest)
    except ManifestError as error:
        hint = "update qcompress" if isinstance(error, NewerFormatError) else REFETCH
        raise ArtifactError(str(path), str(error), hint) from None
    return ArtifactFile(container, manifest, kept)
