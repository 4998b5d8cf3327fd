"""A killer: every writing command is killed before and after every call that changes a file, and what is left is held
against what is promised: each output is the old one, the new one or none, and the next run ends as if nothing was.

    PYTHONPATH=tests python -m fuzz.kills --work DIR [--every N] [--scenario NAME] [--random N]

`--every N` takes every Nth call; `--random N` adds N kills at random moments.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from fuzz.sound import gaussian, import_all
from qcompress.checkpoint import staging
from qcompress.checkpoint.checkpoint import write_checkpoint
from qcompress.cli.app import run

CHANGING = ("pwrite", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "remove", "link")
"""Functions of `os` that change files; `open` counts where it writes."""
SECONDS = 120
Files = dict[str, str]


@dataclass(frozen=True)
class Scenario:
    """One command in a folder of its own.

    words    of the command line
    outputs  what it writes: each is old, new or absent at any moment
    prepare  makes inputs, and old outputs
    """

    words: tuple[str, ...]
    outputs: tuple[str, ...]
    prepare: Callable[[Path], None]


@dataclass(frozen=True)
class Kill:
    """What was killed, where, and what was wrong with what was left; nothing where all is well."""

    scenario: str
    moment: str
    faults: tuple[str, ...]


def scenarios() -> dict[str, Scenario]:
    """Every command that writes, on files and folders, with and without an old output and a run to resume."""
    live, statistics = ("-r", "live.yaml", "--seed", "1"), ("--save-statistics", "s.safetensors")
    return {
        "file": Scenario(
            ("quantize", "m.safetensors", "--bits", "3", "-o", "a.safetensors", "--json", "j.json"),
            ("a.safetensors", "a.report.json", "j.json"),
            _nothing,
        ),
        "file again": Scenario(
            ("quantize", "m.safetensors", "--bits", "3", "-o", "a.safetensors", "-f", "--coding", "ans"),
            ("a.safetensors", "a.report.json"),
            _old_file,
        ),
        "folder again": Scenario(
            ("quantize", "network", "--bits", "3", "-o", "out", "-f"), ("out", "out.report.json"), _old_folder
        ),
        "folder again, resumed": Scenario(
            ("quantize", "network", "--bits", "3", "-o", "out", "-f", "--resume"),
            ("out", "out.report.json"),
            _old_folder,
        ),
        "budget": Scenario(
            ("quantize", "m.safetensors", "--bpw", "3", "-o", "a.safetensors", "-f"),
            ("a.safetensors", "a.report.json"),
            _old_file,
        ),
        "cluster": Scenario(
            ("cluster", "m.safetensors", "--bits", "2", "-o", "a.safetensors", "--resume"),
            ("a.safetensors", "a.report.json"),
            _nothing,
        ),
        "live": Scenario(
            ("quantize", "digits.safetensors", *live, "-o", "a.safetensors", "-f", *statistics),
            ("a.safetensors", "a.report.json", "s.safetensors"),
            _old_file,
        ),
        "training": Scenario(
            ("finetune-reg", "digits.safetensors", *live, "-o", "a.safetensors", "-f"),
            ("a.safetensors", "a.report.json", "a.reg.safetensors"),
            _old_file,
        ),
        "export": Scenario(
            ("export", "packed", "--to", "safetensors", "-o", "out", "-f"), ("out",), _old_folder_and_artifact
        ),
        "report": Scenario(
            ("report", "a.safetensors", "--format", "html", "-o", "page.html", "-f", "--json", "j.json"),
            ("page.html", "j.json"),
            _old_pages,
        ),
    }


# --- what lies there before -------------------------------------------------------------------------------------------


def _nothing(_: Path) -> None:
    pass


def _old_file(folder: Path) -> None:
    _must("quantize", "m.safetensors", "--bits", "8", "-o", "a.safetensors")


def _old_folder(folder: Path) -> None:
    _must("quantize", "network", "--bits", "8", "-o", "out")


def _old_folder_and_artifact(folder: Path) -> None:
    _old_folder(folder)
    _must("quantize", "network", "--bits", "4", "-o", "packed")


def _old_pages(folder: Path) -> None:
    _old_file(folder)
    _must("report", "a.safetensors", "--format", "html", "-o", "page.html", "--json", "j.json")
    _must("quantize", "m.safetensors", "--bits", "2", "-o", "a.safetensors", "-f")


LIVE = """version: 1
model: {factory: "qcompress.demo:DigitsNet"}
data: {calibration: {npz: x.npz}, eval: {npz: x.npz}, train: {npz: x.npz, batch_size: 16}}
task: {classification: {}}
rules: [{match: "*.weight", gptq: {bits: 3}}]
finetune:
  epochs: 2
  optimizer: {sgd: {lr: 0.01}}
  regularize: [{match: "*.weight", dsmm: {}}]
