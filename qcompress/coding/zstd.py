"""Frames of zstd (RFC 8878), checked before they expand."""

from __future__ import annotations

from collections.abc import Iterable

import zstandard

_LEVEL = 1
_BLOCK = 1 << 17


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
    # A block takes at least 4 bytes, whatever it expands to.
    room = (len(frame) // 4) * _BLOCK
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
