"""One file of an artifact is streamed into its slots from any thread, and read back before it counts as written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qcompress.artifact.layout import INDEX_NAME, Layout, Slot, header_room, index_text, manifest_slot
from qcompress.artifact.manifest import MANIFEST_NAME
from qcompress.checkpoint.safetensors_file import is_hidden
from qcompress.coding.stored import Stored
from qcompress.errors import CheckpointError, ResourceError, raise_all
from qcompress.types.config import Shape
from qcompress.types.files import is_there, real_path

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Buffer

READ_BACK_BYTES = 1 << 22
SPARE_SHARE = 10_000
"""Room for a header is given back where it is more than one part in so many of the file."""
COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", ".vocab", ".merges", ".spm"}
"""Files of a checkpoint folder that travel with its weights: configuration, tokenizer, model card, model code."""
INDEX_SUFFIX = ".index.json"
CONFIG_NAME, QUANTIZATION, QUANT_METHOD, METHOD = "config.json", "quantization_config", "quant_method", "qcompress"
WEIGHTS = "weights"
"""Where a Hugging Face folder says what its weights are quantized with, so that nothing loads them as plain ones."""


MakeManifest: TypeAlias = Callable[[str, int], bytes]
"""Makes a manifest of a file's SHA-256 of data and CRC-32 of header, of one length whatever they are."""


@dataclass(frozen=True)
class Written:
    """One finished file: its slots with their real sizes, its header's bytes, and what names it.

    sha256  of the manifest, which holds that of all else; of a file without one, of its data
    """

    slots: tuple[Slot, ...]
    header_bytes: int
    sha256: str

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + sum(slot.n_bytes for slot in self.slots)

    @property
    def overhead_bytes(self) -> int:
        """Of header and manifest."""
        return self.header_bytes + sum(slot.n_bytes for slot in self.slots if slot.name == MANIFEST_NAME)


@dataclass(frozen=True)
class Filled:
    """One slot's data as they lie in an unfinished file: where, how long, with which CRC-32 and shape."""

    start: int
    n_bytes: int
    crc32: int
    shape: Shape


