"""`qcompress report`: HTML, JUnit, gates against an earlier report, and the meaning of a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT, Run, files_under, small_tensors, write_checkpoint

from qcompress.report.document import AccuracyFigures
from qcompress.report.document_json import read_report, write_report


@pytest.fixture
def artifact(run: Run, checkpoint: Path) -> Path:
    assert run("quantize", checkpoint, "--bits", 2, "--max-size", "1MB", "--min-sqnr", 1).code == 0
    return checkpoint.with_name("model-w2.safetensors")


@pytest.fixture
def larger(run: Run, checkpoint: Path) -> Path:
    assert run("quantize", checkpoint, "--bits", 4).code == 0
    return checkpoint.with_name("model-w4.safetensors")


@pytest.fixture
def measure(artifact: Path, larger: Path) -> Callable[[Path, float], Path]:
    """Put a drop in top1 into the stored report of an artifact; the report's path."""

    def put(path: Path, drop: float) -> Path:
        stored = path.with_name(f"{path.stem}.report.json")
        item = AccuracyFigures(metric="top1", baseline=0.9, artifact=0.9 - drop, drop=drop, samples=1000)
        write_report(replace(read_report(stored), accuracy=(item,)), stored)
        return stored

    return put


def refused(run: Run, *arguments: object) -> str:
    """The one line of a command that is refused for what it reads, having printed nothing."""
    ran = run("report", *arguments)
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1), ran.err
    return ran.error_lines[0]


def misused(run: Run, *arguments: object) -> str:
    ran = run("report", *arguments)
    assert (ran.code, ran.out, len(ran.error_lines)) == (2, "", 1), ran.err
    return ran.error_lines[0]


