"""Where an output is built, and how it takes its place: by one rename, after all was written and nothing is in the way.

A killed or failed run leaves the old output or none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qcompress.errors import OutputError, ResourceError


def staging_folder(output: Path) -> Path:
    """The hidden folder beside `output` where it is built, with what a run that resumes needs."""
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def staged_output(output: Path, *, force: bool, folder: bool, resume: bool = False) -> Iterator[Path]:
    """A hidden folder beside `output` to build it in; on leaving without an error, what was built becomes `output`.

    folder  whether the output is one, which is then made
    resume  find what an earlier run left there, and leave it there on an error; else the folder starts and ends empty
    yields  the path to write to, a file or a folder of the output's own name
    raises  OutputError where the output exists without `force`, is of another kind, or is being written by another run;
            ResourceError where the folder around it cannot be written
    """
    refuse_existing(output, force, folder)
    staging = staging_folder(output)
    with reporting_resources(output.parent):
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(lock, staging, output)
        keep = resume
        try:
            with reporting_resources(output.parent):
                if not resume:
                    _empty(staging)
                if folder:
                    (staging / output.name).mkdir(exist_ok=resume)
                yield staging / output.name
                refuse_existing(output, force, folder)
                _replace(staging / output.name, output)
                keep = False
        finally:
            if not keep:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(descriptor: int, staging: Path, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run that held the lock may have removed this folder while we waited to open it.
        alone = staging.exists() and os.path.samestat(os.fstat(descriptor), staging.stat())
    except OSError:
        alone = False
    if not alone:
        raise OutputError(str(output), "is being written by another run", "wait for it, or choose another -o")


def refuse_existing(output: Path, force: bool, folder: bool) -> None:
    """Raise OutputError where the output exists without `force`, or is of another kind."""
    if not (output.exists() or output.is_symlink()):
        return
    if not force:
        raise OutputError(str(output), "exists already", "choose another -o, or replace it with --force")
    if output.is_dir() != folder and output.exists():
        kind, other = ("a folder", "a file") if output.is_dir() else ("a file", "a folder")
        raise OutputError(str(output), f"is {kind}, and the output is {other}", "choose another -o")
    if folder and any(output.iterdir()) and not any(output.glob("*.safetensors")):
        raise OutputError(str(output), "is a folder that holds no .safetensors file", "choose another -o")


def refuse_own_input(source: Path, output: Path) -> None:
    """Raise OutputError where `output` is the input, a link to it, or a folder around it."""
    inputs = [source, *source.glob("*.safetensors")] if source.is_dir() else [source]
    real = output.resolve()
    for path in inputs:
        same = output.exists() and path.exists() and output.samefile(path)
        around = real in path.resolve().parents or real in path.absolute().parents
        if same or real == path.resolve() or (output.exists() and around):
            raise OutputError(str(output), "is the input itself", "choose another -o")


def _empty(folder: Path) -> None:
    """Remove what a killed run left behind."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _replace(built: Path, output: Path) -> None:
    if output.is_dir() and not output.is_symlink():
        # A folder cannot be renamed over: the old one steps aside, and comes back if the new one cannot take its place.
        old = built.parent / f"{output.name}.replaced"
        output.rename(old)
        try:
            built.rename(output)
        except OSError:
            old.rename(output)
            raise
    else:
        built.replace(output)
    _sync_folder(output.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reporting_resources(place: Path) -> Iterator[None]:
    """Turn an operating system error while writing to `place` into ResourceError."""
    try:
        yield
    except OSError as error:
        mend = {
            "ENOSPC": "free some space, or write to another disk with -o",
            "EDQUOT": "free some of the quota, or write to another disk with -o",
            "EACCES": "make the folder writable, or choose another with -o",
            "EROFS": "choose a writable folder with -o",
            "ENOENT": "make the folder first, or choose another with -o",
            "ENOTDIR": "choose a folder with -o",
            "EFBIG": "the file system or a limit allows no file so large; choose another with -o",
        }.get(errno.errorcode.get(error.errno or 0, ""), "check the disk, or choose another place with -o")
        raise ResourceError(str(place), error.strerror or str(error), mend) from error
