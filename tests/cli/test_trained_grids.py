"""Quantization-aware training from the command line: artifacts, resuming, ranks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import TRAINED_RECIPE, anchored, write_colours, write_learned
from conftest import Run, run_ranks
from safetensors.torch import load_file, save_file
from torch import nn

import qcompress
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.staging import MARKER
from qcompress.coding.grids import decode
from qcompress.registry import LsqConfig, PactConfig
from qcompress.training import loop
from qcompress.types.encoded import Affine

NET = """
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.up = nn.ConvTranspose2d(8, 6, 3)
        self.mix = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.mix(F.relu(self.up(F.relu(self.norm(self.conv(x))))))
        return self.fc(x.mean((2, 3)))

def net(norm=True):
    return Net(norm)
"""

RECIPE = (
    TRAINED_RECIPE
    + """\
rules:
  - {match: "*.weight", METHOD: OPTIONS}
activations: {bits: 4}
finetune:
  epochs: 3
  optimizer: {sgd: {lr: 0.02, momentum: 0.9, weight_decay: 1.0e-4}}
  schedule: cosine
  norm_batches: 4
  log_steps: 5
"""
)
WEIGHTS = ("conv.weight", "up.weight", "mix.weight", "fc.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has learned to tell four colours apart, with its data."""
    found = tmp_path_factory.mktemp("qat")
    (found / "net.py").write_text(NET)
    samples = write_colours(found)
    write_learned(found, samples, 60)
    write_learned(found, samples, 60, name="plain", norm=False)
    return found


def words_of(folder: Path, output: Path, method: str, options: str, *more: str, name: str = "m") -> list[str]:
    """The command line; a change `old=>new` is one of the recipe's text."""
    changes = [one.split("=>") for one in more if "=>" in one]
    text = RECIPE.replace("METHOD", method).replace("OPTIONS", options)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    recipe = output.with_suffix(".yaml")
    recipe.write_text(anchored(text, folder))
    words = [str(folder / f"{name}.safetensors"), "-r", str(recipe), "--allow-code", "-o", str(output)]
    command = "cluster" if method == "dkm" else "quantize"
    return [command, *words, *(one for one in more if "=>" not in one)]


def trained(run: Run, folder: Path, output: Path, method: str, options: str, *more: str) -> dict[str, Any]:
    done = run(*words_of(folder, output, method, options, "--json", "-", *more))
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def top1(report: dict[str, Any]) -> float:
    value: float = next(one["artifact"] for one in report["accuracy"] if one["metric"] == "top1")
    return value


CASES = [
    ("lsq", "{bits: 2}"),
    ("lsq", "{bits: 4, granularity: tensor, start: mean, learning_rate: 0.005}"),
    ("lsq", "{bits: 3, axis: 1}"),
    ("pact", "{bits: 2}"),
    ("pact", "{bits: 1}"),
    ("pact", "{bits: 4, granularity: tensor, scale: unit, clip: 4.0, clip_decay: 0.001}"),
]
FAST = "  schedule: cosine=>  schedule: cosine\n  precision: bfloat16\n  memory_format: channels_last"


