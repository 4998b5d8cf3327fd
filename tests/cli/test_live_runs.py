"""Live models from the command line: accuracy in report and gates, eval, statistics, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colours import write_colours, write_learned
from conftest import ROOT, Run
from safetensors.torch import load_file, save_file

import qcompress
from qcompress.data.user_code import find_callable
from qcompress.registry import METHODS

QUANTIZERS = [name for name, method in METHODS.items() if method.family == "quantize" and not method.rates]

NET = """
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(x + self.bn2(self.conv2(x))).mean((2, 3)))

def net(width=8):
    return Net(width)
"""

RECIPE = """
version: 1
model: {factory: net.py:net}
data:
  calibration: {npz: data.npz, samples: 64, batch_size: 16}
  train: {npz: data.npz, batch_size: 20}
  eval: {npz: data.npz}
  normalize: {mean: [0.5], std: [0.25]}
task: {classification: {metric: top1}}
rules:
  - {match: "*.weight", METHOD: {bits: 4}}
activations: {bits: 8}
finetune: {epochs: 1, optimizer: {sgd: {lr: 0.001}}}
"""

QUICK = {
    "pdquant": ["--set", "rules.0.pdquant.iterations=10"],
    "adaround": ["--set", "rules.0.adaround.iterations=20"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that tells four colours apart, its weights, its data and a recipe a method."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "net.py").write_text(NET)
    write_learned(folder, write_colours(folder, 200), 60)
    for method in QUANTIZERS:
        (folder / f"{method}.yaml").write_text(RECIPE.replace("METHOD", method))
    return folder


def quantize(run: Run, folder: Path, method: str, output: Path, *more: str) -> Any:
    words = ["quantize", str(folder / "m.safetensors"), "-r", str(folder / f"{method}.yaml"), "--allow-code"]
    return run(*words, "-o", str(output), *QUICK.get(method, []), *more)


@pytest.mark.parametrize("method", QUANTIZERS)
def test_every_method_reports_the_accuracy_that_eval_finds(
    run: Run, trained: Path, tmp_path: Path, method: str
) -> None:
    output = tmp_path / "a.safetensors"
    done = quantize(run, trained, method, output, "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    (top1,) = report["accuracy"]
    assert (top1["metric"], top1["samples"]) == ("top1", 200)
    assert top1["baseline"] > 0.95 and top1["artifact"] > 0.8
    assert top1["artifact_interval"][0] <= top1["artifact"] <= top1["artifact_interval"][1]
    assert report["size"]["artifact_bytes"] == output.stat().st_size
    done = run("eval", str(output), "-r", str(trained / f"{method}.yaml"), "--allow-code", "--json", "-")
    assert done.code == 0, done.err
    found = json.loads(done.out)["metrics"][0]
    # The report rounds to six digits.
    assert found["value"] == pytest.approx(top1["artifact"], rel=1e-5)
    assert found["interval"] == pytest.approx(top1["artifact_interval"], rel=1e-5)
    assert run("verify", str(output)).code == 0


@pytest.mark.parametrize("method", ["dfq", "gptq"])
def test_an_artifact_loads_into_the_original_architecture(run: Run, trained: Path, tmp_path: Path, method: str) -> None:
    output, dense = tmp_path / "a.safetensors", tmp_path / "dense.safetensors"
    assert quantize(run, trained, method, output, "--set", "activations.bits=6").code == 0
    make = find_callable("net.py:net", trained, True, "test")
    plain, fake_quantized = make().eval(), make().eval()
    qcompress.load_into(plain, output)
    qcompress.load_into(fake_quantized, output, activations=True)
    assert not plain.conv2._forward_pre_hooks and fake_quantized.conv2._forward_pre_hooks
    assert run("export", str(output), "--to", "safetensors", "-o", str(dense)).code == 0
    state, original = load_file(dense), load_file(trained / "m.safetensors")
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in original.items()}
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in state.items())
    report = json.loads((tmp_path / "a.report.json").read_text())
    adjusted = [layer["name"] for layer in report["layers"] if layer["reason"].endswith("values adjusted")]
    assert bool(adjusted) == (method == "dfq")
    kept = [name for name, value in original.items() if value.ndim < 2 and torch.equal(value, state[name])]
    assert (len(kept) == len([1 for value in original.values() if value.ndim < 2])) == (method == "gptq")


def test_equal_runs_give_equal_bytes(run: Run, trained: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert quantize(run, trained, "pdquant", tmp_path / f"{name}.safetensors").code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_companions_and_data_free_quantizers(run: Run, trained: Path, tmp_path: Path) -> None:
    more = ["--set", "companions=[bias_correction, batch_norm]", "--set", "rules.0.rtn.bits=2", "--json", "-"]
    plain = json.loads(quantize(run, trained, "rtn", tmp_path / "a.safetensors", *more[2:]).out)
    better = json.loads(quantize(run, trained, "rtn", tmp_path / "b.safetensors", *more).out)
    assert better["accuracy"][0]["artifact"] >= plain["accuracy"][0]["artifact"]
    for kind in ("batch-norm", "noise", "minmax", "percentile"):
        done = quantize(run, trained, "squant", tmp_path / f"{kind}.safetensors", "--set", f"activations.range={kind}")
        assert done.code == 0, done.err


def test_gates_on_metrics(run: Run, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    assert quantize(run, trained, "gptq", output, "--max-drop", "top1=0.2", "--min-metric", "top1=0.7").code == 0
    done = quantize(run, trained, "gptq", output, "--force", "--min-metric", "top1=1.01")
    assert done.code == 4 and "min-metric top1" in done.err and output.exists()
    recipe = str(trained / "gptq.yaml")
    assert run("eval", str(output), "-r", recipe, "--allow-code", "--min-metric", "top1=1.01").code == 4
    done = quantize(run, trained, "gptq", output, "--force", "--min-metric", "bleu=1")
    assert done.code == 3 and "the task does not measure 'bleu'" in done.err


def test_errors_of_gptq_are_those_against_what_its_codes_stand_for(run: Run, trained: Path, tmp_path: Path) -> None:
    """At 8 bits codes are near: the target makes up for the layers before, and is far from the checkpoint's weight."""
    sqnrs = {}
    for aim in ("true", "false"):
        output = tmp_path / f"{aim}.safetensors"
        words = ["--set", "rules.0.gptq.bits=8", "--set", f"rules.0.gptq.asymmetric={aim}"]
        assert quantize(run, trained, "gptq", output, *words).code == 0
        layers = json.loads(output.with_suffix(".report.json").read_text())["layers"]
        found = next(layer for layer in layers if layer["name"] == "conv2.weight")
        assert ("its codes stand for" in found["reason"]) == (aim == "true")
        sqnrs[aim] = found["figures"]["sqnr_db"]
    assert sqnrs["true"] > 35 and sqnrs["false"] > 35