class SlotWriter:
    """One file being written. Slots are filled from any thread, each by one thread at a time and in its own order."""

    def __init__(self, path: Path, layout: Layout, *, reopen: bool = False) -> None:
        """A new file at `path`; with `reopen` the unfinished one that may lie there."""
        self.path = path
        self._layout = layout
        self._file = path.open("rb+" if reopen and path.exists() else "xb+", buffering=0)
        self._start: dict[str, int] = {}
        self._size = {slot.name: slot.n_bytes for slot in layout.slots}
        self._filled: dict[str, int] = {}
        self._crc: dict[str, int] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._header_bytes = layout.header_bytes
        self._data_slots = tuple(slot for slot in layout.slots if slot.name != MANIFEST_NAME)
        self._place_slots()

    def _place_slots(self) -> None:
        position = self._layout.header_bytes
        for slot in self._data_slots:
            if slot.varies:
                break
            self._start[slot.name] = position
            position += slot.n_bytes
        self._next = position

    def put(self, name: str, data: Buffer) -> None:
        """Write the next bytes of a slot whose size the plan fixed."""
        self._write(name, data)

    def put_varying(self, name: str, stored: Stored, shape: tuple[int, ...]) -> None:
        """Write all bytes of a slot whose size entropy coding chose; the calls must come in the order of the slots."""
        self._start[name] = self._next
        self._size[name] = stored.size
        self._shape[name] = shape
        self._next += stored.size
        for piece in stored.pieces():
            self._write(name, piece)

    def put_planned(self, name: str, stored: Stored, shape: tuple[int, ...]) -> None:
        """Write all bytes of a slot at once, whether the plan fixed its size or not; see `put` and `put_varying`."""
        if name not in self._start:
            self.put_varying(name, stored, shape)
            return
        for piece in stored.pieces():
            self.put(name, piece)

    def put_pieces(self, name: str, pieces: Iterable[Buffer], most: int) -> bool:
        """Write a slot in pieces that come to `most` bytes at most; False, with the slot still empty, where to more.

        The calls must come in the order of the slots, as those of `put_varying`.
        """
        self._start[name], self._size[name] = self._next, most
        self._filled[name], self._crc[name] = 0, 0
        for piece in pieces:
            if self._filled[name] + memoryview(piece).nbytes > most:
                return False
            self._write(name, piece)
        size = self._filled[name]
        self._size[name], self._shape[name] = size, (size,)
        self._next += size
        return True

    def _write(self, name: str, data: Buffer) -> None:
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        filled = self._filled.get(name, 0)
        if filled + len(view) > self._size[name]:
            raise AssertionError(f"{name} has more bytes than its slot of {self._size[name]}")
        self._crc[name] = zlib.crc32(view, self._crc.get(name, 0))
        self._filled[name] = filled + len(view)
        self._write_at(view, self._start[name] + filled)

    def _write_at(self, view: memoryview, position: int) -> None:
        while view:
            done = os.pwrite(self._file.fileno(), view, position)
            view, position = view[done:], position + done

    def filled(self, names: Iterable[str]) -> dict[str, Filled]:
        """What those of the named slots that exist hold, for `restore` in a later run."""
        return {
            name: Filled(self._start[name], self._size[name], self._crc.get(name, 0), self._shape.get(name, ()))
            for name in names
            if name in self._filled
        }

    def restore(self, slots: Mapping[str, Filled]) -> bool:
        """Take over a tensor's slots from an earlier run if the file still holds just that; in file order."""
        for name, filled in slots.items():
            place = (filled.start, filled.n_bytes)
            planned = (self._start[name], self._size[name]) if name in self._start else (self._next, filled.n_bytes)
            if place != planned or self._checksum(*place) != filled.crc32:
                return False
        for name, filled in slots.items():
            self._filled[name], self._crc[name] = filled.n_bytes, filled.crc32
            if name not in self._start:
                self._start[name], self._size[name], self._shape[name] = filled.start, filled.n_bytes, filled.shape
                self._next += filled.n_bytes
        return True

    def _checksum(self, position: int, n_bytes: int, digest: hashlib._Hash | None = None, crc32: int = 0) -> int | None:
        """The CRC-32, after an earlier one, of what the file holds there, which `digest` sees too; None if it ends."""
        crc = crc32
        while n_bytes:
            piece = os.pread(self._file.fileno(), min(n_bytes, READ_BACK_BYTES), position)
            if not piece:
                return None
            crc = zlib.crc32(piece, crc)
            if digest is not None:
                digest.update(piece)
            position, n_bytes = position + len(piece), n_bytes - len(piece)
        return crc

    def crc32_of(self, name: str) -> int:
        """The CRC-32 of what was written to a slot."""
        return self._crc.get(name, 0)

    def size_of(self, name: str) -> int:
        """The bytes that were written to a slot."""
        return self._size[name]

    def crc32_over(self, names: Iterable[str]) -> int:
        """The CRC-32 of several slots, one behind another, as the disk holds them."""
        crc32 = 0
        for name in names:
            found = self._checksum(self._start[name], self._size[name], crc32=crc32)
            crc32 = crc32 if found is None else found
        return crc32

    def finish(self, render: Callable[[Sequence[Slot]], bytes], manifest: MakeManifest | None = None) -> Written:
        """Read everything back, then write the manifest, if there is one, and the header that `render` makes of slots.

        Raises ResourceError where the disk holds other bytes than were written.
        """
        slots = tuple(
            replace(slot, n_bytes=self._size[slot.name], shape=self._shape.get(slot.name, slot.shape))
            for slot in self._data_slots
        )
        missing = [slot.name for slot in slots if self._filled.get(slot.name, 0) != slot.n_bytes]
        if missing:
            raise AssertionError(f"slot {missing[0]} was not filled")
        os.fsync(self._file.fileno())
        sha256 = self._read_back(slots)
        data = slots
        if manifest is not None:
            slots = (*slots, manifest_slot(manifest(sha256, 0)))
        self._shrink(header_room(render(slots)), data, sha256)
        start = self._padded(render(slots))
        pieces = {0: start}
        if manifest is not None:
            frame = manifest(sha256, zlib.crc32(start))
            assert len(frame) == slots[-1].n_bytes
            pieces[self._header_bytes + sum(slot.n_bytes for slot in data)] = frame
            sha256 = hashlib.sha256(frame).hexdigest()
        # An earlier run that wrote more may have left its file here.
        os.ftruncate(self._file.fileno(), self._header_bytes + sum(slot.n_bytes for slot in slots))
        # The header last: until then the file is none.
        for position, piece in sorted(pieces.items(), reverse=True):
            self._write_at(memoryview(piece), position)
            os.fsync(self._file.fileno())
            if os.pread(self._file.fileno(), len(piece), position) != piece:
                raise self._differs("its header or manifest")
        return Written(slots, self._header_bytes, sha256)

    def _shrink(self, needed: int, slots: Sequence[Slot], sha256: str) -> None:
        """Move the data up to a header of `needed` bytes, where the layout allows it and the file is small enough."""
        spare, size = self._header_bytes - needed, self._next
        if not self._layout.shrinks or spare * SPARE_SHARE < size:
            return
        for position in range(self._header_bytes, size, READ_BACK_BYTES):
            piece = os.pread(self._file.fileno(), READ_BACK_BYTES, position)
            self._write_at(memoryview(piece), position - spare)
        os.ftruncate(self._file.fileno(), size - spare)
        os.fsync(self._file.fileno())
        self._start = {name: start - spare for name, start in self._start.items()}
        self._header_bytes = needed
        if self._read_back(slots) != sha256:
            raise self._differs("its data")

    def _padded(self, header: bytes) -> bytes:
        room = self._header_bytes - 8
        if len(header) > room:
            raise AssertionError(f"the header needs {len(header)} bytes and has room for {room}")
        return room.to_bytes(8, "little") + header.ljust(room)

    def _differs(self, what: str) -> ResourceError:
        hint = "check the disk and memory of this machine"
        return ResourceError(str(self.path), f"{what} reads back other bytes than were written", hint)

    def _read_back(self, slots: Sequence[Slot]) -> str:
        """The SHA-256 of the data as the disk holds them; ResourceError where they differ from what was written."""
        digest = hashlib.sha256()
        for slot in slots:
            if self._checksum(self._start[slot.name], slot.n_bytes, digest) != self._crc.get(slot.name, 0):
                raise self._differs(f"tensor {slot.name!r}")
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close, finished or not; an unfinished file goes with its staging folder."""
        self._file.close()


def find_companions(source: Path) -> list[Path]:
    """The files that travel with the weights of a checkpoint folder, none for a single file.

    raises  CheckpointError (Refusals where several) for a link among them that leads out of the folder, for what it
            leads to may be anything that this user can read, or that leads nowhere
    """
    if not source.is_dir():
        return []
    found, errors = [], []
    inside = _own_folders(real_path(source))
    for path in sorted(source.iterdir()):
        foreign = path.suffix not in COMPANION_SUFFIXES or is_hidden(path)
        if foreign or path.name.endswith((INDEX_SUFFIX, ".report.json")):
            continue
        if path.is_symlink() and not inside.intersection(real_path(path).parents):
            what, hint = "is a link that leads out of the checkpoint's folder", "copy the file into the folder"
            errors.append(CheckpointError(str(path), what, f"{hint}, or take the link away"))
        elif path.is_symlink() and not is_there(path):
            errors.append(CheckpointError(str(path), "is a link that leads nowhere", "take it away, or mend it"))
        elif path.is_file():
            found.append(path)
    raise_all(errors)
    return found


def _own_folders(folder: Path) -> frozenset[Path]:
    """Where the files of a folder may lie: in itself, or where a Hugging Face cache keeps those of all revisions."""
    for revision in (folder, *folder.parents):
        if revision.parent.name == "snapshots":
            return frozenset({folder, revision.parent.parent / "blobs"})
    return frozenset({folder})


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what travels with the weights of a checkpoint folder. Raises as `find_companions` does."""
    for path in find_companions(source):
        shutil.copyfile(path, folder / path.name)


