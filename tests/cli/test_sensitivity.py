"""report --sensitivity and budgets on a live model: what is measured, kept, drawn, spent and refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from colours import write_learned
from conftest import Run
from safetensors.torch import load_file
from torch import nn

from qcompress.data.user_code import find_callable
from qcompress.plan.sensitivity import SENSITIVITY, Sensitivity, read_sensitivity
from qcompress.report.document_json import read_report, report_path

NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
"""

RECIPE = """
version: 1
model: {factory: net.py:net}
data:
  calibration: {npz: data.npz, samples: 48, batch_size: 20}
  eval: {npz: data.npz, batch_size: 50}
task: {classification: {metric: top1}}
rules:
  - {match: "*.weight", squant: {bits: 4}}
"""

OPEN = RECIPE.replace("{bits: 4}", "{}") + "budget: {bpw: 3.5}\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small network, trained, its data and its recipes."""
    folder = tmp_path_factory.mktemp("sensitive")
    (folder / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    x = random.standard_normal((120, 12)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64) + 2 * (x[:, 1] * x[:, 2] > 0)
    np.savez(folder / "data.npz", x=x, y=y)
    write_learned(folder, (torch.from_numpy(x), torch.from_numpy(y)), 150)
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "open.yaml").write_text(OPEN)
    return folder


@pytest.fixture
def measured(run: Run, trained: Path, tmp_path: Path) -> Path:
    """The cache of one measurement."""
    cache = tmp_path / "s.json"
    if not (trained / "s.json").exists():
        ran = measure(run, trained, trained / "s.json", "-q")
        assert ran.code == 0, ran.err
    cache.write_bytes((trained / "s.json").read_bytes())
    return cache


def measure(run: Run, folder: Path, cache: Path, *more: object, recipe: str = "r.yaml") -> Any:
    flags = ("-r", folder / recipe, "--allow-code", "--cache", cache, "--samples", 60)
    return run("report", folder / "m.safetensors", "--sensitivity", *flags, *more)


def outputs(folder: Path, change: dict[str, torch.Tensor]) -> torch.Tensor:
    module: nn.Module = find_callable("net.py:net", folder, True, "test")()
    module.load_state_dict(load_file(folder / "m.safetensors") | change)
    with torch.no_grad():
        found: torch.Tensor = module(torch.from_numpy(np.load(folder / "data.npz")["x"]))
    return found


def test_divergences_and_metrics_are_those_of_one_layer_alone(run: Run, trained: Path, measured: Path) -> None:
    """Against an artifact in which a recipe compresses this layer only, and the definition of the divergence."""
    found = read_sensitivity(measured)
    assert (found.divergence_data, found.divergence_samples, found.metric_samples) == ("calibration", 48, 60)
    assert [layer.name for layer in found.layers] == ["0.weight", "2.weight", "4.weight"]
    whole = outputs(trained, {}).log_softmax(1)
    labels = torch.from_numpy(np.load(trained / "data.npz")["y"])
    assert found.baseline["top1"] == pytest.approx(float((whole[:60].argmax(1) == labels[:60]).double().mean()))
    for layer in found.layers:
        assert [cost.bits for cost in layer.widths] == list(range(1, 9))
        for bits in (1, 2, 5):
            plain = measured.with_name("one.safetensors")
            (measured.with_name("one.yaml")).write_text(
                f'version: 1\nrules: [{{match: "{layer.name}", squant: {{bits: {bits}}}}}]\n'
            )
            ran = run("quantize", trained / "m.safetensors", "-r", plain.with_suffix(".yaml"), "-o", plain, "-f", "-q")
            assert ran.code == 0, ran.err
            decoded = run("export", plain, "--to", "safetensors", "-o", plain.with_name("dense.safetensors"), "-f")
            assert decoded.code == 0, decoded.err
            weight = load_file(plain.with_name("dense.safetensors"))[layer.name]
            other = outputs(trained, {layer.name: weight}).log_softmax(1)
            divergence = (whole.exp() * (whole - other)).sum(1)[:48].double().mean()
            cost = layer.by_width[bits]
            assert cost.divergence == pytest.approx(float(divergence), rel=1e-4, abs=1e-7)
            hits = float((other[:60].argmax(1) == labels[:60]).double().mean())
            assert cost.metrics["top1"] == pytest.approx(hits)
            assert found.drop(cost) == pytest.approx(found.baseline["top1"] - hits)
            stored = next(one for one in read_report(report_path(plain)).layers if one.name == layer.name)
            assert cost.relative_error == pytest.approx(
                stored.figures.relative_error if stored.figures else 0, rel=1e-5
            )


