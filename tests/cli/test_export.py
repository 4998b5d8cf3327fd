"""`qcompress export`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run, files_under
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
    assert ran.err == f"error: --to {name}: not available in this version; use safetensors\n"
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
