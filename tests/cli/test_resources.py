"""Full disks, unwritable folders and limits: exit code 5, one line, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Ran, Run, files_under, small_tensors, write_checkpoint

NOBODY = 65534


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user of the machine can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Without the rights of root, whom no file mode stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def assert_out_of_resource(ran: Ran, *words: str) -> None:
    """Exit code 5 with one line of error that holds `words`, and nothing on stdout."""
    assert (ran.code, ran.out, ran.err.count("\n")) == (5, "", 1), ran.err
    assert ran.err.startswith("error: ")
    for word in words:
        assert word in ran.err


def test_an_unwritable_folder(run: Run, public_folder: Path) -> None:
    checkpoint = write_checkpoint(public_folder / "model.safetensors", small_tensors())
    checkpoint.chmod(0o644)
    # Whatever root alone may read of the libraries is imported by a run that succeeds.
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    before = files_under(public_folder)
    public_folder.chmod(0o555)
    with as_ordinary_user():
        assert_out_of_resource(run("quantize", checkpoint, "--bits", 3), "Permission denied", "-o")
        ran = run("export", public_folder / "model-w2.safetensors", "--to", "safetensors")
        assert_out_of_resource(ran, "Permission denied")
    assert files_under(public_folder) == before


def test_an_unreadable_checkpoint_is_3(run: Run, public_folder: Path) -> None:
    checkpoint = write_checkpoint(public_folder / "model.safetensors", small_tensors())
    checkpoint.chmod(0o000)
    with as_ordinary_user():
        ran = run("quantize", checkpoint, "--bits", 2)
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert "Permission denied" in ran.err


@pytest.mark.parametrize("place", ["missing/out.safetensors", "model.safetensors/out.safetensors"])
def test_a_folder_that_is_none(run: Run, checkpoint: Path, place: str) -> None:
    before = files_under(checkpoint.parent)
    assert_out_of_resource(run("quantize", checkpoint, "--bits", 2, "-o", checkpoint.parent / place), "-o")
    assert files_under(checkpoint.parent) == before


@pytest.mark.parametrize("command", ["quantize", "export"])
@pytest.mark.slow
def test_a_limit_on_file_size(shell: Run, run: Run, checkpoint: Path, command: str) -> None:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    words = {
        "quantize": "quantize model.safetensors --bits 8 --force -o model-w2.safetensors",
        "export": "export model-w2.safetensors --to safetensors",
    }[command]
    before = files_under(checkpoint.parent)
    ran = shell(f"ulimit -f 8; qcompress {words}", checkpoint.parent)
    assert_out_of_resource(ran, "File too large", "-o")
    assert files_under(checkpoint.parent) == before
    assert not list(checkpoint.parent.glob(".*partial"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_beforehand(run: Run, checkpoint: Path, tiny_disk: Path) -> None:
    ran = run("quantize", checkpoint, "--bits", 8, "-o", tiny_disk / "out.safetensors")
    assert_out_of_resource(ran, "disk has", "free some space")
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(run: Run, checkpoint: Path, tiny_disk: Path) -> None:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    ran = run("export", checkpoint.with_name("model-w2.safetensors"), "--to", "safetensors", "-o", tiny_disk / "x")
    assert_out_of_resource(ran, "No space left")
    assert list(tiny_disk.iterdir()) == []


def failing(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["os.pwrite", "os.fsync", "SlotWriter._read_back"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_any_failing_call_leaves_the_old_file(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    output = checkpoint.with_name("out.safetensors")
    output.write_bytes(b"the old file")
    before = files_under(checkpoint.parent)
    with monkeypatch.context() as patched:
        patched.setattr(f"qcompress.artifact.writer.{call}", failing(number))
        ran = run("quantize", checkpoint, "--bits", 2, "-o", output, "--force")
    assert_out_of_resource(ran, os.strerror(number))
    assert files_under(checkpoint.parent) == before
    assert not list(checkpoint.parent.glob(".*partial"))


@pytest.mark.parametrize("place", ["data", "header"])
def test_a_disk_that_returns_other_bytes_is_noticed(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    real = os.pwrite

    def flip(descriptor: int, data: memoryview, position: int) -> int:
        changed = bytearray(data)
        changed[-1] ^= (position == 0) == (place == "header")
        return real(descriptor, changed, position)

    before = files_under(checkpoint.parent)
    with monkeypatch.context() as patched:
        patched.setattr("qcompress.artifact.writer.os.pwrite", flip)
        ran = run("quantize", checkpoint, "--bits", 2)
    assert_out_of_resource(ran, "reads back other bytes")
    assert files_under(checkpoint.parent) == before


def test_json_that_cannot_be_written(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    ran = run("quantize", checkpoint, "--bits", 2, "-n", "--json", tmp_path / "missing" / "plan.json")
    assert_out_of_resource(ran, "plan.json", "--json")


def test_a_limit_of_threads(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python says it where a limit of memory or processes leaves no room for a thread's stack."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert_out_of_resource(run("quantize", checkpoint, "--bits", 2, "--threads", 2), "--threads 1")
    assert not list(checkpoint.parent.glob(".*partial"))
