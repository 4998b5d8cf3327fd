"""Ready recipes that share weights: each plans its network's weights; MobileBERT runs through on a task like QNLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Run
from PIL import Image
from safetensors.torch import save_file

from qcompress.data.user_code import import_package
from qcompress.errors import UsageError
from qcompress.model.build import build_model
from qcompress.recipe import read_recipe
from qcompress.registry import METHODS

RECIPES = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if any(rule.method and METHODS[rule.method].family == "cluster" for rule in read_recipe(path).rules)
]
BERT = {
    "hidden_size": 32, "embedding_size": 16, "intra_bottleneck_size": 16, "num_hidden_layers": 2, "vocab_size": 50,
    "intermediate_size": 32, "num_attention_heads": 2, "num_feedforward_networks": 1, "max_position_embeddings": 32,
}  # fmt: skip


def built(path: Path) -> torch.nn.Module:
    recipe = read_recipe(path)
    assert recipe.model is not None
    package = recipe.model.factory.partition(":")[0].partition(".")[0]
    if package in ("torchvision", "timm", "transformers"):
        try:
            import_package(package)
        except UsageError as error:
            pytest.skip(str(error))
    with torch.device("meta"):
        return build_model(recipe.model, path.parent, allow_code=True, place="model")


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little of all data that the recipes name."""
    folder = tmp_path_factory.mktemp("data")
    question_pairs(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    (folder / "cifar10").mkdir()
    for part in ("train20k", "test5000"):
        np.savez(folder / "cifar10" / f"{part}.npz", x=pixels, y=np.arange(2))
    for part in ("train", "val", "calib256", "val400"):
        for label, image in zip("ab", pixels, strict=True):
            (folder / "imagenet" / part / label).mkdir(parents=True)
            Image.fromarray(image).resize((256, 256)).save(folder / "imagenet" / part / label / "0.png")
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_clustering_recipe_plans_the_weights_that_it_names(
    run: Run, path: Path, tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPRESS_DATA", str(small_data))
    module = built(path)
    weights = [name for name, value in module.named_parameters() if value.ndim > 1]
    save_file(
        {name: torch.zeros(value.shape) for name, value in module.state_dict().items()}, tmp_path / "m.safetensors"
    )
    words = ["cluster", str(tmp_path / "m.safetensors"), "-r", str(path), "--dry-run", "--json", "-"]
    if any(rule.method == "learned" for rule in read_recipe(path).rules):
        learned = {f"{name}.representatives": torch.arange(16.0) for name in weights}
        save_file(learned, tmp_path / "m.reg.safetensors")
    done = run(*words)
    assert done.code == 0, done.err
    coded = [one["name"] for one in json.loads(done.out)["tensors"] if "bits" in one]
    kept = {name for name in weights if "embeddings" in name}
    assert set(coded) == set(weights) - kept and coded


def question_pairs(folder: Path) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(5, 50, (48, 12))
    ids[:, 0] = 1 + np.arange(48) % 2
    kinds = (np.arange(12) >= 5).astype(np.int64) * np.ones((48, 1), np.int64)
    arrays: dict[str, Any] = {"input_ids": ids, "token_type_ids": kinds, "attention_mask": np.ones_like(ids)}
    (folder / "text").mkdir()
    for part in ("train", "val"):
        np.savez(folder / "text" / f"qnli_{part}.npz", **arrays, y=np.arange(48) % 2)


@pytest.mark.parametrize("method", ["kmeans", "dkm"])
@pytest.mark.parametrize("bits", [1, 2])
def test_mobilebert_runs_through_on_a_task_like_qnli(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, bits: int
) -> None:
    pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
    monkeypatch.setenv("QCOMPRESS_DATA", str(tmp_path))
    question_pairs(tmp_path)
    network = import_package("transformers").MobileBertForSequenceClassification
    torch.manual_seed(0)
    module = network(network.config_class(**BERT, num_labels=2))
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, tmp_path / "m.safetensors")
    recipe, output = ROOT / "recipes" / "text" / f"mobilebert_qnli_{method}.yaml", tmp_path / "a.safetensors"
    changes = [f"rules.1.{method}.bits={bits}", "finetune.epochs=1", *(f"model.args.{k}={v}" for k, v in BERT.items())]
    changes = [one for one in changes if method == "dkm" or "finetune" not in one]
    words = ["cluster", str(tmp_path / "m.safetensors"), "-r", str(recipe), "-o", str(output), "--json", "-"]
    done = run(*words, *(word for change in changes for word in ("--set", change)))
    assert done.code == 0, done.err
    report = json.loads(done.out)
    (accuracy,) = report["accuracy"]
    assert accuracy["metric"] == "accuracy" and accuracy["samples"] == 48 and accuracy["kmeans"] is not None
    coded = [layer for layer in report["layers"] if layer["bits"]]
    assert {layer["bits"] for layer in coded} == {bits} and len(coded) >= 20
    assert run("verify", str(output)).code == 0
