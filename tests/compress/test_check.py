"""What a run would stumble over is found before its work, all of it at once, and nothing runs without consent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Ran, Run, process_environment, write_checkpoint

from qcompress.errors import UsageError

NET = """
from pathlib import Path

import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        assert torch.empty(0).device.type == "meta" or Path(__file__).with_name("weights").exists()
        Path(__file__).with_name("MARK").touch()
        self.embed = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.up = nn.ConvTranspose1d(4, width, 3)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.embed(x)
        x = self.attention(x, x, x)[0]
        return self.head(self.up(x.transpose(1, 2)).mean(2))

def data():
    return torch.utils.data.TensorDataset(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))

def score(outputs, batch):
    return outputs[:, 0]
"""
RECIPE = """\
version: 1
model: {factory: net.py:Net}
data:
  calibration: {npz: data.npz}
  eval: {npz: data.npz}
task: classification
rules:
  - {match: "*", gptq: {bits: 4}}
"""
SHAPES = {
    "embed.weight": (6, 4),
    "attention.in_proj_weight": (12, 4),
    "attention.in_proj_bias": (12,),
    "attention.out_proj.weight": (4, 4),
    "attention.out_proj.bias": (4,),
    "up.weight": (4, 4, 3),
    "up.bias": (4,),
    "head.weight": (2, 4),
    "head.bias": (2,),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    write_checkpoint(tmp_path / "m.safetensors", tensors)
    np.savez(tmp_path / "data.npz", x=random.integers(0, 6, (8, 3)), y=np.arange(8) % 2)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QCOMPRESS_DATA", raising=False)
    return tmp_path


def check(run: Run, *words: str, changes: tuple[str, ...] = ()) -> Ran:
    return run("recipe", "check", "r.yaml", *words, *(word for change in changes for word in ("--set", change)))


def test_the_network_is_built_without_weights_and_planned_by(run: Run, folder: Path) -> None:
    ran = check(run, "m.safetensors", "--allow-code")
    assert (ran.code, ran.err, ran.out) == (0, "", "r.yaml: sound, 1 rule, 5 of 9 tensors compressed\n")
    assert (folder / "MARK").exists()


def test_a_dry_run_is_what_the_run_will_do(run: Run, folder: Path) -> None:
    """Axes, and what another method must take, are those of the network; the run agrees with its dry run."""
    coded = ("--coding", "packed", "--json", "-")
    plan = run("quantize", "m.safetensors", "-r", "r.yaml", "--allow-code", "-n", *coded)
    assert (plan.code, plan.err) == (0, "")
    planned = json.loads(plan.out)
    rows = {row["name"]: row for row in planned["tensors"]}
    assert {name: row["method"] for name, row in rows.items()} == {
        **{name: "kept" for name in SHAPES if name.endswith("bias")},
        **dict.fromkeys(("up.weight", "head.weight"), "gptq"),
        **dict.fromkeys(("attention.in_proj_weight", "attention.out_proj.weight"), "gptq"),
        "embed.weight": "mse",
    }
    assert "ConvTranspose1d stores its outputs second" in rows["up.weight"]["reason"]
    assert "gptq cannot take it: its module, Embedding" in rows["embed.weight"]["reason"]
    (folder / "weights").touch()
    ran = run("quantize", "m.safetensors", "-r", "r.yaml", "--allow-code", *coded)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert planned["artifact_bytes"] == report["size"]["artifact_bytes"]
    assert {name: row["method"] for name, row in rows.items()} == {
        layer["name"]: layer["method"] or "kept" for layer in report["layers"]
    }


def test_without_consent_it_says_what_it_could_not_check(run: Run, folder: Path) -> None:
    changes = ("data.eval={factory: net.py:data}", "task={factory: {factory: net.py:score, metric: m}}")
    for words in ((), ("m.safetensors",)):
        ran = check(run, *words, changes=changes)
        assert ran.code == 0
        assert ran.err.splitlines() == [
            "not checked: r.yaml:2: model.factory: 'net.py:Net' is code, which runs only with --allow-code",
            "not checked: --set data.eval={factory: net.py:data}: data.eval.factory: 'net.py:data' is code, which runs "
            "only with --allow-code",
            "not checked: --set task={factory: {factory: net.py:score, metric: m}}: task.factory: 'net.py:score' is "
            "code, which runs only with --allow-code",
        ]
        assert ran.out.startswith("r.yaml: sound as far as it was checked, 1 rule")
        assert not (folder / "MARK").exists()
    dry = run("quantize", "m.safetensors", "-r", "r.yaml", "--dry-run")
    assert dry.code == 0
    assert dry.err.startswith("not checked: r.yaml:2: model.factory: 'net.py:Net' is code")
    assert not (folder / "MARK").exists()
    assert check(run, "m.safetensors", "--allow-code", changes=changes).code == 0


PROBLEMS: dict[str, tuple[tuple[str, ...], str]] = {
    "a missing file": (("data.eval.npz=none.npz",), "data.eval: 'none.npz' is not in the recipe's folder"),
    "a missing array": (("data.eval.inputs=z",), "data.npz: has no array 'z'"),
    "arrays that differ": (("data.eval.npz=odd.npz",), "odd.npz: array 'y' has the shape [3], and 'x' has 4 samples"),
    "too few samples": (("data.calibration.samples=9",), "9 samples are asked for and there are 8"),
    "a missing factory file": (("model.factory=gone.py:Net",), "model.factory: no file"),
    "no such callable": (("model.factory=net.py:Nett",), "has no callable 'Nett'"),
    "no such module": (("model.factory=no.such.module:Net",), "'no.such.module' does not import"),
    "a network that fails": (("model.args.depth=3",), "net.py:Net fails: TypeError"),
    "another network": (("model.args.width=5",), "3 tensors, first 'up.weight': have other shapes in the checkpoint"),
    "no such loss": (
        ("finetune={optimizer: {sgd: {lr: 0.1}}, loss: net.py:loss}", "data.train={npz: data.npz}"),
        "finetune.loss: 'net.py' has no callable 'loss'",
    ),
    "no such data factory": (("data.eval={factory: net.py:dataa}",), "data.eval: 'net.py' has no callable 'dataa'"),
    "a data factory that fails": (("data.eval={factory: net.py:data, args: {n: 1}}",), "net.py:data fails: TypeError"),
    "no calibration data": (("data={eval: {npz: data.npz}}",), "gptq needs calibration data"),
    "no data to measure": (("data={calibration: {npz: data.npz}}",), "there is nothing to measure on"),
    "a rule that fits nothing": (("rules.0.match=conv*",), "match 'conv*' fits no tensor"),
    "a tensor that the method cannot take": (
        ("rules.0.match=embed.weight",),
        "gptq cannot take it: its module, Embedding, is not a matrix product",
    ),
    "a missing file of sensitivities": (
        ("budget={bpw: 3, sensitivity: none.json}", 'rules.0={match: "*", gptq: {}}'),
        "'none.json' is not there",
    ),
    "a regularizer that fits nothing": (
        (
            "finetune={optimizer: {sgd: {lr: 0.1}}, regularize: [{match: conv*, l2: {strength: 1}}]}",
            "data.train={npz: data.npz}",
            'rules.0={match: "*.weight", rtn: {bits: 4}}',
        ),
        "match 'conv*' decides nothing",
    ),
    "training without data": (("finetune={optimizer: {sgd: {lr: 0.1}}}",), "names no data.train"),
}


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize("command", ["check", "dry run"])
def test_a_problem_is_found_before_the_work(run: Run, folder: Path, case: str, command: str) -> None:
    np.savez(folder / "odd.npz", x=np.zeros((4, 3), np.int64), y=np.zeros(3))
    changes, words = PROBLEMS[case]
    if command == "check":
        ran = check(run, "m.safetensors", "--allow-code", changes=changes)
    else:
        flags = [word for change in changes for word in ("--set", change)]
        ran = run("quantize", "m.safetensors", "-r", "r.yaml", "--allow-code", "--dry-run", *flags)
    assert (ran.code, ran.out) == (3, ""), ran.err
    assert [line for line in ran.error_lines if words in line], ran.err
    assert len(ran.error_lines) == ran.err.count("\n")


def test_all_problems_are_told_at_once(run: Run, folder: Path) -> None:
    cases = ("a missing file", "too few samples", "no such callable", "a rule that fits nothing")
    ran = check(run, "m.safetensors", "--allow-code", changes=tuple(PROBLEMS[case][0][0] for case in cases))
    assert ran.code == 3
    assert len(ran.error_lines) == len(cases)
    for case in cases:
        assert PROBLEMS[case][1] in ran.err


def test_what_lacks_a_model_is_found_without_torch(run: Run, folder: Path) -> None:
    text = RECIPE.replace("model: {factory: net.py:Net}\n", "").replace("npz: data.npz", "npz: gone.npz")
    (folder / "r.yaml").write_text(text + "activations: {}\ngates: {max_drop: {top1: 0.1}}\n")
    program = (
        "import sys\nfrom qcompress.cli.app import run\n"
        "code = run(['recipe', 'check', 'r.yaml', 'm.safetensors'])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=process_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    for words in (
        "there is no model to measure",
        "gptq needs a live model; add `model` and `data.calibration`; or run with --statistics FILE",
        "they need a live model",
        "r.yaml:3: data.calibration (also r.yaml:4: data.eval): 'gone.npz' is not in",
        "this run measures no metric",
    ):
        assert words in done.stderr
    (folder / "r.yaml").write_text('version: 1\nrules: [{match: "*", gptq: {bits: 4}}]\n')
    assert check(run, "m.safetensors").code == 3
    assert check(run, "m.safetensors", "--statistics", "s.safetensors").code == 0


def test_missing_packages_are_told_with_their_extras(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> UsageError:
        return UsageError(name, f"the package {name} is not installed", "pip install")

    monkeypatch.setattr("qcompress.compress.check.missing_package", missing)
    (folder / "tokenizer.json").write_text("{}")
    changes = (
        "data.eval={images: images}",
        "data.train={npz: data.npz, augment: [rand_augment]}",
        "data.calibration={text: r.yaml, tokenizer: tokenizer.json}",
        "task=translation",
    )
    ran = check(run, changes=changes)
    assert ran.code == 3
    told = {line.split()[1].rstrip(":") for line in ran.error_lines if "is not installed" in line}
    assert told == {"PIL", "torchvision", "tokenizers", "sacrebleu"}


def test_ready_recipes_of_listed_networks_need_no_consent(run: Run, folder: Path) -> None:
    """Without ImageNet their data are missing, and nothing else."""
    ran = run("recipe", "check", ROOT / "recipes" / "imagenet" / "resnet18.yaml")
    assert ran.code == 3
    assert all("imagenet/" in line and "is not in the recipe's folder" in line for line in ran.error_lines)
    assert "not checked" not in ran.err