def test_the_cache_is_read_again_and_refused_where_it_is_of_something_else(
    run: Run, trained: Path, measured: Path
) -> None:
    before = measured.read_bytes()
    again = measure(run, trained, measured, "--json", "-")
    assert (again.code, again.out.encode()) == (0, before)
    assert f"read from {measured}" in again.err
    hint = "measure anew with --force, or keep both with --cache FILE"
    other = measure(run, trained, measured, "--widths", "2,3")
    what = "was measured with another recipe, other samples or other widths"
    assert (other.code, other.error_lines) == (3, [f"error: {measured}: {what}; {hint}"])
    document = json.loads(before)
    measured.write_text(json.dumps(document | {"input_sha256": "f" * 64}))
    foreign = measure(run, trained, measured)
    assert (foreign.code, foreign.error_lines) == (
        3,
        [f"error: {measured}: was measured on another checkpoint; {hint}"],
    )
    assert measure(run, trained, measured, "--widths", "2,3", "--force", "-q").code == 0
    assert read_sensitivity(measured).bits == (2, 3)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"schema": "qcompress.sensitivity/2"}, "schema qcompress.sensitivity/2, this version reads"),
        ({"schema": "qcompress.report/1"}, "not a file of sensitivities of qcompress"),
        ({"layers": "none"}, "damaged file of sensitivities: layers"),
        ({"divergence_kind": "other"}, "damaged file of sensitivities: divergence_kind"),
        ({"baseline": {}}, "damaged file of sensitivities: document: a metric is there by half"),
    ],
)
def test_damaged_and_newer_files_are_refused_with_a_hint(
    run: Run, trained: Path, measured: Path, change: dict[str, Any], what: str
) -> None:
    measured.write_text(json.dumps(json.loads(measured.read_text()) | change))
    ran = run(
        *("quantize", trained / "m.safetensors", "--bpw", 3.5, "--method", "squant"),
        *("--sensitivity", measured, "-o", measured.with_name("out.safetensors")),
    )
    assert ran.code == 3
    (line,) = ran.error_lines
    assert line.startswith(f"error: {measured}: {what}")
    assert line.endswith("measure it with `qcompress report CHECKPOINT --sensitivity -r RECIPE`")
    assert not measured.with_name("out.safetensors").exists()


def test_nonsense_costs_are_refused(run: Run, trained: Path, measured: Path) -> None:
    document = json.loads(measured.read_text())
    document["layers"][1]["widths"][0]["divergence"] = -1.0
    measured.write_text(json.dumps(document))
    ran = measure(run, trained, measured)
    assert (ran.code, "layers.1.widths.0.divergence: Input should be greater" in ran.err) == (3, True)
    measured.write_text("{")
    assert measure(run, trained, measured).error_lines[0].startswith(f"error: {measured}: not a JSON document")


def test_as_many_samples_are_looked_at_as_were_asked_for(run: Run, trained: Path, tmp_path: Path) -> None:
    """Batches hold 20: the second is cut. More than there are, and all are looked at."""
    for asked, seen in ((30, (30, 30)), (500, (48, 120))):
        cache = tmp_path / f"{asked}.json"
        ran = measure(run, trained, cache, "--widths", "2", "-q", "--samples", asked)
        assert ran.code == 0, ran.err
        found = read_sensitivity(cache)
        assert (found.divergence_samples, found.metric_samples) == seen


