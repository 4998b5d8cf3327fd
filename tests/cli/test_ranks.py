"""`quantize` and `cluster` under torchrun: real processes that meet by gloo, fail together, and are restarted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from artifact.examples import gaussian, save
from colours import write_colours, write_learned
from conftest import Run, files_under, run_ranks

from qcompress.artifact.reader import read_artifact
from qcompress.types.encoded import Affine

pytestmark = pytest.mark.slow

NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
"""
RECIPE = """
version: 1
model: {factory: "net.py:net"}
data:
  calibration: {npz: data.npz, samples: 40, batch_size: 8}
  eval: {npz: data.npz, batch_size: 16}
  normalize: {mean: [0.5], std: [0.25]}
task: {classification: {metric: top1}}
rules: [{match: "*.weight", gptq: {bits: 4}}]
activations: {bits: 8}
"""

KILLED_ONCE = """
import os, signal
from qcompress.cli.app import main
from qcompress.encode.journal import Journal

append = Journal.append

def append_and_die(journal, record):
    append(journal, record)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

Journal.append = append_and_die
main()
"""


def weights(count: int = 6) -> dict[str, torch.Tensor]:
    return {f"layer{index}.weight": gaussian(40 + index, 500, seed=index) for index in range(count)}


def test_three_processes_write_what_one_writes(run: Run, tmp_path: Path) -> None:
    source, output = save(tmp_path / "model.safetensors", weights()), tmp_path / "a.safetensors"
    assert run("quantize", source, "--bits", 3, "-o", output).code == 0
    alone = output.read_bytes()
    output.unlink()
    (tmp_path / "a.report.json").unlink()
    done = run_ranks(3, "quantize", source, "--bits", 3, "-o", output, "-q")
    assert (done.code, done.out) == (0, f"{output}\n"), done.err
    assert output.read_bytes() == alone
    assert set(files_under(tmp_path)) == {"model.safetensors", "a.safetensors", "a.report.json"}


def test_an_error_of_one_process_is_told_once_and_ends_all(tmp_path: Path) -> None:
    broken = {**weights(), "layer3.weight": torch.full((43, 500), torch.nan)}
    source = save(tmp_path / "model.safetensors", broken)
    done = run_ranks(2, "quantize", source, "--bits", 3, "-o", tmp_path / "a.safetensors")
    assert done.code != 0 and done.out == ""
    assert re.findall(r"^(error|bug|terminated).*", done.err, re.MULTILINE) == ["error"]
    assert re.search(r"^error: .*layer3.weight.*NaN", done.err, re.MULTILINE)
    # What torchrun saw: each has left with the exit code of the error, or was still on its way out when torchrun, which
    # had seen the other go, ended it by SIGTERM.
    assert "3" in (codes := re.findall(r"exitcode +: (-?\d+)", done.err)) and {*codes} <= {"3", "-15"}
    assert set(files_under(tmp_path)) == {"model.safetensors"}


def test_a_killed_process_is_restarted_and_goes_on_to_the_same_bytes(run: Run, tmp_path: Path) -> None:
    source, output = save(tmp_path / "model.safetensors", weights()), tmp_path / "a.safetensors"
    assert run("cluster", source, "--bits", 3, "-o", output).code == 0
    alone = output.read_bytes()
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    words = ["cluster", source, "--bits", 3, "-o", output, "--force", "--resume", "-q"]
    done = run_ranks(2, *words, restarts=1, script=script)
    assert done.code == 0, done.err
    assert output.read_bytes() == alone
    assert "SIGKILL" in done.err or "-9" in done.err, "a process was killed"


def test_two_processes_calibrate_and_measure_what_one_does(run: Run, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    write_learned(tmp_path, write_colours(tmp_path, 60), 30)
    recipe, output = tmp_path / "r.yaml", tmp_path / "a.safetensors"
    recipe.write_text(RECIPE)
    words = ["quantize", tmp_path / "m.safetensors", "-r", recipe, "-o", output, "--allow-code", "--force", "-q"]
    found = []
    for done in (run(*words), run_ranks(2, *words)):
        assert (done.code, done.out) == (0, f"{output}\n"), done.err
        accuracy = json.loads(output.with_suffix(".report.json").read_text())["accuracy"][0]
        found.append((read_artifact(output).files[0].read_encoded("0.weight"), accuracy))
    (alone, before), (ranks, after) = found
    assert isinstance(alone, Affine) and isinstance(ranks, Affine)
    torch.testing.assert_close(ranks.scale.float(), alone.scale.float(), rtol=1e-3, atol=0)
    # A target on the edge between two levels may fall either way.
    assert float((ranks.codes != alone.codes).float().mean()) < 0.02
    assert after["baseline"] == before["baseline"] and after["samples"] == 60
