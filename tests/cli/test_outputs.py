"""No command replaces what it reads, another of its outputs, or what is not its own: each refuses before it works."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, files_under

Words = tuple[object, ...]

CASES: dict[str, Callable[[Path], Words]] = {
    "report over artifact": lambda d: ("quantize", d / "m.safetensors", "--bits", 2, "-o", d / "k", "--json", d / "k"),
    "statistics over input": lambda d: (
        *("quantize", d / "m.safetensors", "-r", d / "live.yaml"),
        *("--save-statistics", d / "m.safetensors", "-f"),
    ),
    "json over recipe": lambda d: (
        *("quantize", d / "m.safetensors", "-r", d / "r.yaml", "-f", "--json", d / "r.yaml"),
    ),
    "json over report": lambda d: (
        *("quantize", d / "m.safetensors", "--bits", 2, "-o", d / "n.safetensors", "--json", d / "n.report.json"),
    ),
    "json over input of eval": lambda d: ("eval", d / "m.safetensors", "-r", d / "r.yaml", "--json", d / "r.yaml"),
    "json over recipe of show": lambda d: ("recipe", "show", d / "r.yaml", "--json", d / "r.yaml", "-f"),
    "json over artifact of verify": lambda d: ("verify", d / "a", "--json", d / "a", "-f"),
    "export over artifact": lambda d: ("export", d / "a", "--to", "safetensors", "-o", d / "a", "-f"),
    "foreign report": lambda d: ("quantize", d / "m.safetensors", "--bits", 2, "-o", d / "y.safetensors"),
    "foreign json": lambda d: ("verify", d / "a", "--json", d / "diary"),
    "foreign work folder": lambda d: ("quantize", d / "m.safetensors", "--bits", 2, "-o", d / "w.safetensors", "-f"),
    "a pipe": lambda d: ("quantize", d / "m.safetensors", "--bits", 2, "-o", d / "pipe", "-f"),
}


@pytest.fixture
def home(run: Run, checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with a checkpoint, an artifact, recipes, and files of someone else's under names that we would use."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "m.safetensors").write_bytes(checkpoint.read_bytes())
    assert run("quantize", folder / "m.safetensors", "--bits", 4, "-o", folder / "a").code == 0
    (folder / "r.yaml").write_text('version: 1\nrules:\n  - {match: "*", rtn: {bits: 2}}\n')
    model = "model: {factory: 'qcompress.demo:DigitsNet'}\ndata: {calibration: {npz: x.npz}}\n"
    (folder / "live.yaml").write_text(f'version: 1\n{model}rules:\n  - {{match: "*", gptq: {{bits: 2}}}}\n')
    (folder / "y.report.json").write_text("dear diary")
    (folder / "diary").write_text("dear diary")
    (folder / ".w.safetensors.partial").mkdir()
    (folder / ".w.safetensors.partial" / "thesis").write_text("years of work")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_the_commands_own_is_left_as_it_was(run: Run, home: Path, case: str) -> None:
    if case == "a pipe":
        os.mkfifo(home / "pipe")
    before = files_under(home)
    ran = run(*CASES[case](home))
    assert (ran.code, ran.out) == (3, ""), ran.err
    assert all(line.startswith("error: ") for line in ran.error_lines)
    assert files_under(home) == before


def test_json_goes_into_a_pipe(run: Run, home: Path) -> None:
    os.mkfifo(home / "pipe")
    # Opened for both, so that neither end waits for the other.
    reader = os.open(home / "pipe", os.O_RDWR)
    try:
        assert run("verify", home / "a", "--json", home / "pipe").code == 0
        assert json.loads(os.read(reader, 1 << 16))["schema"] == "qcompress.verify/1"
    finally:
        os.close(reader)
    assert (home / "pipe").is_fifo()


def test_own_reports_are_written_again_and_foreign_files_with_force(run: Run, home: Path) -> None:
    for _ in range(2):
        assert run("verify", home / "a", "--json", home / "v.json").code == 0
    assert run("verify", home / "a", "--json", home / "diary", "-f").code == 0
    assert json.loads((home / "diary").read_text())["schema"] == "qcompress.verify/1"


PIPED: dict[str, Words] = {
    "checkpoint": ("quantize", "pipe", "--bits", 2),
    "artifact": ("verify", "pipe"),
    "report": ("report", "pipe"),
    "recipe": ("recipe", "check", "pipe"),
    "statistics": ("quantize", "m.safetensors", "-r", "r.yaml", "--statistics", "pipe"),
    "sensitivity": ("quantize", "m.safetensors", "-r", "r.yaml", "--set", "budget.bpw=3", "--sensitivity", "pipe"),
}


@pytest.mark.parametrize("case", PIPED)
def test_a_pipe_that_nobody_writes_to_is_an_error_and_not_waited_for(
    run: Run, home: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(home / "pipe")
    monkeypatch.chdir(home)
    if case in ("statistics", "sensitivity"):
        method = "gptq: {bits: 2}" if case == "statistics" else "mse: {}"
        (home / "r.yaml").write_text(f'version: 1\nrules: [{{match: "*.weight", {method}}}]\n')
    ran = run(*PIPED[case])
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1), ran.err
    assert "pipe" in ran.err
