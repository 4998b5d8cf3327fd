"""A safetensors file's header is checked here against every way it can lie, and its bytes are read when asked for.

The library reads whole tensors and says little of what is wrong; here rows are read out of files larger than memory,
and every error names the file, the tensor and the hint. Imports no torch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

from qcompress.coding.stored import PIECE_BYTES, Stored
from qcompress.errors import InputError
from qcompress.types.files import open_regular
from qcompress.types.plan import DTYPE_BITS, TensorInfo

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library refuses longer headers."""

MAX_DIMENSIONS = 64
"""Sizes of a shape."""

RESERVED = ".qc."
"""What stands between tensor and part in the names of an artifact's parts, and in no other name."""

OWN_TENSORS = ("qcompress.data", "qcompress.manifest")
"""Stored tensors of an artifact that stand for no tensor of a checkpoint."""

FOREIGN_MAGIC = {
    b"PK\x03\x04": "a zip archive, most likely a PyTorch pickle",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for",
    b"\x00\x05\x16\x07": "what macOS keeps beside a file, not the file itself",
}
PICKLE_HINT = "convert it to safetensors first; pickles are never loaded"
LFS_HINT = "fetch the file itself: git lfs pull"
FOREIGN_HINTS = {
    b"GGUF": "write a dense checkpoint first, with transformers: from_pretrained(gguf_file=...) and save_pretrained",
    b"version https://git-lfs": LFS_HINT,
    b"\x00\x05\x16\x07": "name the file without ._",
}


STEADY = "let nothing write to it meanwhile, and run again"


