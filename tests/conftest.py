"""What the tests share: the command line in this process or in one of its own, and small checkpoints."""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

# Before anything imports torch: more threads than work make small tensors slow, and threads that wait spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from safetensors.numpy import save_file

# A shared machine may be slow at any moment, which says nothing about the code.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")

Tensors: TypeAlias = dict[str, NDArray[Any]]

ROOT = Path(__file__).parent.parent
OURS = (
    "QCOMPRESS_ALLOW_CODE",
    "QCOMPRESS_CODING",
    "QCOMPRESS_DEVICE",
    "QCOMPRESS_MAX_MEMORY",
    "QCOMPRESS_SEED",
    "QCOMPRESS_THREADS",
)
DECIDING = (*OURS, "NO_COLOR", "FORCE_COLOR", "TERM")
"""Variables that change what the program says or does, and that the tests' own surroundings must not decide."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker for each core where the whole suite runs; none for single files, which end sooner without."""
    named = config.invocation_params.args
    if any(Path(str(one).partition("::")[0]).exists() for one in named):
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Run: TypeAlias = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("quantize", path, "--bits", 2)` in this process; `stdin` is the text of standard input."""
    from qcompress.cli.app import run as run_arguments

    for name in DECIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QCOMPRESS_THREADS", "1")

    def call(*arguments: object, stdin: str = "") -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run_arguments([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return call


def process_environment(**changes: str) -> dict[str, str]:
    """The environment of a process of its own: this package on its path, and nothing that decides for it."""
    kept = {name: value for name, value in os.environ.items() if name not in DECIDING}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "QCOMPRESS_THREADS": "1", **changes}


def program(*arguments: object) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "qcompress", *map(str, arguments)]


def refused(run: Run, folder: Path, *arguments: object, code: int = 3) -> str:
    """The one line that a command says which leaves with this code, and changes nothing in the folder."""
    before = files_under(folder)
    ran = run(*arguments)
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("error: ")
    assert files_under(folder) == before
    return ran.err.rstrip("\n")


def run_ranks(size: int, *arguments: object, restarts: int = 0, script: Path | None = None) -> Ran:
    """What a command leaves that torchrun runs in so many processes; `script` stands in for the program."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", size, "--master-port", port]
    what = program(*arguments)[1:] if script is None else [script, *arguments]
    command = [str(word) for word in (*launch, "--max-restarts", restarts, *what)]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=300, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run_process() -> Run:
    """Like `run`, in a process of its own. `env` adds variables; `stdout` takes what else would be in the result."""

    def call(*arguments: object, env: Mapping[str, str] | None = None, stdout: int | IO[str] = subprocess.PIPE) -> Ran:
        done = subprocess.run(
            program(*arguments),
            env=process_environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
        return Ran(done.returncode, done.stdout or "", done.stderr)

    return call


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Ran]:
    """Run a line of bash in `cwd` where `qcompress` is this checkout's program."""
    binaries = tmp_path / ".bin"
    binaries.mkdir()
    wrapper = binaries / "qcompress"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(program())} "$@"\n')
    wrapper.chmod(0o755)

    def call(script: str, cwd: Path, **env: str) -> Ran:
        path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=cwd,
            env=process_environment(PATH=path, **env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return call


def small_tensors(seed: int = 0) -> Tensors:
    """A convolution, two linear layers, biases and a batch norm's counter: 17,483 values in all."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (0.05 * random.standard_normal(shape)).astype(np.float32)

    return {
        "conv1.weight": normal(16, 3, 3, 3),
        "conv1.bias": normal(16),
        "bn1.num_batches_tracked": np.array(7, dtype=np.int64),
        "layer.weight": normal(64, 256),
        "fc.weight": normal(10, 64),
        "fc.bias": normal(10),
    }


def write_checkpoint(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """A checkpoint as the safetensors library writes it."""
    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """`model.safetensors` with `small_tensors`, alone in a folder."""
    return write_checkpoint(tmp_path / "model.safetensors", small_tensors())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Hugging Face folder: two shards with their index, config and tokenizer files."""
    folder = tmp_path / "network"
    folder.mkdir()
    tensors = small_tensors()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:3], names[3:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        write_checkpoint(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "small"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes: what a refused or failed command must not change."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def package_or_skip(name: str) -> Any:
    """A package of an extra, or a module of one, as the program imports it; where it is not installed, or where mlx's
    wheel does not load, the test is skipped."""
    from qcompress.data.user_code import import_package
    from qcompress.errors import UsageError

    try:
        return import_package(name)
    except UsageError as error:
        pytest.skip(str(error))
    except ImportError as error:
        if name.partition(".")[0] != "mlx":
            raise
        pytest.skip(f"mlx does not load here: {error}")


def skip_without_package(factory: str) -> None:
    """Skip a test of a network whose package cannot be imported here."""
    from qcompress.types.settings import LIBRARIES

    package = factory.partition(":")[0].partition(".")[0]
    if package in LIBRARIES:
        package_or_skip(package)
