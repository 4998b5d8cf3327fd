"""An artifact is found and read here: everything is checked against everything else before anything is allocated."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qcompress.artifact.artifact_file import ArtifactFile
from qcompress.artifact.entry import Entry, seal_tied
from qcompress.artifact.hashes import artifact_hash
from qcompress.artifact.layout import INDEX_NAME, OWN_NAMES, expand_file
from qcompress.artifact.manifest import MANIFEST_NAME, METADATA_KEY, Manifest, ManifestError, NewerFormatError
from qcompress.artifact.memory import BLOCK_BYTES, PROCESS_BYTES
from qcompress.artifact.parse_manifest import open_manifest, refuse_other_format
from qcompress.artifact.parts import REFETCH, check_parts, other_names
from qcompress.checkpoint.pipeline import is_pipeline
from qcompress.checkpoint.safetensors_file import Container, parse_json, read_container, weight_files
from qcompress.coding.ans import decoding_processes
from qcompress.errors import ArtifactError, InputError, raise_all
from qcompress.types.encoded import ActivationGrid
from qcompress.types.plan import TensorInfo


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
        codes += sum(info.numel for file in self.files for info in file.manifest.coded.values())
        limits = [file.max_memory for file in self.files if file.max_memory is not None]
        fitting = [max(limit - BLOCK_BYTES, 0) // PROCESS_BYTES for limit in limits]
        with decoding_processes(codes, min([workers, *fitting])) as executor:
            yield replace(self, files=tuple(replace(file, executor=executor) for file in self.files))

    @property
    def sha256(self) -> str:
        """What a report names this artifact by."""
        return artifact_hash([(file.path.name, file.sha256) for file in self.files])

    def file_of(self, name: str) -> ArtifactFile:
        """The file that stores a tensor, compressed or kept."""
        return next(file for file in self.files if file.holds(name))

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
            damaged = file.find_damage()
            for name, entry in file.manifest.tensors.items():
                try:
                    file.tensor(name).check()
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


def read_artifact(path: Path, max_memory: int | None = None) -> Artifact:
    """The artifact at `path`, a file or a folder: headers and manifests, checked. Raises ArtifactError.

    max_memory  bytes that reading its tensors may take; None: all that there is
    """
    # `.` and `..` have no name of their own.
    path = path.resolve() if path.name in ("", "..") else path
    if is_pipeline(path):
        raise ArtifactError(
            str(path), "is a pipeline, whose components are artifacts", "name the folder of one of them"
        )
    weight_map = _read_index(path / INDEX_NAME) if (path / INDEX_NAME).is_file() else None
    artifact = Artifact(path, tuple(read_artifact_file(file, max_memory) for file in _find_files(path, weight_map)))
    held = {
        info.name: file.path.name
        for file in artifact.files
        for info in file.container.tensors
        if info.name not in OWN_NAMES
    }
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
    files = {file.name for file in weight_files(path)}
    if weight_map is not None:
        files |= set(weight_map.values())
    elif len(files) != 1:
        raise ArtifactError(str(path), f"holds {len(files)} .safetensors files and no {INDEX_NAME}", "name one file")
    return [path / name for name in sorted(files)]


def read_artifact_file(path: Path, max_memory: int | None = None) -> ArtifactFile:
    """One file's header and manifest, checked. Raises ArtifactError."""
    container = read_container(path, ArtifactError)
    text = container.metadata.get(METADATA_KEY)
    if text is None:
        raise ArtifactError(
            str(path), "is a plain safetensors file, not an artifact", "compress it: qcompress quantize"
        )
    try:
        refuse_other_format(_parse_format(text))
        manifest = _read_manifest(container)
        if manifest.is_compact:
            container = expand_file(container, manifest)
        kept = check_parts(container, manifest)
        for name, twin in manifest.tied.items():
            if seal_tied(name, twin) != manifest.crc32s[name]:
                raise ManifestError(f"tensor {name!r} is tied by a checksum that does not hold")
    except ManifestError as error:
        hint = "update qcompress" if isinstance(error, NewerFormatError) else REFETCH
        raise ArtifactError(str(path), str(error), hint) from None
    return ArtifactFile(container, manifest, kept, max_memory=max_memory)


def _parse_format(text: str) -> int:
    """The format that a file's metadata names. Raises ManifestError."""
    if text.startswith("{"):
        # What format 1 had in this place.
        return 1
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise ManifestError("its format is no number")
    return int(text)


def _read_manifest(container: Container) -> Manifest:
    """The manifest of a file, which has to be its last tensor. Raises ManifestError."""
    info = container.by_name.get(MANIFEST_NAME)
    if info is None:
        raise ManifestError(f"it has no {MANIFEST_NAME!r}")
    if (info.dtype, len(info.shape)) != ("U8", 1) or container.spans[MANIFEST_NAME][1] != container.data_bytes:
        raise ManifestError(f"its {MANIFEST_NAME!r} is not a list of bytes at its end")
    manifest = open_manifest(container.bytes_of(MANIFEST_NAME), partial(other_names, container))
    if zlib.crc32(container.read(0, container.data_start)) != manifest.header_crc32:
        raise ManifestError("its header does not have the CRC-32 that its manifest names")
    return manifest
