"""Which run a saved state of training belongs to, and what a recipe trains on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from artifact.examples import gaussian, save, save_folder
from conftest import ROOT
from torch import Tensor, nn

from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.evaluate import load_network
from qcompress.compress.finetune import FinetuneOptions, finetune, run_identity, train_data, training_loss
from qcompress.data.batches import run_model
from qcompress.data.sources import open_batches
from qcompress.errors import RecipeError
from qcompress.recipe import parse_recipe, read_recipe
from qcompress.training.loop import norm_batches, refresh_norms
from qcompress.types.data_settings import Crop4, Flip
from qcompress.types.plan import Recipe
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import ModelRun

TEXT = """
version: 1
model: {factory: net.py:net}
data: {train: {npz: data.npz}}
task: classification
finetune: {epochs: 2, optimizer: {sgd: {lr: 0.01}}}
"""


def recipe(text: str = TEXT, source: str = "r.yaml") -> Recipe:
    return parse_recipe(text, source)


def model_run(text: str) -> ModelRun:
    return ModelRun(recipe(text), torch.device("cpu"))


def test_equal_runs_have_one_identity_wherever_their_files_lie(tmp_path: Path) -> None:
    state = {"w": gaussian(4, 6), "b": gaussian(4)}
    one = read_checkpoint(save(tmp_path / "one.safetensors", state))
    other = read_checkpoint(save(tmp_path / "other.safetensors", state, {"format": "pt"}))
    assert run_identity(recipe(), one, ALONE) == run_identity(recipe(source="other.yaml"), other, ALONE)
    assert run_identity(recipe(), None, ALONE) == run_identity(recipe("# comment\n" + TEXT), None, ALONE)


def test_recipe_values_names_and_ranks_are_parts_of_a_runs_identity(tmp_path: Path) -> None:
    state = {"w": gaussian(4, 6), "b": gaussian(4)}
    changed = state["w"].clone()
    changed[3, 5] += 1
    states = {
        "plain": state,
        "value": state | {"w": changed},
        "dtype": state | {"b": state["b"].half()},
        "shape": state | {"w": state["w"].reshape(6, 4)},
        "name": {"v": state["w"], "b": state["b"]},
    }
    checkpoints = {name: read_checkpoint(save(tmp_path / f"{name}.safetensors", one)) for name, one in states.items()}
    found = [run_identity(recipe(), one, ALONE) for one in (None, *checkpoints.values())]
    plain = checkpoints["plain"]
    found += [run_identity(replace(recipe(), seed=1), plain, ALONE), run_identity(recipe(), plain, World(0, 2))]
    found.append(run_identity(recipe(TEXT.replace("0.01", "0.02")), plain, ALONE))
    assert len(set(found)) == len(found)


def test_every_rank_of_a_run_finds_the_same_identity() -> None:
    assert len({run_identity(recipe(), None, World(rank, 4)) for rank in range(4)}) == 1


def test_every_shard_counts(tmp_path: Path) -> None:
    first, second = {"a": gaussian(3, 3)}, {"b": gaussian(3, 3, seed=1)}
    folder = save_folder(tmp_path / "one", {"1.safetensors": first, "2.safetensors": second})
    other = save_folder(tmp_path / "two", {"1.safetensors": first, "2.safetensors": {"b": gaussian(3, 3, seed=2)}})
    one, two = (run_identity(recipe(), read_checkpoint(path), ALONE) for path in (folder, other))
    assert one != two


def test_what_training_needs_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not say how to train"):
        text = "version: 1\nrules: [{match: a, rtn: {bits: 4}}]\n"
        finetune(None, model_run(text), FinetuneOptions(tmp_path / "m.safetensors"))
    with pytest.raises(RecipeError, match=r"names no data\.train"):
        train_data(model_run(TEXT.replace("data: {train: {npz: data.npz}}\n", "")))
    with pytest.raises(RecipeError, match="names no task"):
        training_loss(model_run(TEXT.replace("task: classification\n", "")), nn.Identity())
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_augmented_images_are_those_that_a_published_network_was_trained_on() -> None:
    """Its batch norms take their statistics anew: with black around the images it gives almost what it gave."""
    if "QCOMPRESS_DATA" not in os.environ:
        pytest.skip("QCOMPRESS_DATA names no folder with real networks")
    changes = ["data.train.batch_size=128", "data.eval.samples=2000"]
    made = read_recipe(ROOT / "recipes" / "cifar10" / "resnet20_lsq_w4a4.yaml", changes)
    run = ModelRun(made, torch.device("cpu"), allow_code=True)
    module = load_network(run, read_checkpoint(Path(os.environ["QCOMPRESS_DATA"]) / "cifar10" / "resnet20.safetensors"))

    @torch.no_grad()
    def outputs() -> Tensor:
        return torch.cat([run_model(module, batch) for batch in open_batches(run, "eval")]).log_softmax(1)

    before, data = outputs(), train_data(run)
    divergence = []
    for augment in (data.augment, ()):
        refresh_norms(module, norm_batches(replace(data, augment=augment), 32, made.seed))
        divergence.append(float(F.kl_div(outputs(), before, log_target=True, reduction="batchmean")))
    assert data.augment == (Flip(), Crop4())
    assert divergence[0] < 0.005 and divergence[1] > 0.1
