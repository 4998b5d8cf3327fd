"""The report of an artifact is the one that was written with it, as far as its own bytes and the checkpoint tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact.examples import gaussian, rtn, run, save, save_folder

from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.errors import ReportError
from qcompress.recipe import parse_recipe
from qcompress.report.document import LayerReport, Report
from qcompress.report.document_json import write_report
from qcompress.report.gather import gather_report

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

RECIPE = """
version: 1
rules:
  - {match: bias, rtn: {bits: 8}}
  - {match: ["*.norm", "head.*", "nothing*"], rtn: {bits: 4, granularity: tensor}}
  - {match: ["[xy].group", "z.group"], mse: {bits: 3, group_size: 4}}
  - {match: whole, hqq: {bits: 2, group_size: 8}}
  - {match: kept, keep: {}}
  - {match: "*", squant: {bits: 2, symmetric: true}}
"""


def by_name(report: Report, figures: bool) -> dict[str, LayerReport]:
    layers = {layer.name: replace(layer, reason="") for layer in report.layers}
    if figures:
        return layers
    return {name: replace(layer, figures=None, bound_gap_db=None) for name, layer in layers.items()}


@pytest.fixture
def network(tmp_path: Path) -> Path:
    embedding = gaussian(16, 8, seed=7)
    shards = {
        A: {
            "embed_tokens.weight": embedding,
            "head.out": gaussian(6, 4),
            "one.norm": gaussian(1, 12),
            "bias": gaussian(5),
        },
        B: {
            "lm_head.weight": embedding.clone(),
            "y.group": gaussian(4, 8, seed=1),
            "whole": gaussian(4, 8, seed=2),
            "kept": gaussian(3, 5),
            "steps": torch.tensor(3),
            "conv": gaussian(4, 2, 3, 3, dtype=torch.bfloat16),
        },
    }
    return save_folder(tmp_path / "network", shards, {"tie_word_embeddings": True})


def test_the_artifact_alone_tells_all_but_reasons_and_errors(network: Path, tmp_path: Path) -> None:
    written = run(network, tmp_path / "out", parse_recipe(RECIPE, "recipe.yaml"), "auto")
    found = gather_report(tmp_path / "out")
    assert by_name(found, figures=False) == by_name(written, figures=False)
    assert (found.size, found.artifact, found.recipe_hash) == (written.size, written.artifact, written.recipe_hash)
    assert found.input_sha256 == gather_report(tmp_path / "out", read_checkpoint(network)).input_sha256
    for layer in found.compressed:
        expected = by_name(written, figures=True)[layer.name].figures
        assert layer.figures is not None and expected is not None
        assert (layer.figures.entropy, layer.figures.levels_used) == (expected.entropy, expected.levels_used)
        assert layer.sqnr_db is None


def test_a_baseline_tells_the_errors_too(network: Path, tmp_path: Path) -> None:
    written = run(network, tmp_path / "out", parse_recipe(RECIPE, "recipe.yaml"))
    found = gather_report(tmp_path / "out", read_checkpoint(network))
    assert by_name(found, figures=True) == by_name(written, figures=True)


def test_a_name_that_only_metadata_ties_is_no_layer(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"w": gaussian(4, 6)}, {"format": "pt", "alias": "w"})
    written = run(source, tmp_path / "a.safetensors", rtn())
    assert [layer.name for layer in written.layers] == ["w"]
    assert by_name(gather_report(tmp_path / "a.safetensors"), figures=False) == by_name(written, figures=False)


def test_an_artifact_is_named_as_its_folder_is_wherever_one_stands(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(network, tmp_path / "out", rtn(2))
    write_report(report, tmp_path / "out.report.json")
    (tmp_path / "out" / "below").mkdir()
    for here, path in (("out", "."), ("out/below", ".."), (".", "out"), (".", "out/")):
        monkeypatch.chdir(tmp_path / here)
        assert gather_report(Path(path)).run is not None
        assert gather_report(Path(path), read_checkpoint(network)).artifact == report.artifact


def test_the_input_hash_tells_checkpoints_apart_and_recipes_together(network: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "m.safetensors", {"w": gaussian(4, 6, seed=1)})
    same = save(tmp_path / "n.safetensors", {"w": gaussian(4, 6, seed=1)})
    changed = save(tmp_path / "o.safetensors", {"w": gaussian(4, 6, seed=2)})
    hashes = []
    for index, (source, bits) in enumerate([(other, 2), (same, 4), (changed, 2), (network, 2), (network, 4)]):
        output = tmp_path / f"out{index}.safetensors"
        run(source, output, rtn(bits))
        hashes.append(gather_report(output).input_sha256)
    assert [hashes.index(one) for one in hashes] == [0, 0, 2, 3, 3]


def test_a_report_that_does_not_name_its_input_learns_it_from_the_artifact(network: Path, tmp_path: Path) -> None:
    report = run(network, tmp_path / "out", rtn(2))
    write_report(replace(report, input_sha256=None), tmp_path / "out.report.json")
    found = gather_report(tmp_path / "out")
    assert found.run is not None
    assert found.input_sha256 is not None


def test_a_baseline_of_fewer_or_more_files_is_refused(network: Path, tmp_path: Path) -> None:
    for source, baseline in ((network, network / A), (network / A, network)):
        output = tmp_path / f"of-{source.name}"
        run(source, output, rtn(2))
        with pytest.raises(ReportError, match="is not the checkpoint that"):
            gather_report(output, read_checkpoint(baseline))
