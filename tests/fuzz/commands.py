"""Real commands on mutated files, each in a process of its own that leaves as the program leaves.

What holds: the exit code is one of those documented, what went wrong is said in lines of errors without a trace, and
then no file has come, gone or changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import traceback
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NoReturn, TypeAlias

import numpy as np
import torch
from conftest import ROOT, process_environment, program

from fuzz.campaign import SECONDS, WAITING, Disagree, Target, limit_memory
from fuzz.mutations import mutate_bytes, mutate_json, mutate_text
from fuzz.sound import gaussian, import_all
from qcompress.checkpoint.checkpoint import write_checkpoint
from qcompress.cli.app import main, run
from qcompress.errors import QcompressError

LARGEST_RESIDENT_BYTES = 1 << 30
"""What a command may hold beyond what the process held that it comes from."""
SERVE = "from fuzz.commands import serve; serve()"


@dataclass(frozen=True)
class Ended:
    """What a process left.

    code         its exit code, or the signal that ended it as a negative one
    grown_bytes  memory that it held at most, beyond what the process held that it comes from
    """

    code: int
    out: str
    err: str
    grown_bytes: int


@dataclass(frozen=True)
class Kind:
    """A kind of file in the folder of the commands, and those that read it; `outputs` of each may come."""

    name: str
    file: str
    mutate: Callable[[bytes, Random], bytes]
    commands: tuple[tuple[str, tuple[str, ...]], ...]


Files: TypeAlias = Mapping[str, int]
Start: TypeAlias = Callable[[Sequence[str], Path], Ended]
"""Runs a command of these words in a folder."""


class Told(QcompressError):
    """What a command has said of itself in lines of errors."""

    def __init__(self, code: int, lines: list[str]) -> None:
        super().__init__("", "", "")
        self.exit_code = code
        self._lines = lines

    def lines(self) -> list[str]:
        return self._lines


LIVE = """version: 1
model: {factory: "qcompress.demo:DigitsNet"}
data: {calibration: {npz: x.npz, samples: 16}, eval: {npz: x.npz}, train: {npz: x.npz, batch_size: 16}}
task: {classification: {}}
rules: [{match: "*.weight", gptq: {bits: 3}}]
finetune: {epochs: 1, optimizer: {sgd: {lr: 0.01}}, regularize: [{match: "*.weight", dsmm: {}}]}
"""
PLAIN = """version: 1
seed: 3
rules:
  - {match: "0.*", mse: {bits: 3, granularity: group, group_size: 4}}
  - match: ["1.weight", "2.w*"]
    squant: {bits: 4}
  - {match: "*", keep: {dtype: f16}}
