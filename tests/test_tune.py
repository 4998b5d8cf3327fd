"""Centroid tuning: entries move on their weights' gradients, codes stay, nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import nn

import qcompress
from qcompress.artifact.reader import read_artifact
from qcompress.coding.affine import decode
from qcompress.model.code import find_callable
from qcompress.registry import KmeansConfig, Tune
from qcompress.tune import _Entries
from qcompress.types import Codebook

NET = """
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 3)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(F.relu(self.up(F.relu(self.norm(self.conv(x))))).mean((2, 3)))

def net():
    return Net()
"""

RECIPE = """
version: 1
model: {factory: net.py:net}
data:
  train: {npz: data.npz, batch_size: 16}
  eval: {npz: data.npz}
  normalize: {mean: [0.5], std: [0.25]}
task: classification
rules:
  - {match: "*.weight", kmeans: OPTIONS}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tune")
    (found / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    labels = random.integers(4, size=192)
    pixels = random.integers(0, 160, size=(192, 8, 8, 3))
    pixels[..., 0] += 60 * (labels % 2)[:, None, None]
    pixels[..., 1] += 60 * (labels // 2)[:, None, None]
    np.savez(found / "data.npz", x=pixels.astype(np.uint8), y=labels)
    torch.manual_seed(0)
    module: nn.Module = find_callable("net.py:net", found, True, "test")()
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    y = torch.from_numpy(labels)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(80):
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file(module.state_dict(), found / "m.safetensors")
    return found


def clustered(run: Run, folder: Path, output: Path, options: str, *more: str) -> dict[str, Any]:
    recipe = folder / "cluster.yaml"
    recipe.write_text(RECIPE.replace("OPTIONS", options))
    words = ["cluster", str(folder / "m.safetensors"), "-r", str(recipe), "--allow-code", "-o", str(output)]
    done = run(*words, "--json", "-", *more)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.parametrize("options", ["bits: 2", "bits: 4, dim: 2", "bits: 2, group_size: 2, codebook: int8"])
def test_codes_stay_and_accuracy_comes_back(run: Run, folder: Path, tmp_path: Path, options: str) -> None:
    plain, tuned = tmp_path / "plain.safetensors", tmp_path / "tuned.safetensors"
    before = clustered(run, folder, plain, f"{{{options}}}")["accuracy"][0]
    after = clustered(run, folder, tuned, f"{{{options}, tune: {{epochs: 6, learning_rate: 0.01}}}}")["accuracy"][0]
    assert after["untuned"] == pytest.approx(before["artifact"]) and before["untuned"] is None
    assert after["artifact"] >= before["artifact"]
    old, new = (read_artifact(path).files[0] for path in (plain, tuned))
    moved = False
    for name in old.manifest.tensors:
        one, other = old.read_encoded(name), new.read_encoded(name)
        assert isinstance(one, Codebook) and isinstance(other, Codebook)
        assert torch.equal(one.codes, other.codes) and one.centroids.shape == other.centroids.shape
        moved = moved or not torch.equal(decode(one), decode(other))
    assert moved
    source, loaded = load_file(folder / "m.safetensors"), qcompress.load_state_dict(tuned)
    for name in set(source) - set(old.manifest.tensors):
        assert torch.equal(source[name], loaded[name]), name


@pytest.mark.parametrize("gradient", ["sum", "rms", "mean"])
@pytest.mark.parametrize("dim", [1, 2])
def test_an_entrys_gradient_is_that_of_its_weights(gradient: str, dim: int) -> None:
    """By autograd through indexing, one vector at a time; divided by the number of its codes or its root."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 3, (4, 5), generator=generator, dtype=torch.uint8)
    centroids = torch.randn(2, 4, dim, generator=generator)
    encoded = Codebook(codes, 2, centroids, 0, (4 * dim, 5))
    entries = _Entries(encoded, torch.device("cpu"), gradient, keep_zero=False)
    slope = torch.randn(4 * dim, 5, generator=generator)
    weight = entries(torch.empty(0))
    assert torch.equal(weight.detach(), decode(encoded))
    (weight * slope).sum().backward()
    wanted, counts = torch.zeros(2, 4, dim), torch.zeros(2, 4)
    for row in range(4):
        for column in range(5):
            place = (row // 2, int(codes[row, column]))
            wanted[place] += slope[row * dim : (row + 1) * dim, column]
            counts[place] += 1
    power = {"sum": 0.0, "rms": 0.5, "mean": 1.0}[gradient]
    wanted /= counts.clamp_min(1).unsqueeze(2) ** power
    assert entries.values.grad is not None
    torch.testing.assert_close(entries.values.grad.view(2, 4, dim), wanted)


def test_an_exact_zero_stays_one() -> None:
    encoded = Codebook(
        torch.tensor([[0, 1, 2]], dtype=torch.uint8), 2, torch.tensor([[[-1.0], [0.0], [2.0]]]), 0, (1, 3)
    )
    entries = _Entries(encoded, torch.device("cpu"), "rms", keep_zero=True)
    entries(torch.empty(0)).sum().backward()
    assert entries.values.grad is not None
    assert entries.values.grad.flatten().tolist() == [1.0, 0.0, 1.0]


def test_what_tuning_needs_is_asked_for(run: Run, folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('version: 1\nrules:\n  - {match: "*.weight", kmeans: {bits: 4, tune: {}}}\n')
    done = run("cluster", str(folder / "m.safetensors"), "-r", str(recipe))
    assert done.code == 3 and "add `model`, `data.train`, `task`" in done.err
    text = RECIPE.replace("OPTIONS", "{bits: 4, tune: {}}") + "  - {match: x, kmeans: {bits: 2, tune: {epochs: 9}}}\n"
    recipe.write_text(text.replace("net.py", str(folder / "net.py")).replace("data.npz", str(folder / "data.npz")))
    done = run("cluster", str(folder / "m.safetensors"), "-r", str(recipe), "--allow-code")
    assert done.code == 3 and "tune in different ways" in done.err
    recipe.write_text("version: 1\nrules:\n  - {match: a, kmeans: {bits: 4, tune: {epochs: 0}}}\n")
    assert run("recipe", "check", str(recipe)).code == 3


def test_defaults() -> None:
    assert KmeansConfig(bits=4, tune=Tune()).tune == Tune(epochs=3, learning_rate=1e-3, gradient="rms")
