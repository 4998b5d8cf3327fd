"""Equal inputs, recipe and seed give equal bytes, whatever the process, its folder and its environment are like."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import process_environment
from safetensors.torch import load_file, save_file

from qcompress.registry import METHODS

SURROUNDINGS: list[tuple[str, dict[str, str], list[str]]] = [
    ("a", {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}, ["--threads", "1"]),
    (
        "b c/deeper",
        {"PYTHONHASHSEED": "4711", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "3", "COLUMNS": "40"},
        ["--threads", "3", "--max-memory", "2GB"],
    ),
]
"""Folder, environment and flags: none of it may show in an artifact."""
OPTIONS = {"rd": "{}", "pdquant": "{bits: 3, iterations: 20}", "adaround": "{bits: 3, iterations: 50}"}
TRAINING = "finetune: {epochs: 1, optimizer: {sgd: {lr: 0.01}}}\n"


def prepare(folder: Path, method: str) -> None:
    from qcompress.demo import DigitsNet

    torch.manual_seed(0)
    save_file(DigitsNet().state_dict(), folder / "m.safetensors")
    random = np.random.default_rng(0)
    np.savez(folder / "x.npz", x=random.random((96, 1, 8, 8), dtype=np.float32), y=np.arange(96) % 10)
    learned = {
        f"{name}.representatives": torch.linspace(-1, 1, 8) * value.abs().max()
        for name, value in load_file(folder / "m.safetensors").items()
        if name.endswith("weight") and value.ndim > 1
    }
    save_file(learned, folder / "m.reg.safetensors")
    found = METHODS[method]
    live = found.needs != "weights" or method == "rd"
    train = "{npz: x.npz, batch_size: 16, augment: [flip, crop4]}"
    data = f"{{calibration: {{npz: x.npz}}, eval: {{npz: x.npz}}, train: {train}}}"
    (folder / "r.yaml").write_text(
        "version: 1\nseed: 3\n"
        + ("model: {factory: 'qcompress.demo:DigitsNet'}\ntask: {classification: {}}\n" if live else "")
        + (f"data: {data}\nactivations: {{bits: 8}}\n" if live and found.family == "quantize" else "")
        + (f"data: {data}\n" if live and found.family == "cluster" else "")
        + ("budget: {bpw: 3}\n" if found.rates else "")
        + (TRAINING if found.needs == "training" else "")
        + f"rules:\n  - {{match: ['conv*.weight', 'fc*.weight'], {method}: {OPTIONS.get(method, '{bits: 3}')}}}\n"
    )


RUN_ALL = """
import os
import sys
from pathlib import Path
from qcompress.cli.app import run
from qcompress.registry import METHODS
for folder in sorted(Path.cwd().iterdir()):
    os.chdir(folder)
    found = METHODS[folder.name]
    # Training sums over its threads, in an order that is that of their number: it is part of what is asked for.
    flags = ["--threads", "2"] if found.needs == "training" else sys.argv[1:]
    assert run([found.family, "m.safetensors", "-r", "r.yaml", "-o", "out.safetensors", "-q", *flags]) == 0, folder
"""
"""One process runs every method, each in the folder of its name."""


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """In each of the surroundings: method -> SHA-256 of its artifact."""
    found = []
    for name, env, flags in SURROUNDINGS:
        home = tmp_path_factory.mktemp("runs") / name
        for method in METHODS:
            (home / method).mkdir(parents=True)
            prepare(home / method, method)
        words = [sys.executable, "-c", RUN_ALL, *flags]
        done = subprocess.run(words, cwd=home, env=process_environment(**env), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs = {method: home / method / "out.safetensors" for method in METHODS}
        found.append({method: hashlib.sha256(path.read_bytes()).hexdigest() for method, path in outputs.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_no_method_lets_its_surroundings_show(digests: list[dict[str, str]], method: str) -> None:
    one, other = digests
    assert one[method] == other[method]
