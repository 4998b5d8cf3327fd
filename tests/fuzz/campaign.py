"""Campaigns of mutated files: seeded, resumable, each distinct failure kept as its smallest file.

    PYTHONPATH=tests python -m fuzz.campaign --state DIR --cases 100000 [--target NAME] [--seed N]

Cases run in child processes, so that a crash or a hang is one failed case and not the end. What a case may come to:
`refused` with an error of ours, `same` where what is read is what was written, `changed` where it is not, which only
files without checksums may. All else is a failure: `bug`, `crash`, `hang`, `memory`, `words`, `unseen`, `disagree`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from qcompress.errors import QcompressError

SECONDS = 10
"""Processor seconds that one case may take."""
WAITING = 300
"""Seconds after which a case waits for something that does not come: other programs may be busy for long."""
MEMORY_BYTES = 1 << 30
"""What one case may take beyond what the process has: files here declare far less than a tenth of it."""
LONGEST_LINE = 2000
CODES = (2, 3, 4, 5)
"""Exit codes of errors."""
ALLOWED = ("refused", "same", "changed")


class Disagree(AssertionError):
    """Readers do not agree about a file, or one took what its checksums should have told."""


@dataclass(frozen=True)
class Target:
    """One kind of file.

    seeds    sound files
    mutate   (file, chance) -> a file
    read     reads a file at a path, as every command that takes such a file does; what it returns is compared
    accepts  (what the sound file gave, what this one gives) -> whether a file with checksums may give that
    """

    name: str
    seeds: Mapping[str, bytes]
    mutate: Callable[[bytes, Random], bytes]
    read: Callable[[Path], Any]
    suffix: str = ""
    accepts: Callable[[Any, Any], bool] | None = None


@dataclass
class Counts:
    """What the cases of a target have come to, and the failures by what tells them apart."""

    next: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, int] = field(default_factory=dict)


def case(target: Target, index: int, seed: int) -> tuple[str, bytes]:
    """The name of the sound file and the mutated one."""
    chance = Random(f"{seed}:{target.name}:{index}")
    name = chance.choice(sorted(target.seeds))
    return name, target.mutate(target.seeds[name], chance)


def judge(target: Target, right: Mapping[str, Any], name: str, path: Path) -> tuple[str, str]:
    """The outcome of reading the file at `path`, and what tells a failure apart from others."""
    started = time.process_time()
    try:
        found = target.read(path)
    except QcompressError as error:
        lines = error.lines()
        sound = all(0 < len(line) < LONGEST_LINE and line.isprintable() for line in lines) and error.exit_code in CODES
        return ("refused", "") if lines and sound else ("words", f"{type(error).__name__}")
    except MemoryError as error:
        return "memory", _signature(error)
    except Disagree as error:
        return "disagree", str(error)
    except Exception as error:
        return "bug", _signature(error)
    if time.process_time() - started > SECONDS:
        return "hang", target.name
    if found == right[name]:
        return "same", ""
    if target.accepts is None:
        return "changed", ""
    return ("same", "") if target.accepts(right[name], found) else ("unseen", name)


def _signature(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "qcompress" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "elsewhere"
    return f"{type(error).__name__} in {place}"


def rights(target: Target, folder: Path) -> dict[str, Any]:
    """What each sound file gives."""
    found = {}
    for name, data in target.seeds.items():
        path = folder / f"sound{target.suffix}"
        path.write_bytes(data)
        found[name] = target.read(path)
    return found


def run_here(target: Target, folder: Path, cases: range, seed: int) -> Iterator[tuple[int, str, str, bytes]]:
    """Each case in this process: its number, outcome, signature and file."""
    right = rights(target, folder)
    path = folder / f"case{target.suffix}"
    for index in cases:
        name, data = case(target, index, seed)
        path.write_bytes(data)
        outcome, signature = judge(target, right, name, path)
        yield index, outcome, signature, data


def run_apart(target: Target, folder: Path, cases: range, seed: int) -> Iterator[tuple[int, str, str, bytes]]:
    """Each case in a child process, another one after each that crashes or hangs."""
    start = cases.start
    while start < cases.stop:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            _work(target, folder, range(start, cases.stop), seed, theirs)
        os.close(theirs)
        with os.fdopen(ours) as lines:
            for line in lines:
                index, outcome, signature = json.loads(line)
                yield index, outcome, signature, case(target, index, seed)[1]
                start = index + 1
        _, status = os.waitpid(child, 0)
        if start < cases.stop:
            how = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            outcome = "hang" if how == signal.SIGALRM else "crash"
            yield start, outcome, f"signal {how}" if how else f"exit {status}", case(target, start, seed)[1]
            start += 1


def _work(target: Target, folder: Path, cases: range, seed: int, pipe: int) -> None:
    """The child: limits, then the cases, one line each."""
    code = 1
    try:
        limit_memory()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(pipe, "w", buffering=1) as lines:
            signal.alarm(WAITING)
            for index, outcome, signature, _ in run_here(target, folder, cases, seed):
                lines.write(json.dumps([index, outcome, signature]) + "\n")
                signal.alarm(WAITING)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def limit_memory() -> None:
    """Let this process take MEMORY_BYTES beyond what it has, unless less is left to it already."""
    with Path("/proc/self/statm").open() as sizes:
        held = int(sizes.read().split()[5]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + MEMORY_BYTES if most == resource.RLIM_INFINITY else min(held + MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def campaign(targets: Mapping[str, Target], state: Path, cases: int, seed: int) -> dict[str, Counts]:
    """`cases` more cases of each target, after those that `state` knows."""
    state.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, target in targets.items():
        counts = _read(state / f"{name}.json")
        folder = state / "work" / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, outcome, signature, data in run_apart(target, folder, range(counts.next, counts.next + cases), seed):
            counts.next = index + 1
            counts.outcomes[outcome] += 1
            if outcome not in ALLOWED:
                _keep(state / "failures" / name, f"{outcome}: {signature}", data, target.suffix, counts)
            if index % 500 == 0:
                _write(state / f"{name}.json", counts)
        _write(state / f"{name}.json", counts)
        words = f"{name}: {counts.next} cases, {dict(counts.outcomes)}, {counts.failures or 'no failure'}"
        sys.stderr.write(f"{words}\n")
        found[name] = counts
    return found


def _keep(folder: Path, signature: str, data: bytes, suffix: str, counts: Counts) -> None:
    counts.failures[signature] = counts.failures.get(signature, 0) + 1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(signature.encode()).hexdigest()[:12]}{suffix}"
    if not path.exists() or len(data) < path.stat().st_size:
        path.write_bytes(data)
        path.with_name(f"{path.name}.txt").write_text(signature)


def _read(path: Path) -> Counts:
    if not path.exists():
        return Counts()
    document = json.loads(path.read_text())
    return Counts(document["next"], Counter(document["outcomes"]), document["failures"])


def _write(path: Path, counts: Counts) -> None:
    document = {"next": counts.next, "outcomes": counts.outcomes, "failures": counts.failures}
    path.with_suffix(".new").write_text(json.dumps(document))
    path.with_suffix(".new").replace(path)


def main() -> None:
    from fuzz.targets import make_targets

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--cases", type=int, default=1000, help="more cases of each target")
    parser.add_argument("--target", action="append", help="one of them; all if absent")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.state.mkdir(parents=True, exist_ok=True)
    targets = make_targets(asked.state)
    chosen = {name: targets[name] for name in asked.target or targets}
    found = campaign(chosen, asked.state, asked.cases, asked.seed)
    sys.exit(any(counts.failures for counts in found.values()))


if __name__ == "__main__":
    main()