def test_gptq_stores_an_exponent_a_row_where_rows_lie_too_far_apart(run: Run, trained: Path, tmp_path: Path) -> None:
    """Also where its codes stand for other weights than the checkpoint's."""
    spread = load_file(trained / "m.safetensors")
    spread["conv2.weight"][1] *= 2.0**-40
    checkpoint, output = tmp_path / "spread.safetensors", tmp_path / "o.safetensors"
    save_file(spread, checkpoint)
    done = run("quantize", str(checkpoint), "-r", str(trained / "gptq.yaml"), "--allow-code", "-o", str(output))
    assert done.code == 0, done.err
    rows = qcompress.load_state_dict(output)["conv2.weight"].flatten(1).double()
    wanted = spread["conv2.weight"].flatten(1).double()
    assert 0 < float(rows[1].norm()) < 2 * float(wanted[1].norm())


def test_a_recipe_without_rules_measures_on_several_threads(run: Run, trained: Path, tmp_path: Path) -> None:
    text = (trained / "gptq.yaml").read_text()
    kept = [
        line for line in text.splitlines() if not line.startswith(("rules:", "  - {match", "finetune", "activations"))
    ]
    (trained / "measure.yaml").write_text("\n".join(kept))
    words = ["-r", str(trained / "measure.yaml"), "--allow-code"]
    done = run("eval", str(trained / "m.safetensors"), *words, "--threads", "2")
    assert done.code == 0, done.err
    # Of four classes the label is always among five.
    assert "top1" in done.out and "top5" not in done.out
    assert run("recipe", "check", *words[1:2], "--allow-code").code == 0
    done = run("quantize", str(trained / "m.safetensors"), *words)
    assert done.code == 3 and "has no rules" in done.err


