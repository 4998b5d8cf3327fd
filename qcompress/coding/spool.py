"""Bytes wait here until what stands before them is known: in memory, and where they are many in a nameless file."""

from __future__ import annotations

import io
import tempfile
import weakref
from pathlib import Path
from typing import IO

from qcompress.coding.stored import Stored, behind

HELD_BYTES = 1 << 21
"""Bytes that wait in memory at most, where there is a folder for more."""


class Spool:
    """Bytes that are written once, from front to back, and then read.

    folder  where a file holds them that no other program sees and that goes with them; None: memory holds all
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file: IO[bytes] = io.BytesIO()
        if folder is not None:
            self._file = tempfile.SpooledTemporaryFile(HELD_BYTES, dir=str(folder))  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append some bytes. Raises OSError where the disk takes no more."""
        self._file.write(data)
        self.size += len(data)

    def stored(self, head: bytes = b"") -> Stored:
        """All bytes as they are now, behind those of `head`."""
        return behind(head, Stored(self.size, self._fetch))

    def _fetch(self, start: int, stop: int) -> memoryview:
        self._file.seek(start)
        return memoryview(self._file.read(stop - start))
