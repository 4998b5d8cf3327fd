"""All that a run writes is held against all that it reads, and against each other, before anything starts.

Paths are compared as the file system sees them: resolved, and by inode where they exist, so that links and other
spellings of a name are known for what they are. Imports no torch.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompress.checkpoint.staging import refuse_existing
from qcompress.errors import OutputError, raise_all

LARGEST_OWN_JSON = 1 << 28
"""Bytes beyond which a file is not looked into to see whether this tool wrote it."""


@dataclass(frozen=True)
class Read:
    """A file or folder that a run reads; `what` calls it by its part in the run: "the recipe"."""

    path: Path
    what: str


@dataclass(frozen=True)
class Write:
    """A file or folder that a run writes.

    what       calls it by its part in the run: "-o", "--json", "the report"
    folder     whether it is a folder
    streams    whether a pipe or a terminal of that name is written to; nothing else than files is ever replaced
    is_own     whether what lies there was written by this tool, which then replaces it without --force
    """

    path: Path
    what: str
    folder: bool = False
    streams: bool = False
    is_own: Callable[[Path], bool] | None = None


def refuse_meeting(reads: Iterable[Read], writes: Sequence[Write], *, force: bool = False) -> None:
    """Raise OutputError (Refusals where several) for each write that would harm a read, a write, or a user's own file.

    A write harms a read that it is, that lies in the folder that it replaces, or that it replaces a file of. What
    exists is replaced with `force` alone, unless this tool wrote it as a report; what is neither a file nor a folder,
    never.
    """
    reads = list(reads)
    errors: list[OutputError] = []
    for index, write in enumerate(writes):
        read = next((read for read in reads if _harms(write, read.path)), None)
        other = next((other for other in writes[:index] if _same(write.path, other.path)), None)
        if read is not None:
            errors.append(OutputError(str(write.path), f"{write.what} would replace {read.what}", "name another place"))
        elif other is not None:
            what = f"{other.what} and {write.what} name the same place"
            errors.append(OutputError(str(write.path), what, "name different ones"))
        else:
            errors += _refused(write, force)
    raise_all(errors)


def refuse_own_input(source: Path, output: Path) -> None:
    """Raise OutputError where `output` is the input, a link to it, a file of its folder, or a folder around it."""
    if _harms(Write(output, "-o"), source):
        raise OutputError(str(output), "is the input itself", "choose another -o")


def is_own_json(path: Path) -> bool:
    """Whether a file is a JSON document that this tool wrote: its `schema` says so."""
    try:
        if path.stat().st_size > LARGEST_OWN_JSON:
            return False
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("schema", "")).startswith("qcompress.")


def is_stream(path: Path) -> bool:
    """Whether the path names a pipe or a terminal, which is written to as it stands."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _refused(write: Write, force: bool) -> list[OutputError]:
    """Why the write may not take its place, if it may not."""
    if write.streams and is_stream(write.path):
        return []
    owned = write.is_own is not None and write.path.is_file() and write.is_own(write.path)
    try:
        refuse_existing(write.path, force or owned, write.folder)
    except OutputError as error:
        if write.what == "-o":
            return [error]
        hint = error.hint.replace("choose another -o", "name another place")
        return [OutputError(error.where, f"{write.what} would go there, and it {error.what}", hint)]
    return []


def _harms(write: Write, read: Path) -> bool:
    """Whether writing there would change what is read."""
    if _same(write.path, read):
        return True
    if not write.path.exists():
        return False
    own, real = write.path.resolve(), read.resolve()
    if own in real.parents or own in read.absolute().parents:
        return True
    if real.is_dir() and not own.is_dir():
        return real in own.parents or any(_same(write.path, Path(entry.path)) for entry in os.scandir(real))
    return False


def _same(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False