@pytest.mark.parametrize(
    ("method", "options", "more"), [*((*case, []) for case in CASES), *((*CASES[index], [FAST]) for index in (0, 3))]
)
def test_the_artifact_is_what_was_trained(
    run: Run, folder: Path, tmp_path: Path, method: str, options: str, more: list[str]
) -> None:
    """Its accuracy is the last one that training measured, to the sample, and what `eval` measures again."""
    output = tmp_path / "a.safetensors"
    report = trained(run, folder, output, method, options, *more)
    assert top1(report) > 0.5
    lines = [json.loads(line) for line in (tmp_path / "a.log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "epoch" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert top1(report) == pytest.approx(epochs[-1]["metrics"]["top1"], abs=1e-6)
    measured = run("eval", str(output), "-r", str(tmp_path / "a.yaml"), "--allow-code", "--json", "-")
    values = {one["metric"]: one["value"] for one in json.loads(measured.out)["metrics"]}
    assert values["top1"] == pytest.approx(top1(report), abs=1e-6)
    assert run("verify", str(output)).code == 0
    file = read_artifact(output).files[0]
    assert set(file.manifest.tensors) == set(WEIGHTS)
    convention = "full" if method == "lsq" else "mid-rise"
    assert {entry.grid for entry in file.manifest.tensors.values()} == {convention}
    source, loaded = load_file(folder / "m.safetensors"), qcompress.load_state_dict(output)
    changed = {name for name in source if name not in WEIGHTS and not torch.equal(source[name], loaded[name])}
    assert changed == set(file.manifest.adjusted) and "norm.running_mean" in changed
    assert loaded["norm.num_batches_tracked"] == source["norm.num_batches_tracked"]
    grids = file.manifest.activations
    assert {name: grid.bits for name, grid in grids.items()} == {"conv": 8, "up": 4, "mix": 4, "fc": 4}
    # Behind a ReLU no code is spent below zero; the inputs of the others go both ways.
    assert (
        grids["up"].zero_point == grids["mix"].zero_point == 0 < min(grids["conv"].zero_point, grids["fc"].zero_point)
    )


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_integers_and_grids_are_those_of_the_last_step(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen: dict[str, Any] = {}
    train = loop.train

    def watched(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        done = train(module, *arguments, **options)
        layers: Any = dict(module.named_modules())
        seen["weights"] = {name: layers[name.rpartition(".")[0]].weight.detach().clone() for name in WEIGHTS}
        inputs = torch.randn(5, 8, 8, 8)
        seen["input"] = (inputs, layers["up"].qcompress_input(inputs).detach())
        return done

    monkeypatch.setattr("qcompress.training.trainer.train", watched)
    output = tmp_path / "a.safetensors"
    trained(run, folder, output, method, "{bits: 2}")
    file = read_artifact(output).files[0]
    for name, weight in seen["weights"].items():
        encoded = file.read_encoded(name)
        assert isinstance(encoded, Affine)
        assert torch.equal(decode(encoded), weight), name
    from qcompress.calibration.activations import quantize_activation

    inputs, wanted = seen["input"]
    assert torch.equal(quantize_activation(inputs, file.manifest.activations["up"]), wanted)


@pytest.mark.parametrize(
    ("method", "options"), [("lsq", "{bits: 2, granularity: tensor, start: mean}"), ("pact", "{bits: 1}")]
)
@pytest.mark.slow
def test_training_brings_back_what_rounding_loses(
    run: Run, folder: Path, tmp_path: Path, method: str, options: str
) -> None:
    """Against the same grids where they start, which hardly move at a rate of next to nothing."""
    coarse = ["bits: 4}=>bits: 1}" if method == "pact" else "bits: 4}=>bits: 2}", "  norm_batches: 4\n=>"]
    start = trained(run, folder, tmp_path / "s.safetensors", method, options, *coarse, "lr: 0.02=>lr: 1.0e-9")
    report = trained(run, folder, tmp_path / "a.safetensors", method, options, *coarse)
    assert top1(report) > top1(start) + 0.02


def test_weights_alone_and_layers_that_stay(run: Run, folder: Path, tmp_path: Path) -> None:
    """Without `activations` inputs stay as they are; other methods and kept weights take part."""
    output = tmp_path / "a.safetensors"
    rules = "rules:\n=>rules:\n  - {match: fc.weight, squant: {bits: 8}}\n  - {match: mix.weight, keep: {}}\n"
    trained(run, folder, output, "lsq", "{bits: 3}", rules, "activations: {bits: 4}\n=>")
    file = read_artifact(output).files[0]
    assert not file.manifest.activations
    assert {name: entry.bits for name, entry in file.manifest.tensors.items()} == {
        **dict.fromkeys(("conv.weight", "up.weight"), 3),
        "fc.weight": 8,
    }
    # What another method has compressed is not trained: its codes are of the checkpoint's weight.
    source, loaded = load_file(folder / "m.safetensors"), qcompress.load_state_dict(output)
    error = (source["fc.weight"] - loaded["fc.weight"]).abs().max()
    assert float(error) < 0.01 * float(source["fc.weight"].abs().max())
    assert "mix.weight" in file.manifest.adjusted and "fc.weight" not in file.manifest.adjusted


def test_a_checkpoint_of_sixteen_bits(run: Run, folder: Path, tmp_path: Path) -> None:
    half = {
        name: v.to(torch.bfloat16) if v.is_floating_point() else v
        for name, v in load_file(folder / "m.safetensors").items()
    }
    save_file(half, tmp_path / "m.safetensors")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "data.npz").write_bytes((folder / "data.npz").read_bytes())
    report = trained(run, tmp_path, tmp_path / "a.safetensors", "lsq", "{bits: 3}")
    assert top1(report) > 0.5
    loaded = qcompress.load_state_dict(tmp_path / "a.safetensors")
    assert all(loaded[name].dtype == value.dtype for name, value in half.items())


def test_export_holds_the_trained_weights(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    trained(run, folder, output, "pact", "{bits: 1}", "activations: {bits: 4}\n=>")
    done = run("export", str(output), "--to", "safetensors", "-q")
    assert done.code == 0, done.err
    dense = load_file(done.out.strip())
    for name, value in qcompress.load_state_dict(output).items():
        assert torch.equal(dense[name], value)
    # At 1 bit each channel has one magnitude.
    assert all(len(row.abs().unique()) == 1 for row in dense["conv.weight"])


@pytest.mark.slow
def test_distillation_changes_what_is_learned(run: Run, folder: Path, tmp_path: Path) -> None:
    distil = "schedule: cosine=>schedule: cosine\n  distil: {share: 1.0, temperature: 2.0}"
    trained(run, folder, tmp_path / "a.safetensors", "lsq", "{bits: 3}")
    taught = trained(run, folder, tmp_path / "b.safetensors", "lsq", "{bits: 3}", distil)
    assert top1(taught) > 0.6
    one, other = (qcompress.load_state_dict(tmp_path / f"{name}.safetensors") for name in "ab")
    assert not torch.equal(one["conv.weight"], other["conv.weight"])


PENALTY = "  schedule=>  regularize: [{match: '*.weight', RULE}]\n  schedule"


@pytest.mark.parametrize("method", ["lsq", "pact", "dkm"])
def test_regularizers_pull_the_weights_beneath_the_grids(run: Run, folder: Path, tmp_path: Path, method: str) -> None:
    """One that is strong beyond all reason leaves little of a weight; one of no strength changes no bit."""
    more = ["activations: {bits: 4}\n=>"] if method == "dkm" else []
    sizes, data = {}, {}
    for name, rule in (("none", ""), ("nothing", "l2: {strength: 0}"), ("strong", "l2: {strength: 10.0}")):
        output = tmp_path / f"{name}.safetensors"
        penalty = [PENALTY.replace("RULE", rule)] if rule else []
        trained(run, folder, output, method, "{bits: 4}", *more, *penalty)
        loaded = qcompress.load_state_dict(output)
        sizes[name] = {weight: float(loaded[weight].abs().max()) for weight in WEIGHTS}
        data[name] = {weight: loaded[weight] for weight in WEIGHTS}
    assert all(torch.equal(data["none"][name], data["nothing"][name]) for name in WEIGHTS)
    assert all(sizes["strong"][name] < 0.25 * sizes["none"][name] for name in WEIGHTS), sizes


def test_regularizers_leave_alone_what_another_method_compressed(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    rules = "rules:\n=>rules:\n  - {match: fc.weight, squant: {bits: 8}}\n"
    pull = PENALTY.replace("RULE", "l2: {strength: 10.0, coupling: decoupled}")
    trained(run, folder, output, "lsq", "{bits: 4}", rules, pull)
    source, loaded = load_file(folder / "m.safetensors"), qcompress.load_state_dict(output)
    error = (source["fc.weight"] - loaded["fc.weight"]).abs().max()
    assert float(error) < 0.01 * float(source["fc.weight"].abs().max())
    assert float(loaded["conv.weight"].abs().max()) < 0.25 * float(source["conv.weight"].abs().max())


class Broken(Exception):
    pass


@pytest.mark.parametrize(("method", "options"), [("lsq", "{bits: 2}"), ("pact", "{bits: 2}"), ("dkm", "{bits: 2}")])
@pytest.mark.slow
def test_a_broken_run_goes_on_to_the_same_bytes(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: str
) -> None:
    # What a regularizer learns is part of what is saved.
    learned = PENALTY.replace("RULE", "dsmm: {preset: paper-dsmm}")
    more = ["--resume", "log_steps: 5=>save_steps: 4", learned]
    if method == "dkm":
        more.append("activations: {bits: 4}\n=>")
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert run(*words_of(folder, whole, method, options, *more)).code == 0
    save, saved = loop._save, []

    def breaking(one: Any) -> None:
        save(one)
        saved.append(1)
        if len(saved) == 4:
            raise Broken

    monkeypatch.setattr(loop, "_save", breaking)
    assert run(*words_of(folder, broken, method, options, *more)).code == 1
    monkeypatch.setattr(loop, "_save", save)
    assert not broken.exists() and (tmp_path / ".broken.safetensors.partial" / "training.safetensors").exists()
    done = run(*words_of(folder, broken, method, options, *more))
    assert done.code == 0 and "going on from step 12" in done.err, done.err
    assert broken.read_bytes() == whole.read_bytes()
    assert (tmp_path / "broken.log.jsonl").read_text() == (tmp_path / "whole.log.jsonl").read_text()
    assert not (tmp_path / ".broken.safetensors.partial").exists()


def test_a_state_that_cannot_be_read_is_dropped_with_a_word(run: Run, folder: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".a.safetensors.partial"
    partial.mkdir()
    (partial / MARKER).touch()
    (partial / "training.safetensors").write_bytes(b"broken")
    done = run(*words_of(folder, tmp_path / "a.safetensors", "lsq", "{bits: 2}", "--resume"))
    assert done.code == 0 and "training.safetensors is dropped, and training starts anew" in done.err


@pytest.mark.slow
def test_equal_seeds_give_equal_bytes(run: Run, folder: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for output, seed in zip(outputs, ("1", "1", "2"), strict=True):
        trained(run, folder, output, "lsq", "{bits: 2}", "--seed", seed)
    data = [output.read_bytes() for output in outputs]
    assert data[0] == data[1] != data[2]


@pytest.mark.slow
def test_two_ranks_do_what_one_process_does_with_twice_the_batch(run: Run, folder: Path, tmp_path: Path) -> None:
    """After one step: later ones would multiply the noise of sums, since a rounding falls one way or the other."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    changes = ["norm: true=>norm: false", "batch_size: 16, augment: [flip]=>batch_size: 16, samples: 32, augment: []"]
    # Targets that the network does not meet yet, for gradients that are worth averaging.
    changes += ["epochs: 3=>epochs: 1", "schedule: cosine=>schedule: cosine\n  label_smoothing: 0.5"]
    twice = [*changes, "batch_size: 16=>batch_size: 32"]
    assert run(*words_of(folder, one, "lsq", "{bits: 4}", *twice, "-q", name="plain")).code == 0
    words = words_of(folder, two, "lsq", "{bits: 4}", *changes, name="plain")
    done = run_ranks(2, *words, "-q")
    assert done.code == 0, done.err
    assert done.out.strip() == str(two)
    first, second = (read_artifact(path).files[0] for path in (one, two))
    for name, grid in first.manifest.activations.items():
        assert second.manifest.activations[name].scale == pytest.approx(grid.scale, rel=1e-5)
    for name in WEIGHTS:
        alone, ranks = first.read_encoded(name), second.read_encoded(name)
        assert isinstance(alone, Affine) and isinstance(ranks, Affine)
        torch.testing.assert_close(ranks.scale.float(), alone.scale.float(), rtol=1e-3, atol=0)
        # A weight on the edge between two levels may fall either way.
        assert float((alone.codes != ranks.codes).float().mean()) < 0.01
    loaded = [qcompress.load_state_dict(path) for path in (one, two)]
    for name in set(loaded[0]) - set(WEIGHTS):
        torch.testing.assert_close(loaded[1][name], loaded[0][name], rtol=1e-5, atol=1e-7)


WRONG: dict[str, tuple[str, str, list[str], str]] = {
    "one bit": ("lsq", "{bits: 1}", [], "bits"),
    "asymmetric": ("lsq", "{bits: 2, symmetric: false}", [], "leave symmetric out"),
    "no data": (
        "lsq",
        "{bits: 2}",
        ["  train: {npz: data.npz, batch_size: 16, augment: [flip]}\n=>"],
        "add `data.train`",
    ),
    "two of them": (
        "lsq",
        "{bits: 2}",
        ["rules:\n=>rules:\n  - {match: fc.weight, pact: {bits: 2}}\n"],
        "lsq and pact would train one after the other",
    ),
    "companions": ("lsq", "{bits: 2}", ["task: =>companions: [batch_norm]\ntask: "], "and lsq trains it"),
    "ranges without data": ("pact", "{bits: 2}", ["bits: 4}=>bits: 4, range: noise}"], "not from range: noise"),
    "regularizers": (
        "pact",
        "{bits: 2}",
        ["  schedule=>  regularize: [{match: fc.wait, l2: {}}]\n  schedule"],
        "match 'fc.wait' decides nothing",
    ),
    "frozen norms": ("lsq", "{bits: 2}", ["  schedule=>  batch_norm: frozen\n  schedule"], "leave norm_batches out"),
    "few samples": ("lsq", "{bits: 2}", ["batch_size: 16=>batch_size: 500"], "192 samples, fewer than the 500"),
    "nothing to measure on": (
        "lsq",
        "{bits: 2}",
        ["  eval: {npz: data.npz}\n=>", "task: classification\n=>", "  schedule=>  keep: best\n  schedule"],
        "add `task`",
    ),
    "distil": ("lsq", "{bits: 2}", ["  schedule=>  distill: {}\n  schedule"], "did you mean `distil`?"),
    "share": ("lsq", "{bits: 2}", ["  schedule=>  distil: {share: 2}\n  schedule"], "between 0 and 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_leaves_nothing(run: Run, folder: Path, tmp_path: Path, case: str) -> None:
    method, options, more, error = WRONG[case]
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "a.safetensors"
    words = words_of(folder, output, method, options, *more)
    done = run(*words)
    assert done.code == 3 and error in done.err and "Traceback" not in done.err, done.err
    assert [path.name for path in output.parent.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("method", ["lsq", "pact", "dkm"])
@pytest.mark.slow
def test_a_network_is_trained_on_its_grids_from_scratch(run: Run, folder: Path, tmp_path: Path, method: str) -> None:
    """Without a checkpoint it learns what another learned before it was quantized; the seed decides from where."""
    more = ["epochs: 3=>epochs: 12", "lr: 0.02=>lr: 0.05"]
    more += ["activations: {bits: 4}\n=>"] if method == "dkm" else []
    names = {"a": "1", "b": "1", "c": "2"}
    for name, seed in names.items():
        words = words_of(folder, tmp_path / f"{name}.safetensors", method, "{bits: 4}", *more, "--seed", seed)
        del words[1]
        done = run(*words, "--json", "-")
        assert done.code == 0, done.err
        report = json.loads(done.out)
        (accuracy,) = (one for one in report["accuracy"] if one["metric"] == "top1")
        assert accuracy["baseline"] < 0.5 < 0.8 < accuracy["artifact"]
    data = [(tmp_path / f"{name}.safetensors").read_bytes() for name in names]
    assert data[0] == data[1] != data[2]


NO_CHECKPOINT = {
    "flags": (["--bits", "2"], 2, "no checkpoint is given"),
    "a method without training": (["METHOD=>rtn", "activations: {bits: 4}\n=>"], 3, "no method of the recipe trains"),
    "another method beside": (
        ["rules:\n=>rules:\n  - {match: fc.weight, squant: {bits: 8}}\n"],
        3,
        "squant would compress weights that nothing has trained",
    ),
    "distil": (["  schedule=>  distil: {}\n  schedule"], 3, "no network to learn from"),
    "a gate on the drop": (["rules:\n=>gates: {max_drop: {top1: 0.1}}\nrules:\n"], 3, "no checkpoint to fall below"),
    "no consent": (["no consent"], 2, "--allow-code"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINT)
def test_what_needs_a_checkpoint_says_so(run: Run, folder: Path, tmp_path: Path, case: str) -> None:
    more, code, error = NO_CHECKPOINT[case]
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "a.safetensors"
    if case == "flags":
        words = ["quantize", *more, "-o", str(output)]
    else:
        changes = [one for one in more if "=>" in one and not one.startswith("METHOD")]
        method = "rtn" if more[0].startswith("METHOD") else "lsq"
        words = words_of(folder, output, method, "{bits: 2}", *changes)
        del words[1]
        words = [word for word in words if case != "no consent" or word != "--allow-code"]
    done = run(*words)
    assert done.code == code and error in done.err and "Traceback" not in done.err, done.err
    assert not output.exists()


def test_an_output_that_exists_is_refused_before_training(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    output.write_bytes(b"mine")
    done = run(*words_of(folder, output, "lsq", "{bits: 2}"))
    assert done.code == 3 and "exists already" in done.err and "step" not in done.err
    assert output.read_bytes() == b"mine"


def test_an_exploding_run_is_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    done = run(*words_of(folder, tmp_path / "a.safetensors", "lsq", "{bits: 2}", "lr: 0.02=>lr: 1.0e+30"))
    assert done.code == 3 and "Traceback" not in done.err and "learning rate" in done.err
    assert not (tmp_path / "a.safetensors").exists()


def test_configs() -> None:
    assert (LsqConfig(bits=2).form, LsqConfig(bits=2).stored_convention) == ("symmetric", "full")
    assert (PactConfig(bits=1).form, PactConfig(bits=1).stored_convention) == ("symmetric", "mid-rise")
    with pytest.raises(ValueError, match="leave symmetric out"):
        PactConfig(bits=2, symmetric=False)
