"""One door to files that other people's libraries read: whatever such a library raises is an error of the file."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qcompress.errors import DataError, QcompressError, ResourceError
from qcompress.types.files import is_there

LARGEST_LABEL = 2**31 - 1
STDERR = 2
SHOWN = 120
"""Characters of a foreign error that are shown."""


@contextmanager
def reading(where: Path | str, what: str, hint: str) -> Iterator[None]:
    """Turn all that a library raises while it reads a file into DataError, and what else it has to say into nothing.

    what  begins the error: "is no npz file"; the library's own words follow in brackets
    """
    try:
        with _unheard, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (QcompressError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # Libraries written in other languages raise panics that are no Exception.
        words = first_line(error, SHOWN)
        raise DataError(str(where), f"{what} ({words})", hint) from None


class _Unheard:
    """Libraries written in other languages print warnings and traces past Python's stderr: these go nowhere here.

    Threads share the one stderr of the process: the first that comes turns it away, the last that goes brings it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._heard: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                # What Python's own stream has not written yet is still to be heard.
                with suppress(OSError, ValueError, AttributeError):
                    sys.stderr.flush()
                with suppress(OSError):
                    self._heard = os.dup(STDERR)
                    _redirect(os.open(os.devnull, os.O_WRONLY))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._heard is not None:
                with suppress(OSError, ValueError, AttributeError):
                    sys.stderr.flush()
                _redirect(self._heard)
                self._heard = None


def _redirect(descriptor: int) -> None:
    """What is written to stderr goes to this open file, of which the descriptor is closed."""
    os.dup2(descriptor, STDERR)
    os.close(descriptor)


_unheard = _Unheard()


def first_line(error: BaseException, length: int = 200) -> str:
    """The kind and the words of a foreign error, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:length]


def find_file(root: Path, name: str, place: str) -> Path:
    """A file or folder that a recipe names, from its folder `root` or from QCOMPRESS_DATA. Raises DataError."""
    folders = search_folders(root)
    for folder in folders:
        if is_there(folder / name):
            refuse_irregular(folder / name, place)
            return folder / name
    where = "the recipe's folder" + (", nor in QCOMPRESS_DATA" if len(folders) > 1 else "; QCOMPRESS_DATA is not set")
    raise DataError(place, f"{name!r} is not in {where}", "check the path, or set QCOMPRESS_DATA to its folder")


def search_folders(root: Path) -> list[Path]:
    """Where the files that a recipe names are looked for, in this order: in its folder `root`, and QCOMPRESS_DATA."""
    base = os.environ.get("QCOMPRESS_DATA")
    return [root, *([Path(base)] if base else [])]


def refuse_irregular(path: Path, where: str) -> None:
    """Raise DataError for a pipe, a device or a socket: reading one may wait for ever, and no second time succeeds."""
    if not (path.is_file() or path.is_dir()):
        raise DataError(str(path), "is neither a file nor a folder", f"see {where}")


def refuse_immense(n_bytes: int, where: Path) -> None:
    """Raise ResourceError for data that the memory of this machine cannot hold."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > memory:
        what = f"declares {n_bytes:,} bytes of data, and this machine has {memory:,} of memory"
        raise ResourceError(str(where), what, "give fewer samples in a file")


def parse_label(text: str | None, where: str) -> int:
    """The number of a class, from 0. Raises DataError."""
    try:
        label = int(text or "", 10) if len(text or "") < 20 else -1
    except ValueError:
        label = -1
    if not 0 <= label <= LARGEST_LABEL:
        raise DataError(where, f"has a label {(text or '')[:40]!r} that is no number of a class", "number them from 0")
    return label
