"""Without consent a recipe is data, for every command; and the current folder is nobody's to import from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Run, files_under, process_environment, write_checkpoint
from typer.main import get_command

from qcompress.cli.app import app

COMMANDS: Any = get_command(app)

NET = """
from pathlib import Path

from torch import nn

def net():
    Path(__file__).with_name("MARK").touch()
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
"""
RECIPE = """\
version: 1
model: {factory: FACTORY}
data: {eval: {npz: data.npz}, calibration: {npz: data.npz}, train: {npz: data.npz, batch_size: 4}}
task: classification
rules: [{match: "1.weight", rtn: {bits: 4}}]
finetune: {optimizer: {sgd: {lr: 0.01}}, regularize: [{match: "1.weight", l2: {strength: 0.1}}]}
"""
WORDS: dict[str, list[str]] = {
    "quantize": ["m.safetensors"],
    "cluster": ["m.safetensors", "--set", "rules.0={match: 1.weight, kmeans: {bits: 2}}"],
    "finetune-reg": ["m.safetensors"],
    "eval": ["m.safetensors"],
    "report": ["m.safetensors", "--sensitivity"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.default_rng(0)
    weights = {"1.weight": random.standard_normal((2, 4)), "1.bias": np.zeros(2)}
    write_checkpoint(tmp_path / "m.safetensors", {name: one.astype(np.float32) for name, one in weights.items()})
    inputs, labels = random.standard_normal((8, 2, 2)).astype(np.float32), np.arange(8) % 2
    np.savez(tmp_path / "data.npz", x=inputs, y=labels)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("FACTORY", "net.py:net"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_with_a_recipe_asks_for_consent() -> None:
    flags = {name: {flag for one in command.params for flag in one.opts} for name, command in COMMANDS.commands.items()}
    # `export` reads a recipe with --check alone, and asks below.
    assert {name for name, known in flags.items() if "--recipe" in known} == {*WORDS, "export"}
    assert {name for name, known in flags.items() if "--allow-code" in known} == {*WORDS, "export"}


def test_a_checked_export_runs_no_code_without_consent(run: Run, folder: Path) -> None:
    assert run("quantize", "m.safetensors", "--bits", "4", "-o", "a.safetensors").code == 0
    words = ("export", "a.safetensors", "--to", "safetensors", "--check", "-r", "r.yaml")
    ran = run(*words)
    assert ran.code == 2 and "'net.py:net' is code that would run" in ran.err
    assert not (folder / "MARK").exists()


@pytest.mark.parametrize("command", WORDS)
def test_no_command_runs_code_without_consent(run: Run, folder: Path, command: str) -> None:
    before = files_under(folder)
    ran = run(command, *WORDS[command], "-r", "r.yaml")
    assert (ran.code, ran.out) == (2, "")
    assert ran.error_lines == [
        "error: r.yaml:2: model.factory: 'net.py:net' is code that would run; look at it, and pass --allow-code if you "
        "trust it"
    ]
    assert files_under(folder) == before
    ran = run(command, *WORDS[command], "-r", "r.yaml", "--allow-code", "-q")
    assert ran.code == 0, ran.err
    assert (folder / "MARK").exists()


def test_one_line_names_every_key(run: Run, folder: Path) -> None:
    own = ["--set", "data.eval={factory: net.py:net}", "--set", "task={factory: {factory: 'os:system'}}"]
    ran = run("eval", "m.safetensors", "-r", "r.yaml", *own, "--set", "finetune.loss=loss.py:loss")
    assert (ran.code, len(ran.error_lines)) == (2, 1)
    for words in (
        "'net.py:net' of data.eval.factory",
        "'os:system' of task.factory",
        "'loss.py:loss' of finetune.loss",
    ):
        assert words in ran.err


def test_consent_by_the_environment(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, code in (("1", 0), ("true", 0), ("0", 2), ("false", 2)):
        monkeypatch.setenv("QCOMPRESS_ALLOW_CODE", value)
        assert run("eval", "m.safetensors", "-r", "r.yaml").code == code, value


@pytest.mark.parametrize("text", ["allow_code: true", "allow-code: true", "trust_remote_code: true"])
def test_a_recipe_cannot_consent(run: Run, folder: Path, text: str) -> None:
    for place in (f"{text}\n", f"model: {{factory: net.py:net, {text}}}\n"):
        lines = [
            line for line in RECIPE.replace("FACTORY", "net.py:net").splitlines() if not place.startswith(line[:5])
        ]
        (folder / "r.yaml").write_text("\n".join(lines) + f"\n{place}")
        ran = run("eval", "m.safetensors", "-r", "r.yaml")
        assert ran.code == 3
        assert "unknown" in ran.err
    assert not (folder / "MARK").exists()


def test_a_misspelt_network_is_told_the_nearest(run: Run, folder: Path) -> None:
    ran = run("eval", "m.safetensors", "-r", "r.yaml", "--set", "model.factory=torchvision.models:resnet81")
    assert ran.code == 2
    assert "did you mean torchvision.models:resnet" in ran.err


def run_in(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=process_environment(**environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("search", ["", f"{ROOT}:", f":{ROOT}:."])
def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, search: str) -> None:
    """Modules of the standard library, of ours and of others lie there, and each would leave a mark."""
    write_checkpoint(tmp_path / "m.safetensors", {"w": np.ones((8, 8), np.float32)})
    names = (
        *(
            "typing",
            "json",
            "pathlib",
            "signal",
            "traceback",
            "dataclasses",
            "difflib",
            "concurrent",
            "multiprocessing",
        ),
        *("typer", "rich", "yaml", "numpy", "torch", "pydantic", "annotated_types", "safetensors", "zstandard"),
        *("constriction", "transformers", "sitecustomize_of_qcompress"),
    )
    if search:
        # What the interpreter itself imports before it comes to this package is not ours to keep from such a path.
        names = ("typer", "rich", "yaml", "numpy", "torch", "pydantic", "safetensors", "zstandard", "constriction")
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"open('MARK_{name}', 'w')\n")
    environment = {"PYTHONPATH": search} if search else {}
    ran = run_in(tmp_path, "qcompress", "quantize", "m.safetensors", "--bits", "2", "--coding", "ans", **environment)
    assert ran.returncode == 0, ran.stderr
    assert sorted(tmp_path.glob("MARK*")) == []


def test_the_import_path_and_that_of_children_leave_the_folder_out(tmp_path: Path) -> None:
    show = "import json, os, sys; print(json.dumps([sys.path, os.environ.get('PYTHONSAFEPATH')]))"
    program = f"from qcompress.__main__ import leave_current_folder as leave; leave(); {show}"
    for here in (tmp_path, ROOT):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=here,
            env=process_environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        path, safe = json.loads(done.stdout)
        assert safe == "1"
        assert "" not in path and str(tmp_path) not in path
        # The clone comes last where it is the current folder, and as it was elsewhere.
        assert (path[-1] if here == ROOT else path[0]) == str(ROOT)
        assert path.count(str(ROOT)) == 1
