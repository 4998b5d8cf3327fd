"""`qcompress eval --packed`: networks that compute from codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run

from qcompress.checkpoint.checkpoint import write_checkpoint
from qcompress.compress import evaluate
from qcompress.demo import DigitsNet
from qcompress.runtime.packed_weight import PackedCodes

RECIPE = """version: 1
model: {factory: "qcompress.demo:DigitsNet"}
data: {eval: {npz: x.npz}}
task: {classification: {}}
rules: [{match: "*.weight", rtn: {bits: 4}}]
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_checkpoint(DigitsNet().state_dict(), tmp_path / "m.safetensors")
    pixels = np.random.default_rng(0).random((12, 1, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "x.npz", x=pixels, y=np.arange(12) % 10)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("flags", ["--bits 2", "--bits 3 --granularity group --group-size 7", "--bpw 2"])
def test_it_is_measured_alike_and_told_how_small_it_is(flags: str, run: Run, sources: Path) -> None:
    assert run("quantize", "m.safetensors", *flags.split(), "-o", "a.safetensors").code == 0
    dense = run("eval", "a.safetensors", "-r", "r.yaml")
    packed = run("eval", "a.safetensors", "-r", "r.yaml", "--packed", "--json", "p.json")
    assert packed.code == 0 and packed.out.startswith(dense.out.rstrip())
    assert "weights and outputs equal those of the decoded network" in packed.out
    told = json.loads((sources / "p.json").read_text())["packed"]
    weights = {name for name, value in DigitsNet().state_dict().items() if value.ndim > 1}
    assert set(told["packed"]) == weights and told["dense"] == told["unequal"] == [] and told["difference"] == 0
    assert told["bytes"] < told["dense_bytes"] / 2
    assert told["dense_bytes"] == sum(value.nbytes for value in DigitsNet().state_dict().values())


def test_codes_that_compute_something_else_fail_the_command(
    run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("quantize", "m.safetensors", "--bits", "4", "-o", "a.safetensors").code == 0
    right = PackedCodes.decode
    monkeypatch.setattr(PackedCodes, "decode", lambda self: right(self) * 1.001)
    ran = run("eval", "a.safetensors", "-r", "r.yaml", "--packed")
    assert ran.code == 4 and "weights are not those that the artifact decodes to, first 'conv" in ran.err
    monkeypatch.setattr(evaluate, "_parameter", lambda *_: torch.zeros(()))
    ran = run("eval", "a.safetensors", "-r", "r.yaml", "--packed")
    assert ran.code == 4 and "the network's outputs differ by up to" in ran.err


def test_a_checkpoint_has_nothing_to_hold_packed(run: Run, sources: Path) -> None:
    ran = run("eval", "m.safetensors", "-r", "r.yaml", "--packed")
    assert ran.code == 3 and "m.safetensors: is a plain safetensors file, not an artifact" in ran.err