def test_the_file_follows_its_schema(measured: Path) -> None:
    jsonschema.validate(json.loads(measured.read_text()), SENSITIVITY.json_schema())


def test_tables_and_csv_say_what_was_measured(run: Run, trained: Path, measured: Path) -> None:
    found: Sensitivity = read_sensitivity(measured)
    table = measure(run, trained, measured, "--no-color").out
    order = [line.split()[0] for line in table.splitlines() if ".weight" in line]
    assert order == [layer.name for layer in sorted(found.layers, key=lambda layer: -layer.widths[0].divergence)]
    assert "Kullback-Leibler divergence" in table
    assert "48 samples of data.calibration" in table
    rows = list(csv.DictReader(io.StringIO(measure(run, trained, measured, "--format", "csv").out)))
    assert len(rows) == 3 * 8
    for row in rows:
        layer = next(one for one in found.layers if one.name == row["name"])
        assert float(row["divergence"]) == pytest.approx(layer.by_width[int(row["bits"])].divergence, rel=1e-4)
        assert float(row["top1"]) == pytest.approx(layer.by_width[int(row["bits"])].metrics["top1"], rel=1e-4)
    markdown = measure(run, trained, measured, "--format", "markdown").out
    assert markdown.count("| 0.weight |") == 1


def test_a_budget_is_spent_by_what_was_measured(run: Run, trained: Path, measured: Path, tmp_path: Path) -> None:
    """A layer whose divergences are made to be enormous gets the most bits, and the report names what it cost."""
    document = json.loads(measured.read_text())
    for layer in document["layers"]:
        for cost in layer["widths"]:
            cost["divergence"] = (1e4 if layer["name"] == "4.weight" else 1.0) / 4 ** cost["bits"]
    measured.write_text(json.dumps(document))
    output = tmp_path / "out.safetensors"
    flags = ["--bpw", 4.5, "--method", "squant", "--sensitivity", measured, "--coding", "packed", "-o", output]
    dry = json.loads(run("quantize", trained / "m.safetensors", *flags, "-n", "--json", "-").out)
    ran = run("quantize", trained / "m.safetensors", *flags, "-q")
    assert ran.code == 0, ran.err
    layers = {layer.name: layer for layer in read_report(report_path(output)).layers if layer.compressed}
    assert layers["4.weight"].bits == 8
    assert min(layer.bits or 9 for layer in layers.values()) < 8
    for name, layer in layers.items():
        assert layer.sensitivity == pytest.approx((1e4 if name == "4.weight" else 1.0) / 4 ** (layer.bits or 0))
    # With the costs at hand a dry run decides as the run does.
    assert {row["name"]: row["bits"] for row in dry["tensors"] if "bits" in row} == {
        name: layer.bits for name, layer in layers.items()
    }
    assert dry["artifact_bytes"] == output.stat().st_size


