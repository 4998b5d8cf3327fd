"""What an exporter has planned is written here, whatever its format: streamed, read back, in place all at once."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

from qcompress.artifact.reader import Artifact
from qcompress.checkpoint.outputs import refuse_own_input
from qcompress.checkpoint.staging import staged_output
from qcompress.errors import ResourceError
from qcompress.types.export import ExportFile, ExportPlan

READ_BACK_BYTES = 1 << 22


def write_export(
    plan: ExportPlan,
    artifact: Artifact,
    output: Path,
    *,
    force: bool,
    advance: Callable[[str, int], None] = lambda name, n_bytes: None,
) -> None:
    """Write a plan that was made for this artifact.

    advance  is told of a tensor's name and its bytes whenever some are written
    raises   ArtifactError where a tensor is damaged, OutputError and ResourceError where the output cannot be written;
             nothing is left behind then
    """
    refuse_own_input(artifact.path, output)
    with staged_output(output, force=force, folder=plan.folder) as staged:
        for file in plan.files:
            _write_file(staged / file.name if plan.folder else staged, file, advance)
        for path in plan.copied:
            shutil.copyfile(path, staged / path.name)
        for name, text in plan.texts.items():
            (staged / name).write_bytes(text)


def _write_file(path: Path, file: ExportFile, advance: Callable[[str, int], None]) -> None:
    """Write one file, and hold what the disk has of it against what was written."""
    with path.open("xb+", buffering=0) as out:
        descriptor = out.fileno()
        end, crc32 = _write(descriptor, file.head, 0, 0)
        for target in file.targets:
            start = end
            for piece in target.pieces():
                view = memoryview(piece).cast("B") if memoryview(piece).nbytes else memoryview(b"")
                end, crc32 = _write(descriptor, view, end, crc32)
                advance(target.source, len(view))
            if end - start != target.n_bytes:
                raise AssertionError(f"{target.name} has {end - start} bytes, and {target.n_bytes} were promised")
            end, crc32 = _write(descriptor, bytes(file.filling(target.n_bytes)), end, crc32)
        os.fsync(descriptor)
        found = position = 0
        while piece := os.pread(descriptor, READ_BACK_BYTES, position):
            found, position = zlib.crc32(piece, found), position + len(piece)
    if found != crc32:
        hint = "check the disk and memory of this machine"
        raise ResourceError(str(path), "reads back other bytes than were written", hint)


def _write(descriptor: int, data: bytes | memoryview, position: int, crc32: int) -> tuple[int, int]:
    """Write all of it there; where it ends, and the CRC-32 of the file so far, given that of what was there before."""
    view = memoryview(data)
    crc32 = zlib.crc32(view, crc32)
    while view:
        done = os.pwrite(descriptor, view, position)
        view, position = view[done:], position + done
    return position, crc32
