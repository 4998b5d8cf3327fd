"""What the project promises of itself: CI runs what README says, versions are pinned, nothing is of one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import qcompress

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

# Spelt in pieces, so that this file does not name what it looks for.
MACHINE_PATHS = re.compile(r"(?:^|[^A-Za-z0-9_.\-])/" + "(?:work|root|home|farm)" + "/[a-z]")
REGISTRY_HOSTS = re.compile(r"(?:pypi|pythonhosted|download\.pytorch)" + r"\.org")


def tracked_files() -> list[Path]:
    """The files that git holds or would hold."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def normal(requirement: str) -> str:
    """The name of a requirement, as registries compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^    (pip install .* && .*)$", readme, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert f'="{command}"\n' in script


def test_the_ci_script_is_bash_and_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


def test_the_changelog_tells_of_this_version() -> None:
    assert f"\n## {qcompress.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["version"] == qcompress.__version__


def test_every_dependency_is_pinned() -> None:
    wanted = [
        *PROJECT["dependencies"],
        *(name for extra in PROJECT["optional-dependencies"].values() for name in extra),
    ]
    assert {name for name in map(normal, wanted) if name not in pins()} == {PROJECT["name"]}, "but for its own extras"


def test_hooks_are_the_checks_of_ci() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    script = (ROOT / ".ci" / "run").read_text()
    assert {hook["language"] for hook in hooks} == {"system"}
    assert [hook["id"] for hook in hooks] == ["ruff-format", "ruff", "mypy"]
    assert all(f"\n{command}\n" in script for command in ("ruff format --check .", "ruff check .", "mypy"))


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("what", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["paths of a machine", "registry hosts"])
def test_no_tracked_file_names(what: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if what.search(line)
    ]
    assert found == []


def test_no_tracked_file_is_large() -> None:
    assert [str(path.relative_to(ROOT)) for path in tracked_files() if path.stat().st_size > 1 << 20] == []


def test_the_image_holds_what_it_copies() -> None:
    lines = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    sources = [ROOT / source for line in lines for source in line]
    assert sources
    assert [str(source) for source in sources if not source.exists()] == []
    assert "\nUSER qcompress\n" in (ROOT / "Dockerfile").read_text()