def test_a_dry_run_leaves_widths_open_where_codes_are_entropy_coded(
    run: Run, trained: Path, measured: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    flags = ["--bpw", 4.5, "--method", "squant", "--sensitivity", measured, "-o", output]
    dry = json.loads(run("quantize", trained / "m.safetensors", *flags, "-n", "--json", "-").out)
    assert (dry["artifact_bytes"], {row["bits"] for row in dry["tensors"] if "bits" in row}) == (None, {None})
    assert run("quantize", trained / "m.safetensors", *flags, "-q").code == 0
    assert dry["least_bytes"] <= output.stat().st_size
    measured.write_text("{")
    assert run("quantize", trained / "m.safetensors", *flags, "-n", "-f").code == 3


def test_the_recipe_may_name_the_file(run: Run, trained: Path, measured: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "b.yaml"
    recipe.write_text('version: 1\nbudget: {bpw: 4.5, sensitivity: s.json}\nrules: [{match: "*.weight", squant: {}}]\n')
    ran = run("quantize", trained / "m.safetensors", "-r", recipe, "-o", tmp_path / "o.safetensors", "--json", "-")
    assert ran.code == 0, ran.err
    assert any("measured in s.json" in layer["reason"] for layer in json.loads(ran.out)["layers"])
    again = run("quantize", trained / "m.safetensors", "-r", recipe, "--bpw", 5, "-n", "--json", "-")
    assert json.loads(again.out)["budget"] == {"bpw": 5.0, "sensitivity": "s.json"}
    measured.unlink()
    ran = run("quantize", trained / "m.safetensors", "-r", recipe, "-o", tmp_path / "p.safetensors")
    assert (ran.code, "budget.sensitivity: 's.json' is not there" in ran.error_lines[0]) == (3, True)


def test_a_live_run_measures_by_itself(run: Run, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "live.safetensors"
    flags = ("-r", trained / "open.yaml", "--allow-code", "-o", output)
    ran = run("quantize", trained / "m.safetensors", *flags, "--coding", "packed", "--json", "-")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["size"]["bits_per_weight"] <= 3.5
    compressed = [layer for layer in document["layers"] if layer["bits"]]
    assert all("measured on 48 samples of data.calibration" in layer["reason"] for layer in compressed)
    assert all(layer["sensitivity"] is not None for layer in compressed)
    first = output.read_bytes()
    assert run("quantize", trained / "m.safetensors", *flags, "--coding", "packed", "-q", "-f").code == 0
    assert output.read_bytes() == first


def test_the_smallest_that_keeps_the_accuracy(run: Run, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.safetensors"
    flags = ("-r", trained / "open.yaml", "--minimize", "size", "--max-drop", "top1=0.05", "--allow-code", "-o", output)
    ran = run("quantize", trained / "m.safetensors", *flags, "--json", "-")
    assert ran.code == 0, ran.err
    held = [float(line.split()[0]) for line in ran.err.splitlines() if line.endswith("per weight: holds")]
    broken = [float(line.split()[0]) for line in ran.err.splitlines() if line.endswith("breaks a gate")]
    assert max(broken, default=0.0) < min(held) < 8
    assert json.loads(ran.out)["gates"][0]["passed"]
    assert {path.name for path in tmp_path.iterdir()} == {"small.safetensors", "small.report.json"}


REFUSED = {
    "no recipe": (["--sensitivity"], "--sensitivity: takes a recipe to run the network by; add -r RECIPE"),
    "no sensitivity": (["--samples", 3], "--samples: takes --sensitivity; add it, or leave this out"),
    "a recipe alone": (["-r", "r.yaml"], "-r: takes --sensitivity; add it, or leave this out"),
    "gates": (["--sensitivity", "--max-size", "1MB"], "--max-size: goes with artifacts, not with --sensitivity"),
    "widths": (["--sensitivity", "-r", "R", "--widths", "2-4"], "--widths 2-4: is no list of widths from 1 to 8"),
    "width 0": (["--sensitivity", "-r", "R", "--widths", "0,1"], "--widths 0,1: is no list of widths from 1 to 8"),
    "two": (["m.safetensors", "--sensitivity"], "--sensitivity: takes one checkpoint, not 2; name one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_do_not_go_together(run: Run, trained: Path, case: str) -> None:
    arguments, message = REFUSED[case]
    arguments = [trained / "r.yaml" if one == "R" else one for one in arguments]
    ran = run("report", trained / "m.safetensors", *arguments)
    assert (ran.code, ran.error_lines[0].startswith(f"error: {message}")) == (2, True), ran.err


def test_a_recipe_without_a_model_or_with_no_widths_is_refused(run: Run, trained: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text('version: 1\nrules: [{match: "*", squant: {bits: 2}}]\n')
    ran = run("report", trained / "m.safetensors", "--sensitivity", "-r", bare)
    assert (ran.code, ran.error_lines) == (
        3,
        [f"error: {bare}: names no model; add `model`, and `data.calibration` or `data.eval`"],
    )
