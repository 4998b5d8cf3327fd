"""Bytes become frames of zstd (RFC 8878) and back; what a frame declares is held against what it can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import zstandard

_LEVEL = 1
_BLOCK = 1 << 17
"""No block of a frame is longer when expanded."""
_LEAST_BLOCK = 4
"""Bytes that a block takes at least."""
_DENSE_LEVEL = 19
_FAST_LEVEL = 9
_DENSE_BYTES = 1 << 18
"""Texts of more bytes are compressed at the faster level."""
MOST_RATIO = 256
"""By how much a sealed frame expands at most."""
MOST_SEALED = 100_000_000
"""Bytes of a sealed frame's content at most: those that a safetensors header may have."""


def bound_frame(size: int) -> int:
    """The most bytes of a frame of `size` bytes (ZSTD_COMPRESSBOUND in zstd.h)."""
    return size + (size >> 8) + (max(0, _BLOCK - size) >> 11)


def compress_frame(parts: Iterable[bytes | memoryview], size: int) -> bytes:
    """One frame of all parts together, `size` bytes."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False, write_content_size=True)
    stream = compressor.compressobj(size=size)
    return b"".join([*[stream.compress(part) for part in parts], stream.flush()])


def expand_frame(frame: memoryview, least: int, most: int) -> bytes:
    """What the frame, which is all of `frame`, holds: `least` to `most` bytes.

    Raises ValueError, before anything is allocated, where it declares other sizes or cannot hold what it declares.
    """
    room = (len(frame) // _LEAST_BLOCK) * _BLOCK
    if least > room:
        raise ValueError(f"a zstd frame of {len(frame)} bytes cannot hold {least}")
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        if not least <= declared <= most:
            wanted = least if least == most else f"{least} to {most}"
            raise ValueError(f"the zstd frame declares {declared} bytes, not {wanted}")
        if declared > room:
            raise ValueError(f"a zstd frame of {len(frame)} bytes cannot hold {declared}")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"the zstd frame is damaged: {error}") from error
    if len(content) != declared:
        raise ValueError(f"the zstd frame holds {len(content)} bytes, not {declared}")
    return content


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
