"""Files are opened for reading so that nothing is waited for: a pipe without a writer blocks whoever opens it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened to read bytes. Raises OSError for all else, also for a pipe, a device or a socket."""
    descriptor, is_pipe = _open(path)
    if is_pipe:
        os.close(descriptor)
        raise _no_file(path)
    return os.fdopen(descriptor, "rb")


def read_start(path: Path, most: int) -> bytes:
    """Up to `most` bytes of a regular file, or of a pipe that somebody writes to, as a shell's `<(command)` is.

    Raises OSError for all else, also for a pipe that nobody has opened to write.
    """
    descriptor, is_pipe = _open(path)
    with os.fdopen(descriptor, "rb", buffering=0):
        found = b""
        if is_pipe:
            # With a writer that has written nothing yet this is an error, and without one the end of the file.
            with contextlib.suppress(BlockingIOError):
                found = os.read(descriptor, most)
                if not found:
                    raise OSError(errno.EPIPE, "is a pipe that nobody writes to", str(path))
            os.set_blocking(descriptor, True)
        while len(found) < most and (piece := os.read(descriptor, most - len(found))):
            found += piece
    return found


def is_there(path: Path) -> bool:
    """Whether a path names something: one that is too long, or a link to itself, names nothing."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def real_path(path: Path) -> Path:
    """The absolute path without links, as far as they lead somewhere."""
    # Path.resolve raises where a link leads to itself.
    return Path(os.path.realpath(path))


def _open(path: Path) -> tuple[int, bool]:
    """The descriptor of a regular file or of a pipe, and whether it is a pipe, which does not block yet."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise _no_file(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, stat.S_ISFIFO(mode)


def _no_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "is a pipe, a device or a socket, not a file", str(path))
