"""Ready recipes that train: each builds its network and reaches its weights; some run through on random data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Run
from safetensors.torch import load_file, save_file

from qcompress.data.user_code import import_package
from qcompress.errors import UsageError
from qcompress.model.build import build_network
from qcompress.recipe import read_recipe, trains
from qcompress.types.plan import Recipe
from qcompress.types.run import ModelRun

TRAINING = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if "\nfinetune:" in path.read_text(encoding="utf-8")
)
CODING = [path for path in TRAINING if trains(read_recipe(path))]
ON_GRIDS = [path for path in CODING if read_recipe(path).family == "quantize"]
RECIPES = [path for path in TRAINING if path not in CODING]


def skip_without_package(recipe: Recipe) -> None:
    assert recipe.model is not None and recipe.finetune is not None
    package = recipe.model.factory.partition(":")[0].partition(".")[0]
    if package in ("torchvision", "timm"):
        try:
            import_package(package)
        except UsageError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("path", ON_GRIDS, ids=lambda path: path.stem)
def test_every_recipe_that_trains_on_grids_quantizes_all_layers_at_its_width(
    run: Run, tmp_path: Path, path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name says method and widths: of every weight, and of the inputs."""
    monkeypatch.setenv("QCOMPRESS_DATA", str(small_data))
    recipe = read_recipe(path)
    skip_without_package(recipe)
    module = build_network(ModelRun(recipe, torch.device("cpu"), allow_code=True))
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    done = run("quantize", str(tmp_path / "m.safetensors"), "-r", str(path), "--dry-run", "--json", "-")
    assert done.code == 0, done.err
    _, method, widths, *_ = path.stem.split("_")
    rows = {row["name"]: row for row in json.loads(done.out)["tensors"] if row["method"] != "kept"}
    assert set(rows) == {name for name, value in module.state_dict().items() if value.ndim >= 2}
    assert {(row["method"], f"w{row['bits']}") for row in rows.values()} == {(method, widths[:2])}
    assert recipe.activations is not None and f"a{recipe.activations.bits}" == widths[2:]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_training_recipe_reaches_the_weights_that_it_names(
    run: Run, path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPRESS_DATA", str(small_data))
    recipe = read_recipe(path)
    skip_without_package(recipe)
    assert recipe.finetune is not None
    done = run("finetune-reg", "-r", str(path), "--allow-code", "--dry-run", "--json", "-")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["weights"]
    reached = [row["name"] for row in rows if row["regularizer"]]
    weights = [row["name"] for row in rows if len(row["shape"]) >= 2 and ".embeddings." not in row["name"]]
    assert reached == (weights if recipe.finetune.regularize else [])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "cifar10").mkdir()
    for name in ("train20k", "test5000"):
        pixels = random.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "cifar10" / f"{name}.npz", x=pixels, y=np.arange(32) % 10)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet_sine", "alexnet_exponential", "vgg16_cosine", "vgg16_min_squared"])
def test_networks_of_the_second_paper_train_and_cluster(
    run: Run, images: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("QCOMPRESS_DATA", str(images))
    output = images / "out.safetensors"
    quick = ["model.args.width=0.125", "data.train.batch_size=16", "finetune.epochs=1", "finetune.naive_bits=[2]"]
    words = ["finetune-reg", "-r", str(ROOT / "recipes" / "qar" / f"{name}.yaml"), "--allow-code", "-o", str(output)]
    done = run(*words, *[word for one in quick for word in ("--set", one)], "-q")
    assert done.code == 0, done.err
    shared = run("cluster", str(output), "--method", "learned", "-q")
    assert shared.code == 0, shared.err


def test_labelled_sentences_become_arrays(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "train.tsv").write_text("a fine film\t1\na dull and a long film\t0\n", encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("a film\t1\n", encoding="utf-8")
    make = [sys.executable, str(ROOT / "benchmarks" / "make_sentences.py"), str(tmp_path / "out")]
    files = [str(tmp_path / f"{part}.tsv") for part in ("train", "dev")]
    subprocess.run([*make, *files, "--vocabulary", "270", "--length", "6"], check=True, capture_output=True)
    train, dev = (np.load(tmp_path / "out" / f"{part}.npz") for part in ("train", "dev"))
    assert train["y"].tolist() == [1, 0] and dev["y"].tolist() == [1]
    assert train["input_ids"].shape == train["attention_mask"].shape == (2, 6)
    # <s> begins and </s> ends a sentence, also one that is cut; <pad> fills the rest.
    for ids, mask in zip(train["input_ids"], train["attention_mask"], strict=True):
        assert ids[0] == 1 and ids[mask.sum() - 1] == 2 and not ids[mask.sum() :].any()
    assert dev["input_ids"][0, 1] == train["input_ids"][0, 1], "one tokenizer for all files"


@pytest.mark.slow
def test_the_translation_recipe_trains_and_quantizes(run: Run, tmp_path: Path) -> None:
    data = os.environ.get("QCOMPRESS_DATA")
    if data is None:
        pytest.skip("QCOMPRESS_DATA is not set: Multi30k is not here")
    pytest.importorskip("tokenizers")
    pytest.importorskip("sacrebleu")
    text = Path(data) / "text"
    tokenizer = tmp_path / "tokenizer.json"
    make = [sys.executable, str(ROOT / "benchmarks" / "make_tokenizer.py"), str(tokenizer)]
    files = [str(text / f"multi30k_train.{language}.txt") for language in ("de", "en")]
    subprocess.run([*make, *files, "--vocabulary", "4000"], check=True, capture_output=True)
    recipe = str(ROOT / "recipes" / "text" / "multi30k_dsmm.yaml")
    quick = {
        "model.args.width": "32",
        "model.args.layers": "1",
        "model.args.hidden": "64",
        "data.train.samples": "64",
        "data.train.batch_size": "16",
        "data.eval.samples": "8",
        "data.calibration.samples": "8",
        "finetune.epochs": "1",
        "finetune.naive_bits": "[8]",
        **{f"data.{part}.tokenizer": str(tokenizer) for part in ("train", "eval", "calibration")},
    }
    changes = [word for key, value in quick.items() for word in ("--set", f"{key}={value}")]
    output = tmp_path / "t.safetensors"
    done = run("finetune-reg", "-r", recipe, "--allow-code", "-o", str(output), "-q", *changes)
    assert done.code == 0, done.err
    assert "embedding.weight.alpha" in load_file(tmp_path / "t.reg.safetensors")
    done = run("quantize", str(output), "-r", recipe, "--allow-code", "--json", "-", *changes)
    assert done.code == 0, done.err
    assert json.loads(done.out)["accuracy"][0]["metric"] == "bleu"
