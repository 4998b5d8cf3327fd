"""A recipe's network loaded and measured: what counts as an artifact, and two measurements held against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from artifact.examples import gaussian, make_artifact, plan_for, rtn, run, save, save_folder
from torch import nn

from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.compress import compress
from qcompress.compress.evaluate import attach_grids, compare, is_artifact, is_measured, load_network, measure_task
from qcompress.data.measurement import Measurement
from qcompress.errors import ArtifactError, CheckpointError, ModelError, RecipeError
from qcompress.recipe import parse_recipe
from qcompress.types.encoded import ActivationGrid, Fitted
from qcompress.types.run import ModelRun, Options

CPU = torch.device("cpu")


def measured(values: list[float], metric: str = "top1", *, higher: bool = True) -> Measurement:
    each = np.array(values, dtype=np.float64)
    mean = float(each.mean())
    return Measurement(metric, mean, len(each), mean - 0.1, mean + 0.1, higher, each, np.ones(len(each)))


def test_an_artifact_is_told_from_a_checkpoint_by_its_header(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path)
    assert is_artifact(artifact) and not is_artifact(tmp_path / "source.safetensors")


def test_of_a_folder_its_first_file_decides(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "network", {"model.safetensors": {"w": gaussian(6, 10)}})
    run(folder, tmp_path / "artifact", rtn(3))
    (tmp_path / "empty").mkdir()
    assert is_artifact(tmp_path / "artifact")
    assert not is_artifact(folder) and not is_artifact(tmp_path / "empty")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        is_artifact(tmp_path / "m.safetensors")


@pytest.mark.parametrize("higher", [True, False])
def test_a_drop_is_positive_where_the_artifact_is_worse(higher: bool) -> None:
    good, bad = measured([1, 1, 1, 0] * 8, higher=higher), measured([1, 0, 1, 0] * 8, higher=higher)
    (figures,) = compare([good], [bad])
    assert figures.drop == pytest.approx(0.25 if higher else -0.25)
    assert figures.interval is not None
    low, high = figures.interval
    assert low < figures.drop < high
    assert (figures.baseline, figures.artifact, figures.samples) == (good.value, bad.value, 32)
    assert (figures.baseline_interval, figures.artifact_interval) == ((good.low, good.high), (bad.low, bad.high))
    (back,) = compare([bad], [good])
    assert back.drop == -figures.drop and back.interval == pytest.approx((-high, -low))


def test_the_drop_is_paired() -> None:
    """Equal hits leave no doubt; as many hits on other samples do."""
    one, other = measured([1, 0] * 16), measured([0, 1] * 16)
    (same,), (moved,) = compare([one], [one]), compare([one], [other])
    assert same.drop == moved.drop == 0
    assert same.interval == (0, 0)
    assert moved.interval is not None and moved.interval[0] < 0 < moved.interval[1]


def test_what_tuning_and_kmeans_gave_is_matched_by_name() -> None:
    before = [measured([1] * 10), measured([1] * 10, "top5")]
    after = [measured([1, 1, 1, 0] * 5), measured([1] * 20, "top5")]
    untuned, kmeans = [measured([1, 0] * 10)], [measured([1, 0, 0, 0] * 5)]
    figures = compare(before[:1], [measured([1, 1, 1, 0, 1, 1, 1, 0, 1, 1])], untuned, kmeans)[0]
    assert (figures.untuned, figures.kmeans) == (0.5, 0.25)
    assert figures.kmeans_ratio == pytest.approx(0.8 / 0.25) and figures.untuned_ratio == pytest.approx(2)
    zero = compare(before[:1], before[:1], kmeans=[measured([0] * 10)])[0]
    assert zero.kmeans == 0 and zero.kmeans_ratio is None
    plain = compare(before[1:], before[1:], untuned, kmeans)[0]
    assert plain.untuned is plain.kmeans is plain.kmeans_ratio is plain.untuned_ratio is None
    with pytest.raises(ValueError):
        compare(before, after[:1])


def artifact_with(folder: Path, fitted: Fitted) -> Artifact:
    checkpoint = read_checkpoint(save(folder / "m.safetensors", nn.Sequential(nn.Linear(4, 3)).state_dict()))
    compress(checkpoint, plan_for(checkpoint, rtn(4)), Options(folder / "a.safetensors"), fitted)
    return read_artifact(folder / "a.safetensors")


def test_caps_and_quantizers_are_attached_where_the_artifact_says(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    fitted = Fitted({}, activations={"0": ActivationGrid(2, 1.0, 0)}, caps={"0": torch.full((3,), 0.5)})
    inputs = torch.tensor([[0.2, 0.9, 2.2, 9.0], [-1.0, 1.4, 1.6, 3.0]])
    with torch.no_grad():
        wanted = module(inputs.round().clamp(0, 3)).clamp_max(0.5)
        attach_grids(module, artifact_with(tmp_path, fitted))
        torch.testing.assert_close(module(inputs), wanted)


@pytest.mark.parametrize("part", ["activations", "caps"])
def test_a_module_that_is_not_there_is_refused(tmp_path: Path, part: str) -> None:
    grid, caps = ActivationGrid(8, 0.1, 0), torch.ones(3)
    fitted = Fitted({}, activations={"0": grid}) if part == "activations" else Fitted({}, caps={"0": caps})
    artifact = artifact_with(tmp_path, fitted)
    with pytest.raises(ArtifactError, match=r"a\.safetensors: quantizes inputs of a module that is not there: .*0"):
        attach_grids(nn.Linear(4, 3), artifact)


NET = "from torch import nn\n\ndef net(size=3):\n    return nn.Linear(4, size).double()\n"


def model_run(folder: Path, more: str = "") -> ModelRun:
    (folder / "net.py").write_text(NET)
    text = f"version: 1\nmodel: {{factory: net.py:net}}\nrules: [{{match: '*', rtn: {{bits: 4}}}}]\n{more}"
    return ModelRun(parse_recipe(text, str(folder / "r.yaml")), CPU, allow_code=True)


def test_a_network_is_built_in_float32_and_takes_a_checkpoints_weights(tmp_path: Path) -> None:
    state = nn.Linear(4, 3).state_dict()
    checkpoint = read_checkpoint(save(tmp_path / "m.safetensors", state))
    module = load_network(model_run(tmp_path), checkpoint)
    assert all(value.dtype == torch.float32 for value in module.state_dict().values())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert load_network(model_run(tmp_path), None).state_dict().keys() == state.keys()


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path / "m.safetensors", nn.Linear(5, 3).state_dict()))
    with pytest.raises((ModelError, CheckpointError), match=r"m\.safetensors"):
        load_network(model_run(tmp_path), checkpoint)


def test_only_a_recipe_with_task_and_eval_data_is_measured(tmp_path: Path) -> None:
    data, task = "data: {eval: {npz: x.npz}}\n", "task: classification\n"
    assert is_measured(model_run(tmp_path, data + task).recipe)
    assert not any(is_measured(model_run(tmp_path, more).recipe) for more in ("", data, task))
    with pytest.raises(RecipeError, match="names no task"):
        measure_task(nn.Linear(4, 3), model_run(tmp_path, data), "test")
