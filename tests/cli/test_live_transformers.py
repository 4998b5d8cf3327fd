"""Recipes that name a network of transformers, on the folder that its `save_pretrained` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, refused
from model.architectures import ARCHITECTURES, make_architecture
from safetensors.torch import load_file, save_file

import qcompress
from qcompress.artifact.reader import read_artifact

RENAMED = {
    "gpt-neox": "gpt_neox.layers.*",
    "mixtral": "model.layers.*",
    "qwen2-moe": "model.layers.*",
    "qwen3-moe": "model.layers.*",
    "deepseek-v3": "model.layers.*",
    "llama-tied": "model.layers.*",
    "gpt2": "transformer.h.*",
    "vit": "vit.layers.*",
    "swin": None,
    "beit": None,
}
"""Architectures whose folders hold other names than the network has, or fewer: their blocks."""


def write_recipe(folder: Path, name: str, rules: str, blocks: str | None) -> Path:
    factory, args = ARCHITECTURES[name]
    random = np.random.default_rng(0)
    text = "ForCausalLM" in factory or "LMHead" in factory
    if text:
        np.savez(folder / "d.npz", input_ids=random.integers(0, 64, (8, 12)))
        source, task = "{npz: d.npz, inputs: {input_ids: input_ids}, batch_size: 4}", "causal-lm"
    else:
        pixels = random.standard_normal((8, 3, 32, 32)).astype("float32")
        np.savez(folder / "d.npz", pixel_values=pixels, y=random.integers(0, 2, 8))
        source, task = "{npz: d.npz, inputs: {pixel_values: pixel_values}, batch_size: 4}", "classification"
    settings = {"factory": f"transformers:{factory}", "args": args} | ({"blocks": blocks} if blocks else {})
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {json.dumps(settings)}\n"
        f"data: {{calibration: {source}, eval: {source}}}\ntask: {task}\n{rules}"
    )
    return recipe


@pytest.mark.parametrize("name", RENAMED)
def test_a_live_recipe_works_on_what_save_pretrained_wrote(run: Run, name: str, tmp_path: Path) -> None:
    make_architecture(name).save_pretrained(tmp_path / "m")
    rules = "rules: [{match: '*.weight', gptq: {bits: 8}}]\nactivations: {bits: 8}\n"
    recipe = write_recipe(tmp_path, name, rules, RENAMED[name])
    planned = run("quantize", tmp_path / "m", "-r", recipe, "--dry-run", "--json", "-")
    assert planned.code == 0, planned.err
    done = run("quantize", tmp_path / "m", "-r", recipe, "--json", "-", "-o", tmp_path / "a")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers.keys() == load_file(tmp_path / "m" / "model.safetensors").keys()
    assert {one["name"]: one["method"] for one in json.loads(planned.out)["tensors"] if one["method"] != "kept"} == {
        name: layer["method"] for name, layer in layers.items() if layer["bits"]
    }
    assert min(layer["figures"]["sqnr_db"] for layer in layers.values() if layer["bits"]) > 25
    assert sum(layer["method"] == "gptq" for layer in layers.values()) > 4
    other = make_architecture(name, seed=1)
    qcompress.load_into(other, tmp_path / "a", activations=True)
    again = run("eval", tmp_path / "a", "-r", recipe, "--json", "-")
    assert again.code == 0, again.err
    assert json.loads(again.out)["metrics"][0]["value"] == pytest.approx(report["accuracy"][0]["artifact"])
    assert read_artifact(tmp_path / "a").activations


def planned_experts(run: Run, folder: Path, recipe: Path) -> list[dict[str, str]]:
    planned = run("quantize", folder, "-r", recipe, "--dry-run", "--json", "-")
    assert planned.code == 0, planned.err
    return [one for one in json.loads(planned.out)["tensors"] if ".experts." in one["name"]]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
@pytest.mark.parametrize("method", ["gptq: {bits: 3}", "adaround: {bits: 3, iterations: 2}"])
def test_parts_of_a_stack_get_the_codes_of_the_stack(run: Run, name: str, method: str, tmp_path: Path) -> None:
    """Experts one by one on the disk, and the same network under its own names, whose experts are stacked there."""
    module = make_architecture(name)
    module.save_pretrained(tmp_path / "parts")
    (tmp_path / "stacks").mkdir()
    own = {key: value.contiguous() for key, value in module.state_dict().items()}
    save_file(own, tmp_path / "stacks" / "model.safetensors")
    module.config.save_pretrained(tmp_path / "stacks")
    recipe = write_recipe(tmp_path, name, f"rules: [{{match: '*', {method}}}]\n", None)
    found = []
    for folder in ("parts", "stacks"):
        done = run("quantize", tmp_path / folder, "-r", recipe, "--json", "-", "-o", tmp_path / f"{folder}-codes")
        assert done.code == 0, done.err
        experts = [one for one in json.loads(done.out)["layers"] if ".experts." in one["name"]]
        assert {one["method"] for one in experts} == {method.partition(":")[0]}
        again = make_architecture(name, seed=1)
        qcompress.load_into(again, tmp_path / f"{folder}-codes")
        found.append(again.state_dict())
    assert len({".gate_up_proj" in key for key in found[0]}) == 2
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_parts_of_a_stack_that_has_several_rules_are_rounded_alone(run: Run, tmp_path: Path) -> None:
    """Then the plan says that no calibrated method reaches them; a rule that names one is refused."""
    make_architecture("mixtral").save_pretrained(tmp_path / "m")
    rules = "rules: [{match: '*.w3.weight', gptq: {bits: 5}}, {match: '*_*.weight', gptq: {bits: 4}}]\n"
    experts = planned_experts(run, tmp_path / "m", write_recipe(tmp_path, "mixtral", rules, None))
    reason = "mse, for gptq cannot take it: MixtralExperts holds it as a part of another tensor"
    found = {(one["name"].split(".")[-2], one["method"], one["reason"].endswith(reason)) for one in experts}
    assert len(experts) == 24 and found == {("w1", "mse", True), ("w3", "mse", True), ("w2", "gptq", False)}
    rules = f"rules: [{{match: {experts[0]['name']}, gptq: {{bits: 4}}}}]\n"
    recipe = write_recipe(tmp_path, "mixtral", rules, None)
    assert "MixtralExperts holds it as a part of another tensor" in refused(
        run, tmp_path, "quantize", tmp_path / "m", "-r", recipe
    )


def test_a_budget_decides_the_width_of_a_stack(run: Run, tmp_path: Path) -> None:
    """One for all experts of a layer, which the method then takes together."""
    make_architecture("mixtral").save_pretrained(tmp_path / "m")
    rules = "rules: [{match: '*.weight', gptq: {}}]\nbudget: {bpw: 5}\n"
    recipe = write_recipe(tmp_path, "mixtral", rules, None)
    done = run("quantize", tmp_path / "m", "-r", recipe, "--json", "-", "-o", tmp_path / "a")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    experts = [one for one in report["layers"] if ".experts." in one["name"]]
    assert {one["method"] for one in experts} == {"gptq"}
    of_layers = {(one["name"].split(".")[2], one["bits"]) for one in experts if ".w2." not in one["name"]}
    assert len(of_layers) == len({layer for layer, _ in of_layers})
    assert report["size"]["bits_per_weight"] <= 5


def test_statistics_of_a_stack_are_those_of_its_parts(run: Run, tmp_path: Path) -> None:
    """What flows into the two matrices of an expert is the same, and no other expert's; weights alone can use it."""
    make_architecture("mixtral").save_pretrained(tmp_path / "m")
    recipe = write_recipe(tmp_path, "mixtral", "rules: [{match: '*.weight', gptq: {bits: 4}}]\n", None)
    saved = ("--save-statistics", tmp_path / "s.safetensors")
    done = run("quantize", tmp_path / "m", "-r", recipe, *saved, "-o", tmp_path / "a", "-q")
    assert done.code == 0, done.err
    every = load_file(tmp_path / "s.safetensors")
    found = {name: value for name, value in every.items() if ".experts." in name and name.endswith(".hessian")}
    assert len(found) == 24 and {value.shape[0] for value in found.values()} == {1}
    first = {name: value for name, value in found.items() if ".w1." in name}
    assert all(torch.equal(value, found[name.replace(".w1.", ".w3.")]) for name, value in first.items())
    assert len({value.sum().item() for value in first.values()}) == len(first) == 8
    alone = ("--method", "gptq", "--bits", "4", "--statistics", tmp_path / "s.safetensors")
    again = run("quantize", tmp_path / "m", *alone, "-o", tmp_path / "b", "-q")
    assert again.code == 0, again.err


