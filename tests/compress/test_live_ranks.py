"""Several ranks calibrate, measure and spend budgets together: samples, layers and tensors are divided, results not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import write_colours, write_learned
from conftest import files_under
from worlds import together

from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.checkpoint.side_files import read_statistics
from qcompress.compress.compress_model import LiveOptions, compress_live
from qcompress.compress.evaluate import evaluate, read_or_measure
from qcompress.compress.plan_checkpoint import plan_checkpoint
from qcompress.errors import DataError, UsageError
from qcompress.plan.sensitivity import Sensitivity
from qcompress.recipe import read_recipe
from qcompress.report.document import Report
from qcompress.types.encoded import Affine
from qcompress.types.plan import Recipe
from qcompress.types.ranks import World
from qcompress.types.run import ModelRun, Options

NET = """
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.left(x) + self.bn2(self.right(x))).mean((2, 3)))

def net():
    return Net()
"""

RECIPE = """
version: 1
model: {factory: "net.py:net"}
data:
  calibration: {npz: data.npz, samples: 50, batch_size: 8}
  eval: {npz: data.npz, batch_size: 30}
  normalize: {mean: [0.5], std: [0.25]}
task: {classification: {metric: top1}}
"""
GPTQ = """rules: [{match: "*.weight", gptq: {bits: 4PRESET}}]
activations: {bits: 8, range: mse}
companions: [bias_correction, batch_norm]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    (found / "net.py").write_text(NET)
    write_learned(found, write_colours(found, 100), 30)
    return found


def recipe_of(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE + text)
    return read_recipe(path, family="cluster" if "kmeans" in text else "quantize")


def made(folder: Path, asked: Recipe, output: Path, size: int, **how: Any) -> list[Report]:
    """What each of so many ranks reports of the artifact that they make together."""
    output.parent.mkdir(exist_ok=True)
    source = read_checkpoint(folder / "m.safetensors")

    def run(world: World) -> Report:
        model_run = ModelRun(asked, torch.device("cpu"), allow_code=True, world=world)
        plan = plan_checkpoint(source, asked, model_run)
        report = compress_live(source, plan, Options(output, world=world), model_run, LiveOptions(**how))
        assert report is not None
        return replace(report, run=None)

    return together(size, run)


@pytest.mark.parametrize("preset", ["", ", preset: paper"])
def test_gptq_of_ranks_is_that_of_one_process_within_the_rounding_of_sums(
    folder: Path, tmp_path: Path, preset: str
) -> None:
    """Batches, layers of one input, ranges of inputs and corrections are divided."""
    asked = recipe_of(folder, GPTQ.replace("PRESET", preset))
    one, many = tmp_path / "one" / "a.safetensors", tmp_path / "many" / "a.safetensors"
    (alone,) = made(folder, asked, one, 1)
    reports = made(folder, asked, many, 3)
    assert reports == [reports[0]] * 3, "every rank knows the same"
    first, second = (read_artifact(path).files[0] for path in (one, many))
    for name in ("conv1.weight", "left.weight", "right.weight", "fc.weight"):
        a, b = first.read_encoded(name), second.read_encoded(name)
        assert isinstance(a, Affine) and isinstance(b, Affine)
        # A target on the edge between two levels may fall either way.
        assert float((a.codes != b.codes).float().mean()) <= 0.01
        torch.testing.assert_close(a.scale.float(), b.scale.float(), rtol=2e-3, atol=0)
    assert set(first.manifest.activations) == set(second.manifest.activations) != set()
    for name, grid in first.manifest.activations.items():
        assert second.manifest.activations[name].scale == pytest.approx(grid.scale, rel=1e-3)
    (before,), (after,) = alone.accuracy, reports[0].accuracy
    assert after.baseline == before.baseline and after.samples == before.samples == 100
    assert after.artifact == pytest.approx(before.artifact, abs=0.02)


def test_statistics_of_ranks_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    asked = recipe_of(folder, 'rules: [{match: "*.weight", rtn: {bits: 4}}]')
    found = []
    for size in (1, 2):
        path = tmp_path / f"{size}.safetensors"
        made(folder, asked, tmp_path / f"{size}" / "a.safetensors", size, save_statistics=path)
        found.append(read_statistics(path))
    for name in ("conv1.weight", "left.weight", "fc.weight"):
        one, other = (statistics.gram(name) for statistics in found)
        torch.testing.assert_close(one.hessian, other.hessian, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "text",
    [
        'rules: [{match: "*.weight", mse: {bits: 3}}]',
        'rules: [{match: "*", kmeans: {bits: 3, share: model}}]',
        'rules: [{match: "*.weight", rtn: {}}]\nbudget: {bpw: 4.5}',
        'rules: [{match: "*.weight", dfq: {bits: 6}}]',
    ],
)
def test_what_needs_no_sums_is_the_same_to_the_byte(folder: Path, tmp_path: Path, text: str) -> None:
    """Methods that need weights alone, also under a budget that measured sensitivities decide."""
    asked = recipe_of(folder, text)
    (alone,) = made(folder, asked, tmp_path / "one" / "a.safetensors", 1)
    assert made(folder, asked, tmp_path / "many" / "a.safetensors", 2) == [alone] * 2
    assert files_under(tmp_path / "one") == files_under(tmp_path / "many")


def test_metrics_of_ranks_are_those_of_one_process(folder: Path) -> None:
    """100 samples in four batches over three ranks: what each sample gave comes back in its place."""
    asked = recipe_of(folder, 'rules: [{match: "*.weight", rtn: {bits: 4}}]')

    def run(world: World) -> list[Any]:
        found = evaluate(folder / "m.safetensors", ModelRun(asked, torch.device("cpu"), True, world=world))
        return [(one.metric, one.value, one.low, one.per_sample.tolist(), one.weights.tolist()) for one in found]

    (alone,) = together(1, run)
    assert len(alone[0][3]) == 100
    assert together(3, run) == [alone] * 3


def test_sensitivities_of_ranks_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    asked = recipe_of(folder, 'rules: [{match: "*.weight", rtn: {bits: 4}}]')
    source = read_checkpoint(folder / "m.safetensors")

    def run(world: World) -> Sensitivity:
        model_run = ModelRun(asked, torch.device("cpu"), True, world=world)
        return read_or_measure(source, model_run, tmp_path / f"{world.size}.json", 40, [2, 4])

    (alone,) = together(1, run)
    for found in together(3, run):
        assert replace(found, run=alone.run) == alone


@pytest.mark.parametrize("method", ["adaround: {bits: 4}", "pdquant: {bits: 4}", "kmeans: {bits: 3, tune: {}}"])
def test_what_ranks_cannot_divide_is_refused(folder: Path, tmp_path: Path, method: str) -> None:
    text = f'rules: [{{match: "*.weight", {method}}}]'
    with pytest.raises(UsageError, match=r"^torchrun: .*run qcompress by itself"):
        made(folder, recipe_of(folder, text), tmp_path / "a.safetensors", 2)


def test_each_rank_needs_a_batch(folder: Path, tmp_path: Path) -> None:
    (folder / "few.yaml").write_text((RECIPE + GPTQ).replace("PRESET", "").replace("samples: 50", "samples: 8"))
    with pytest.raises(DataError, match="has 1 batches for 2 processes"):
        made(folder, read_recipe(folder / "few.yaml"), tmp_path / "a.safetensors", 2)
