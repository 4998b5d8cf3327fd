"""One codebook for several tensors, and codebooks weighed by statistics, from the command line to the file and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import save_folder
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompress
from qcompress.artifact.reader import read_artifact
from qcompress.clustering.kmeans import assign_scalars, cluster_scalars
from qcompress.coding.grids import centroid_values
from qcompress.methods import kmeans
from qcompress.plan.plan import shared_by
from qcompress.types.encoded import Codebook

NAMES = [f"blocks.{block}.{kind}.weight" for block in range(2) for kind in ("q", "k")]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        name: (torch.randn(12, 16, generator=generator) * (0.1 + index)).bfloat16() for index, name in enumerate(NAMES)
    }
    return {**found, "head.weight": torch.randn(8, 16, generator=generator), "head.bias": torch.zeros(8)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


GROUPS = {
    "layer": [[*NAMES[:2]], [*NAMES[2:]], ["head.weight"]],
    "type": [[NAMES[0], NAMES[2]], [NAMES[1], NAMES[3]], ["head.weight"]],
    "model": [[*NAMES, "head.weight"]],
}


@pytest.mark.parametrize("coding", ["packed", "auto"])
@pytest.mark.parametrize("share", GROUPS)
def test_tensors_that_share_have_one_stored_codebook(
    run: Run, checkpoint: Path, tmp_path: Path, share: str, coding: str
) -> None:
    output = tmp_path / "a.safetensors"
    words = ["cluster", str(checkpoint), "--bits", "3", "--share", share, "--coding", coding, "-o", str(output)]
    report = json.loads(run(*words, "--json", "-").out)
    assert run("verify", str(output)).code == 0
    assert report["size"]["artifact_bytes"] == output.stat().st_size
    file = read_artifact(output).files[0]
    stored = {name for name in file.container.by_name if name.endswith(".qc.codebook")}
    owners = {name: entry.shared or name for name, entry in file.manifest.tensors.items()}
    groups = GROUPS[share]
    assert len(stored) == len(groups) and {f"{owner}.qc.codebook" for owner in owners.values()} == stored
    source, loaded = load_file(checkpoint), qcompress.load_state_dict(output)
    for group in groups:
        assert len({owners[name] for name in group}) == 1
        values = torch.cat([source[name].float().flatten() for name in group])
        decoded = torch.cat([loaded[name].float().flatten() for name in group])
        # As the reader decodes before weights take their own dtype, of which there are two.
        assert len(decoded.unique()) <= 8 * len({source[name].dtype for name in group})
        best = float(cluster_scalars(values, 8).error)
        # Entries are stored in half precision; some decode to bfloat16.
        assert float((decoded.double() - values.double()).square().sum()) <= best * 1.01
    layers = {layer["name"]: layer for layer in report["layers"] if layer["bits"]}
    for name, layer in layers.items():
        own = owners[name] == name
        assert layer["codebook_in"] == (None if own else owners[name])
        assert (layer["side_information_bytes"] > 0) is own


def test_a_report_and_an_export_of_shared_codebooks(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    output, dense = tmp_path / "a.safetensors", tmp_path / "d.safetensors"
    assert run("cluster", str(checkpoint), "--bits", "3", "--share", "model", "-o", str(output), "-q").code == 0
    first = {layer["name"]: layer for layer in json.loads((tmp_path / "a.report.json").read_text())["layers"]}
    for more in ([], ["--baseline", str(checkpoint)]):
        (tmp_path / "a.report.json").unlink(missing_ok=True)
        again = json.loads(run("report", str(output), *more, "--json", "-").out)
        for layer in again["layers"]:
            for key in ("codebook_in", "side_information_bytes", "bytes", "granularity"):
                assert layer[key] == first[layer["name"]][key]
            if layer["bits"]:
                assert layer["figures"]["entries"] == 8
                assert layer["figures"]["dead"] == first[layer["name"]]["figures"]["dead"]
    assert run("export", str(output), "--to", "safetensors", "-o", str(dense)).code == 0
    loaded = qcompress.load_state_dict(output)
    assert all(torch.equal(value, loaded[name]) for name, value in load_file(dense).items())


@pytest.mark.parametrize("options", [{"dim": 2}, {"codebook": "int8"}, {"codebook": "f32"}, {"init": "k-means++"}])
def test_every_kind_of_codebook_is_shared(run: Run, checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recipe, output = tmp_path / "r.yaml", tmp_path / "a.safetensors"
    rule = {"match": "*.weight", "kmeans": {"bits": 3, "share": "model", **options}}
    recipe.write_text(json.dumps({"version": 1, "rules": [rule]}))
    done = run("cluster", str(checkpoint), "-r", str(recipe), "-o", str(output), "-q")
    assert done.code == 0, done.err
    assert run("verify", str(output)).code == 0
    file = read_artifact(output).files[0]
    codebooks = [file.read_encoded(name) for name in file.manifest.tensors]
    first = codebooks[0]
    assert isinstance(first, Codebook)
    for name, codebook in zip(file.manifest.tensors, codebooks, strict=True):
        assert isinstance(codebook, Codebook)
        assert torch.equal(centroid_values(codebook), centroid_values(first))
        if codebook.dim == 1:
            table = centroid_values(codebook)[0, :, 0]
            values = load_file(checkpoint)[name].reshape(codebook.codes.shape)
            assert torch.equal(codebook.codes, assign_scalars(values, table))


def test_files_of_a_folder_store_it_once_each(run: Run, tmp_path: Path) -> None:
    every = weights()
    shards = {
        "model-00001-of-00002.safetensors": {name: every[name] for name in NAMES[:3]},
        "model-00002-of-00002.safetensors": {name: every[name] for name in (NAMES[3], "head.weight", "head.bias")},
    }
    source, output = save_folder(tmp_path / "m", shards), tmp_path / "a"
    assert run("cluster", str(source), "--bits", "3", "--share", "model", "-o", str(output), "-q").code == 0
    assert run("verify", str(output)).code == 0
    codebooks = []
    for file in read_artifact(output).files:
        stored = [name for name in file.container.by_name if name.endswith(".qc.codebook")]
        assert len(stored) == 1
        codebooks.append(bytes(file.container.bytes_of(stored[0])))
    assert codebooks[0] == codebooks[1]


def test_different_settings_share_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe, output = tmp_path / "r.yaml", tmp_path / "a.safetensors"
    recipe.write_text(
        "version: 1\nrules:\n"
        '  - {match: "blocks.*", kmeans: {bits: 3, share: model}}\n'
        '  - {match: "head.weight", kmeans: {bits: 2, share: model}}\n'
    )
    assert run("cluster", str(checkpoint), "-r", str(recipe), "-o", str(output), "-q").code == 0
    manifest = read_artifact(output).files[0].manifest
    assert manifest.tensors["head.weight"].shared is None
    assert sum(manifest.tensors[name].shared is None for name in NAMES) == 1


def test_the_plan_of_shared_codebooks_knows_the_size(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    words = ["cluster", str(checkpoint), "--bits", "3", "--share", "type", "--coding", "packed"]
    words += ["-o", str(tmp_path / "a.safetensors")]
    plan = json.loads(run(*words, "--dry-run", "--json", "-").out)
    report = json.loads(run(*words, "--json", "-").out)
    assert plan["exact"] and plan["artifact_bytes"] == report["size"]["artifact_bytes"]
    assert "one codebook for the type q.weight" in {one["name"]: one["reason"] for one in plan["tensors"]}[NAMES[0]]


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "layer model.layers.3", "type q_proj.weight"),
        ("layer1.0.conv1.weight", "layer layer1.0", "type conv1.weight"),
        ("model.layers.3.mlp.experts.7.w1.weight", "layer model.layers.3", "type w1.weight"),
        ("encoder.attention.q.weight", "layer encoder.attention", "type q.weight"),
        ("fc.weight", "layer", "type fc.weight"),
    ],
)
def test_what_a_layer_and_a_type_are(name: str, layer: str, kind: str) -> None:
    assert (shared_by(name, "layer"), shared_by(name, "type"), shared_by(name, "model")) == (layer, kind, "model")
    assert shared_by(name, None) is None


def test_what_cannot_be_shared_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    rules = "version: 1\nrules:\n  - {match: '*.weight', kmeans: {OPTIONS}}\n"
    recipe.write_text(rules.replace("OPTIONS", "bits: 12, dim: 4, codebook: f32, share: model"))
    done = run("cluster", str(checkpoint), "-r", str(recipe))
    assert done.code == 3 and "model: " in done.err and "are no less than the 2048 of now" in done.err
    recipe.write_text(rules.replace("OPTIONS", "bits: 4, share: model, granularity: channel"))
    done = run("cluster", str(checkpoint), "-r", str(recipe))
    assert done.code == 3 and "share: model needs granularity: tensor" in done.err
    done = run("cluster", str(checkpoint), "--bits", "4", "--share", "file")
    assert done.code == 2 and "layer" in done.err
    every = weights()
    every[NAMES[1]][0, 0] = float("nan")
    save_file(every, tmp_path / "nan.safetensors")
    done = run("cluster", str(tmp_path / "nan.safetensors"), "--bits", "4", "--share", "model")
    assert done.code == 3 and f"tensor {NAMES[1]!r}: 1 of its 192 values are NaN" in done.err
    assert not (tmp_path / "nan-c4.safetensors").exists()


def test_a_resumed_run_starts_again_where_the_shared_codebook_has_changed(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another weight changes the codebook of all: nothing that the killed run has finished may stay."""
    whole, output = tmp_path / "whole.safetensors", tmp_path / "a.safetensors"
    words = ["cluster", str(checkpoint), "--bits", "3", "--share", "model", "--threads", "1", "-q"]
    encode, calls = kmeans.encode, []

    def killing(*arguments: Any) -> Codebook:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(kmeans, "encode", killing)
    assert run(*words, "--resume", "-o", str(output)).code == 130
    assert not output.exists()
    every = weights()
    every[NAMES[3]] = every[NAMES[3]] * 3
    save_file(every, checkpoint)
    assert run(*words, "--resume", "-o", str(output)).code == 0
    assert run(*words, "-o", str(whole)).code == 0
    assert output.read_bytes() == whole.read_bytes()


