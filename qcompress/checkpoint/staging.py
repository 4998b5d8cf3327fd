"""An output is built in a hidden work folder beside its place and takes that place in one step, or not at all.

Files and folders alike: a killed or failed run leaves the old output, the new one, or none. A folder that is replaced
is exchanged with the new one by one system call where there is such a call; elsewhere the old one steps aside into the
work folder, from where the next run puts it back before it does anything else. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from qcompress.errors import OutputError, ResourceError
from qcompress.types.ranks import ALONE, World

MARKER = ".qcompress"
"""The file in each work folder that says whose it is: a folder of that name without it is the user's own."""
FINISHED, REPLACED = ".finished", ".replaced"
"""Suffixes in the work folder of what is about to take its place, and of what stepped aside for it."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Constants of renameat2(2)."""
NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV})
"""What the call answers where the kernel or the file system cannot exchange."""


def staging_folder(output: Path) -> Path:
    """The hidden folder beside `output` where it is built, with what a run that resumes needs."""
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def staged_output(
    output: Path, *, force: bool, folder: bool, resume: bool = False, world: World = ALONE
) -> Iterator[Path]:
    """A hidden folder beside `output` to build it in; on leaving without an error, what was built becomes `output`.

    folder  whether the output is one, which is then made
    resume  find what an earlier run left there, and leave it there on an error; else the folder starts and ends empty
    world   the ranks that build it together: the first makes the folder, and puts the output in its place once all are
            done with it
    yields  the path to write to, a file or a folder of the output's own name
    raises  OutputError where the output exists without `force`, is of another kind, or is being written by another run,
            and where the hidden folder is not this tool's; ResourceError where the folder around it cannot be written
    """
    if not world.is_first:
        world.wait()
        yield staging_folder(output) / output.name
        world.wait()
        world.wait()
        return
    refuse_existing(output, force, folder)
    with _locked(output) as staging:
        keep = True
        try:
            with reporting_resources(output.parent):
                _put_back(staging, output)
                keep = resume
                refuse_existing(output, force, folder)
                if not resume:
                    _empty(staging)
                if folder:
                    (staging / output.name).mkdir(exist_ok=resume)
                world.wait()
                yield staging / output.name
                world.wait()
                refuse_existing(output, force, folder)
                _sync_all(staging / output.name)
                _take_place(staging / output.name, output)
                keep = False
        finally:
            if not keep:
                with contextlib.suppress(OSError):
                    _empty(staging)
                    (staging / MARKER).unlink()
                    staging.rmdir()
    world.wait()


def write_whole(text: str, path: Path) -> None:
    """Write a text so that a reader finds the old file or the new one, never a part. Replaces what is there.

    Raises ResourceError where the folder or the disk does not allow it, OutputError where the path is no regular file.
    """
    with staged_output(path, force=True, folder=False) as staged, staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def refuse_existing(output: Path, force: bool, folder: bool) -> None:
    """Raise OutputError where the output exists without `force`, or is what no output of this kind may replace."""
    try:
        mode = output.stat().st_mode
    except OSError:
        if not output.is_symlink():
            return
        mode = stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OutputError(str(output), "is a device, a pipe or a socket, which no output replaces", "choose another -o")
    if not force:
        raise OutputError(str(output), "exists already", "choose another -o, or replace it with --force")
    if stat.S_ISDIR(mode) != folder and output.exists():
        kind, other = ("a folder", "a file") if stat.S_ISDIR(mode) else ("a file", "a folder")
        raise OutputError(str(output), f"is {kind}, and the output is {other}", "choose another -o")
    ours = any(output.glob("*.safetensors")) or (output / "model_index.json").is_file() if folder else True
    if folder and any(output.iterdir()) and not ours:
        raise OutputError(str(output), "is a folder that holds no .safetensors file", "choose another -o")


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[Path]:
    """The work folder of `output`, made where there is none, for this run alone. Raises OutputError, ResourceError."""
    staging = staging_folder(output)
    with reporting_resources(output.parent):
        with contextlib.suppress(FileExistsError):
            staging.mkdir()
        if staging.is_symlink() or not staging.is_dir():
            raise _not_ours(staging)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held the lock may have removed this folder while we waited to open it.
            alone = staging.exists() and os.path.samestat(os.fstat(lock), staging.stat())
        except OSError:
            alone = False
        if not alone:
            raise OutputError(str(output), "is being written by another run", "wait for it, or choose another -o")
        if not (staging / MARKER).exists():
            if any(staging.iterdir()):
                raise _not_ours(staging)
            with reporting_resources(output.parent):
                (staging / MARKER).touch()
        yield staging
    finally:
        os.close(lock)


def _not_ours(staging: Path) -> OutputError:
    what = "is in the way: this tool would build its output there, and did not make it"
    return OutputError(str(staging), what, "move it away, or choose another -o")


def _put_back(staging: Path, output: Path) -> None:
    """Put back the folder that a run killed between two renames left without its place."""
    replaced = staging / f"{output.name}{REPLACED}"
    if replaced.exists() and not (output.exists() or output.is_symlink()):
        replaced.rename(output)
        _fsync(output.parent)


def _empty(staging: Path) -> None:
    """Remove what a run left behind, but not the mark of whose folder this is."""
    for path in staging.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _take_place(built: Path, output: Path) -> None:
    if not output.is_dir() or output.is_symlink():
        built.replace(output)
    else:
        # What lies under the output's own name in the work folder is what a run may resume from, so never the old one.
        finished = built.with_name(f"{output.name}{FINISHED}")
        if finished.exists():
            shutil.rmtree(finished)
        built.rename(finished)
        _fsync(finished.parent)
        if not _exchange(finished, output):
            _step_aside(finished, output)
    _fsync(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where this system cannot. Raises OSError for any other reason."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _step_aside(finished: Path, output: Path) -> None:
    """Replace a folder by two renames: the old one comes back if the new one cannot take its place."""
    old = finished.with_name(f"{output.name}{REPLACED}")
    if old.exists():
        shutil.rmtree(old)
    output.rename(old)
    _fsync(old.parent)
    try:
        finished.rename(output)
    except OSError:
        old.rename(output)
        raise


def _sync_all(built: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk before it takes its place."""
    for path in [*built.rglob("*"), built] if built.is_dir() else [built]:
        _fsync(path)


def _fsync(path: Path) -> None:
    """Make a file, or a rename in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
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
        hint = {
            "ENOSPC": "free some space, or write to another disk with -o",
            "EDQUOT": "free some of the quota, or write to another disk with -o",
            "EACCES": "make the folder writable, or choose another with -o",
            "EROFS": "choose a writable folder with -o",
            "ENOENT": "make the folder first, or choose another with -o",
            "ENOTDIR": "choose a folder with -o",
            "EFBIG": "the file system or a limit allows no file so large; choose another with -o",
        }.get(errno.errorcode.get(error.errno or 0, ""), "check the disk, or choose another place with -o")
        raise ResourceError(str(place), error.strerror or str(error), hint) from error
