"""Signals in the middle of a run: nothing half-written stays, and what was there before is untouched."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, process_environment, program, write_checkpoint

DEADLINE_SECONDS = 60.0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes seconds to compress: 32 tensors of 2**20 weights."""
    weight = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float16)
    folder = tmp_path_factory.mktemp("large")
    return write_checkpoint(folder / "model.safetensors", {f"layer{n}.weight": weight for n in range(32)})


@pytest.fixture
def running(large: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is compressing `large` over an old file right now, and the output that it will make."""
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"the old file")
    process = subprocess.Popen(
        program("quantize", large, "--bits", 3, "--method", "hqq", "-o", output, "--force"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(),
        # A shell that started the tests in its background made them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    built = tmp_path / ".out.safetensors.partial" / "out.safetensors"
    started = time.monotonic()
    while not built.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < DEADLINE_SECONDS
        time.sleep(0.01)
    try:
        yield process, output
    finally:
        process.kill()
        process.wait(DEADLINE_SECONDS)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "interrupted: nothing is left half-written\n"),
        (signal.SIGTERM, 143, "terminated: nothing is left half-written\n"),
    ],
    ids=["SIGINT", "SIGTERM"],
)
def test_an_interrupt_leaves_nothing_behind(
    running: tuple[subprocess.Popen[str], Path], number: signal.Signals, code: int, words: str
) -> None:
    process, output = running
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, out, err) == (code, "", words)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.read_bytes() == b"the old file"


def test_a_kill_leaves_the_old_file_and_the_next_run_cleans_up(
    running: tuple[subprocess.Popen[str], Path], run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    process, output = running
    process.kill()
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert output.read_bytes() == b"the old file"
    small = tmp_path_factory.mktemp("small") / "model.safetensors"
    write_checkpoint(small, {"weight": np.ones((8, 8), dtype=np.float32)})
    assert run("quantize", small, "--bits", 2, "-o", output, "--force").code == 0
    assert run("verify", output).code == 0
    assert {path.name for path in output.parent.iterdir()} == {"out.safetensors", "out.report.json"}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bytes_of_an_unbroken_one(
    tmp_path: Path, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float16)
    source = tmp_path_factory.mktemp("source") / "model.safetensors"
    write_checkpoint(source, {f"layer{n}.weight": weight for n in range(32)})
    output = tmp_path / "out.safetensors"
    words = ("quantize", source, "--bits", 3, "--method", "hqq", "--threads", 1)
    process = subprocess.Popen(
        program(*words, "-o", output, "--resume"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=process_environment(),
    )
    journal = tmp_path / ".out.safetensors.partial" / f"{source.name}.journal"
    started = time.monotonic()
    # Its first line is the key; two more are two finished tensors.
    while not journal.exists() or len(journal.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < DEADLINE_SECONDS
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=DEADLINE_SECONDS)
    assert not output.exists()
    assert run(*words, "-o", output, "--resume").code == 0
    whole = tmp_path_factory.mktemp("whole") / "out.safetensors"
    assert run(*words, "-o", whole).code == 0
    assert output.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out.safetensors", "out.report.json"}


def test_a_second_run_does_not_touch_the_first(
    running: tuple[subprocess.Popen[str], Path], run: Run, large: Path
) -> None:
    process, output = running
    ran = run("quantize", large, "--bits", 2, "-o", output, "--force")
    assert (ran.code, ran.out) == (3, "")
    assert "being written by another run" in ran.err
    assert process.poll() is None
    assert (output.parent / ".out.safetensors.partial" / "out.safetensors").exists()