"""


def _inputs(folder: Path) -> None:
    from qcompress.demo import DigitsNet

    weights = {f"{index}.weight": gaussian(8, 12, seed=index) for index in range(3)}
    write_checkpoint({**weights, "bias": gaussian(8)}, folder / "m.safetensors")
    (folder / "network").mkdir()
    write_checkpoint(weights, folder / "network" / "model.safetensors")
    (folder / "network" / "config.json").write_text("{}")
    torch.manual_seed(0)
    write_checkpoint(DigitsNet().state_dict(), folder / "digits.safetensors")
    pixels = np.random.default_rng(0).random((64, 1, 8, 8), dtype=np.float32)
    np.savez(folder / "x.npz", x=pixels, y=np.arange(64) % 10)
    (folder / "live.yaml").write_text(LIVE)
    (folder / "diary.txt").write_text("someone else's")


def _must(*words: str) -> None:
    assert run([*words, "-q"]) == 0, words


# --- kills ------------------------------------------------------------------------------------------------------------


def _watch(hit: Callable[[bool], None]) -> None:
    """Let `hit` know before and after every call of this process that changes a file."""

    def wrapped(call: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not counts(*args, **kwargs):
                return call(*args, **kwargs)
            hit(False)
            result = call(*args, **kwargs)
            hit(True)
            return result

        return watched

    for name in CHANGING:
        setattr(os, name, wrapped(getattr(os, name), lambda *_, **__: True))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    os.open = wrapped(os.open, lambda _, flags=0, *__, **___: bool(flags & writing))
    staging._exchange = wrapped(staging._exchange, lambda *_: True)
    import io

    import safetensors.torch

    safetensors.torch.save_file = wrapped(safetensors.torch.save_file, lambda *_, **__: True)
    opened = io.open

    def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wxa+") and isinstance(file, str | os.PathLike):
            hit(False)
        return opened(file, mode, *args, **kwargs)

    io.open = open_file


def run_apart(
    words: tuple[str, ...], kill_at: tuple[int, bool] | None = None, after: float | None = None
) -> tuple[int, int]:
    """The exit code of a command in a child, minus the signal that ended it, and its calls that changed a file.

    kill_at  (which of them, whether after it) is the child's last
    after    seconds, after which the child is killed
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _be_killed(words, kill_at, theirs)
    os.close(theirs)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(ours) as lines:
        told = lines.read()
    _, status = os.waitpid(child, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return code, int(told or 0)


def _be_killed(words: tuple[str, ...], kill_at: tuple[int, bool] | None, pipe: int) -> None:
    count, code, tell = 0, 99, os.write

    def hit(after: bool) -> None:
        nonlocal count
        count += not after
        if (count, after) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        signal.alarm(SECONDS)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        _watch(hit)
        code = run([*words])
        tell(pipe, str(count).encode())
    finally:
        os._exit(code)


def files_of(folder: Path) -> Files:
    """Every file under a folder by its name, with a digest of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _part(files: Files, output: str) -> Files:
    return {name: digest for name, digest in files.items() if name == output or name.startswith(f"{output}/")}


@dataclass(frozen=True)
class Bench:
    """A scenario prepared in `sound`: its files before and after an unbroken run, and the calls of such a run."""

    name: str
    scenario: Scenario
    sound: Path
    before: Files
    after: Files
    calls: int


def prepare(name: str, scenario: Scenario, work: Path) -> Bench:
    import_all()
    sound = work / name.replace(" ", "-")
    shutil.rmtree(sound, ignore_errors=True)
    sound.mkdir(parents=True)
    with contextlib.chdir(sound):
        _inputs(sound)
        scenario.prepare(sound)
    before = files_of(sound)
    place = _copy(sound)
    with contextlib.chdir(place):
        code, calls = run_apart(scenario.words)
    assert code == 0, f"{name} ends with {code}"
    after = files_of(place)
    assert calls > 0 and set(scenario.outputs) <= {part for name in after for part in (name, name.partition("/")[0])}
    return Bench(name, scenario, sound, before, after, calls)


def _copy(sound: Path) -> Path:
    place = sound.with_name(f"{sound.name}.run")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    return place


def kill(bench: Bench, kill_at: tuple[int, bool] | None, after: float | None = None) -> Kill:
    """Kill the command there, look at what is left, run it again, and look at that."""
    scenario, place = bench.scenario, _copy(bench.sound)
    moment = f"{'after' if kill_at[1] else 'before'} call {kill_at[0]}" if kill_at else f"after {after:.3f} s"
    faults: list[str] = []
    with contextlib.chdir(place):
        code, _ = run_apart(scenario.words, kill_at, after)
        if code not in (0, -signal.SIGKILL):
            faults.append(f"exit {code}")
        left = files_of(place)
        for output in scenario.outputs:
            states = (_part(bench.before, output), _part(bench.after, output), {})
            # A report tells of seconds and memory, so that no two are alike: it has to be whole.
            if _part(left, output) not in states and (_comparable(output) or not _is_whole(place / output)):
                faults.append(f"{output} is neither old, new nor absent")
            old = bool(_part(bench.before, output))
            if old and not _part(left, output) and not _is_kept(place, output, bench.before):
                faults.append(f"{output} is lost")
        for name in bench.before:
            known = any(name == output or name.startswith(f"{output}/") for output in scenario.outputs)
            if not known and left.get(name) != bench.before[name]:
                faults.append(f"{name} has changed")
        again, _ = run_apart(scenario.words if "-f" in scenario.words else (*scenario.words, "-f"))
        found = files_of(place)
        if again:
            faults.append(f"the next run ends with {again}")
        wrong = [
            name for name in {*found, *bench.after} if _comparable(name) and found.get(name) != bench.after.get(name)
        ]
        if wrong:
            faults.append(f"after the next run {sorted(wrong)} are not as an unbroken run leaves them")
    return Kill(bench.name, moment, tuple(faults))


def _is_kept(place: Path, output: str, before: Files) -> bool:
    """Whether an output that is not in its place lies whole in the work folder, from which the next run takes it."""
    aside = staging.staging_folder(place / output) / f"{output}{staging.REPLACED}"
    kept = files_of(aside) if aside.is_dir() else {}
    return bool(kept) and {f"{output}/{name}": digest for name, digest in kept.items()} == _part(before, output)


def _is_whole(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text.endswith("</html>\n")
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _comparable(name: str) -> bool:
    """Whether equal runs write equal bytes there: reports and logs tell of seconds and memory."""
    return not name.endswith((".report.json", ".log.jsonl", ".html", "j.json"))


def kills(bench: Bench, every: int, offset: int = 0) -> Iterator[Kill]:
    """Kills before and after every `every`th call."""
    for call in range(1 + offset % every, bench.calls + 1, every):
        for after in (False, True):
            yield kill(bench, (call, after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--scenario", action="append")
    parser.add_argument("--random", type=int, default=0)
    asked = parser.parse_args()
    every: Mapping[str, Scenario] = scenarios()
    failed = total = 0
    for name in asked.scenario or every:
        bench = prepare(name, every[name], asked.work.resolve())
        started = time.monotonic()
        with contextlib.chdir(_copy(bench.sound)):
            run_apart(bench.scenario.words)
        seconds, chance = time.monotonic() - started, Random(name)
        found = [*kills(bench, asked.every)]
        found += [kill(bench, None, chance.uniform(0, seconds)) for _ in range(asked.random)]
        bad = [one for one in found if one.faults]
        total, failed = total + len(found), failed + len(bad)
        sys.stderr.write(f"{name}: {bench.calls} calls, {len(found)} kills, {len(bad)} with faults\n")
        for one in bad[:10]:
            sys.stderr.write(f"    {one.moment}: {'; '.join(one.faults)}\n")
    sys.stderr.write(f"{total} kills, {failed} with faults\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
