"""finetune-reg from the command line: what it writes, what it says, ranks, kills, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from colours import TRAINED_RECIPE, anchored, make_network, write_colours
from conftest import Run, process_environment, program, run_ranks
from safetensors.torch import load_file, save_file

from qcompress.checkpoint.staging import MARKER
from qcompress.report.training_report import TRAINING

NET = """
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self, norm=True, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        return self.fc(F.relu(x + self.conv2(x)).mean((2, 3)))

def net(norm=True, width=8):
    return Net(norm, width)
"""

RECIPE = (
    TRAINED_RECIPE
    + """\
finetune:
  epochs: 2
  optimizer: {sgd: {lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 1.0e-4}}
  schedule: {cosine: {final: 0.01}}
  warm_up: 0.1
  log_steps: 5
  naive_bits: [2, 4]
  regularize:
    - {match: fc.weight, min-squared: {levels: 4}}
    - {match: "*.weight", dsmm: {preset: paper-dsmm}}
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that tells four colours apart, untrained, its data and a recipe."""
    found = tmp_path_factory.mktemp("finetune")
    (found / "net.py").write_text(NET)
    write_colours(found)
    save_file(make_network(found).state_dict(), found / "m.safetensors")
    save_file(make_network(found, norm=False).state_dict(), found / "plain.safetensors")
    (found / "reg.yaml").write_text(RECIPE)
    return found


def words_of(folder: Path, output: Path, *more: str) -> list[str]:
    words = ["finetune-reg", str(folder / "m.safetensors"), "-r", str(folder / "reg.yaml"), "--allow-code"]
    return [*words, "-o", str(output), *more]


def test_a_run_writes_checkpoint_learned_terms_report_and_log(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "m-dsmm.safetensors"
    done = run(*words_of(folder, output, "--json", "-"))
    assert done.code == 0, done.err
    assert {path.name for path in tmp_path.iterdir()} == {
        *("m-dsmm.safetensors", "m-dsmm.reg.safetensors", "m-dsmm.report.json", "m-dsmm.log.jsonl"),
    }
    before, after = load_file(folder / "m.safetensors"), load_file(output)
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    learned = load_file(tmp_path / "m-dsmm.reg.safetensors")
    assert {"conv1.weight.alpha", "conv2.weight.alpha", "fc.weight.representatives"} == set(learned)
    assert learned["fc.weight.representatives"].shape == (4,)
    report = json.loads(done.out)
    jsonschema.validate(report, TRAINING.json_schema())
    assert report == json.loads((tmp_path / "m-dsmm.report.json").read_text())
    assert report["steps"] == 24 and [one["bits"] for one in report["naive"]] == [2, 4]
    assert report["accuracy"][0]["artifact"] > 0.9 > report["accuracy"][0]["baseline"]
    layers = {one["name"]: one for one in report["layers"]}
    assert set(layers) == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert layers["fc.weight"]["dead"] == 0 and layers["conv1.weight"]["temperature"] > 0.1
    weight = after["conv1.weight"].double()
    ratio = float((weight.max() - weight.min()) / weight.std(correction=0))
    assert layers["conv1.weight"]["after"]["range_over_std"] == pytest.approx(ratio, rel=1e-5)


def test_the_kmeans_figures_are_those_of_cluster(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    report = json.loads(run(*words_of(folder, output, "--json", "-")).out)
    assert [one["bits"] for one in report["kmeans"]] == [1, 2]
    recipe = tmp_path / "kmeans.yaml"
    head = anchored(RECIPE.split("finetune:")[0], folder)
    for one in report["kmeans"]:
        recipe.write_text(head + f'rules:\n  - {{match: "*.weight", kmeans: {{bits: {one["bits"]}}}}}\n')
        done = run("cluster", str(output), "-r", str(recipe), "--allow-code", "--force", "--json", "-")
        assert done.code == 0, done.err
        assert json.loads(done.out)["accuracy"][0]["artifact"] == pytest.approx(one["after"], abs=1e-6)


def test_the_naive_figures_are_those_of_quantize(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    report = json.loads(run(*words_of(folder, output, "--json", "-")).out)
    recipe = tmp_path / "rtn.yaml"
    recipe.write_text(
        anchored(RECIPE.split("finetune:")[0], folder) + 'rules:\n  - {match: "*.weight", rtn: {bits: 2}}\n'
    )
    done = run("quantize", str(output), "-r", str(recipe), "--allow-code", "--json", "-")
    assert done.code == 0, done.err
    quantized = json.loads(done.out)
    naive = next(one for one in report["naive"] if one["bits"] == 2)
    assert quantized["accuracy"][0]["artifact"] == pytest.approx(naive["after"], abs=1e-6)
    by_name = {one["name"]: one for one in report["layers"]}
    for layer in quantized["layers"]:
        if layer["bits"]:
            figures = by_name[layer["name"]]["after"]
            assert layer["figures"]["sqnr_db"] == pytest.approx(figures["sqnr_db"]["2"], rel=1e-4)
            assert layer["figures"]["outlier_share"] == pytest.approx(figures["outlier_share"])


def test_table_quiet_and_dry_run(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    done = run(*words_of(folder, output, "--dry-run"))
    assert done.code == 0 and not output.exists()
    assert "dsmm" in done.out and "min-squared" in done.out and "no rule matches" in done.out
    done = run(*words_of(folder, output, "-q"))
    assert done.out.strip() == str(output)
    done = run(*words_of(folder, output))
    assert done.code == 3 and "exists already" in done.err
    done = run(*words_of(folder, output, "--force"))
    assert done.code == 0 and "2 bits" in done.out and "fc.weight" in done.out
    assert "epoch 2 of 2" in done.err


def test_alpha_is_foreseen_and_a_schedule_chooses_its_strength(run: Run, folder: Path, tmp_path: Path) -> None:
    """A weight's strength is in the report as a number; that of the schedule leads alpha further than the paper's."""
    alphas, strengths = {}, {}
    for name, more in (("paper", ()), ("schedule", ("--set", "finetune.regularize.1.dsmm.strength=schedule"))):
        planned = run(*words_of(folder, tmp_path / "t.safetensors", "--dry-run", *more))
        assert planned.code == 0 and ("schedule" in planned.out) == (name == "schedule")
        done = run(*words_of(folder, tmp_path / f"{name}.safetensors", "--json", "-", *more))
        assert done.code == 0 and "dsmm: alpha will come to about" in done.err
        (layer,) = (one for one in json.loads(done.out)["layers"] if one["name"] == "conv2.weight")
        alphas[name], strengths[name] = layer["temperature"], layer["strength"]
    assert strengths["paper"] == 0.01 < strengths["schedule"]
    assert alphas["paper"] < alphas["schedule"]


def test_from_scratch_in_sixteen_bits_and_with_gates(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new.safetensors"
    words = ["finetune-reg", "-r", str(folder / "reg.yaml"), "--allow-code", "-o", str(output), "--json", "-"]
    done = run(*words, "--min-metric", "top1=0.9999", "--set", "finetune.epochs=1")
    report = json.loads(done.out)
    assert report["checkpoint"] is None and report["accuracy"] is None
    assert done.code == (0 if report["metrics"]["top1"] > 0.9999 else 4)
    assert output.exists()
    assert load_file(output).keys() == load_file(folder / "m.safetensors").keys()
    half = {name: v.to(torch.bfloat16) if v.is_floating_point() else v for name, v in load_file(output).items()}
    save_file(half, tmp_path / "half.safetensors")
    done = run(
        *("finetune-reg", str(tmp_path / "half.safetensors"), "-r", str(folder / "reg.yaml"), "--allow-code", "-q"),
        *("-o", str(tmp_path / "half-out.safetensors"), "--max-drop", "top1=1"),
    )
    assert done.code == 0, done.err
    after = load_file(tmp_path / "half-out.safetensors")
    assert all(after[name].dtype == value.dtype for name, value in half.items())


def test_distillation_from_the_checkpoint(run: Run, folder: Path, tmp_path: Path) -> None:
    """All of the loss at its distance to what it was, and no penalty: nothing is learned, and little moves."""
    recipe = tmp_path / "distil.yaml"
    text = RECIPE.partition("  regularize:")[0].replace("schedule:", "distil: {share: 1.0}\n  schedule:")
    recipe.write_text(anchored(text, folder))
    output = tmp_path / "d.safetensors"
    rest = ["-r", str(recipe), "--allow-code", "-o", str(output), "--json", "-", "--set", "finetune.norm_batches=4"]
    done = run("finetune-reg", str(folder / "m.safetensors"), *rest)
    assert done.code == 0, done.err
    assert json.loads(done.out)["accuracy"][0]["artifact"] < 0.8
    source, taught = load_file(folder / "m.safetensors"), load_file(output)
    assert float((source["conv2.weight"] - taught["conv2.weight"]).abs().max()) < 0.05
    done = run("finetune-reg", *rest, "--force")
    assert done.code == 3 and "give a CHECKPOINT" in done.err
    shown = run("recipe", "show", str(recipe))
    assert "distil: {share: 1.0, temperature: 4.0}" in shown.out


AUGMENTED = [
    "[flip, crop4]",
    pytest.param(
        "[{random_resized_crop: {size: 8}}, flip, {color_jitter: {hue: 0.1}}, rand_augment, mixup, cutmix]",
        marks=pytest.mark.skipif(not find_spec("torchvision"), reason="torchvision is not installed"),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("augment", AUGMENTED)
def test_a_killed_run_goes_on_to_the_same_bytes(run: Run, folder: Path, tmp_path: Path, augment: str) -> None:
    changes = ["finetune.epochs=20", "finetune.save_steps=1", f"data.train.augment={augment}"]
    if augment != AUGMENTED[0]:
        changes += ["finetune.precision=bfloat16", "finetune.memory_format=channels_last"]
    more = ["--resume", *(word for change in changes for word in ("--set", change))]
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert run(*words_of(folder, whole, *more)).code == 0
    started = subprocess.Popen(
        program(*words_of(folder, broken, *more)), env=process_environment(), stderr=subprocess.PIPE, text=True
    )
    assert started.stderr is not None
    # The step after this line may be half done, or its state half written.
    next(line for line in started.stderr if line.startswith("step 50 of"))
    started.send_signal(signal.SIGKILL)
    started.communicate()
    log = tmp_path / "broken.log.jsonl"
    assert not broken.exists() and (tmp_path / ".broken.safetensors.partial").exists()
    assert run(*words_of(folder, broken, *more)).code == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert (tmp_path / "broken.reg.safetensors").read_bytes() == (tmp_path / "whole.reg.safetensors").read_bytes()
    assert log.read_text() == (tmp_path / "whole.log.jsonl").read_text()
    assert not (tmp_path / ".broken.safetensors.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("augment", AUGMENTED)
def test_two_ranks_do_what_one_process_does_with_twice_the_batch(
    run: Run, folder: Path, tmp_path: Path, augment: str
) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text(anchored(RECIPE, folder).replace("norm: true", "norm: false").replace("[flip]", augment))
    words = ["finetune-reg", str(folder / "plain.safetensors"), "-r", str(recipe), "--allow-code", "-q"]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert run(*words, "-o", one, "--set", "data.train.batch_size=32").code == 0
    done = run_ranks(2, *words, "-o", two)
    assert done.code == 0, done.err
    assert done.out.strip() == str(two)
    wanted = load_file(one)
    for name, value in load_file(two).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    learned = load_file(tmp_path / "one.reg.safetensors")
    for name, value in load_file(tmp_path / "two.reg.safetensors").items():
        torch.testing.assert_close(value, learned[name], rtol=1e-3, atol=1e-4)


def test_a_loss_that_explodes_leaves_the_last_good_weights(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    bad = [
        "--set",
        "finetune.optimizer.sgd.lr=1.0e+12",
        "--set",
        "finetune.save_steps=1",
        "--set",
        "finetune.warm_up=0",
    ]
    done = run(*words_of(folder, output, *bad))
    assert (
        done.code == 3 and "no network uses; the weights of step 1 are in" in done.err and "Traceback" not in done.err
    )
    assert "last-good.safetensors" in done.err and not output.exists()
    kept = load_file(tmp_path / "t.last-good.safetensors")
    assert kept.keys() == load_file(folder / "m.safetensors").keys()


WRONG: dict[str, tuple[list[str], int, str]] = {
    "unknown key": (["--set", "finetune.regularize.1.dsmm.strenght=1"], 3, "did you mean `strength`?"),
    "unknown regularizer": (["--set", "finetune.regularize.1.dsm={}"], 3, "unknown key or regularizer"),
    "negative strength": (["--set", "finetune.regularize.1.dsmm.strength=-1"], 3, "at least 0"),
    "decay": (["--set", "finetune.regularize.1.dsmm.weight_decay=0.1"], 3, "must not decay"),
    "levels": (["--set", "finetune.regularize.0.min-squared.levels=64"], 3, "64 representatives for 32 weights"),
    "few samples": (["--set", "data.train.batch_size=500"], 3, "192 samples, fewer than the 500"),
    "no data": (["--set", "data.train.npz=none.npz"], 3, "none.npz"),
    "no match": (["--set", "finetune.regularize.0.match=x"], 3, "decides nothing"),
    "metric": (["--min-metric", "bleu=1"], 3, "does not measure 'bleu'"),
    "no size": (["--set", "data.train.augment=[random_resized_crop]"], 3, "`size` is missing"),
    "mixed pixels": (
        ["--set", "data.train.augment=[mixup]", "--set", "task=reconstruction"],
        3,
        "mixup mixes images and their classes, and the task is reconstruction",
    ),
    "no leave": (["--no-color"], 2, "--allow-code"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(run: Run, folder: Path, tmp_path: Path, case: str) -> None:
    more, code, error = WRONG[case]
    words = words_of(folder, tmp_path / "t.safetensors", *more)
    done = run(*(word for word in words if case != "no leave" or word != "--allow-code"))
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert (done.code, len(errors)) == (code, 1), done.err
    assert error in errors[0] and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_recipes_without_training_are_refused_and_states_that_cannot_be_read_dropped(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("version: 1\nfinetune: {optimizer: {sgd: {lr: 0.1}}}\n")
    done = run("finetune-reg", str(folder / "m.safetensors"), "-r", str(bare))
    assert done.code == 3 and "names no model and no data.train and no task" in done.err
    done = run("finetune-reg", str(folder / "m.safetensors"))
    assert done.code == 2 and "add -r RECIPE" in done.err
    done = run("quantize", str(folder / "m.safetensors"), "-r", str(folder / "reg.yaml"), "--allow-code")
    assert done.code == 3 and "has no rules" in done.err
    partial = tmp_path / ".t.safetensors.partial"
    partial.mkdir()
    (partial / MARKER).touch()
    (partial / "training.safetensors").write_bytes(b"broken")
    done = run(*words_of(folder, tmp_path / "t.safetensors", "--resume"))
    assert done.code == 0 and "training.safetensors is dropped, and training starts anew" in done.err


def test_quantize_takes_what_was_trained(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    assert run(*words_of(folder, output, "-q")).code == 0
    done = run("quantize", str(output), "--bits", "2", "-q")
    assert done.code == 0 and run("verify", done.out.strip()).code == 0


def config_of(recipe: Path) -> Any:
    from qcompress.recipe import read_recipe

    return read_recipe(recipe)


def test_the_recipe_reads_back_as_it_is_shown(folder: Path, tmp_path: Path) -> None:
    from qcompress.recipe import parse_recipe, recipe_hash, recipe_yaml

    recipe = config_of(folder / "reg.yaml")
    again = parse_recipe(recipe_yaml(recipe), "shown")
    assert recipe_hash(again) == recipe_hash(recipe)
    assert again.finetune is not None and recipe.finetune is not None
    assert replace(again.finetune, regularize=()) == replace(recipe.finetune, regularize=())