def statistics(path: Path, *names: str, columns: int = 16) -> Path:
    """Inputs of which the first column is a hundred times as large as the others."""
    diagonal = torch.ones(columns)
    diagonal[0] = 1e4
    state = {f"{name}.hessian": torch.diag(diagonal)[None] for name in names}
    save_file({**state, **{f"{name}.mean": torch.zeros(1, columns) for name in names}}, path)
    return path


@pytest.mark.parametrize("share", [None, "model"])
@pytest.mark.parametrize("dim", ["1", "2"])
def test_statistics_weigh_the_columns(run: Run, checkpoint: Path, tmp_path: Path, share: str | None, dim: str) -> None:
    known = statistics(tmp_path / "s.safetensors", *NAMES, "head.weight")
    words = ["cluster", str(checkpoint), "--bits", "2", "--dim", dim, *(["--share", share] if share else []), "-q"]
    plain, weighed = tmp_path / "plain.safetensors", tmp_path / "weighed.safetensors"
    assert run(*words, "-o", str(plain)).code == 0
    assert run(*words, "-o", str(weighed), "--statistics", str(known)).code == 0
    source = load_file(checkpoint)
    errors = []
    for path in (plain, weighed):
        loaded = qcompress.load_state_dict(path)
        squares = sum(
            (loaded[name].double() - source[name].double()).square().sum(0) for name in [*NAMES, "head.weight"]
        )
        errors.append((float(squares[0]), float(squares[1:].sum())))
    assert errors[1][0] < errors[0][0] / 1.4 and errors[1][1] > errors[0][1]


