"""Budgets from the command line: what they write, what they foretell, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    Run,
    files_under,
    process_environment,
    program,
    refused,
    small_tensors,
    write_checkpoint,
)

from qcompress.report.document_json import read_report, report_path

RECIPE = """
version: 1
budget: {bpw: 3.0}
rules:
  - {match: "conv1.*", keep: {}}
  - {match: "*.weight", rtn: {}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.yaml"
    path.write_text(RECIPE)
    return path


def planned(run: Run, *arguments: object) -> dict[str, Any]:
    ran = run("quantize", *arguments, "-n", "--json", "-")
    assert ran.code == 0, ran.err
    document: dict[str, Any] = json.loads(ran.out)
    return document


@pytest.mark.parametrize("coding", ["packed", "auto"])
@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--bpw", "2", "model-2.0bpw"),
        ("--bpw", "2.25", "model-2.25bpw"),
        ("--target-size", "9KB", "model-9KB"),
        ("--target-size", "9000", "model-9000B"),
    ],
)
def test_the_artifact_keeps_within_its_budget_and_is_named_for_it(
    run: Run, checkpoint: Path, flag: str, value: str, name: str, coding: str
) -> None:
    ran = run("quantize", checkpoint, flag, value, "--method", "rtn", "--coding", coding, "-q")
    output = checkpoint.with_name(f"{name}.safetensors")
    assert (ran.code, ran.out) == (0, f"{output}\n"), ran.err
    report = read_report(report_path(output))
    if flag == "--bpw":
        assert (report.size.bits_per_weight or 99.0) <= float(value)
        # One tensor holds nearly all weights: with 2 bits there is not room for its second.
        assert coding == "auto" or value == "2" or (report.size.bits_per_weight or 0.0) > 0.95 * float(value)
    else:
        assert output.stat().st_size == report.size.artifact_bytes <= 9000
        # One bit more for the tensor of nearly all weights would take some 2,200 bytes.
        assert coding == "auto" or report.size.artifact_bytes > 9000 - 2200
    assert len({layer.bits for layer in report.compressed}) > 1
    assert run("verify", output).code == 0


def test_a_recipe_s_budget_goes_into_the_artifact_and_equal_runs_give_equal_bytes(
    run: Run, checkpoint: Path, recipe: Path
) -> None:
    assert run("quantize", checkpoint, "-r", recipe, "-q").code == 0
    output = checkpoint.with_name("model-mixed.safetensors")
    first = output.read_bytes()
    assert run("quantize", checkpoint, "-r", recipe, "-q", "--force", "--threads", "2").code == 0
    assert output.read_bytes() == first
    report = read_report(report_path(output))
    assert {layer.name for layer in report.compressed} == {"layer.weight", "fc.weight"}
    assert (report.size.bits_per_weight or 99.0) <= 3.0


def test_a_flag_beats_the_recipe_s_budget(run: Run, checkpoint: Path, recipe: Path) -> None:
    document = planned(run, checkpoint, "-r", recipe, "--target-size", "12KB")
    assert document["budget"] == {"size": 12000}
    assert document["output"].endswith("model-mixed.safetensors")


