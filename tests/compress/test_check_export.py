"""An export is held against its artifact by what it was made for: equal weights pass, others are found and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run, package_or_skip
from exporters.networks import compress_llama, q4
from safetensors.torch import load_file, save_file

from qcompress.artifact.reader import read_artifact
from qcompress.compress.check_export import CONSUMERS, check_export
from qcompress.compress.export import export
from qcompress.errors import ModelError, UsageError
from qcompress.types.export import ExportOptions


def needs(to: str) -> None:
    for package in CONSUMERS[to][0]:
        package_or_skip(f"{package}.core" if package == "mlx" else package)


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=[] if to == "safetensors" else pytest.mark.slow) for to in CONSUMERS]
)
def test_each_consumer_has_the_artifacts_weights(to: str, tmp_path: Path) -> None:
    needs(to)
    artifact = read_artifact(compress_llama(tmp_path, q4(), q4("*embed*", 8), tie_word_embeddings=True))
    output = tmp_path / ("m.gguf" if to == "gguf" else "out")
    export(artifact, output, to)
    checked = check_export(artifact, output, to, ExportOptions())
    assert (checked.tensors, checked.missing) == (20, ())
    assert (checked.difference, checked.worst, checked.holds) == (0.0, None, True)
    for package in CONSUMERS[to][0]:
        assert f"{package} " in checked.consumer


def test_another_weight_is_found_and_named(tmp_path: Path) -> None:
    artifact = read_artifact(compress_llama(tmp_path))
    export(artifact, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] += 0.25
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    checked = check_export(artifact, tmp_path / "out", "safetensors", ExportOptions())
    assert not checked.holds
    assert (checked.worst, checked.missing) == (name, ("model.norm.weight",))
    torch.testing.assert_close(checked.difference, 0.25, rtol=1e-6, atol=0)


def test_what_cannot_be_loaded_is_an_error_of_the_file(tmp_path: Path) -> None:
    artifact = read_artifact(compress_llama(tmp_path))
    (tmp_path / "bad.safetensors").write_bytes(b"no file")
    with pytest.raises(ModelError, match=r"safetensors .* does not load the export"):
        check_export(artifact, tmp_path / "bad.safetensors", "safetensors", ExportOptions())


def test_the_command_names_consumer_and_difference(run: Run, tmp_path: Path) -> None:
    artifact = compress_llama(tmp_path)
    ran = run("export", artifact, "--to", "safetensors", "--check", "-o", tmp_path / "out")
    assert ran.code == 0
    assert "checked with safetensors " in ran.out.splitlines()[-1]
    assert ran.out.rstrip().endswith(": 21 tensors equal")
    ran = run("export", artifact, "--to", "safetensors", "--check", "-f", "-o", tmp_path / "out", "--json", "-")
    assert json.loads(ran.out)["check"]["difference"] == 0
    assert run("export", artifact, "--to", "safetensors", "--check", "-n").code == 2


def test_a_missing_consumer_is_told_before_anything_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compress_llama(tmp_path)
    monkeypatch.setattr(
        "qcompress.compress.check_export.missing_package",
        lambda name: UsageError(name, "is not installed", "pip install") if name == "gguf" else None,
    )
    ran = run("export", artifact, "--to", "gguf", "--check", "-o", tmp_path / "m.gguf")
    assert (ran.code, ran.err) == (2, "error: gguf: is not installed; pip install\n")
    assert not (tmp_path / "m.gguf").exists()
