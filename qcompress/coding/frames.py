"""Bytes become frames of zstd (RFC 8878) and back; what a frame declares is held against what it can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import zstandard

from qcompress.coding.stored import Stored

_LEVEL = 1
_BLOCK = 1 << 17
"""No block of a frame is longer when expanded."""
_LEAST_BLOCK = 4
"""Bytes that a block takes at least."""
_DENSE_LEVEL = 19
_FAST_LEVEL = 9
_DENSE_BYTES = 1 << 18
"""Texts of more bytes are compressed at the faster level."""
MOST_WINDOW = 1 << 23
"""Bytes that a frame of codes may look back at, and that its decoder holds: part of the format."""
_MAGIC = 0xFD2FB528
_LONGEST_HEAD = 18
_RLE, _RESERVED = 1, 3
"""Types of blocks: one byte, repeated, and none."""
MOST_RATIO = 256
"""By how much a sealed frame expands at most."""
MOST_SEALED = 100_000_000
"""Bytes of a sealed frame's content at most: those that a safetensors header may have."""


def bound_frame(size: int) -> int:
    """The most bytes of a frame of `size` bytes (ZSTD_COMPRESSBOUND in zstd.h)."""
    return size + (size >> 8) + (max(0, _BLOCK - size) >> 11)


def compress_frame(parts: Iterable[bytes | memoryview], size: int) -> bytes:
    """One frame of all parts together, `size` bytes."""
    return b"".join(frame_parts(parts, size))


def frame_parts(parts: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    """The same, in parts."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False, write_content_size=True)
    stream = compressor.compressobj(size=size)
    yield from map(stream.compress, parts)
    yield stream.flush()


def expand_frame(frame: memoryview, least: int, most: int) -> bytes:
    """What the frame, which is all of `frame`, holds: `least` to `most` bytes.

    Raises ValueError, before anything is allocated, where it declares other sizes or cannot hold what it declares.
    """
    _refuse_room(len(frame), least)
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        _refuse_size(len(frame), declared, least, most)
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"the zstd frame is damaged: {error}") from error
    if len(content) != declared:
        raise ValueError(f"the zstd frame holds {len(content)} bytes, not {declared}")
    return content


class FrameReader:
    """What a frame holds, read from front to back: some blocks of it are in memory at a time.

    size  of the content, `least` to `most` bytes, as the frame declares it

    Raises ValueError where the frame is damaged, or declares what it cannot hold.
    """

    def __init__(self, frame: Stored, least: int, most: int) -> None:
        _refuse_room(frame.size, least)
        self._frame = frame
        head = frame.read(0, min(_LONGEST_HEAD, frame.size))
        if int.from_bytes(head[:4], "little") != _MAGIC:
            raise ValueError("the zstd frame is damaged: it does not begin as one")
        try:
            parameters = zstandard.get_frame_parameters(head)
            self._at = zstandard.frame_header_size(head)
        except zstandard.ZstdError as error:
            raise ValueError(f"the zstd frame is damaged: {error}") from error
        self.size: int = parameters.content_size
        _refuse_size(frame.size, self.size, least, most)
        if parameters.window_size > MOST_WINDOW:
            raise ValueError(f"the zstd frame looks back at {parameters.window_size} bytes, more than {MOST_WINDOW}")
        self._tail = 4 if parameters.has_checksum else 0
        self._decoder = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj()
        self._expand(head[: self._at])
        self._last = False
        self._held = bytearray()
        self._start = 0

    def read(self, start: int, stop: int) -> memoryview:
        """The content from `start`, which is not before that of the last read, to `stop`, which is within the size."""
        while self._start + len(self._held) < stop:
            passed = min(start - self._start, len(self._held))
            del self._held[:passed]
            self._start += passed
            self._held += self._next_block()
        return memoryview(self._held[start - self._start : stop - self._start])

    def finish(self) -> None:
        """Check that nothing is left behind what was read."""
        end = self._start + len(self._held)
        while not self._last:
            end += len(self._next_block())
        if end != self.size or self._at + self._tail != self._frame.size:
            raise ValueError("the zstd frame is damaged: it does not end where its content does")
        if self._tail:
            self._expand(self._frame.read(self._at, self._frame.size))

    def _next_block(self) -> bytes:
        """What the next block expands to, at most 128 KiB."""
        if self._last:
            raise ValueError("the zstd frame is damaged: it ends before its content")
        if self._at + 3 > self._frame.size:
            raise ValueError("the zstd frame is damaged: it is cut off")
        header = int.from_bytes(self._frame.read(self._at, self._at + 3), "little")
        kind, size = header >> 1 & 3, header >> 3
        end = self._at + 3 + (1 if kind == _RLE else size)
        if kind == _RESERVED or size > _BLOCK or end > self._frame.size:
            raise ValueError("the zstd frame is damaged: it has a block that is too long, or of no type")
        block = self._frame.read(self._at, end)
        self._at, self._last = end, bool(header & 1)
        return self._expand(block)

    def _expand(self, data: memoryview) -> bytes:
        try:
            content: bytes = self._decoder.decompress(data)
        except zstandard.ZstdError as error:
            raise ValueError(f"the zstd frame is damaged: {error}") from error
        return content


def _refuse_size(frame_bytes: int, declared: int, least: int, most: int) -> None:
    """Raise ValueError where a frame declares other than `least` to `most` bytes, or more than it can hold."""
    if not least <= declared <= most:
        wanted = least if least == most else f"{least} to {most}"
        raise ValueError(f"the zstd frame declares {declared} bytes, not {wanted}")
    _refuse_room(frame_bytes, declared)


def _refuse_room(frame_bytes: int, size: int) -> None:
    """Raise ValueError where a frame cannot hold so many bytes."""
    if size > (frame_bytes // _LEAST_BLOCK) * _BLOCK:
        raise ValueError(f"a zstd frame of {frame_bytes} bytes cannot hold {size}")


def seal_frame(text: bytes, numbers: bytes) -> bytes:
    """One frame of `text` and then `numbers`, with the checksum of both.

    The numbers, which are not empty, are stored as they are, so that the length of the frame follows from the text and
    from how many they are: it is known before they are.
    """
    level = _DENSE_LEVEL if len(text) <= _DENSE_BYTES else _FAST_LEVEL
    content = text + numbers
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
    stream = compressor.compressobj(size=len(content))
    start = stream.compress(text) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    # The checksum of a frame is that of its content, however that was compressed.
    checksum = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(content)[-4:]
    if len(content) > MOST_RATIO * (len(start) + len(numbers)):
        start, numbers = start[: zstandard.frame_header_size(start)], content
    return b"".join([start, *_raw_blocks(numbers), checksum])


def _raw_blocks(data: bytes) -> Iterator[bytes]:
    """The last blocks of a frame: `data` as they are, each block behind its header of three bytes."""
    for begin in range(0, len(data), _BLOCK):
        piece = data[begin : begin + _BLOCK]
        last = begin + len(piece) == len(data)
        yield (len(piece) << 3 | last).to_bytes(3, "little") + piece


def open_frame(frame: memoryview) -> bytes:
    """What `seal_frame` made a frame of. Raises ValueError where the frame is damaged, or has no checksum."""
    content = expand_frame(frame, 1, min(MOST_SEALED, MOST_RATIO * len(frame)))
    if not zstandard.get_frame_parameters(frame).has_checksum:
        raise ValueError("the zstd frame has no checksum")
    return content
