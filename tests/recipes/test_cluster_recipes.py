"""Ready recipes that share weights: each plans its network's weights; MobileBERT runs through on a task like QNLI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Run, skip_without_package
from safetensors.torch import save_file

from qcompress.data.user_code import import_package
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
    skip_without_package(recipe.model.factory)
    with torch.device("meta"):
        return build_model(recipe.model, path.parent, allow_code=True, place="model")


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


@pytest.mark.parametrize("method", ["kmeans", "dkm"])
@pytest.mark.parametrize("bits", [1, 2])
def test_mobilebert_runs_through_on_a_task_like_qnli(
    run: Run, tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, method: str, bits: int
) -> None:
    pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
    monkeypatch.setenv("QCOMPRESS_DATA", str(small_data))
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
