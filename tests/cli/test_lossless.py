"""`quantize --lossless`: every tensor entropy coded, none compressed, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from artifact.examples import denses, gaussian, save, save_folder
from conftest import Run

from qcompress.compress.load import load_state_dict


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": gaussian(80, 64, dtype=torch.bfloat16),
        "layer.weight": gaussian(64, 64, dtype=torch.bfloat16),
        "layer.bias": gaussian(64, dtype=torch.bfloat16),
        "steps": torch.arange(5000),
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "model.safetensors", tensors())


def test_a_checkpoint_becomes_smaller_and_comes_back(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    done = run("quantize", checkpoint, "--lossless", "-q")
    assert (done.code, done.out) == (0, f"{tmp_path / 'model-lossless.safetensors'}\n")
    artifact = tmp_path / "model-lossless.safetensors"
    assert denses(load_state_dict(artifact)) == denses(tensors())
    assert run("export", artifact, "--to", "safetensors", "-o", tmp_path / "dense.safetensors").code == 0
    assert run("verify", artifact).code == 0
    report = json.loads(run("report", artifact, "--format", "json").out)
    assert report["size"]["compressed_weights"] == 0
    assert {layer["method"] for layer in report["layers"]} == {"kept"}
    sizes = {layer["name"]: layer["bytes"] / layer["baseline_bytes"] for layer in report["layers"]}
    assert sizes["layer.weight"] < 0.75
    assert sizes["layer.bias"] == sizes["steps"] == 1
    recipe = json.loads(run("quantize", checkpoint, "--lossless", "-n", "--json", "-").out)
    assert [row["method"] for row in recipe["tensors"]] == ["kept"] * 4


def test_a_folder_and_a_compact_file(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    save_folder(tmp_path / "net", {"model.safetensors": tensors()}, {"model_type": "none"})
    assert run("quantize", tmp_path / "net", "--lossless", "-q").code == 0
    assert denses(load_state_dict(tmp_path / "net-lossless")) == denses(tensors())
    assert run("quantize", checkpoint, "--lossless", "--compact", "-o", tmp_path / "c.safetensors").code == 0
    assert denses(load_state_dict(tmp_path / "c.safetensors")) == denses(tensors())


def test_the_coding_can_be_named(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    sizes = {}
    for coding in ("auto", "zstd", "ans"):
        output = tmp_path / f"{coding}.safetensors"
        assert run("quantize", checkpoint, "--lossless", "--coding", coding, "-o", output).code == 0
        assert denses(load_state_dict(output)) == denses(tensors())
        sizes[coding] = output.stat().st_size
        other = tmp_path / f"{coding}-other.safetensors"
        assert run("quantize", checkpoint, "--lossless", "--keep-coding", coding, "-o", other).code == 0
        assert other.read_bytes() == output.read_bytes()
    assert sizes["auto"] <= min(sizes.values()) + 16
    assert sizes["zstd"] != sizes["ans"]


def test_what_is_kept_beside_weights_can_be_coded(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('version: 1\nrules:\n- {match: "layer.*", rtn: {bits: 4}}\n')
    plain, coded = tmp_path / "plain.safetensors", tmp_path / "coded.safetensors"
    assert run("quantize", checkpoint, "-r", recipe, "-o", plain).code == 0
    assert run("quantize", checkpoint, "-r", recipe, "-o", coded, "--keep-coding", "auto").code == 0
    assert denses(load_state_dict(plain)) == denses(load_state_dict(coded))
    assert coded.stat().st_size < plain.stat().st_size - 2000


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--bits", 4], "--lossless --bits: weights that are stored without loss have neither"),
        (["--method", "rtn"], "--lossless --method: "),
        (["--bits-embedding", 8], "--lossless --bits-embedding: "),
        (["--for", "mlx"], "--lossless --for: "),
        (["--effort", "fast"], "--lossless --effort: "),
        (["--bpw", 2], "--lossless --bpw 2.0: "),
        (["--minimize", "size"], "--lossless --minimize size: "),
        (["--keep-dtype", "f16"], "--lossless --keep-dtype: "),
        (["--coding", "packed"], "--lossless --coding packed: packed codes save nothing"),
        (["--keep-coding", "huffman"], "--keep-coding huffman: not a coding to keep tensors in; valid here: `auto`, "),
        (["-r", "r.yaml"], "-r r.yaml --lossless: the recipe decides what becomes of the weights; "),
    ],
)
def test_what_loses_bits_is_refused_beside_it(words: list[object], line: str, checkpoint: Path, run: Run) -> None:
    done = run("quantize", checkpoint, "--lossless", *words)
    assert done.code == 2
    assert line in done.err
    assert len(done.err.splitlines()) == 1


def test_a_checkpoint_that_is_read_as_another_is_refused(run: Run, tmp_path: Path) -> None:
    """Its bytes are fp8 and scales: dense weights would be larger, and no copy of what is there."""
    weight = gaussian(128, 128).to(torch.float8_e4m3fn)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    shard = {"w.weight": weight, "w.weight_scale_inv": torch.ones(1, 1)}
    save_folder(tmp_path / "net", {"model.safetensors": shard}, config)
    done = run("quantize", tmp_path / "net", "--lossless")
    assert done.code == 3
    assert "holds fp8 or MXFP4 weights" in done.err