def test_rd_takes_the_parts_of_a_stack(run: Run, tmp_path: Path) -> None:
    make_architecture("mixtral").save_pretrained(tmp_path / "m")
    rules = "rules: [{match: '*.weight', rd: {effort: fast}}]\nbudget: {bpw: 4}\n"
    recipe = write_recipe(tmp_path, "mixtral", rules, None)
    done = run("quantize", tmp_path / "m", "-r", recipe, "--json", "-", "-o", tmp_path / "a")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    experts = [one for one in report["layers"] if ".experts." in one["name"]]
    assert len(experts) == 24 and {one["method"] for one in experts} == {"rd"}
    assert 3.9 < report["size"]["bits_per_weight"] <= 4
    assert min(one["figures"]["sqnr_db"] for one in experts) > 10


@pytest.mark.parametrize("name", ["vit", "mixtral"])
def test_a_budget_is_spent_by_what_the_network_loses(run: Run, name: str, tmp_path: Path) -> None:
    make_architecture(name).save_pretrained(tmp_path / "m")
    recipe = write_recipe(tmp_path, name, "rules: [{match: '*.weight', squant: {}}]\nbudget: {bpw: 5}\n", RENAMED[name])
    done = run("quantize", tmp_path / "m", "-r", recipe, "--json", "-", "-o", tmp_path / "a")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["size"]["bits_per_weight"] <= 5
    assert len({layer["bits"] for layer in report["layers"] if layer["bits"]}) > 1


def test_training_writes_the_names_that_the_folder_had(run: Run, tmp_path: Path) -> None:
    before = make_architecture("mixtral")
    before.save_pretrained(tmp_path / "m")
    recipe = write_recipe(tmp_path, "mixtral", "", None)
    recipe.write_text(
        recipe.read_text().replace("eval:", "train: {npz: d.npz, inputs: {input_ids: input_ids}, batch_size: 4}, eval:")
        + "finetune: {epochs: 1, optimizer: {sgd: {lr: 0.01}}}\n"
    )
    done = run("finetune-reg", tmp_path / "m", "-r", recipe, "-o", tmp_path / "t", "-q")
    assert done.code == 0, done.err
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("m", "t"))
    assert {name: value.shape for name, value in old.items()} == {name: value.shape for name, value in new.items()}
    assert all(torch.allclose(old[name], new[name], atol=0.1) for name in old)
    assert not all(torch.equal(old[name], new[name]) for name in old if ".experts." in name)