def test_html_goes_to_stdout_or_to_a_file(run: Run, artifact: Path, larger: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    text = run("report", artifact, "--format", "html").out
    ran = run("report", artifact, "--format", "html", "-o", page)
    assert (ran.code, ran.out) == (0, f"{page}: {page.stat().st_size:,} bytes\n")
    assert page.read_text() == text
    assert text.startswith("<!doctype html>\n")
    assert all(name in text for name in small_tensors())
    assert run("report", artifact, larger, "--format", "html", "-o", page, "-f", "-q").out == f"{page}\n"
    assert "2 artifacts compared" in page.read_text()


@pytest.mark.parametrize("form", ["table", "json", "markdown", "csv", "html"])
def test_a_file_holds_what_a_pipe_would_get(run: Run, artifact: Path, tmp_path: Path, form: str) -> None:
    target = tmp_path / "report.out"
    assert run("report", artifact, "--format", form, "-o", target).code == 0
    assert target.read_text() == run("report", artifact, "--format", form).out


def test_json_on_stdout_beside_html_in_a_file(run: Run, artifact: Path, tmp_path: Path) -> None:
    ran = run("report", artifact, "--format", "html", "-o", tmp_path / "report.html", "--json", "-")
    assert json.loads(ran.out) == json.loads(run("report", artifact, "--json", "-").out)
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert "--json - --format html" in misused(run, artifact, "--format", "html", "--json", "-")


def test_no_file_that_exists_or_is_read_is_replaced(run: Run, artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    stored = artifact.with_name("model-w2.report.json")
    (tmp_path / "old.html").write_text("old")
    before = files_under(tmp_path)
    assert "replace it with --force" in refused(run, artifact, "-o", tmp_path / "old.html")
    link = tmp_path / "link.json"
    link.symlink_to(stored)
    since = ("--baseline-report", stored, "--max-growth", "1%")
    for arguments in (
        (artifact, *since, "--json", stored),
        (artifact, *since, "--json", link),
        (artifact, *since, "--junit", stored),
        (stored, "-o", stored, "-f"),
    ):
        assert "would replace the input" in refused(run, *arguments)
    link.unlink()
    for flag in ("-o", "--junit", "--json"):
        assert "is a place for weights" in misused(run, stored, flag, tmp_path / "new.safetensors", "--max-size", "1MB")
    assert "name the same place" in refused(run, artifact, "-o", tmp_path / "a", "--junit", tmp_path / "a")
    assert files_under(tmp_path) == before


def test_a_file_that_cannot_be_written_is_5(run: Run, artifact: Path, tmp_path: Path) -> None:
    for flag in ("-o", "--junit", "--json"):
        ran = run("report", artifact, flag, tmp_path / "absent" / "report")
        assert (ran.code, ran.out, len(ran.error_lines)) == (5, "", 1)


def test_junit_has_a_case_for_each_gate_held_now(run: Run, artifact: Path, larger: Path, tmp_path: Path) -> None:
    junit = tmp_path / "gates.xml"
    limit = artifact.stat().st_size
    ran = run("report", artifact, larger, "--max-size", limit, "--min-sqnr", 1, "--junit", junit, "-q")
    assert (ran.code, ran.out) == (4, "")
    root = ElementTree.parse(junit).getroot()
    cases = [(case.get("classname"), case.get("name"), len(case.findall("failure"))) for case in root.iter("testcase")]
    assert cases == [
        ("model-w2.safetensors", "max-size", 0),
        ("model-w2.safetensors", "min-sqnr", 0),
        ("model-w4.safetensors", "max-size", 1),
        ("model-w4.safetensors", "min-sqnr", 0),
    ]


def test_junit_tells_of_the_gates_of_the_run_where_none_is_held_now(
    run: Run, artifact: Path, larger: Path, tmp_path: Path
) -> None:
    junit = tmp_path / "gates.xml"
    assert run("report", artifact, "--junit", junit).code == 0
    assert [case.get("name") for case in ElementTree.parse(junit).iter("testcase")] == ["max-size", "min-sqnr"]
    junit.unlink()
    assert "there is no gate to tell of" in misused(run, larger, "--junit", junit, "-q")
    assert not junit.exists()


def test_growth_since_a_report_fails_with_4(run: Run, artifact: Path, larger: Path) -> None:
    stored = artifact.with_name("model-w2.report.json")
    growth = 100 * (larger.stat().st_size / artifact.stat().st_size - 1)
    assert run("report", artifact, "--baseline-report", stored, "--max-growth", "0%").code == 0
    assert run("report", larger, "--baseline-report", stored, "--max-growth", f"{growth + 0.1:.1f}%").code == 0
    ran = run("report", larger, "--baseline-report", stored, "--max-growth", f"{growth - 0.1:.1f}%", "--json", "-")
    assert ran.code == 4
    assert "error: gate max-growth: " in ran.err
    (gate,) = json.loads(ran.out)["gates"]
    assert (gate["name"], gate["passed"]) == ("max-growth", False)
    assert gate["value"] == pytest.approx(growth / 100)


def test_a_drop_is_held_against_the_earlier_one_or_against_the_checkpoint(
    run: Run, artifact: Path, larger: Path, measure: Callable[[Path, float], Path]
) -> None:
    old, _ = measure(artifact, 0.03), measure(larger, 0.034)
    assert run("report", larger, "--max-drop", "top1=0.005").code == 4
    assert run("report", larger, "--baseline-report", old, "--max-drop", "top1=0.005").code == 0
    ran = run("report", larger, "--baseline-report", old, "--max-drop", "top1=0.003", "-q")
    assert (ran.code, ran.out) == (4, "")
    assert "gate max-drop top1 since the baseline: 0.004 > 0.003" in ran.err


def test_a_metric_that_was_not_measured_is_3(
    run: Run, artifact: Path, larger: Path, measure: Callable[[Path, float], Path]
) -> None:
    plain = larger.with_name("model-w4.report.json")
    old = measure(artifact, 0.03)
    since = ("--max-drop", "top1=0.1", "--max-drop", "bleu=1")
    ran = run("report", larger, "--baseline-report", old, *since)
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 2)
    assert "top1 was not measured (measured: none)" in ran.err
    assert f"{plain} has no top1 (it has: none)" in refused(
        run, artifact, "--baseline-report", plain, "--max-drop", "top1=1"
    )


def change(path: Path, **keys: Any) -> Path:
    changed = path.with_name("changed.json")
    changed.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return changed


def test_a_baseline_that_is_missing_foreign_newer_or_of_another_checkpoint_is_3(
    run: Run, artifact: Path, tmp_path: Path
) -> None:
    def against(path: Path) -> str:
        line = refused(run, artifact, "--baseline-report", path, "--max-growth", "9%")
        assert line.startswith(f"error: {path}: ")
        assert "qcompress report ARTIFACT --json FILE" in line
        return line

    stored = artifact.with_name("model-w2.report.json")
    assert "cannot read the report" in against(tmp_path / "absent.json")
    assert "not a text file" in against(artifact)
    assert "schema qcompress.report/2" in against(change(stored, schema="qcompress.report/2"))
    assert "not a report of qcompress" in against(change(stored, schema="other/1"))
    assert "hashes of their inputs differ" in against(change(stored, input_sha256="0" * 64))
    (tmp_path / "other").mkdir()
    other = write_checkpoint(tmp_path / "other" / "model.safetensors", small_tensors(seed=1))
    assert run("quantize", other, "--bits", 2).code == 0
    again = tmp_path / "again.json"
    assert run("report", other.with_name("model-w2.safetensors"), "--json", again, "-q").code == 0
    assert "hashes of their inputs differ" in against(again)


@pytest.mark.parametrize("growth", ["2", "%", "two%", "nan%", "inf%", "1e999%", "2 MB", "0.02"])
def test_growth_is_a_number_of_per_cent(run: Run, artifact: Path, growth: str) -> None:
    stored = artifact.with_name("model-w2.report.json")
    line = misused(run, artifact, "--baseline-report", stored, "--max-growth", growth)
    assert line.endswith("write it like 2% or 0.5%")


def test_a_limit_without_a_baseline_and_a_baseline_without_a_limit_are_2(run: Run, artifact: Path) -> None:
    assert "add --baseline-report FILE" in misused(run, artifact, "--max-growth", "2%")
    assert "nothing is held against it" in misused(run, artifact, "--baseline-report", artifact, "--max-size", "1MB")
    assert "NAME=NUMBER" in misused(run, artifact, "--baseline-report", artifact, "--max-drop", "top1")


@pytest.mark.parametrize("name", ["sqnr", "SQNR dB", "sqnr_db"])
def test_a_figure_is_explained_in_one_line_without_any_artifact(run: Run, name: str) -> None:
    ran = run("report", "--explain", name)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("sqnr_db: signal to quantization noise ratio in dB")
    assert ran.out.count("\n") == 1


def test_an_unknown_figure_suggests_the_nearest(run: Run) -> None:
    assert "did you mean `entropy`" in misused(run, "--explain", "entropi")
    assert "docs/glossary.md" in misused(run, "--explain", "xyzzy")
    assert "Missing argument" in misused(run)


@pytest.mark.slow
def test_none_of_it_imports_torch(run: Run, run_process: Run, artifact: Path, larger: Path, tmp_path: Path) -> None:
    # In a process where torch cannot be imported.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    stored = artifact.with_name("model-w2.report.json")
    page, junit = tmp_path / "page.html", tmp_path / "gates.xml"
    ran = run_process("report", artifact, larger, "--format", "html", "-o", page, "-q", env=env)
    assert (ran.code, ran.err) == (0, "")
    ran = run_process(
        "report", larger, "--baseline-report", stored, "--max-growth", "1%", "--junit", junit, "-q", env=env
    )
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (4, "", 1)
    assert run_process("report", "--explain", "drop", env=env).code == 0
