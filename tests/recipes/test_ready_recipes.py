"""Every ready recipe is planned on its real network, and those that need no training run through on a little data."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, skip_without_package
from safetensors.torch import save_file

from qcompress.model.build import build_network, build_skeleton, facts_by, take_shapes
from qcompress.plan.plan import make_plan
from qcompress.recipe import read_recipe, trains
from qcompress.registry import METHODS
from qcompress.training.penalties import decide_penalties
from qcompress.types.config import Shape
from qcompress.types.plan import ModelFacts, Recipe, TensorInfo
from qcompress.types.run import ModelRun

ALL = sorted((ROOT / "recipes").rglob("*.yaml"))
LIVE = [
    path
    for path in ALL
    if (one := read_recipe(path)).model is not None and one.rules and not trains(one) and one.finetune is None
]
"""Recipes that compress a trained network, with nothing to be trained before."""
RUN = {rule.method: path for path in reversed(LIVE) for rule in read_recipe(path).rules if rule.method is not None}
"""Method -> the first of the recipes that use it, which are always run; all are planned."""
EVERY = "QCOMPRESS_EVERY_RECIPE"
"""The variable of the environment that has all of them run."""
QUICK: dict[str, dict[str, object]] = {
    "adaround": {"iterations": 2},
    "pdquant": {"iterations": 2, "correction_steps": 1},
    "rd": {"effort": "fast"},
}
"""What makes a method quick."""
PRINTED = ("stories260k_gptq_w3",)
"""Recipes that take less than a minute as they are; the rows of the benchmarks run the others."""


@cache
def network(factory: str, args: str, path: Path) -> tuple[torch.nn.Module, ModelFacts, dict[str, Shape]]:
    """A recipe's network without weights, and what it says of its tensors."""
    module = build_skeleton(ModelRun(read_recipe(path), torch.device("cpu"), allow_code=True))
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return module, facts_by(module, take_shapes(module, shapes), shapes), shapes


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_is_planned_on_its_network(path: Path) -> None:
    recipe = read_recipe(path)
    if recipe.model is not None:
        skip_without_package(recipe.model.factory)
    if recipe.model is None:
        shapes: dict[str, Shape] = {
            "conv1.weight": (64, 3, 7, 7),
            "layer1.0.conv1.weight": (64, 64, 3, 3),
            "layer1.0.bn1.weight": (64,),
            "fc.weight": (100, 64),
            "model.embed_tokens.weight": (256, 64),
            "lm_head.weight": (256, 64),
            "model.layers.0.mlp.up_proj.weight": (256, 64),
        }
        facts: ModelFacts = {}
    else:
        # One place for all recipes of a network.
        factory = (path.parent / recipe.model.factory).resolve() if ".py:" in recipe.model.factory else None
        module, facts, shapes = network(str(factory or recipe.model.factory), json.dumps(recipe.model.args), path)
        if recipe.finetune is not None:
            decide_penalties(module, recipe.finetune.regularize)
    if not recipe.rules:
        assert recipe.finetune is not None
        return
    infos = [
        TensorInfo(name, shape, "I64" if name.endswith("num_batches_tracked") else "F32")
        for name, shape in shapes.items()
    ]
    plan = make_plan(recipe, infos, {}, {}, model=facts)
    wanted = {rule.method for rule in recipe.rules if rule.method is not None}
    found = {one.method for one in plan.decisions if one.compresses}
    assert wanted <= found <= wanted | {"mse"}
    if recipe.model is not None:
        assert all("cannot take" not in one.reason or one.method == "mse" for one in plan.decisions), "nothing is lost"


def narrowed(recipe: Recipe, path: Path) -> list[str]:
    """What makes a run of a recipe quick."""
    changes = []
    for index, rule in enumerate(recipe.rules):
        quick = QUICK.get(rule.method or "", {})
        changes += [f"rules.{index}.{rule.method}.{key}={value}" for key, value in quick.items()]
    data = recipe.data
    if data is not None and data.calibration is not None:
        changes.append("data.calibration.samples=2")
    if data is not None and data.train is not None:
        changes.append("data.train.batch_size=2")
    if path.parent.name == "imagenet":
        parts = [part for part in ("calibration", "eval") if data is not None and getattr(data, part) is not None]
        changes += [f"data.{part}.crop=32" for part in parts]
    return [word for change in changes for word in ("--set", change)]


@pytest.mark.slow
@pytest.mark.parametrize("path", LIVE, ids=lambda path: path.stem)
def test_recipes_without_training_run_through_on_a_little_data(
    run: Run, tmp_path: Path, path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path not in RUN.values() and not os.environ.get(EVERY):
        pytest.skip(f"another recipe of its method is run; {EVERY}=1 runs all")
    monkeypatch.setenv("QCOMPRESS_DATA", str(small_data))
    recipe = read_recipe(path)
    if recipe.model is not None:
        skip_without_package(recipe.model.factory)
    thin = []
    if recipe.model is not None and "width" in recipe.model.args:
        thin = ["--set", "model.args.width=0.125"]
        recipe = replace(recipe, model=replace(recipe.model, args={"width": 0.125}))
    module = build_network(ModelRun(recipe, torch.device("cpu"), allow_code=True))
    save_file({n: v.contiguous().clone() for n, v in module.state_dict().items()}, tmp_path / "m.safetensors")
    command = "cluster" if recipe.family == "cluster" else "quantize"
    if any(METHODS[rule.method or ""].representatives for rule in recipe.rules if rule.method):
        learned = {name: torch.linspace(-1, 1, 16) for name, value in module.named_parameters() if value.ndim > 1}
        save_file({f"{n}.representatives": v for n, v in learned.items()}, tmp_path / "m.reg.safetensors")
    words = [command, str(tmp_path / "m.safetensors"), "-r", str(path), "--allow-code", "--json", "-"]
    done = run(*words, *thin, *narrowed(recipe, path), "-o", str(tmp_path / "o.safetensors"))
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["accuracy"] and np.isfinite(report["accuracy"][0]["artifact"])
    assert report["size"]["artifact_bytes"] < report["size"]["baseline_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in LIVE if path.stem in PRINTED], ids=lambda path: path.stem)
def test_recipes_run_as_printed_where_the_data_are(run: Run, tmp_path: Path, path: Path) -> None:
    """The command that stands at the head of each recipe."""
    data = os.environ.get("QCOMPRESS_DATA")
    if not data:
        pytest.skip("QCOMPRESS_DATA names no folder")
    recipe = read_recipe(path)
    if recipe.model is not None:
        skip_without_package(recipe.model.factory)
    printed = next(line for line in path.read_text().splitlines() if "qcompress " in line).partition("qcompress ")[2]
    command, checkpoint, *_ = printed.split()
    file = Path(data) / checkpoint.removeprefix("data/")
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    done = run(
        command, str(file), "-r", str(path), "--allow-code", "-o", str(tmp_path / "o.safetensors"), "--json", "-"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["accuracy"]
