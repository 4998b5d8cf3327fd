"""An artifact is read here: everything is checked against everything else before anything is allocated.

A tensor is decoded from its codes only after their length, their CRC-32 and their grid are known to be right.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.artifact.entry import PARTS, Entry, part_name, seal, seal_all_kept, seal_kept, seal_tied
from qcompress.artifact.hashes import artifact_hash
from qcompress.artifact.layout import INDEX_NAME, OWN_NAMES, Slot, expand_file
from qcompress.artifact.manifest import (
    DATA_NAME,
    MANIFEST_NAME,
    METADATA_KEY,
    POOL_NAME,
    Manifest,
    ManifestError,
    NewerFormatError,
)
from qcompress.artifact.parse_manifest import LIMITS, open_manifest, refuse_other_format
from qcompress.artifact.parts import REFETCH, UnboundedFile, check_parts, find_parts, halved_dtypes, other_names
from qcompress.checkpoint.safetensors_file import Container, parse_json, read_container
from qcompress.coding.ans import decoding_processes
from qcompress.coding.packing import count_codes, unpack
from qcompress.coding.payload import decode_payload, least_bytes
from qcompress.coding.tables import given_values
from qcompress.errors import ArtifactError, InputError, Subject, raise_all
from qcompress.types.encoded import ActivationGrid
from qcompress.types.plan import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qcompress.types.encoded import Compressed

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

    @property
    def sha256(self) -> str:
        """What names this file: the SHA-256 of its manifest, which holds that of all else."""
        return hashlib.sha256(self.container.bytes_of(MANIFEST_NAME)).hexdigest()

    def kept_bytes(self, name: str) -> memoryview:
        """The bytes of a kept tensor as the checkpoint had it, in its own dtype, checked. Raises ArtifactError."""
        self.check_kept(name)
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
        parts = self.parts_of(self.manifest.tensors[name].shared or name)
        return {part: info for part, info in parts.items() if part != "codes"}

    def slots(self) -> list[Slot]:
        """What the file holds, as the writer's slots, in file order."""
        owner = {part_name(name, part): name for name in self.manifest.tensors for part in PARTS}
        return [
            Slot(info.name, info.dtype, info.shape, info.n_bytes, owner.get(info.name, info.name))
            for info in self.container.tensors
        ]

    @property
    def overhead_bytes(self) -> int:
        """Of header and manifest."""
        return self.container.data_start + self.container.by_name[MANIFEST_NAME].n_bytes

    @property
    def pooled_bytes(self) -> int:
        """Side information that several tensors share."""
        info = self.container.by_name.get(POOL_NAME)
        return info.n_bytes if info is not None else 0

    @cached_property
    def unbounded_tensors(self) -> UnboundedFile:
        """The tensors of this file whose codes are unbounded."""
        return UnboundedFile(self.container, self.manifest, self.executor)

    # What is read is checked first: the CRC-32 of a tensor covers all that decides its values.

    def check_kept(self, name: str) -> None:
        """Hold a kept tensor against its CRC-32. Raises ArtifactError."""
        if self.manifest.is_compact:
            if not self._kept_holds:
                raise self._damaged(name, "the checksum of all kept tensors does not hold")
            return
        info, own = self.container.by_name[name], self.original(name)
        crc32 = self.container.crc32_of(name)
        if seal_kept(name, own.dtype, info.dtype, info.shape, crc32) != self.manifest.crc32s[name]:
            raise self._damaged(name, "its checksum does not hold")

    @cached_property
    def _kept_holds(self) -> bool:
        """Whether the kept tensors of a compact file, which lie one behind another, have their common CRC-32."""
        crc32 = 0
        for info in self.kept:
            crc32 = self.container.crc32_of(info.name, crc32)
        of = [(info, self.original(info.name).dtype) for info in self.kept]
        return seal_all_kept(of, crc32) == self.manifest.crc32s[DATA_NAME]

    def check_compressed(self, name: str) -> None:
        """Hold the parts and the fields of a compressed tensor against its CRC-32. Raises ArtifactError."""
        entry = self.manifest.tensors[name]
        crc32 = self.container.crc32_of(part_name(name, "codes"))
        for info in self.grid_of(name).values():
            crc32 = self.container.crc32_of(info.name, crc32)
        if seal(name, entry, crc32) != entry.crc32:
            raise self._damaged(name, "its checksum does not hold")

    def find_damage(self) -> list[InputError]:
        """What of all that is not compressed does not have its CRC-32: kept tensors, and what is pooled."""
        errors: list[InputError] = []
        checks: list[Callable[[], None]] = [
            *(partial(self.check_kept, info.name) for info in self.kept),
            self.unbounded_tensors.check_pool,
        ]
        for check in checks:
            try:
                check()
            except ArtifactError as error:
                errors.append(error)
        return errors

    def check_codes(self, name: str) -> None:
        """Decode a compressed tensor, to see that it can be. Raises ArtifactError."""
        entry = self.manifest.tensors[name]
        if entry.is_unbounded:
            self.check_compressed(name)
            self.unbounded_tensors.codes(name)
        elif entry.form == "constant":
            self._check_constant(name)
        else:
            self.packed_codes(name)

    def _check_constant(self, name: str) -> None:
        self.check_compressed(name)
        if np.frombuffer(self.container.bytes_of(part_name(name, "codes")), np.uint8).any():
            raise self._damaged(name, "it is constant and has codes")

    def packed_codes(self, name: str) -> NDArray[np.uint8]:
        """The packed codes [rows, row_bytes] of a compressed tensor, checked with its grid. Raises ArtifactError."""
        self.check_compressed(name)
        entry = self.manifest.tensors[name]
        payload = self.container.bytes_of(part_name(name, "codes"))
        try:
            packed = decode_payload(
                payload,
                entry.coding,
                entry.bits,
                entry.code_rows,
                entry.columns,
                self.executor,
                least_bytes(entry.numel),
            )
        except ValueError as error:
            raise self._damaged(name, str(error)) from None
        grids = self.grids(name)
        if not all(np.isfinite(grid).all() for grid in grids.values()):
            raise self._damaged(name, "its grid holds NaN or Inf")
        low, high = LIMITS["exponent"]
        if "exponent" in grids and not ((grids["exponent"] >= low) & (grids["exponent"] <= high)).all():
            raise self._damaged(name, f"an exponent of its rows is not in [{low}, {high}]")
        self._check_named(name, entry, packed)
        return packed

    def _check_named(self, name: str, entry: Entry, packed: NDArray[np.uint8]) -> None:
        """Raise ArtifactError where a code names no entry of the codebook or table, or one that is no number."""
        if entry.form not in ("codebook", "table"):
            return
        if entry.given is not None:
            named = np.isfinite(given_values(entry.given))
        else:
            part, place = ("codebook", 1) if entry.form == "codebook" else ("table", 0)
            named = np.arange(2**entry.bits) < self.grid_of(name)[part].shape[place]
        if not named.all() and count_codes(packed, entry.bits, entry.columns)[~named].any():
            raise self._damaged(name, f"a code is beyond its {entry.form}")

    def grids(self, name: str) -> dict[str, NDArray[Any]]:
        """part -> its values, of all parts but the codes; views of the file."""
        return {
            part: np.frombuffer(self.container.bytes_of(info.name), np.dtype(NUMPY_DTYPES[info.dtype])).reshape(
                info.shape
            )
            for part, info in self.grid_of(name).items()
        }

    def read_encoded(self, name: str) -> Compressed:
        """A compressed tensor's codes and what decodes them, checked. Raises ArtifactError."""
        from qcompress.coding.unbounded.side import unbounded_of_grid
        from qcompress.types.encoded import Constant

        entry = self.manifest.tensors[name]
        if entry.is_unbounded:
            self.check_compressed(name)
            return unbounded_of_grid(*self.unbounded_tensors.codes(name), entry.shape, entry.axis, entry.dtype)
        if entry.form == "constant":
            self._check_constant(name)
            return Constant(entry.value, entry.shape, entry.axis, entry.dtype)
        return encoded_of(entry, unpack(self.packed_codes(name), entry.bits, entry.columns), self.grids(name))

    def check_digests(self) -> None:
        """Hold the data against the SHA-256 that the manifest names. Raises ArtifactError."""
        start, end = self.container.data_start, self.container.spans[MANIFEST_NAME][0]
        digest = hashlib.sha256()
        for piece in self.container.pieces(start, start + end):
            digest.update(piece)
        if digest.hexdigest() != self.manifest.sha256:
            raise ArtifactError(str(self.path), "its data do not have the SHA-256 that its manifest names", REFETCH)

    def _damaged(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(str(self.path), what, REFETCH, Subject(name))


def encoded_of(entry: Entry, codes: NDArray[Any], grids: Mapping[str, NDArray[Any]]) -> Compressed:
    """The form of an entry with codes [rows, columns], all or those of some rows, and the parts that decode them."""
    import torch

    from qcompress.types.encoded import Affine, Blocked, Codebook, Table

    parts = {part: torch.from_numpy(values.copy()) for part, values in grids.items()}
    held = torch.from_numpy(codes if entry.bits <= 8 else codes.astype(np.int16))
    common: dict[str, Any] = {
        "codes": held,
        "bits": entry.bits,
        "exponent": entry.exponent,
        "shape": entry.shape,
        "axis": entry.axis,
        "dtype": entry.dtype,
    }
    if entry.form == "codebook":
        return Codebook(**common, centroids=parts["codebook"], scale=parts.get("scale"))
    common |= {"scale": parts["scale"], "row_exponents": parts.get("exponent")}
    convention = entry.grid if entry.grid in ("narrow", "full", "mid-rise") else None
    match entry.form:
        case "affine":
            zero_point, offset = parts.get("zero_point"), parts.get("offset")
            return Affine(
                **common,
                zero_point=zero_point,
                offset=offset,
                convention=convention,
                group_size=entry.group_size,
            )
        case "table":
            values = parts["table"] if entry.given is None else torch.from_numpy(given_values(entry.given))
            return Table(**common, values=values, given=entry.given, group_size=entry.group_size)
        case "blocked":
            assert entry.group_size is not None
            return Blocked(
                **common,
                subscale=parts["subscale"],
                offset=parts.get("offset"),
                suboffset=parts.get("suboffset"),
                convention=convention,
                group_size=entry.group_size,
                sub_blocks=entry.sub_blocks,
                subzero=entry.subzero,
            )
        case _:
            raise AssertionError(f"{entry.form} has no codes of {entry.bits} bits")


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
        return artifact_hash([(file.path.name, file.sha256) for file in self.files])

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
            damaged = file.find_damage()
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
    return ArtifactFile(container, manifest, kept)


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
