"""`qcompress report`: stored figures, comparison, baselines, formats, gates."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from conftest import Run, files_under, small_tensors, write_checkpoint

from qcompress.artifact.reader import read_artifact


@pytest.fixture
def artifact(run: Run, checkpoint: Path) -> Path:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    return checkpoint.with_name("model-w2.safetensors")


@pytest.fixture
def larger(run: Run, checkpoint: Path) -> Path:
    assert run("quantize", checkpoint, "--bits", 4).code == 0
    return checkpoint.with_name("model-w4.safetensors")


def layers(text: str) -> dict[str, dict[str, object]]:
    return {layer["name"]: layer for layer in json.loads(text)["layers"]}


def test_it_shows_the_stored_report(run: Run, artifact: Path) -> None:
    stored = artifact.with_name("model-w2.report.json")
    written = json.loads(stored.read_text())
    assert json.loads(run("report", stored, "--json", "-").out) == written
    # Which checkpoint it was made from, the artifact knows even where its report does not say so.
    shown = json.loads(run("report", artifact, "--json", "-").out)
    assert shown == written | {"input_sha256": read_artifact(artifact).files[0].manifest.input_sha256}


def test_without_the_stored_report_the_artifact_speaks_for_itself(run: Run, artifact: Path) -> None:
    before = json.loads(run("report", artifact, "--json", "-").out)
    artifact.with_name("model-w2.report.json").unlink()
    after = json.loads(run("report", artifact, "--json", "-").out)
    assert after["size"] == before["size"]
    assert {layer["figures"]["sqnr_db"] for layer in after["layers"] if layer["figures"]} == {None}
    assert run("report", artifact).code == 0


def test_a_baseline_measures_the_same_figures_again(run: Run, artifact: Path, checkpoint: Path) -> None:
    stored = layers(run("report", artifact, "--json", "-").out)
    artifact.with_name("model-w2.report.json").unlink()
    ran = run("report", artifact, "--baseline", checkpoint, "--json", "-")
    assert (ran.code, ran.err) == (0, "")
    measured = layers(ran.out)
    assert {name: layer["figures"] for name, layer in measured.items()} == {
        name: layer["figures"] for name, layer in stored.items()
    }


def test_a_baseline_may_have_another_name_but_not_other_weights(
    run: Run, artifact: Path, checkpoint: Path, tmp_path: Path
) -> None:
    renamed = checkpoint.rename(tmp_path / "renamed.safetensors")
    assert run("report", artifact, "--baseline", renamed).code == 0
    other = write_checkpoint(tmp_path / "model.safetensors", small_tensors(seed=1))
    ran = run("report", artifact, "--baseline", other)
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)
    assert "is not the checkpoint" in ran.err


def test_a_sharded_baseline(run: Run, sharded: Path) -> None:
    assert run("quantize", sharded, "--bits", 4).code == 0
    output = sharded.with_name("network-w4")
    stored = layers(run("report", output, "--json", "-").out)
    measured = layers(run("report", output, "--baseline", sharded, "--json", "-").out)
    assert {name: layer["figures"] for name, layer in measured.items()} == {
        name: layer["figures"] for name, layer in stored.items()
    }


def test_a_report_cannot_be_measured(run: Run, artifact: Path, checkpoint: Path) -> None:
    ran = run("report", artifact.with_name("model-w2.report.json"), "--baseline", checkpoint)
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "other/1"}', '{"schema": "qcompress.report/2"}'])
def test_a_foreign_report_file_is_3(run: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.report.json"
    path.write_text(text)
    ran = run("report", path)
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)


def test_csv_has_a_line_for_each_tensor(run: Run, artifact: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run("report", artifact, "--format", "csv").out)))
    assert [row["name"] for row in rows] == list(layers(run("report", artifact, "--json", "-").out))
    assert sum(int(row["bytes"]) for row in rows) < artifact.stat().st_size


def test_markdown_for_a_pull_request(run: Run, artifact: Path) -> None:
    text = run("report", artifact, "--format", "markdown").out
    assert text.startswith("**model-w2.safetensors**\n")
    assert "<details>" in text


def test_two_artifacts_side_by_side(run: Run, artifact: Path, larger: Path) -> None:
    ran = run("report", artifact, larger)
    assert ran.code == 0
    assert "A  model-w2.safetensors" in ran.out
    assert "B  model-w4.safetensors" in ran.out
    document = json.loads(run("report", artifact, larger, "--format", "json").out)
    change = larger.stat().st_size - artifact.stat().st_size
    assert [file["bytes_change"] for file in document["files"]] == [0, change]
    assert all(layer["sqnr_change_db"][1] is None or layer["sqnr_change_db"][1] > 6 for layer in document["layers"])


def test_gates_hold_for_each_of_several(run: Run, artifact: Path, larger: Path) -> None:
    assert run("report", artifact, larger, "--max-size", larger.stat().st_size).code == 0
    ran = run("report", artifact, larger, "--max-size", larger.stat().st_size - 1, "-q")
    assert (ran.code, ran.out, len(ran.error_lines)) == (4, "", 1)
    assert f"gate max-size: artifact '{larger}': " in ran.err
    assert f"{artifact}" not in ran.err
    ran = run("report", artifact, larger, "--max-size", 1)
    assert (ran.code, len(ran.error_lines)) == (4, 1)
    assert f"gate max-size: 2 artifacts, first '{artifact}': the limit is 1 bytes" in ran.err
    ran = run("report", artifact, larger, "--min-metric", "top1=1")
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)
    assert f"gate min-metric top1: 2 artifacts, first '{artifact}': top1 was not measured" in ran.err
    ran = run("report", artifact, larger, "--min-sqnr", 60)
    assert ran.code == 4
    assert ran.out


def test_a_gate_on_what_was_not_measured_is_3(run: Run, artifact: Path) -> None:
    ran = run("report", artifact, "--min-metric", "top1=0.5")
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)
    artifact.with_name("model-w2.report.json").unlink()
    ran = run("report", artifact, "--min-sqnr", 5)
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)
    assert "--baseline" in ran.err


def test_a_report_changes_no_file(run: Run, artifact: Path, checkpoint: Path) -> None:
    before = files_under(artifact.parent)
    for extra in ([], ["--baseline", checkpoint], ["--format", "csv"]):
        assert run("report", artifact, *extra).code == 0
    assert files_under(artifact.parent) == before