def test_a_dry_run_leaves_widths_open_and_tells_the_least(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    before = files_under(tmp_path)
    document = planned(run, checkpoint, "--bpw", 2.5, "--method", "rtn", "--coding", "packed")
    assert files_under(tmp_path) == before
    assert (document["artifact_bytes"], document["exact"], document["budget"]) == (None, False, {"bpw": 2.5})
    opened = [row for row in document["tensors"] if row["method"] == "rtn"]
    assert [(row["bits"], row["widths"]) for row in opened] == [(None, list(range(1, 9)))] * 3
    table = run("quantize", checkpoint, "--bpw", 2.5, "--method", "rtn", "-n", "--no-color")
    assert "2.5 bits per compressed weight; widths are chosen once weights are read" in table.out
    assert " 1-8 " in table.out


@pytest.mark.parametrize("asked", [999, 100])
def test_the_least_that_a_refusal_names_can_be_had_and_nothing_less(run: Run, checkpoint: Path, asked: int) -> None:
    flags = ["--method", "rtn", "--coding", "packed", "-q"]
    ran = run("quantize", checkpoint, "--target-size", asked, *flags, "-n")
    least = int(ran.error_lines[0].partition("ask for at least ")[2].partition(",")[0])
    assert run("quantize", checkpoint, "--target-size", least, *flags).code == 0
    assert checkpoint.with_name(f"model-{least}B.safetensors").stat().st_size <= least
    assert run("quantize", checkpoint, "--target-size", least - 1, *flags).code == 3


REFUSED = {
    "two budgets": (["--bpw", 2, "--target-size", "1MB"], 2, "--bpw 2.0 --target-size 1MB: are several budgets; keep"),
    "bits too": (["--bpw", 2, "--bits", 3], 2, "--bits 3 --bpw 2.0: the budget decides the bits; leave one of them"),
    "nothing": (["--bpw", 0, "--method", "rtn"], 2, "--bpw 0.0: is no number of bits; give one above 0, as 2.5"),
    "not a number": (["--bpw", "nan", "--method", "rtn"], 2, "--bpw nan: is no number of bits; give one above 0"),
    "no size": (["--target-size", "2XB", "--method", "rtn"], 2, "--target-size 2XB: `2XB` is not a size"),
    "too few bits": (["--bpw", 0.9, "--method", "rtn"], 3, "--bpw 0.9: 0.9 bits per weight are too few"),
    "too few bytes": (["--target-size", "1KB", "--method", "rtn"], 3, "--target-size 1KB: 1,000 bytes are too few"),
    "no gate": (["--minimize", "size", "--method", "rtn"], 3, "--minimize size: there is no gate for the smallest"),
    "size gates alone": (
        ["--minimize", "size", "--method", "rtn", "--max-size", "1MB"],
        3,
        "--minimize size: there is no gate for the smallest artifact to hold; add --max-drop top1=0.005",
    ),
    "no effort": (["--bpw", 2, "--method", "rtn", "--effort", "high"], 2, "--effort high: no method of this run knows"),
    "other effort": (["--bits", 2, "--method", "mse", "--effort", "fast"], 2, "--effort fast: no method of this run"),
    "no budget to spend": (
        ["--bits", 2, "--sensitivity", "s.json"],
        2,
        "--sensitivity s.json: there is no budget to spend by it; add --bpw X or --target-size SIZE",
    ),
    "no file": (
        ["--bpw", 2, "--method", "rtn", "--sensitivity", "s.json"],
        3,
        "s.json: cannot read the file of sensitivities: No such file or directory; measure it with `qcompress report",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(run: Run, checkpoint: Path, tmp_path: Path, case: str) -> None:
    arguments, code, message = REFUSED[case]
    line = refused(run, tmp_path, "quantize", checkpoint, *arguments, code=code)
    assert line.startswith(f"error: {message}")


def test_an_existing_output_is_refused_before_anything_is_measured(run: Run, checkpoint: Path) -> None:
    output = checkpoint.with_name("model-2.0bpw.safetensors")
    output.write_text("mine")
    ran = run("quantize", checkpoint, "--bpw", 2, "--method", "rtn")
    assert (ran.code, output.read_text()) == (3, "mine")


def test_effort_reaches_every_width(run: Run, checkpoint: Path) -> None:
    """The smaller effort of mse tries fewer starts: other codes, and `recipe` in the manifest says so."""
    sizes = {}
    for effort in ("normal", "high"):
        output = checkpoint.with_name(f"{effort}.safetensors")
        ran = run("quantize", checkpoint, "--bpw", 3, "--method", "mse", "--effort", effort, "-q", "-o", output)
        assert ran.code == 0, ran.err
        sizes[effort] = read_report(report_path(output)).recipe_hash
    assert sizes["normal"] != sizes["high"]


def test_the_smallest_that_holds_a_gate(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """The bits of what held hold again, and those of the largest that broke the gate break it again."""
    flags = ["--method", "rtn", "--min-sqnr", 15, "--coding", "packed"]
    ran = run("quantize", checkpoint, "--minimize", "size", *flags, "--json", "-")
    assert ran.code == 0, ran.err
    output = checkpoint.with_name("model-smallest.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "model-smallest.safetensors",
        "model-smallest.report.json",
    }
    found = json.loads(ran.out)
    assert [gate["passed"] for gate in found["gates"]] == [True]
    held = [float(line.split()[0]) for line in ran.err.splitlines() if line.endswith("per weight: holds")]
    broken = [float(line.split()[0]) for line in ran.err.splitlines() if line.endswith("breaks a gate")]
    assert max(broken) < min(held)
    smaller = tmp_path / "smaller.safetensors"
    flags += ["-q", "--compact", "-o", smaller]
    assert run("quantize", checkpoint, "--bpw", max(broken) + 1e-4, *flags).code == 4
    assert run("quantize", checkpoint, "--bpw", min(held) + 1e-4, *flags, "--force").code == 0
    first, again = (read_report(report_path(path)) for path in (output, smaller))
    assert [layer.bits for layer in again.layers] == [layer.bits for layer in first.layers]


def test_gates_that_no_width_holds_fail_at_the_widest(run: Run, checkpoint: Path) -> None:
    ran = run("quantize", checkpoint, "--minimize", "size", "--min-sqnr", 90, "--method", "rtn", "--json", "-")
    assert ran.code == 4
    assert {layer["bits"] for layer in json.loads(ran.out)["layers"]} == {8, None}


def test_weights_that_are_not_finite_are_refused_or_kept(run: Run, tmp_path: Path) -> None:
    tensors = small_tensors()
    tensors["fc.weight"][0, 0] = np.nan
    path = write_checkpoint(tmp_path / "model.safetensors", tensors)
    ran = run("quantize", path, "--bpw", 3, "--method", "rtn")
    assert ran.code == 3
    assert "1 of its 640 values are NaN" in ran.error_lines[0]
    ran = run("quantize", path, "--bpw", 3, "--method", "rtn", "--skip-nonfinite", "--json", "-")
    report = json.loads(ran.out)
    assert {layer["name"]: layer["method"] for layer in report["layers"]}["fc.weight"] == "kept"
    assert report["size"]["bits_per_weight"] <= 3


def test_recipe_check_holds_a_budget_against_a_checkpoint(run: Run, checkpoint: Path, recipe: Path) -> None:
    assert run("recipe", "check", recipe, checkpoint).code == 0
    ran = run("recipe", "check", recipe, checkpoint, "--set", "budget.bpw=0.5")
    assert ran.code == 3
    assert ran.error_lines[0].startswith(f"error: {recipe}:3: budget: 0.5 bits per weight are too few")


def test_a_shown_recipe_reads_as_the_same(run: Run, tmp_path: Path, recipe: Path) -> None:
    shown = run("recipe", "show", recipe).out
    again = tmp_path / "again.yaml"
    again.write_text(shown)
    assert run("recipe", "show", again).out == shown
    assert "budget:\n  bpw: 3.0\n" in shown
    assert "bits" not in shown


@pytest.mark.parametrize(
    "words", ["--bpw 2 --effort fast", "--minimize size --min-sqnr 10 --effort fast", "--bpw 3 --method rtn"]
)
def test_the_report_counts_the_processor_time_of_the_whole_command(checkpoint: Path, words: str) -> None:
    """All attempts and all that was imported: what the system says of the process, but for what it takes to end."""
    output = checkpoint.with_name("a.safetensors")
    command = program("quantize", checkpoint, *words.split(), "-o", output, "-q")
    process = subprocess.Popen(command, env=process_environment(), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    run = read_report(report_path(output)).run
    assert run is not None
    whole = used.ru_utime + used.ru_stime
    assert 0.6 * whole <= run.cpu_seconds <= whole
    assert run.seconds >= 0.5 * run.cpu_seconds