def test_a_step_beside_calibration_data_is_refused_with_a_way_out(run: Run, trained: Path, tmp_path: Path) -> None:
    text = (trained / "gptq.yaml").read_text().replace("gptq: {bits: 4}", "rd: {step: 0.3}")
    (trained / "step.yaml").write_text(text)
    words = ["quantize", str(trained / "m.safetensors"), "-r", str(trained / "step.yaml"), "--allow-code"]
    done = run(*words, "-o", str(tmp_path / "o.safetensors"))
    assert done.code == 3 and "a budget decides all steps together" in done.err
    (trained / "step.yaml").write_text("\n".join(one for one in text.splitlines() if "calibration" not in one))
    done = run(*words, "--set", "activations.range=batch-norm", "-o", str(tmp_path / "o.safetensors"))
    assert done.code == 0, done.err


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_saved_statistics_serve_the_bare_checkpoint(run: Run, trained: Path, tmp_path: Path, method: str) -> None:
    statistics, model = tmp_path / "s.safetensors", str(trained / "m.safetensors")
    assert quantize(run, trained, "rtn", tmp_path / "a.safetensors", "--save-statistics", str(statistics)).code == 0
    bare = ["quantize", model, "--method", method, "--bits", "3"]
    done = run(*bare, "-o", str(tmp_path / "b.safetensors"), "--statistics", str(statistics))
    assert done.code == 0, done.err
    spread = load_file(model)
    spread["conv2.weight"][1] *= 2.0**-40
    save_file(spread, tmp_path / "spread.safetensors")
    words = ["quantize", str(tmp_path / "spread.safetensors"), *bare[2:], "--statistics", str(statistics)]
    done = run(*words, "-o", str(tmp_path / "d.safetensors"))
    assert done.code == 0, done.err
    row = qcompress.load_state_dict(tmp_path / "d.safetensors")["conv2.weight"][1].double()
    assert float((row - spread["conv2.weight"][1]).norm()) < 0.3 * float(spread["conv2.weight"][1].double().norm())
    recipe = str(trained / "rtn.yaml")
    done = run("eval", str(tmp_path / "b.safetensors"), "-r", recipe, "--allow-code", "--json", "-")
    assert json.loads(done.out)["metrics"][0]["value"] > 0.8
    done = run(*bare, "-o", str(tmp_path / "c.safetensors"))
    assert done.code == 3 and "needs a live model" in done.err and "--statistics FILE" in done.err
    done = run(*bare, "-o", str(tmp_path / "c.safetensors"), "--statistics", model)
    assert done.code == 3 and "have no float32 tensor" in done.err
    assert not (tmp_path / "c.safetensors").exists()


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no leave to run code": ([], 2, "--allow-code"),
    "no such factory": (["--allow-code", "--set", "model.factory=net.py:nett"], 3, "has no callable 'nett'"),
    "wrong arguments": (
        ["--allow-code", "--set", "model.args.width=9"],
        3,
        "first 'conv1.weight': have other shapes in the checkpoint than in Net",
    ),
    "no such data": (["--allow-code", "--set", "data.eval.npz=x.npz"], 3, "'x.npz' is not in"),
    "too few samples": (["--allow-code", "--set", "data.eval.samples=999"], 3, "999 samples are asked for"),
    "no such array": (["--allow-code", "--set", "data.eval.inputs=z"], 3, "has no array 'z'"),
    "labels out of range": (["--allow-code", "--set", "data.eval.labels=x"], 3, "labels of"),
    "images of another kind": (
        ["--allow-code", "--set", "data.normalize.mean=[1, 2]", "--set", "data.normalize.std=[1, 2]"],
        3,
        "names 2 channels",
    ),
    "inputs of the wrong shape": (["--allow-code", "--set", "data.calibration.inputs=y"], 3, "does not run on inputs"),
    "no such block": (["--allow-code", "--set", "model.blocks=layer*"], 3, "names no module"),
    "no calibration": (["--allow-code", "--set", "data={eval: {npz: data.npz}}"], 3, "needs calibration data"),
    "no model": (["--allow-code", "--set", "model.factory=3"], 3, "is not text"),
    "resuming nothing": (["--allow-code", "--skip-nonfinite"], 2, "names a live model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(run: Run, trained: Path, tmp_path: Path, case: str) -> None:
    words, code, error = WRONG[case]
    output = tmp_path / "a.safetensors"
    done = run("quantize", str(trained / "m.safetensors"), "-r", str(trained / "gptq.yaml"), "-o", str(output), *words)
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert (done.code, len(errors)) == (code, 1), done.err
    assert error in errors[0] and "Traceback" not in done.err
    assert not output.exists()


def test_nan_weights_and_dry_runs(run: Run, trained: Path, tmp_path: Path) -> None:
    state = load_file(trained / "m.safetensors")
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    words = ["-r", str(trained / "gptq.yaml"), "--allow-code"]
    done = run("quantize", str(tmp_path / "nan.safetensors"), *words)
    assert done.code == 3 and "1 of its 216 values are NaN" in done.err
    done = run("quantize", str(trained / "m.safetensors"), "-r", str(trained / "gptq.yaml"), "--dry-run")
    assert done.code == 0 and "gptq" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.safetensors"]


def test_caps_are_stored_applied_and_not_exported(run: Run, trained: Path, tmp_path: Path) -> None:
    """A network with ReLU6 in a chain, equalized with one grid a tensor."""
    capped = NET.replace("F.relu(self.bn1", "F.relu6(self.bn1").replace("x + self.bn2", "self.bn2")
    (tmp_path / "net.py").write_text(capped)
    for name in ("data.npz", "m.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "dfq.yaml").write_text(
        RECIPE.replace("METHOD: {bits: 4}", "dfq: {bits: 8, granularity: tensor, relu6: caps}")
    )
    output = tmp_path / "a.safetensors"
    done = quantize(run, tmp_path, "dfq", output, "--json", "-")
    assert done.code == 0, done.err
    top1 = json.loads(done.out)["accuracy"][0]
    assert abs(top1["drop"]) < 0.05
    module = find_callable("net.py:net", tmp_path, True, "test")()
    qcompress.load_into(module, output)
    assert module.bn1._forward_hooks
    done = run("export", str(output), "--to", "safetensors", "-o", str(tmp_path / "dense.safetensors"))
    assert done.code == 3 and "a dense checkpoint cannot hold" in done.err
    assert not (tmp_path / "dense.safetensors").exists()


LIBRARIES = {
    "mobilenet_v2": ("torchvision.models", "mobilenet_v2", "adaround"),
    "resnet18": ("torchvision.models", "resnet18", "squant"),
    "resnet50": ("torchvision.models", "resnet50", "squant"),
    "timm_mobilenet_v1": ("timm", "mobilenetv1_100", "adaround"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_ready_recipes_run_through_on_random_weights_and_images(run: Run, tmp_path: Path, name: str) -> None:
    from qcompress.data.user_code import import_package

    package, factory, method = LIBRARIES[name]
    side = 64
    library = import_package(package)
    torch.manual_seed(0)
    module = library.create_model(factory) if package == "timm" else getattr(library, factory)()
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, tmp_path / "m.safetensors")
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(2):
            folder = tmp_path / "imagenet" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = random.integers(256, size=(side + 8, side + 8, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{number}.png")
    words = [f"data.{part}.{key}" for part in ("calibration", "eval") for key in ("resize", "crop")]
    sizes = [f"--set={word}={side if 'crop' in word else side + 4}" for word in words]
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / "recipes" / "imagenet" / f"{name}.yaml").read_text(encoding="utf-8")
    # What the larger networks add is their graph, not the solver's time on wide layers.
    recipe.write_text(text.replace("adaround:", f"{method}:"))
    old = os.environ.get("QCOMPRESS_DATA")
    os.environ["QCOMPRESS_DATA"] = str(tmp_path)
    try:
        quick = ["--set", "rules.0.adaround.range=mse", *QUICK["adaround"]] if method == "adaround" else []
        done = run(
            *("quantize", str(tmp_path / "m.safetensors"), "-r", str(recipe), "-o", str(tmp_path / "a.safetensors")),
            *("--json", "-", "--set", "data.calibration.samples=4", *quick, *sizes),
        )
    finally:
        os.environ.pop("QCOMPRESS_DATA")
        if old is not None:
            os.environ["QCOMPRESS_DATA"] = old
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["accuracy"][0]["samples"] == 4
    assert all(layer["bits"] == 4 for layer in report["layers"] if len(layer["shape"]) >= 2)


TRANSFORMERS = {
    "BertForSequenceClassification": (
        {"num_attention_heads": 2, "max_position_embeddings": 40, "num_labels": 3},
        ("bert.encoder.layer.*", "sequence-classification", {"input_ids": "ids", "attention_mask": "mask"}),
    ),
    "LlamaForCausalLM": (
        {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        ("model.layers.*", "causal-lm", {"input_ids": "ids"}),
    ),
}


ADAROUND, PDQUANT = "adaround: {bits: 4, iterations: 20, range: mse}", "pdquant: {bits: 4, iterations: 3}"


@pytest.mark.parametrize(
    ("factory", "method"),
    [
        ("BertForSequenceClassification", "gptq: {bits: 4}"),
        ("LlamaForCausalLM", ADAROUND),
        ("LlamaForCausalLM", PDQUANT),
        pytest.param("LlamaForCausalLM", "gptq: {bits: 4}", marks=pytest.mark.slow),
        pytest.param("BertForSequenceClassification", ADAROUND, marks=pytest.mark.slow),
        pytest.param("BertForSequenceClassification", PDQUANT, marks=pytest.mark.slow),
    ],
)
def test_transformers_run_block_by_block(run: Run, tmp_path: Path, factory: str, method: str) -> None:
    from qcompress.data.user_code import import_package

    pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
    extra, (blocks, task, inputs) = TRANSFORMERS[factory]
    args = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 50, **extra}
    network = getattr(import_package("transformers"), factory)
    torch.manual_seed(0)
    module = network(network.config_class(**args))
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, tmp_path / "m.safetensors")
    random = np.random.default_rng(0)
    ids = random.integers(0, 50, (40, 20))
    np.savez(tmp_path / "d.npz", ids=ids, mask=np.ones_like(ids), y=random.integers(0, 3, 40))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""\
version: 1
model: {{factory: "transformers:{factory}", args: {json.dumps(args)}, blocks: "{blocks}"}}
data:
  calibration: {{npz: d.npz, inputs: {json.dumps(inputs)}, samples: 24, batch_size: 8}}
  eval: {{npz: d.npz, inputs: {json.dumps(inputs)}}}
task: {task}
activations: {{bits: 8}}
rules:
  - {{match: "*embed*", mse: {{bits: 8}}}}
  - {{match: "*.weight", {method}}}
"""
    )
    done = run("quantize", str(tmp_path / "m.safetensors"), "-r", str(recipe), "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    metric = report["accuracy"][0]
    # Random weights tell classes apart by chance, and words no better than that.
    assert abs(metric["drop"]) < (0.3 if metric["metric"] == "accuracy" else 1.0)
    quality = [layer["figures"]["sqnr_db"] for layer in report["layers"] if layer["bits"]]
    assert len(quality) > 10 and min(quality) > 10