@dataclass(frozen=True)
class Container:
    """The header of one safetensors file, and a way to its bytes.

    Bytes are read and not mapped: of a file that is cut short meanwhile, a mapping ends the process. Each read is held
    against the file as it was when its header was read, so that no two states of it are mixed.

    spans    [begin, end) of each tensor, in bytes from the start of the data
    state    the file when its header was read: device, inode, size, time of its last change
    error    what is raised where the file has changed since
    """

    path: Path
    tensors: tuple[TensorInfo, ...]
    spans: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]
    data_start: int
    data_bytes: int
    state: tuple[int, int, int, int] = field(repr=False, compare=False)
    error: type[InputError] = field(repr=False, compare=False)

    def bytes_of(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The stored bytes of a tensor, or those from `start` to `stop` of them. Raises `error`."""
        begin, end = self.spans[name]
        last = end if stop is None else min(begin + stop, end)
        return self.read(self.data_start + begin + start, self.data_start + last)

    def pieces_of(self, name: str) -> Iterator[memoryview]:
        """The stored bytes of a tensor in pieces of PIECE_BYTES. Raises `error`."""
        begin, end = self.spans[name]
        yield from self.pieces(self.data_start + begin, self.data_start + end)

    def crc32_of(self, name: str, crc32: int = 0) -> int:
        """The CRC-32 of a tensor's bytes behind those of which `crc32` is. Raises `error`."""
        for piece in self.pieces_of(name):
            crc32 = zlib.crc32(piece, crc32)
        return crc32

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """The file's bytes from `begin` to `end` in pieces. Raises `error`."""
        with self._opened() as descriptor:
            for start in range(begin, end, PIECE_BYTES):
                yield self._pread(descriptor, start, min(start + PIECE_BYTES, end))

    def stored(self, name: str) -> Stored:
        """A tensor's bytes, to be read where they are asked for; they cannot be changed. Its reads raise `error`."""
        begin, end = self.spans[name]
        place = self.data_start + begin

        def fetch(start: int, stop: int) -> memoryview:
            with self._opened() as descriptor:
                return self._pread(descriptor, place + start, place + stop)

        return Stored(end - begin, fetch)

    def read(self, begin: int, end: int) -> memoryview:
        """The file's bytes from `begin` to `end`, which may be changed. Raises `error` where they cannot be read."""
        data = bytearray(end - begin)
        view, done = memoryview(data), 0
        with self._opened() as descriptor:
            while done < len(data) and (count := os.preadv(descriptor, [view[done:]], begin + done)):
                done += count
            self._check_state(descriptor, done == len(data))
        return view

    def _pread(self, descriptor: int, begin: int, end: int) -> memoryview:
        """The same, read-only: memory that is not filled with zeros first."""
        data = os.pread(descriptor, end - begin, begin)
        # A read may end early, but at the end of the file it gives nothing.
        while len(data) < end - begin and (more := os.pread(descriptor, end - begin - len(data), begin + len(data))):
            data += more
        self._check_state(descriptor, len(data) == end - begin)
        return memoryview(data)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            with open_regular(self.path) as file:
                yield file.fileno()
        except OSError as error:
            raise self.error(str(self.path), error.strerror or str(error), "check that the file can be read") from None

    def _check_state(self, descriptor: int, complete: bool) -> None:
        """Raise `error` where the file has ended before what was read, or is another than when its header was read."""
        if not complete or _state_of(descriptor) != self.state:
            raise self._changed()

    def refuse_changed(self) -> None:
        """Raise `error` where the file is not the one, or not as it was, when its header was read."""
        self.read(0, 0)

    def _changed(self) -> InputError:
        return self.error(str(self.path), "has changed while it was read", STEADY)

    @cached_property
    def by_name(self) -> Mapping[str, TensorInfo]:
        return {info.name: info for info in self.tensors}

    @property
    def file_bytes(self) -> int:
        return self.data_start + self.data_bytes


class _Broken(Exception):
    """What is wrong with a file, and the hint; `read_container` adds where."""

    def __init__(self, what: str, hint: str = "the file is damaged: fetch or save it again") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def is_hidden(path: Path) -> bool:
    """Whether a file is what macOS leaves beside each file on a disk of another kind."""
    return path.name.startswith("._")


def weight_files(folder: Path, ending: str = ".safetensors") -> list[Path]:
    """The files of a folder whose names end so, in the order of their names."""
    return sorted(path for path in folder.glob(f"*{ending}") if not is_hidden(path))


def read_container(path: Path, error: type[InputError]) -> Container:
    """The checked header of the safetensors file at `path`; raises `error` naming the file and what is wrong."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = _read_header(file.fileno(), size)
            tensors, spans, metadata = _parse_header(raw, size - 8 - len(raw))
            state = _state_of(file.fileno())
    except _Broken as broken:
        raise error(str(path), broken.what, broken.hint) from None
    except FileNotFoundError:
        raise error(str(path), "no such file", "check the path") from None
    except IsADirectoryError:
        raise error(str(path), "is a folder, not a file", "name a .safetensors file") from None
    except OSError as os_error:
        raise error(str(path), os_error.strerror or str(os_error), "check that the file can be read") from None
    except ValueError:
        raise error(ascii(str(path)), "is no name that a file can have", "check the path") from None
    return Container(path, tensors, spans, metadata, 8 + len(raw), size - 8 - len(raw), state, error)


def _state_of(descriptor: int) -> tuple[int, int, int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_header(descriptor: int, size: int) -> bytes:
    if size == 0:
        raise _Broken("is empty")
    start = os.pread(descriptor, 64, 0)
    # A header of 640 bytes begins with the length 80 02, as a pickle does: only what no header follows is foreign.
    for magic, what in FOREIGN_MAGIC.items():
        if start.startswith(magic) and start[8:9] != b"{":
            raise _Broken(f"is {what}", FOREIGN_HINTS.get(magic, PICKLE_HINT))
    if size < 8:
        raise _Broken(f"has {size} bytes, fewer than the 8 that a safetensors file begins with")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] not in (b"{", b""):
        raise _Broken("is not a safetensors file: no header begins at byte 8", "name a .safetensors file")
    if length > MAX_HEADER_BYTES:
        raise _Broken(f"declares a header of {length} bytes, more than the {MAX_HEADER_BYTES} that the format allows")
    if length < 2 or 8 + length > size:
        raise _Broken(f"is truncated: its header should have {length} bytes and the file has {size}")
    raw = os.pread(descriptor, length, 8)
    if len(raw) != length:
        raise _Broken("is truncated inside its header")
    return raw


def _parse_header(
    raw: bytes, data_bytes: int
) -> tuple[tuple[TensorInfo, ...], dict[str, tuple[int, int]], dict[str, str]]:
    try:
        header = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise _Broken("has a header that is not UTF-8") from None
    except ValueError as problem:
        raise _Broken(f"has a header that is not JSON ({str(problem)[:80]})") from None
    if not isinstance(header, dict):
        raise _Broken("has a header that is not a JSON object")
    metadata = _parse_metadata(header.pop("__metadata__", {}))
    spans: dict[str, tuple[int, int]] = {}
    tensors = []
    for name, entry in header.items():
        info, spans[name] = _parse_entry(name, entry, data_bytes)
        tensors.append(info)
    _refuse_overlaps(spans, data_bytes)
    # In the order of their data, which is the order in which they are read.
    tensors.sort(key=lambda info: (spans[info.name], info.name))
    return tuple(tensors), spans, metadata


def parse_json(text: str) -> object:
    """JSON as the standard has it: no key twice, no NaN, no half of a surrogate pair. Raises ValueError."""
    try:
        value: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} stands twice")
    return found


def _parse_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Broken("has metadata that is not a map from text to text")
    return metadata


def _parse_entry(name: str, entry: object, data_bytes: int) -> tuple[TensorInfo, tuple[int, int]]:
    where = f"tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Broken(f"{where} does not have just dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Broken(f"{where} has the unknown dtype {dtype!r}", f"known are {', '.join(sorted(DTYPE_BITS))}")
    if not is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _Broken(f"{where} has the shape {shape!r}, not a list of sizes")
    if not is_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise _Broken(f"{where} has the data offsets {span!r}, not [begin, end]")
    info = TensorInfo(name, tuple(shape), dtype)
    begin, end = span
    if end > data_bytes:
        raise _Broken(f"is truncated: {where} should end at byte {end} of the data, and there are {data_bytes}")
    if end - begin != info.n_bytes:
        raise _Broken(
            f"{where} of shape {list(info.shape)} needs {info.n_bytes} bytes of {dtype} and has {end - begin}"
        )
    return info, (begin, end)


def is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _refuse_overlaps(spans: Mapping[str, tuple[int, int]], data_bytes: int) -> None:
    position, before = 0, ""
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin == end:
            continue
        if begin < position:
            raise _Broken(f"tensors {before!r} and {name!r} overlap")
        if begin > position:
            raise _Broken(f"has a hole of {begin - position} bytes before tensor {name!r}")
        position, before = end, name
    if position != data_bytes:
        raise _Broken(f"has {data_bytes - position} bytes after its last tensor")
