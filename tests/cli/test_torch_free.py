"""Help, recipes, verify, dry runs and stored reports start fast: in a fresh process none of them imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, process_environment, write_checkpoint
from typer.main import get_command

from qcompress.cli.app import app

SCRIPT = """
import json, sys
from qcompress.cli.app import run
for arguments, code in json.loads(sys.argv[1]):
    assert run(arguments) == code, arguments
    assert "torch" not in sys.modules, arguments
"""


def in_one_process(*commands: tuple[list[object], int]) -> subprocess.CompletedProcess[str]:
    """Run (arguments, expected exit code) one after the other, looking for torch after each."""
    texts = json.dumps([([str(argument) for argument in arguments], code) for arguments, code in commands])
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, texts],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def command_names() -> list[list[object]]:
    """Every command's words, those of groups too."""
    root = get_command(app)
    names: list[list[object]] = []
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        names.append([name])
        names += [[name, inner] for inner in getattr(command, "commands", {})]
    return names


def test_help_of_every_command() -> None:
    names = command_names()
    assert ["recipe", "schema"] in names
    done = in_one_process(*(([*words, "--help"], 0) for words in [[], *names]), (["--version"], 0))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(names) + 1


def test_wrong_command_lines(checkpoint: Path) -> None:
    done = in_one_process((["quantize", checkpoint], 2), (["quantize", checkpoint, "--bist", 2], 2), ([], 2))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("coding", ["auto", "packed", "zstd", "ans"])
def test_plans_recipes_checks_and_stored_figures(run: Run, checkpoint: Path, tmp_path: Path, coding: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('version: 1\nrules: [{match: "*", squant: {bits: 2}}]\n')
    artifact, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for output in (artifact, other):
        assert run("quantize", checkpoint, "--bits", 3, "--coding", coding, "-o", output).code == 0
    (tmp_path / "b.report.json").unlink()
    done = in_one_process(
        (["quantize", checkpoint, "--bits", 2, "--dry-run", "--coding", coding], 0),
        (["quantize", checkpoint, "-r", recipe, "-n", "--json", "-"], 0),
        (["recipe", "check", recipe, checkpoint], 0),
        (["recipe", "show", recipe], 0),
        (["recipe", "schema"], 0),
        (["verify", artifact], 0),
        (["report", artifact], 0),
        (["report", artifact, other, "--max-size", "1MB"], 0),
        (["report", other, "--format", "csv"], 0),
        (["report", tmp_path / "a.report.json", "--max-size", "1KB"], 4),
    )
    assert done.returncode == 0, done.stderr


def test_what_is_stored_without_loss(run: Run, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m.safetensors", {"w": np.linspace(-1, 1, 5000, dtype=np.float32)})
    artifact = tmp_path / "a.safetensors"
    assert run("quantize", source, "--lossless", "-o", artifact).code == 0
    (tmp_path / "a.report.json").unlink()
    plan = ["quantize", source, "--lossless", "--dry-run"]
    done = in_one_process((plan, 0), (["verify", artifact], 0), (["report", artifact], 0))
    assert done.returncode == 0, done.stderr
