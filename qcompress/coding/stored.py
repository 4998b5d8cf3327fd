"""Bytes are read where they lie, when they are asked for: nothing that they hold needs all of them in memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

PIECE_BYTES = 1 << 18
"""What is read at a time at least, where there is so much: it stays in a core's cache, for a checksum for instance."""


class Stored:
    """So many bytes, of a file or of memory. Of what was read last a piece is held, so that small reads are cheap.

    fetch  gives the bytes from one place to another
    """

    def __init__(self, size: int, fetch: Callable[[int, int], memoryview]) -> None:
        self.size = size
        self._fetch = fetch
        self._start = 0
        self._held = memoryview(b"")

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes from `start` to `stop`, both within the size. Raises what `fetch` raises."""
        at = start - self._start
        if at < 0 or stop > self._start + len(self._held):
            self._held = self._fetch(start, max(stop, min(start + PIECE_BYTES, self.size)))
            self._start, at = start, 0
        return self._held[at : at + stop - start]

    def pieces(self) -> Iterator[memoryview]:
        """All of the bytes, in pieces."""
        for start in range(0, self.size, PIECE_BYTES):
            yield self.read(start, min(start + PIECE_BYTES, self.size))

    def crc32(self, crc32: int = 0) -> int:
        """The CRC-32 of all of them behind those of which `crc32` is."""
        for piece in self.pieces():
            crc32 = zlib.crc32(piece, crc32)
        return crc32

    def anew(self, start: int = 0) -> Stored:
        """The bytes from `start` on, for another reader, which holds a piece of its own."""
        return Stored(self.size - start, lambda begin, end: self._fetch(start + begin, start + end))


def in_memory(data: bytes | memoryview) -> Stored:
    """Bytes that are in memory already."""
    view = memoryview(data).cast("B")
    return Stored(len(view), lambda start, stop: view[start:stop])


def behind(head: bytes, stored: Stored) -> Stored:
    """Bytes that are in memory, and others behind them."""

    def fetch(start: int, stop: int) -> memoryview:
        before, at = head[start:stop], max(start - len(head), 0)
        if len(before) == stop - start:
            return memoryview(before)
        rest = stored.read(at, stop - len(head))
        return memoryview(before + rest) if before else rest

    return Stored(len(head) + stored.size, fetch)
