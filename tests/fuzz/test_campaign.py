"""Two thousand mutated files of every kind, and planted faults that a campaign has to find."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fuzz import commands
from fuzz.campaign import ALLOWED, Target, campaign, case, judge, run_apart
from fuzz.mutations import mutate_bytes, mutate_json, mutate_text
from fuzz.targets import make_targets
from qcompress.cli import app
from qcompress.cli.output import print_note
from qcompress.errors import DataError, QcompressError

CASES = 2000
COMMANDS, ANEW = 20, 2
"""Cases of each kind in a process of its own, and of those that start Python anew."""
IN_PROCESS = [
    *("artifact", "sealed artifact"),
    *("recipe", "report", "sensitivity", "npz", "image", "table of images", "checkpoint", "statistics", "journal"),
    *("state", "index of a checkpoint", "configuration of a checkpoint", "index of an artifact", "tokenizer"),
    *("array of an npz",),
]
IN_PROCESSES = [f"commands on {kind.name}" for kind in commands.KINDS]
SHELL = "commands from a shell"
CASES_OF = {name: -(-CASES // len(IN_PROCESS)) for name in IN_PROCESS} | dict.fromkeys(IN_PROCESSES, COMMANDS)


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("sound"))


@pytest.mark.slow
def test_every_kind_of_file_has_its_cases(targets: dict[str, Target]) -> None:
    assert [*targets] == [*CASES_OF, SHELL]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES_OF)
def test_mutated_files_are_refused_or_read_as_they_are(targets: dict[str, Target], name: str, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for index, outcome, signature, data in run_apart(targets[name], tmp_path, range(CASES_OF[name]), 0):
        assert outcome in ALLOWED, f"case {index}: {outcome}: {signature}: {data[:200]!r}"
        outcomes[outcome] += 1
    # A target whose mutations all fall on one side tests nothing.
    assert outcomes["refused"] or name == "journal"
    assert len(outcomes) > 1 or name in ("journal", "state", "artifact")


@pytest.mark.slow
def test_commands_from_a_shell_keep_their_promises_too(targets: dict[str, Target], tmp_path: Path) -> None:
    found = [*run_apart(targets[SHELL], tmp_path, range(ANEW), 0)]
    assert len(found) == ANEW and all(outcome in ALLOWED for _, outcome, _, _ in found), found


def misbehaves(fault: str) -> Callable[..., int]:
    """A command line that breaks one promise."""

    def run(_: list[str]) -> int:
        match fault:
            case "a bug":
                return 1
            case "a trace":
                raise KeyError("not caught")
            case "no word":
                return 3
            case "a file left":
                Path("left").touch()
            case "an input changed":
                Path("a.safetensors").write_bytes(b"")
            case "a hang":
                os.kill(os.getpid(), signal.SIGALRM)
        print_note("error: a: is damaged")
        return 3

    return run


@pytest.mark.parametrize("fault", ["a bug", "a trace", "no word", "a file left", "an input changed", "a hang", "none"])
def test_a_command_that_breaks_a_promise_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, kind = tmp_path / "sound", commands.KINDS[0]
    sound.mkdir()
    (sound / kind.file).write_bytes(b"abcdefgh")
    target = commands.make_target("f", kind, sound, commands.run_forked)
    monkeypatch.setattr(app, "run", misbehaves(fault))
    (outcome,) = {judge(target, {}, kind.file, sound / kind.file)[0]}
    assert outcome == ("refused" if fault == "none" else "disagree")


def reads(path: Path) -> bytes:
    data = path.read_bytes()
    if data[:1] != b"a":
        raise DataError(str(path), "is damaged", "make it again")
    return data


def fault(kind: str) -> Target:
    """A reader with a fault that shows in some of its cases."""

    def read(path: Path) -> Any:
        data = path.read_bytes()
        if data != b"abcdefgh":
            match kind:
                case "bug":
                    raise KeyError("not caught")
                case "crash":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    os.kill(os.getpid(), signal.SIGALRM)
                case "memory":
                    raise MemoryError
                case "words":
                    raise QcompressError(str(path), "has no exit code of its own", "give it one")
                case "unseen":
                    return data
        return b"abcdefgh"

    return Target("f", {"a": b"abcdefgh"}, mutate_bytes, read, accepts=lambda one, other: one == other)


@pytest.mark.parametrize("kind", ["bug", "crash", "hang", "memory", "words", "unseen"])
def test_a_campaign_finds_a_planted_fault_and_keeps_its_smallest_file(kind: str, tmp_path: Path) -> None:
    (found,) = campaign({"f": fault(kind)}, tmp_path, 20, 0).values()
    assert set(found.outcomes) <= {kind, "same"} and found.outcomes[kind] == sum(found.failures.values()) > 0
    (words,) = (tmp_path / "failures" / "f").glob("*.txt")
    assert words.read_text().startswith(kind)
    sizes = [len(data) for _, outcome, _, data in run_apart(fault(kind), tmp_path, range(20), 0) if outcome == kind]
    assert words.with_suffix("").stat().st_size == min(sizes)


def test_a_campaign_goes_on_where_it_stopped(tmp_path: Path) -> None:
    target = Target("f", {"a": b"abc", "b": b"abd"}, mutate_bytes, reads)
    whole = campaign({"f": target}, tmp_path / "whole", 60, 3)["f"]
    for _ in range(3):
        parts = campaign({"f": target}, tmp_path / "parts", 20, 3)["f"]
    assert whole == parts and whole.next == 60 == sum(whole.outcomes.values())
    assert campaign({"f": target}, tmp_path / "other", 60, 4)["f"].outcomes != whole.outcomes


@pytest.mark.parametrize(
    ("mutate", "data"),
    [(mutate_bytes, b"abcdefgh"), (mutate_text, b"a: 1\nb: [2]\nc: x\n"), (mutate_json, b'{"a": [1, 2], "b": "c"}')],
)
def test_mutations_are_the_same_every_time_and_of_many_kinds(mutate: Any, data: bytes) -> None:
    target = Target("f", {"a": data}, mutate, reads)
    found = [case(target, index, 0)[1] for index in range(300)]
    assert found == [case(target, index, 0)[1] for index in range(300)]
    assert len(set(found)) > 150
    assert mutate(data, Random(1)) == mutate(data, Random(1))
