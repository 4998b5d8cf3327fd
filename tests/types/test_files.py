"""Reading waits for no pipe that nobody writes to, and takes no device for a file."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from qcompress.types.files import open_regular, read_start


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)))
    with open_regular(path) as file:
        assert file.read() == bytes(range(256))
    assert read_start(path, 1000) == bytes(range(256))
    assert read_start(path, 10) == bytes(range(10))


@pytest.mark.parametrize("most", [5, 100_000, 1_000_000])
def test_a_pipe_that_somebody_writes_to_is_read_to_its_end(tmp_path: Path, most: int) -> None:
    """As of a shell's <(command), also where the writer is slower than we are and writes more than the pipe holds."""
    pipe, data = tmp_path / "pipe", bytes(range(256)) * 1000
    os.mkfifo(pipe)
    # A reader until ours has come and gone, or whoever writes first would find none.
    held = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    file = pipe.open("wb")

    def write() -> None:
        try:
            with file:
                file.write(data)
        except BrokenPipeError:
            assert most < len(data)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_start(pipe, most) == data[:most]
    os.close(held)
    writer.join(10)
    assert not writer.is_alive()


def test_a_pipe_is_no_regular_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(OSError, match="nobody writes to"):
        read_start(tmp_path / "pipe", 10)


@pytest.mark.parametrize("read", [open_regular, lambda path: read_start(path, 10)])
def test_devices_folders_and_absent_files_are_refused(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(OSError, match="not a file"):
        read(Path(os.devnull))
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")
