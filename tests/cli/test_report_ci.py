"""docs/ci.md: the job's shell with a committed baseline, and the commands that compare with it, run as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import ROOT, Ran, Run

DOCUMENT = (ROOT / "docs" / "ci.md").read_text()
RECIPE = 'version: 1\nrules: [{match: "*", squant: {bits: BITS}}]\n'


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


def steps() -> list[dict[str, Any]]:
    (job,) = blocks("yaml")
    found: list[dict[str, Any]] = yaml.safe_load(job)["jobs"]["compress"]["steps"]
    return found


def run_steps(shell: Callable[..., Ran], folder: Path) -> dict[str, int]:
    """The exit codes of the steps that run after installing, as GitHub runs them."""
    codes: dict[str, int] = {}
    for step in steps():
        wanted = not any(codes.values()) or step.get("if") == "always()"
        if "run" in step and step["name"] != "Install" and wanted:
            script = f"set -eo pipefail\n{step['run']}"
            codes[step["name"]] = shell(script, folder, GITHUB_STEP_SUMMARY=str(folder / "summary.md")).code
    return codes


def commands(start: str) -> str:
    (found,) = [block for block in blocks("bash") if block.startswith(start)]
    return found


@pytest.fixture
def folder(checkpoint: Path) -> Path:
    (checkpoint.parent / "recipe.yaml").write_text(RECIPE.replace("BITS", "2"))
    return checkpoint.parent


@pytest.mark.slow
def test_the_job_keeps_what_it_says_and_holds_the_committed_report(shell: Callable[..., Ran], folder: Path) -> None:
    assert run_steps(shell, folder) == {"Check the recipe": 0, "Compress": 0, "Verify": 0, "Report": 0}
    kept = next(step for step in steps() if step.get("name") == "Keep")["with"]["path"].split()
    assert all((folder / name).stat().st_size for name in kept)
    gates = [case.get("name") for case in ElementTree.parse(folder / "gates.xml").iter("testcase")]
    assert gates == ["max-size", "min-sqnr"]

    assert shell(commands("qcompress report small.safetensors --json"), folder).code == 0
    (folder / "small.safetensors").unlink()
    (folder / "recipe.yaml").write_text(RECIPE.replace("BITS", "3"))
    assert run_steps(shell, folder) == {"Check the recipe": 0, "Compress": 4, "Report": 0}


@pytest.mark.slow
def test_what_must_not_get_worse(shell: Callable[..., Ran], run: Run, folder: Path, checkpoint: Path) -> None:
    gated = commands("qcompress report small.safetensors --baseline-report")
    small = folder / "small.safetensors"
    assert run("quantize", checkpoint, "--bits", 2, "-o", small).code == 0
    assert shell(gated, folder).code == 3
    assert shell(commands("qcompress report small.safetensors --json"), folder).code == 0
    assert (shell(gated, folder).code, shell(gated, folder).out) == (0, "")
    assert run("quantize", checkpoint, "--bits", 3, "-o", small, "-f").code == 0
    ran = shell(gated, folder)
    assert ran.code == 4
    assert "max-growth" in ran.err
    assert ElementTree.parse(folder / "changes.xml").getroot().get("failures") == "1"
