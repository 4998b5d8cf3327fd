"""All that a run writes is held against all that it reads, and against each other, before anything starts.

Paths are compared as the file system sees them: resolved, and by inode where they exist, so that links and other
spellings of a name are known for what they are. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompress.checkpoint.staging import refuse_existing, staging_folder
from qcompress.errors import OutputError, raise_all
from qcompress.types.files import is_there, real_path

LARGEST_OWN_JSON = 1 << 28
"""Bytes beyond which a file is not looked into to see whether this tool wrote it."""


@dataclass(frozen=True)
class Read:
    """A file or folder that a run reads.

    what   calls it by its part in the run: "the recipe"
    whole  whether all that lies in a folder is read, in its folders too
    """

    path: Path
    what: str
    whole: bool = False


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

    A write harms a read that it is, that lies in the folder that it replaces or in its work folder, or that it replaces
    a file of. Of two writes none lies in the other. What exists is replaced with `force` alone, unless this tool wrote
    it as a report; what is neither a file nor a folder, never.
    """
    reads = list(reads)
    errors: list[OutputError] = []
    for index, write in enumerate(writes):
        read = next((read for read in reads if _harms(write, read)), None)
        other = next((other for other in writes[:index] if _meet(write, other)), None)
        if read is not None:
            errors.append(OutputError(str(write.path), f"{write.what} would replace {read.what}", "name another place"))
        elif other is not None:
            same = _same(write.path, other.path)
            how = "name the same place" if same else "lie one in the other, and each is written as a whole"
            errors.append(OutputError(str(write.path), f"{other.what} and {write.what} {how}", "name different ones"))
        else:
            errors += _refused(write, force)
    raise_all(errors)


def refuse_own_input(source: Path, output: Path) -> None:
    """Raise OutputError where `output` is the input, a link to it, a file of its folder, or a folder around it."""
    if _harms(Write(output, "-o"), Read(source, "the input")):
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


def _harms(write: Write, read: Read) -> bool:
    """Whether writing there would change what is read."""
    if _same(write.path, read.path) or _lies_in(read.path, staging_folder(write.path)):
        return True
    if not is_there(write.path):
        return False
    if _lies_in(read.path, write.path):
        return True
    real, own = real_path(read.path), real_path(write.path)
    if not real.is_dir():
        return False
    within = real in own.parents and (read.whole or not own.is_dir())
    return within or _holds(real, write.path, deep=read.whole)


def _meet(one: Write, other: Write) -> bool:
    """Whether one of them would take away or change what the other has written."""
    return _same(one.path, other.path) or any(
        _lies_in(inner.path, outer.path) or _lies_in(inner.path, staging_folder(outer.path))
        for inner, outer in ((one, other), (other, one))
    )


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether the path, or what it leads to, lies under a folder, be that there already or not."""
    own = real_path(folder)
    return own in real_path(path).parents or own in path.absolute().parents


def _holds(folder: Path, target: Path, *, deep: bool) -> bool:
    """Whether a folder links to the target, or into it, or has the file that it is under another name.

    deep  looks into its folders too, and into those that it links to
    """
    waiting, seen = [folder], {folder}
    own, inode = real_path(target), target.stat().st_ino
    for here in waiting:
        with contextlib.suppress(OSError), os.scandir(here) as entries:
            for entry in entries:
                place, linked = Path(entry.path), entry.is_symlink()
                real = real_path(place) if linked else place
                if linked and (real == own or own in real.parents):
                    return True
                if entry.is_dir():
                    if deep and real not in seen:
                        seen.add(real)
                        waiting.append(real)
                elif entry.inode() == inode and _same(place, target):
                    return True
    return False


def _same(one: Path, other: Path) -> bool:
    if real_path(one) == real_path(other):
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False