def test_weighed_scalars_are_the_weighed_optimum(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    known = statistics(tmp_path / "s.safetensors", NAMES[0])
    recipe, output = tmp_path / "r.yaml", tmp_path / "a.safetensors"
    recipe.write_text(f"version: 1\nrules:\n  - {{match: {NAMES[0]}, kmeans: {{bits: 3, codebook: f32}}}}\n")
    done = run("cluster", str(checkpoint), "-r", str(recipe), "-o", str(output), "--statistics", str(known), "-q")
    assert done.code == 0, done.err
    each = torch.ones(12, 16, dtype=torch.float64)
    each[:, 0] = 1e4
    wanted = cluster_scalars(load_file(checkpoint)[NAMES[0]], 8, each).centroids
    encoded = read_artifact(output).files[0].read_encoded(NAMES[0])
    assert isinstance(encoded, Codebook)
    torch.testing.assert_close(centroid_values(encoded).flatten(), wanted)


def test_what_statistics_do_not_know_is_said(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    known, output = statistics(tmp_path / "s.safetensors", NAMES[0]), tmp_path / "a.safetensors"
    words = ["cluster", str(checkpoint), "--bits", "2", "-o", str(output), "--json", "-"]
    report = json.loads(run(*words, "--statistics", str(known)).out)
    assert report["warnings"] == [
        f"s.safetensors knows nothing of {NAMES[1]}, {NAMES[3]}, {NAMES[2]} and 1 more: unweighed"
    ]
    other = statistics(tmp_path / "other.safetensors", NAMES[0], columns=15)
    done = run(*words, "--force", "--statistics", str(other))
    assert done.code == 3 and "15 columns" in done.err
    done = run(*words, "--force", "--statistics", str(tmp_path / "none.safetensors"))
    assert done.code == 3 and "none.safetensors" in done.err
