"""`qcompress export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run, files_under
from exporters.networks import compress_llama
from safetensors.torch import load_file

import qcompress
from qcompress.registry import EXPORTERS


@pytest.fixture
def artifact(run: Run, checkpoint: Path) -> Path:
    assert run("quantize", checkpoint, "--bits", 3).code == 0
    return checkpoint.with_name("model-w3.safetensors")


def test_the_dense_export_is_what_load_state_dict_gives(run: Run, artifact: Path, checkpoint: Path) -> None:
    ran = run("export", artifact, "--to", "safetensors", "-q")
    output = artifact.with_name("model-w3-dense.safetensors")
    assert (ran.code, ran.out, ran.err) == (0, f"{output}\n", "")
    dense, state, original = load_file(output), qcompress.load_state_dict(artifact), load_file(checkpoint)
    assert dense.keys() == state.keys() == original.keys()
    for name, tensor in dense.items():
        assert torch.equal(tensor, state[name])
        assert (tensor.shape, tensor.dtype) == (original[name].shape, original[name].dtype)
    assert torch.equal(dense["fc.bias"], original["fc.bias"])
    assert not torch.equal(dense["fc.weight"], original["fc.weight"])


def test_a_dense_export_can_be_compressed_again_to_the_same_weights(run: Run, artifact: Path) -> None:
    assert run("export", artifact, "--to", "safetensors").code == 0
    dense = artifact.with_name("model-w3-dense.safetensors")
    assert run("quantize", dense, "--bits", 8).code == 0
    # 2**3 values a channel, evenly spaced, all lie close to an 8-bit grid.
    again = qcompress.load_state_dict(artifact.with_name("model-w3-dense-w8.safetensors"))
    for name, tensor in load_file(dense).items():
        torch.testing.assert_close(again[name], tensor, atol=2e-3, rtol=0)


def test_a_sharded_export_keeps_its_files(run: Run, sharded: Path) -> None:
    assert run("quantize", sharded, "--bits", 4).code == 0
    folder = sharded.with_name("network-w4")
    ran = run("export", folder, "--to", "safetensors", "-o", sharded.with_name("dense"), "-q")
    assert (ran.code, ran.out) == (0, f"{sharded.with_name('dense')}\n")
    assert set(files_under(sharded.with_name("dense"))) == set(files_under(sharded))
    assert run("quantize", sharded.with_name("dense"), "--bits", 4, "-n").code == 0


@pytest.mark.parametrize("name", [name for name, exporter in EXPORTERS.items() if exporter.target is None])
def test_what_is_not_built_is_refused_by_name(run: Run, artifact: Path, name: str) -> None:
    before = files_under(artifact.parent)
    ran = run("export", artifact, "--to", name)
    assert (ran.code, ran.out) == (2, "")
    built = ", ".join(one for one, exporter in EXPORTERS.items() if exporter.target)
    assert ran.err == f"error: --to {name}: not available in this version; use {built}\n"
    assert files_under(artifact.parent) == before


def test_an_existing_export_is_kept_without_force(run: Run, artifact: Path) -> None:
    assert run("export", artifact, "--to", "safetensors").code == 0
    before = files_under(artifact.parent)
    ran = run("export", artifact, "--to", "safetensors")
    assert (ran.code, len(ran.error_lines)) == (3, 1)
    assert files_under(artifact.parent) == before
    assert run("export", artifact, "--to", "safetensors", "--force").code == 0
    assert run("export", artifact, "--to", "safetensors", "-f", "-o", artifact).code == 3
    assert files_under(artifact.parent) == before


def test_a_dry_run_tells_the_bytes_and_writes_nothing(run: Run, artifact: Path) -> None:
    before = files_under(artifact.parent)
    told = json.loads(run("export", artifact, "--to", "safetensors", "-n", "--json", "-").out)
    assert files_under(artifact.parent) == before
    assert not told["written"]
    done = json.loads(run("export", artifact, "--to", "safetensors", "--json", "-").out)
    output = artifact.with_name(done["output"])
    assert told == {**done, "written": False}
    assert done["bytes"] == output.stat().st_size == done["files"][output.name]
    assert sum(held["weights"] for held in done["formats"]) == sum(one.numel() for one in load_file(output).values())


def test_a_network_is_written_for_each_of_the_others(run: Run, tmp_path: Path) -> None:
    artifact = compress_llama(tmp_path)
    for to, output in (("compressed-tensors", "c"), ("mlx", "m"), ("gguf", "g.gguf")):
        ran = run("export", artifact, "--to", to, "-o", tmp_path / output)
        n_bytes = sum(map(len, files_under(tmp_path / output).values())) or (tmp_path / output).stat().st_size
        assert ran.code == 0
        assert ran.out.splitlines()[0] == f"{tmp_path / output}: {n_bytes:,} bytes"
        assert "14 tensors, 61,440 weights" in ran.out
    assert run("export", artifact, "--to", "gguf", "-q").out == f"{tmp_path / 'artifact.gguf'}\n"


def test_options_of_another_format_are_refused(run: Run, artifact: Path) -> None:
    ran = run("export", artifact, "--to", "mlx", "--pad-hidden")
    assert (ran.code, ran.err) == (2, "error: --pad-hidden: means nothing to --to mlx; it is for gguf\n")
