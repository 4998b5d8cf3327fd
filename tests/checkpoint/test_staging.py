"""Outputs take their place in one step: what a kill leaves at any moment is the old output, the new one, or none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompress.checkpoint import staging
from qcompress.checkpoint.staging import MARKER, staged_output, staging_folder, write_whole
from qcompress.errors import OutputError


class Killed(BaseException):
    """Stands for a kill: nothing that the process would still do after it is done."""


def make_folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "model.safetensors").write_text(text)
    (path / f"{text}.json").touch()
    return path


def text_of(folder: Path) -> str | None:
    """Which folder it is, whole; None where there is none. Fails on a mixture of two."""
    if not folder.exists():
        return None
    text = (folder / "model.safetensors").read_text()
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", f"{text}.json"}
    return text


def replace(output: Path, text: str, **more: bool) -> None:
    with staged_output(output, force=True, folder=True, **more) as staged:
        (staged / "model.safetensors").write_text(text)
        (staged / f"{text}.json").touch()


CALLS = ["rename", "replace", "mkdir", "touch", "unlink", "rmdir"]
"""Every call of `pathlib` and of this module that changes a folder in `staged_output`."""


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int, *, after: bool) -> Callable[[], int]:
    """Let the `moment`th call that changes a folder be the last one, done or not done; returns how many came."""
    count = 0

    def watched(call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            if count == moment and not after:
                raise Killed
            result = call(*args, **kwargs)
            if count == moment:
                raise Killed
            return result

        return run

    for name in CALLS:
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    monkeypatch.setattr(staging, "_exchange", watched(staging._exchange))
    return lambda: count


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_a_kill_at_any_moment_loses_neither_folder(tmp_path: Path, exchanges: bool, after: bool) -> None:
    """After the kill, and after a next run that fails, the place holds one whole folder, old or new."""
    moment, reached = 0, True
    while reached:
        moment += 1
        home = tmp_path / f"{moment}"
        home.mkdir()
        output = make_folder(home / "out", "old")
        with pytest.MonkeyPatch.context() as patch:
            if not exchanges:
                patch.setattr(staging, "_exchange", lambda one, other: False)
            made = kill_at(patch, moment, after=after)
            # Nor does a killed process run what `finally` asks for: the patched calls refuse that too.
            with contextlib.suppress(Killed):
                replace(output, "new")
            reached = made() >= moment
        assert text_of(output) in ("old", "new", None)
        with pytest.raises(RuntimeError), staged_output(output, force=True, folder=True):
            raise RuntimeError("the next run fails")
        assert text_of(output) in ("old", "new")
        replace(output, "newer")
        assert text_of(output) == "newer"
        assert {path.name for path in home.iterdir()} == {"out"}
    assert moment > 5


def test_without_force_a_folder_that_was_put_back_is_refused_and_stays(tmp_path: Path) -> None:
    output = tmp_path / "out"
    work = staging_folder(output)
    work.mkdir()
    (work / MARKER).touch()
    make_folder(work / "out.replaced", "old")
    with pytest.raises(OutputError, match="exists already"), staged_output(output, force=False, folder=True):
        raise AssertionError("not to be built")
    assert text_of(output) == "old"


def test_the_exchange_is_one_system_call_where_there_is_one(tmp_path: Path) -> None:
    one, other = make_folder(tmp_path / "one", "one"), make_folder(tmp_path / "other", "other")
    if not staging._exchange(one, other):
        pytest.skip("this system cannot exchange two paths")
    assert (text_of(one), text_of(other)) == ("other", "one")


def test_an_exchange_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        staging._exchange(tmp_path / "absent", tmp_path / "also absent")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("resume", [False, True])
def test_a_work_folder_of_someone_else_is_left_alone(tmp_path: Path, resume: bool) -> None:
    output = tmp_path / "out.safetensors"
    staging_folder(output).mkdir()
    (staging_folder(output) / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(OutputError, match="did not make it"),
        staged_output(output, force=True, folder=False, resume=resume),
    ):
        raise AssertionError("not to be built")
    assert (staging_folder(output) / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("force", [False, True])
def test_a_pipe_is_never_replaced(tmp_path: Path, force: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="a device, a pipe"), staged_output(pipe, force=force, folder=False):
        raise AssertionError("not to be built")
    assert pipe.is_fifo()


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    write_whole("old", target)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "a bad disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Exception, match="a bad disk"):
        write_whole("new", target)
    monkeypatch.undo()
    assert target.read_text() == "old"
    write_whole("new", target)
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