gates: {max_size: 2MB, max_bpw: 30}
"""
SPENDING = """version: 1
rules: [{match: "*", mse: {}}]
budget: {bpw: 4, sensitivity: s.json}
"""

WEIGHED = 'version: 1\nrules: [{match: "*.weight", gptq: {bits: 3}}]\n'
RECIPES = {"live.yaml": LIVE, "plain.yaml": PLAIN, "spending.yaml": SPENDING, "weighed.yaml": WEIGHED}
MAKING = (
    "quantize digits.safetensors -r live.yaml -o a.safetensors --save-statistics s.safetensors",
    "quantize digits.safetensors --bits 2 -o b.safetensors",
    "report digits.safetensors --sensitivity -r live.yaml --cache s.json --widths 2,4,6",
)
"""Commands that make sound files of the recipes, weights and data."""

EARLY = {"t.safetensors"}
"""Outputs that are whole and in their place before a command may still fail."""
QUANTIZED = ("o.safetensors", "o.report.json")
KINDS = (
    Kind(
        "artifact",
        "a.safetensors",
        mutate_bytes,
        (
            ("verify a.safetensors --json o.json", ("o.json",)),
            ("export a.safetensors --to safetensors -o o.safetensors", ("o.safetensors",)),
            ("report a.safetensors --format html -o o.html", ("o.html",)),
            ("report a.safetensors --baseline digits.safetensors --json -", ()),
            ("eval a.safetensors -r live.yaml --json o.json", ("o.json",)),
        ),
    ),
    Kind(
        "checkpoint",
        "m.safetensors",
        mutate_bytes,
        (
            ("quantize m.safetensors --bits 3 -o o.safetensors", QUANTIZED),
            ("quantize m.safetensors --bits 2 -n --json -", ()),
            ("quantize m.safetensors -r plain.yaml --coding ans -o o.safetensors", QUANTIZED),
            ("quantize m.safetensors --bpw 3 -o o.safetensors", QUANTIZED),
            ("cluster m.safetensors --bits 2 -o o.safetensors", QUANTIZED),
        ),
    ),
    Kind(
        "network",
        "digits.safetensors",
        mutate_bytes,
        (
            (
                "quantize digits.safetensors -r live.yaml -o o.safetensors --save-statistics t.safetensors",
                ("t.safetensors", *QUANTIZED),
            ),
            ("eval digits.safetensors -r live.yaml", ()),
            ("recipe check live.yaml digits.safetensors", ()),
            ("report a.safetensors --baseline digits.safetensors", ()),
        ),
    ),
    Kind(
        "recipe",
        "plain.yaml",
        mutate_text,
        (
            ("recipe check plain.yaml m.safetensors", ()),
            ("recipe show plain.yaml --json o.json", ("o.json",)),
            ("quantize m.safetensors -r plain.yaml -o o.safetensors", QUANTIZED),
            ("quantize m.safetensors -r plain.yaml -n", ()),
        ),
    ),
    Kind(
        "live recipe",
        "live.yaml",
        mutate_text,
        (
            ("recipe check live.yaml", ()),
            ("recipe check live.yaml digits.safetensors", ()),
            ("eval digits.safetensors -r live.yaml", ()),
            ("quantize digits.safetensors -r live.yaml -n", ()),
            ("finetune-reg digits.safetensors -r live.yaml -n", ()),
        ),
    ),
    Kind(
        "data",
        "x.npz",
        mutate_bytes,
        (
            ("eval digits.safetensors -r live.yaml", ()),
            ("recipe check live.yaml", ()),
            ("quantize digits.safetensors -r live.yaml -o o.safetensors", QUANTIZED),
        ),
    ),
    Kind(
        "report",
        "a.report.json",
        mutate_json,
        (
            ("report a.safetensors --format csv", ()),
            ("report a.report.json --format html -o o.html", ("o.html",)),
            ("report a.safetensors --baseline-report a.report.json --max-growth 900000%", ()),
            ("report a.report.json b.safetensors --format markdown", ()),
        ),
    ),
    Kind(
        "statistics",
        "s.safetensors",
        mutate_bytes,
        (("quantize digits.safetensors -r weighed.yaml --statistics s.safetensors -o o.safetensors", QUANTIZED),),
    ),
    Kind(
        "sensitivity",
        "s.json",
        mutate_json,
        (
            ("quantize digits.safetensors -r spending.yaml -o o.safetensors", QUANTIZED),
            ("quantize digits.safetensors -r spending.yaml -n", ()),
        ),
    ),
    Kind(
        "learned representatives",
        "digits.reg.safetensors",
        mutate_bytes,
        (
            ("cluster digits.safetensors --method learned --bits 2 -o o.safetensors", QUANTIZED),
            ("cluster digits.safetensors --method learned --bits 2 -n", ()),
        ),
    ),
)
"""Every kind of file that a command reads. More commands than one take turns, by the file's bytes."""


def command_targets(scratch: Path) -> list[Target]:
    """A target of each kind, whose cases are processes that have imported all; of artifacts one that starts anew."""
    sound = scratch / "commands"
    _make_folder(sound)
    start = Server()
    made = [make_target(f"commands on {kind.name}", kind, sound, start) for kind in KINDS]
    return [*made, make_target("commands from a shell", KINDS[0], sound, run_anew)]


def make_target(name: str, kind: Kind, sound: Path, start: Start) -> Target:
    """Files of a kind beside the others of the folder `sound`."""
    seeds = {kind.file: (sound / kind.file).read_bytes()}
    return Target(name, seeds, kind.mutate, lambda path: _ended(path, kind, sound, start))


def _make_folder(folder: Path) -> None:
    """Sound files of every kind, most of them made by the commands themselves."""
    from qcompress.demo import DigitsNet

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = {f"{index}.weight": gaussian(8, 12, seed=index) for index in range(3)}
    write_checkpoint({**weights, "bias": gaussian(8), "3.half": gaussian(4, 6).half()}, folder / "m.safetensors")
    torch.manual_seed(0)
    state = DigitsNet().state_dict()
    write_checkpoint(state, folder / "digits.safetensors")
    levels = torch.tensor([-0.2, -0.05, 0.05, 0.2])
    learned = {f"{name}.representatives": levels.clone() for name, value in state.items() if name.endswith("weight")}
    write_checkpoint(learned, folder / "digits.reg.safetensors")
    pixels = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)
    np.savez(folder / "x.npz", x=pixels, y=np.arange(32) % 10)
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        for words in MAKING:
            code = run([*words.split(), "-q"])
            assert code == 0, words


