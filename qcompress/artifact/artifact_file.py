"""One file of an artifact: what it holds, its checksums, and a way to each of its tensors. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompress.artifact.entry import PARTS, part_name, seal_all_kept, seal_kept
from qcompress.artifact.layout import Slot
from qcompress.artifact.manifest import DATA_NAME, MANIFEST_NAME, POOL_NAME, Manifest
from qcompress.artifact.memory import ALLOW, block_bytes, refuse_memory
from qcompress.artifact.parts import REFETCH, UnboundedFile, find_parts, halved_dtypes
from qcompress.artifact.stored_tensor import StoredTensor
from qcompress.checkpoint.safetensors_file import Container
from qcompress.coding.planes import decode_values
from qcompress.errors import ArtifactError, InputError, Subject
from qcompress.types.plan import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from qcompress.types.encoded import Compressed


@dataclass(frozen=True)
class ArtifactFile:
    """One safetensors file with a manifest: a whole artifact, or one shard of it.

    executor    of processes that share the work of decoding
    max_memory  bytes that a reader may use; None: all that there is
    """

    container: Container
    manifest: Manifest
    kept: tuple[TensorInfo, ...]
    executor: Executor | None = None
    max_memory: int | None = None

    @property
    def path(self) -> Path:
        return self.container.path

    def original(self, name: str) -> TensorInfo:
        """A tensor of this file as the checkpoint had it."""
        entry = self.manifest.tensors.get(name)
        if entry is not None:
            return TensorInfo(name, entry.shape, entry.dtype)
        info = self._kept_by_name[name]
        return replace(info, dtype=self._halved.get(name, info.dtype))

    def holds(self, name: str) -> bool:
        """Whether this file stores a tensor of the checkpoint, compressed or kept."""
        return name in self.manifest.tensors or name in self._kept_by_name

    @cached_property
    def _kept_by_name(self) -> dict[str, TensorInfo]:
        return {info.name: info for info in self.kept}

    @cached_property
    def _halved(self) -> dict[str, str]:
        """Kept tensor that is stored as F16 -> its dtype in the checkpoint."""
        return halved_dtypes(self.kept, self.manifest)

    @property
    def sha256(self) -> str:
        """What names this file: the SHA-256 of its manifest, which holds that of all else."""
        return hashlib.sha256(self.container.bytes_of(MANIFEST_NAME)).hexdigest()

    def kept_pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a kept tensor as the checkpoint had it, in its own dtype, in pieces, checked first.

        raises  ArtifactError
        """
        self.check_kept(name)
        wide = {"F32": "<f4", "F64": "<f8"}.get(self._halved.get(name, ""))
        for piece in self._coded_pieces(name) if name in self.manifest.coded else self.container.pieces_of(name):
            yield piece if wide is None else np.frombuffer(piece, "<f2").astype(wide).view(np.uint8).data

    def _coded_pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes that the codes of a kept tensor stand for. Raises ArtifactError, ResourceError."""
        info, codes = self.manifest.coded[name], self.container.stored(part_name(name, "codes"))
        if codes.size == info.n_bytes:
            yield from codes.pieces()
            return
        self.refuse_memory(name, 0, "reading it")
        try:
            yield from decode_values(codes, info.dtype, info.numel, self.executor)
        except ValueError as error:
            raise self._damaged(name, str(error)) from None

    def kept_bytes(self, name: str) -> int:
        """What the file holds of a kept tensor."""
        return self.container.by_name[self._stored_name(name)].n_bytes

    def _stored_name(self, name: str) -> str:
        """The stored tensor that holds a kept one."""
        return part_name(name, "codes") if name in self.manifest.coded else name

    def kept_tensor(self, name: str) -> Tensor:
        """A kept tensor, copied out of the file. Raises ArtifactError for a dtype that torch does not have too."""
        from qcompress.coding.kept import KEPT_DTYPES, no_counterpart, tensor_of

        info = self.original(name)
        if info.dtype not in KEPT_DTYPES:
            hint = "read it with: qcompress export ARTIFACT --to safetensors"
            raise ArtifactError(str(self.path), no_counterpart(info.dtype), hint, Subject(name))
        return tensor_of(self.kept_pieces(name), info)

    def parts_of(self, name: str) -> dict[str, TensorInfo]:
        """part -> its stored tensor, for a compressed tensor, in the order of PARTS."""
        return find_parts(self.container, name)

    def tensor(self, name: str) -> StoredTensor:
        """A compressed tensor, to be read by one reader. Raises ResourceError where not even a block may be."""
        self.refuse_memory(name, 0, "reading it")
        entry = self.manifest.tensors[name]
        codes = self.container.by_name[part_name(name, "codes")]
        # Its grid is perhaps another's codebook.
        infos = {"codes": codes} | {
            part: info for part, info in self.parts_of(entry.shared or name).items() if part != "codes"
        }
        parts = {part: self.container.stored(info.name) for part, info in infos.items()}
        find, refuse = partial(self.unbounded_tensors.find, name), partial(self.refuse_memory, name)
        return StoredTensor(self.path, name, entry, infos, parts, self.executor, find, refuse)

    def read_encoded(self, name: str) -> Compressed:
        """A compressed tensor's codes, all at once, and what decodes them, checked. Raises ArtifactError."""
        return self.tensor(name).read()

    def side_bytes(self, name: str) -> int:
        """The side information among the codes of an unbounded tensor. Raises ArtifactError."""
        return self.unbounded_tensors.side_bytes(name, self.container.stored(part_name(name, "codes")))

    def refuse_memory(self, name: str, needed: int, doing: str, hint: str = ALLOW) -> None:
        """Raise ResourceError where a tensor takes more than may be used: so many bytes besides those of a block."""
        needed += block_bytes(self.original(name).numel)
        refuse_memory(self.max_memory, needed, self.path, name, doing, hint)

    def slots(self) -> list[Slot]:
        """What the file holds, as the writer's slots, in file order."""
        owner = {part_name(name, part): name for name in self.manifest.tensors for part in PARTS}
        owner |= {part_name(name, "codes"): name for name in self.manifest.coded}
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
        return UnboundedFile(self.container, self.manifest, self.max_memory)

    # What is read is checked first: the CRC-32 of a tensor covers all that decides its values.

    def check_kept(self, name: str) -> None:
        """Hold a kept tensor against its CRC-32. Raises ArtifactError."""
        coded = name in self.manifest.coded
        if self.manifest.is_compact and not coded:
            if not self._kept_holds:
                raise self._damaged(name, "the checksum of all kept tensors does not hold")
            return
        info, own = self._kept_by_name[name], self.original(name)
        crc32 = self.container.crc32_of(self._stored_name(name))
        if seal_kept(name, own.dtype, info.dtype, info.shape, crc32, coded=coded) != self.manifest.crc32s[name]:
            raise self._damaged(name, "its checksum does not hold")

    def _try_kept(self, name: str) -> None:
        """Check a kept tensor, and see that it decodes where it is coded. Raises ArtifactError."""
        if name not in self.manifest.coded:
            self.check_kept(name)
            return
        for _ in self.kept_pieces(name):
            pass

    @cached_property
    def _kept_holds(self) -> bool:
        """Whether the kept tensors of a compact file, which lie one behind another, have their common CRC-32."""
        crc32 = 0
        kept = [info for info in self.kept if info.name not in self.manifest.coded]
        for info in kept:
            crc32 = self.container.crc32_of(info.name, crc32)
        of = [(info, self.original(info.name).dtype) for info in kept]
        return seal_all_kept(of, crc32) == self.manifest.crc32s[DATA_NAME]

    def find_damage(self) -> list[InputError]:
        """What of all that is not compressed does not have its CRC-32, or is coded and does not decode: kept tensors,
        and what is pooled."""
        errors: list[InputError] = []
        checks: list[Callable[[], None]] = [
            *(partial(self._try_kept, info.name) for info in self.kept),
            self.unbounded_tensors.check_pool,
        ]
        for check in checks:
            try:
                check()
            except ArtifactError as error:
                errors.append(error)
        return errors

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