def mark_config(folder: Path, weights: str, *, dequantized: bool = False) -> None:
    """Say in the config.json of a compressed folder, if it has one, what its weights have to be read with.

    weights      the name of its only file, or of the index of several
    dequantized  whether what it said of the weights before is no longer so
    """

    def marked(own: object) -> object:
        told = {QUANT_METHOD: METHOD, WEIGHTS: weights}
        return told | ({"original": own} if own is not None and not dequantized else {})

    _change_config(folder, marked)


def drop_quantization(folder: Path) -> None:
    """Take out of the config.json of a folder, if it has one, how its weights were quantized: they are dense now."""
    _change_config(folder, lambda _: None)


def plain_config(folder: Path) -> bytes | None:
    """The config.json of a compressed folder as its checkpoint had it, without what `mark_config` has put there; None
    where there is none."""
    return _changed_config(folder, lambda own: own.get("original") if own and own.get(QUANT_METHOD) == METHOD else own)


def _change_config(folder: Path, change: Callable[[Any], object]) -> None:
    text = _changed_config(folder, change)
    if text is not None:
        (folder / CONFIG_NAME).write_bytes(text)


def _changed_config(folder: Path, change: Callable[[Any], object]) -> bytes | None:
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    text = path.read_bytes()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(config, dict):
        return text
    changed = change(config.pop(QUANTIZATION, None))
    config |= {QUANTIZATION: changed} if changed is not None else {}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def write_index(folder: Path, files: Mapping[str, Sequence[Slot]], name: str = INDEX_NAME) -> int:
    """Write the index of a sharded folder; its bytes."""
    data = index_text(files).encode()
    with (folder / name).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data)