def _ended(path: Path, kind: Kind, sound: Path, start: Start) -> str:
    """ "done" where a command did its work on the file; Told where it refused; Disagree where it broke a promise."""
    data, folder = path.read_bytes(), path.with_name(f"{path.name}.folder")
    if not folder.exists():
        shutil.copytree(sound, folder)
    (folder / kind.file).write_bytes(data)
    words, outputs = kind.commands[zlib.crc32(data) % len(kind.commands)]
    before = _files(folder)
    ended = start(words.split(), folder)
    after = _files(folder)
    broken = _broken(ended, before, after, set(outputs))
    if ended.grown_bytes > LARGEST_RESIDENT_BYTES:
        broken = f"it held {ended.grown_bytes:,} bytes"
    if broken is not None:
        shutil.rmtree(folder)
        raise Disagree(f"{words}: {broken}")
    for name in after.keys() - before.keys():
        (folder / name).unlink()
    if ended.code:
        raise Told(ended.code, [line for line in ended.err.splitlines() if line.startswith("error: ")])
    return "done"


def _broken(ended: Ended, before: Files, after: Files, outputs: set[str]) -> str | None:
    """What a command did that none may do."""
    last = (ended.err.splitlines() or ["nothing was said"])[-1]
    if ended.code not in (0, 2, 3, 4, 5):
        return f"exit {ended.code}: {last[:80]}"
    if "Traceback" in ended.err or "error: memory: ran out of it" in ended.err:
        return f"{ended.code}: {last[:80]}"
    changed = {name for name in before if after.get(name) != before[name]}
    come = after.keys() - before.keys()
    due = outputs if ended.code in (0, 4) else outputs & EARLY & come
    if changed or come != due:
        return f"exit {ended.code}: {sorted(changed)} changed and {sorted(come)} came"
    if ended.code and not any(line.startswith("error: ") for line in ended.err.splitlines()):
        return f"exit {ended.code} without an error: {last[:80]}"
    return None


class Server:
    """Runs commands in children of one process that has imported everything and computed nothing.

    A child has none of its parent's threads, and torch, once it has computed, counts on them: where the tests' own
    process is the parent, commands fail by chance.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            env=process_environment(PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests")))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        weakref.finalize(self, _end, self._process)

    def __call__(self, words: Sequence[str], folder: Path) -> Ended:
        """Run a command; the answer is told from one to a caller that has died since by its number."""
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None and answers is not None
        number = secrets.token_hex(8)
        asked.write(json.dumps([number, list(words), str(folder)]).encode() + b"\n")
        asked.flush()
        for line in answers:
            answered, code, grown = json.loads(line)
            if answered == number:
                out, err = (path.read_bytes().decode() for path in _streams(folder))
                return Ended(code, out, err, grown)
        raise RuntimeError("the process that commands come from has ended")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def serve() -> None:
    """Answer each command on a line of the standard input, as Server asks it, by a line."""
    import_all()
    for line in sys.stdin:
        number, words, folder = json.loads(line)
        ended = run_forked(words, Path(folder))
        sys.stdout.write(json.dumps([number, ended.code, ended.grown_bytes]) + "\n")
        sys.stdout.flush()


def run_forked(words: Sequence[str], folder: Path) -> Ended:
    """Run a command in a child of this process, by the way that the program itself starts and ends."""
    streams, held = _streams(folder), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        _be_command(words, folder, streams)
    _, status, used = os.wait4(child, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    out, err = (path.read_bytes().decode() for path in streams)
    return Ended(code, out, err, 1024 * used.ru_maxrss - held)


def _streams(folder: Path) -> list[Path]:
    return [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]


def _be_command(words: Sequence[str], folder: Path, streams: Sequence[Path]) -> NoReturn:
    code = 1
    try:
        signal.alarm(WAITING // 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        limit_memory()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(streams, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin = io.StringIO()
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.argv = ["qcompress", *words]
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_anew(words: Sequence[str], folder: Path) -> Ended:
    """Run a command as a shell does."""
    done = subprocess.run(
        program(*words), cwd=folder, env=process_environment(), capture_output=True, text=True, timeout=WAITING
    )
    return Ended(done.returncode, done.stdout, done.stderr, 0)


def _files(folder: Path) -> Files:
    """The files and folders in a folder, with a checksum of what each file holds."""
    return {
        str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) if path.is_file() else 0
        for path in folder.rglob("*")
    }
