"""Rate-distortion from the command line: with data and without, its budgets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import write_colours, write_learned
from conftest import Run, files_under, refused, small_tensors, write_checkpoint
from safetensors.torch import load_file

import qcompress
from qcompress.data.user_code import find_callable
from qcompress.report.document_json import read_report, report_path

NET = """
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))
"""

RECIPE = """
version: 1
model: {factory: net.py:Net}
data:
  calibration: {npz: data.npz, samples: 64, batch_size: 32}
  eval: {npz: data.npz}
  normalize: {mean: [0.5], std: [0.25]}
task: {classification: {metric: top1}}
rules:
  - {match: "*.weight", rd: {}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that tells four colours apart, its weights, its data and a recipe."""
    folder = tmp_path_factory.mktemp("rd")
    (folder / "net.py").write_text(NET)
    (folder / "rd.yaml").write_text(RECIPE)
    write_learned(folder, write_colours(folder, 200), 40, "net.py:Net")
    return folder


@pytest.mark.parametrize("effort", ["normal", pytest.param("high", marks=pytest.mark.slow)])
def test_with_data_from_budget_to_network(run: Run, trained: Path, tmp_path: Path, effort: str) -> None:
    source, recipe = trained / "m.safetensors", trained / "rd.yaml"
    output, dense = tmp_path / "a.safetensors", tmp_path / "dense.safetensors"
    flags = ["-r", recipe, "--allow-code", "--effort", effort, "--json", "-"]
    done = run("quantize", source, *flags, "--bpw", 2, "-o", output)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert 1.96 <= report["size"]["bits_per_weight"] <= 2
    top1 = report["accuracy"][0]
    assert top1["baseline"] > 0.95 and top1["artifact"] > top1["baseline"] - 0.05
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["conv2.weight"]["method"] == "rd"
    assert layers["bn1.running_mean"]["reason"].endswith("values adjusted")

    assert run("verify", output).code == 0
    ran = run("eval", output, "-r", recipe, "--allow-code", "--json", "-")
    assert json.loads(ran.out)["metrics"][0]["value"] == pytest.approx(top1["artifact"], rel=1e-5)
    assert run("export", output, "--to", "safetensors", "-o", dense).code == 0
    module = find_callable("net.py:Net", trained, True, "test")().eval()
    qcompress.load_into(module, output)
    state, original = load_file(dense), load_file(source)
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in original.items()}
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())

    again = tmp_path / "b.safetensors"
    assert run("quantize", source, *flags, "--bpw", 2, "-o", again).code == 0
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("gate", [("--max-drop", "top1=0.02"), ("--min-sqnr", 12)])
def test_the_smallest_file_that_holds_a_gate_with_data(
    run: Run, trained: Path, tmp_path: Path, gate: tuple[str, object]
) -> None:
    """It holds, and one that is but a little smaller breaks the gate: as little as tables allow in some 1,000 bytes."""
    output = tmp_path / "a.safetensors"
    flags = ["-r", trained / "rd.yaml", "--allow-code", "--effort", "fast", *gate, "--minimize", "size"]
    done = run("quantize", trained / "m.safetensors", *flags, "-o", output, "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert [one["passed"] for one in report["gates"]] == [True]
    held, broken = held_and_broken(done.err)
    assert report["size"]["bits_per_weight"] == pytest.approx(min(held), abs=1e-4)
    assert any(min(held) / 1.08 <= one <= min(held) for one in broken)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.report.json"}


@pytest.mark.slow
def test_a_gate_that_everything_holds_leaves_nothing_but_zeros(run: Run, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    flags = ["-r", trained / "rd.yaml", "--allow-code", "--effort", "fast", "--max-drop", "top1=1"]
    done = run("quantize", trained / "m.safetensors", *flags, "--minimize", "size", "-o", output, "--json", "-")
    assert done.code == 0, done.err
    held, broken = held_and_broken(done.err)
    report = json.loads(done.out)
    assert not broken and report["size"]["bits_per_weight"] == pytest.approx(min(held), abs=1e-4)
    assert {layer["figures"]["entropy"] for layer in report["layers"] if layer["method"] == "rd"} == {0.0}


def held_and_broken(progress: str) -> tuple[list[float], list[float]]:
    """Bits a weight of the attempts at the smallest file, which held all gates and which broke one."""
    lines = progress.splitlines()
    held = [float(line.split()[0]) for line in lines if line.endswith("per weight: holds")]
    return held, [float(line.split()[0]) for line in lines if line.endswith("breaks a gate")]


def test_the_smallest_file_of_weights_alone(run: Run, checkpoint: Path) -> None:
    ran = run("quantize", checkpoint, "--minimize", "size", "--min-sqnr", 15, "--effort", "fast", "-q")
    assert ran.code == 0, ran.err
    report = read_report(report_path(checkpoint.with_name("model-smallest.safetensors")))
    assert 15 <= min(layer.figures.sqnr_db or 0 for layer in report.compressed if layer.figures) < 16


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [("--bpw", "2", "model-2.0bpw"), ("--target-size", "9KB", "model-9KB"), ("--target-size", "8000", "model-8000B")],
)
def test_a_budget_alone_means_rd(run: Run, checkpoint: Path, flag: str, value: str, name: str) -> None:
    ran = run("quantize", checkpoint, flag, value, "-q")
    output = checkpoint.with_name(f"{name}.safetensors")
    assert (ran.code, ran.out) == (0, f"{output}\n"), ran.err
    report = read_report(report_path(output))
    assert {layer.method for layer in report.compressed} == {"rd"}
    if flag == "--bpw":
        assert 1.96 <= (report.size.bits_per_weight or 0) <= 2
    else:
        limit = 9000 if value == "9KB" else 8000
        assert 0.98 * limit <= output.stat().st_size <= limit
    assert run("verify", output).code == 0


@pytest.mark.parametrize("coding", ["auto", "ans", "zstd"])
def test_codings_keep_the_budget(run: Run, checkpoint: Path, coding: str) -> None:
    output = checkpoint.with_name("a.safetensors")
    ran = run("quantize", checkpoint, "--bpw", 3, "--coding", coding, "--effort", "fast", "-q", "-o", output)
    assert ran.code == 0, ran.err
    assert 2.94 <= (read_report(report_path(output)).size.bits_per_weight or 0) <= 3
    assert run("verify", output).code == 0


def test_a_folder_streams_to_a_folder(run: Run, sharded: Path) -> None:
    ran = run("quantize", sharded, "--bpw", 2, "-q")
    assert ran.code == 0, ran.err
    output = sharded.with_name("network-2.0bpw")
    assert run("verify", output).code == 0
    dense = sharded.with_name("dense")
    assert run("export", output, "--to", "safetensors", "-o", dense, "-q").code == 0
    state = qcompress.load_state_dict(output)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: value.shape for name, value in small_tensors().items()
    }
    assert sorted(path.name for path in dense.iterdir()) == sorted(path.name for path in sharded.iterdir())


def test_a_step_in_the_recipe_needs_no_budget(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe, sizes = tmp_path / "r.yaml", []
    for step in (0.05, 0.2):
        recipe.write_text(f'{{version: 1, rules: [{{match: "*", rd: {{step: {step}, effort: fast, prior: none}}}}]}}')
        output = tmp_path / f"{step}.safetensors"
        assert run("quantize", checkpoint, "-r", recipe, "-q", "-o", output).code == 0
        sizes.append(output.stat().st_size)
        weight = small_tensors()["layer.weight"]
        held = step * np.sqrt(np.sqrt(np.mean(np.square(weight))))
        error = qcompress.load_state_dict(output)["layer.weight"].numpy() - weight
        # Half a step, which is stored to eleven bits.
        assert np.abs(error).max() <= 0.501 * held
    assert sizes[1] < sizes[0]


def test_a_dry_run_tells_the_budget_and_writes_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    before = files_under(tmp_path)
    ran = run("quantize", checkpoint, "--bpw", 2, "-n", "--json", "-")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["budget"] == {"bpw": 2.0} and not document["exact"]
    assert files_under(tmp_path) == before
    made = run("quantize", checkpoint, "--bpw", 2, "--json", "-")
    size = json.loads(made.out)["size"]["artifact_bytes"]
    assert size <= document["artifact_bytes"] < 1.1 * size


def test_a_dry_run_bounds_what_calibration_adjusts_too(run: Run, trained: Path, tmp_path: Path) -> None:
    words = ["quantize", trained / "m.safetensors", "-r", trained / "rd.yaml", "--allow-code", "--bpw", 2]
    bound = json.loads(run(*words, "-n", "--json", "-").out)["artifact_bytes"]
    made = json.loads(run(*words, "-o", tmp_path / "a.safetensors", "--json", "-").out)
    assert any(layer["reason"].endswith("values adjusted") for layer in made["layers"])
    assert made["size"]["artifact_bytes"] <= bound


@pytest.mark.parametrize("flag", [("--bpw", "0.05"), ("--target-size", "1KB")])
def test_a_dry_run_refuses_what_the_run_would(run: Run, checkpoint: Path, flag: tuple[str, str]) -> None:
    planned, ran = (run("quantize", checkpoint, *flag, *more) for more in (["-n"], []))
    assert planned.code == ran.code == 3
    assert planned.err == ran.err


def test_the_least_size_that_is_named_can_be_had(run: Run, checkpoint: Path) -> None:
    ran = run("quantize", checkpoint, "--target-size", 999, "--effort", "fast", "-q")
    assert ran.code == 3
    least = int(ran.error_lines[0].partition("ask for at least ")[2].partition(",")[0])
    ran = run("quantize", checkpoint, "--target-size", least, "--effort", "fast", "-q")
    assert ran.code == 0, ran.err
    assert checkpoint.with_name(f"model-{least}B.safetensors").stat().st_size <= least


REFUSED = {
    "no budget": (
        ["--method", "rd"],
        3,
        "command line: rd has no widths, and neither a budget nor a step says how fine its grids are; add",
    ),
    "bits": (["--method", "rd", "--bits", 2], 2, "--bits 2: not an option of `rd`; leave it out, and add --bpw 2.0"),
    "bits and a budget": (["--bpw", 2, "--bits", 3], 2, "--bits 3 --bpw 2.0: the budget decides the bits; leave one"),
    "too many bits": (["--bpw", 40], 3, "--bpw 40.0: 40 bits per weight are too many: the weights have 32 as they are"),
    "too few bits": (["--bpw", 0.05], 3, "--bpw 0.05: 0.05 bits per weight are too few; ask for at least 0.1"),
    "too few bytes": (
        ["--target-size", "1KB"],
        3,
        "--target-size 1KB: 1,000 bytes are too few: what is kept, names and",
    ),
    "no gate": (["--minimize", "size"], 3, "--minimize size: there is no gate for the smallest artifact to hold; add"),
    "no such effort": (["--bpw", 2, "--effort", "huge"], 2, "'--effort'"),
    "clusters": (["--bpw", 2, "--method", "kmeans"], 2, "--method kmeans: `kmeans` is a cluster method; use"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(run: Run, checkpoint: Path, tmp_path: Path, case: str) -> None:
    arguments, code, message = REFUSED[case]
    assert message in refused(run, tmp_path, "quantize", checkpoint, *arguments, code=code)


def test_tensors_too_small_for_the_budget_are_refused_with_what_was_reached(run: Run, tmp_path: Path) -> None:
    tensors = {f"layer{index}.weight": small_tensors()["fc.weight"][:4, :5].copy() for index in range(4)}
    path = write_checkpoint(tmp_path / "model.safetensors", tensors)
    ran = run("quantize", path, "--bpw", 0.2)
    assert ran.code == 3
    assert "--bpw 0.2: 0.2 bits per weight are too few: the smallest attempt took" in ran.error_lines[0]
    assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("skip", [False, True])
def test_weights_that_are_not_finite_are_refused_or_kept(run: Run, tmp_path: Path, skip: bool) -> None:
    tensors = small_tensors()
    tensors["fc.weight"][0, 0] = np.inf
    path = write_checkpoint(tmp_path / "model.safetensors", tensors)
    ran = run("quantize", path, "--bpw", 3, "--json", "-", *(["--skip-nonfinite"] if skip else []))
    if skip:
        report = json.loads(ran.out)
        assert {layer["name"]: layer["method"] for layer in report["layers"]}["fc.weight"] == "kept"
        assert 2.94 <= report["size"]["bits_per_weight"] <= 3
    else:
        assert ran.code == 3
        assert "tensor 'fc.weight': 1 of its 640 values are NaN" in ran.error_lines[0]
        assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]


def test_methods_with_widths_and_without_share_no_budget(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('{version: 1, budget: {bpw: 2}, rules: [{match: "fc.*", rtn: {}}, {match: "*", rd: {}}]}')
    ran = run("quantize", checkpoint, "-r", recipe)
    assert ran.code == 3
    assert "`rtn` has widths and `rd` has none, and one budget is to decide both" in ran.error_lines[0]
