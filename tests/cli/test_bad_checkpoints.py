"""Checkpoints that are damaged, foreign, lying or merely odd: the documented code, one clear line, nothing lost."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, files_under, refused, small_tensors, write_checkpoint
from safetensors.numpy import load_file

import qcompress


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header, whatever it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "three bytes": (b"abc", "3 bytes"),
    "text": (b"this is not a checkpoint at all", "not a safetensors file"),
    "pickle": (pickle.dumps({"a": [1.0]}, protocol=2), "pickle"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickle"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "git lfs pointer": (b"version https://git-lfs.example/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "header longer than the file": (safetensors_bytes({"a": entry(0, 4)}, bytes(4), length=10_000), "truncated"),
    "header of 2**63 bytes": (safetensors_bytes({"a": entry(0, 4)}, bytes(4), length=2**63), "header"),
    "header cut off": (safetensors_bytes({"a": entry(0, 400)}, bytes(400))[:30], "truncated"),
    "data cut off": (safetensors_bytes({"a": entry(0, 400)}, bytes(399)), "truncated"),
    "surplus data": (safetensors_bytes({"a": entry(0, 400)}, bytes(401)), "1 bytes after its last tensor"),
    "overlap": (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlap"),
    "hole": (safetensors_bytes({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "hole"),
    "shape too large": (safetensors_bytes({"a": entry(0, 4, [10, 10])}, bytes(4)), "needs 400 bytes"),
    "shape that overflows": (safetensors_bytes({"a": entry(0, 4, [2**62, 2**62])}, bytes(4)), "'a'"),
    "negative shape": (safetensors_bytes({"a": entry(0, 4, [-1, -1])}, bytes(4)), "shape"),
    "end before begin": (safetensors_bytes({"a": entry(4, 0, [1])}, bytes(4)), "offsets"),
    "unknown dtype": (safetensors_bytes({"a": entry(0, 4, dtype="F31")}, bytes(4)), "dtype"),
    "dtype that is no text": (safetensors_bytes({"a": {**entry(0, 4), "dtype": 3}}, bytes(4)), "dtype"),
    "no offsets": (safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "'a'"),
    "header that is a list": (safetensors_bytes([1, 2]), "header"),
    "header that is no JSON": (safetensors_bytes(b"{nothing}"), "JSON"),
    "header that is no UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "UTF-8"),
    "header nested without end": (safetensors_bytes(b'{"a":' * 50_000), "JSON"),
    "name given twice": (
        safetensors_bytes(b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
        "twice",
    ),
    "metadata that is no text": (safetensors_bytes({"__metadata__": {"a": 1}}), "metadata"),
}


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_bad_file_is_3_and_one_line(run: Run, tmp_path: Path, content: bytes, words: str) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(content)
    line = refused(run, tmp_path, "quantize", checkpoint, "--bits", 4)
    assert line.startswith(f"error: {checkpoint}: ")
    assert words in line
    # The same bytes are no artifact either.
    for command in ("verify", "report"):
        ran = run(command, checkpoint)
        assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)


def test_every_truncation_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(0, len(whole), 4999):
        cut.write_bytes(whole[:length])
        ran = run("quantize", cut, "--bits", 4)
        assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)


def test_a_missing_file_and_a_folder_without_one(run: Run, tmp_path: Path) -> None:
    assert "no such file" in run("quantize", tmp_path / "none.safetensors", "-b", 2).err
    folder = tmp_path / "folder"
    folder.mkdir()
    ran = run("quantize", folder, "--bits", 2)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert "holds no .safetensors file" in ran.err
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    assert "only pickles" in run("quantize", folder, "--bits", 2).err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        "promises model-00002-of-00002.safetensors of 2 files, which are not there: an unfinished download",
    ),
    "cut shard": (lambda folder: os.truncate(folder / "model-00002-of-00002.safetensors", 1000), "truncated"),
    "index that is no JSON": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "JSON"),
    "index without map": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "index of another folder": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}'),
        "outside its folder",
    ),
    "index that promises more": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            (folder / "model.safetensors.index.json").read_text().replace('"fc.bias"', '"fc.bais"')
        ),
        "fc.bais",
    ),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "index"),
}


@pytest.mark.parametrize(("damage", "words"), SHARDS.values(), ids=SHARDS)
def test_a_bad_sharded_folder_is_3(run: Run, sharded: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(sharded)
    assert words in refused(run, sharded.parent, "quantize", sharded, "--bits", 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_weights_that_are_not_finite_are_named(run: Run, tmp_path: Path, value: float, dtype: type) -> None:
    tensors = {name: t.astype(dtype) if t.ndim > 1 else t for name, t in small_tensors().items()}
    tensors["layer.weight"][3, 5:7] = value
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", tensors)
    line = refused(run, tmp_path, "quantize", checkpoint, "--bits", 4)
    assert "'layer.weight'" in line
    assert "2 of its 16384 values" in line
    assert "--skip-nonfinite" in line

    ran = run("quantize", checkpoint, "--bits", 4, "--skip-nonfinite", "--json", "-")
    assert ran.code == 0
    layers = {layer["name"]: layer for layer in json.loads(ran.out)["layers"]}
    assert layers["layer.weight"]["method"] == "kept"
    assert "2 values are NaN or Inf" in layers["layer.weight"]["reason"]
    assert layers["fc.weight"]["method"] == "squant"
    stored = load_file(tmp_path / "model-w4.safetensors")["layer.weight"]
    assert stored.tobytes() == tensors["layer.weight"].tobytes()


def test_gates_that_hold_for_nothing_still_leave_artifact_and_report(run: Run, tmp_path: Path) -> None:
    tensors = {"weight": np.full((4, 8), np.nan, dtype=np.float32)}
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", tensors)
    ran = run("quantize", checkpoint, "--bits", 4, "--skip-nonfinite", "--min-sqnr", 3)
    assert (ran.code, len(ran.error_lines)) == (3, 1)
    assert "no tensor was compressed" in ran.err
    assert (tmp_path / "model-w4.report.json").exists()
    assert run("verify", tmp_path / "model-w4.safetensors").code == 0


@pytest.mark.parametrize("method", ["rtn", "mse", "squant", "hqq"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_zero_constant_and_empty_tensors_are_fine(run: Run, tmp_path: Path, method: str, bits: int) -> None:
    tensors = {
        "zero.weight": np.zeros((4, 8), dtype=np.float32),
        "constant.weight": np.full((4, 8), 0.25, dtype=np.float32),
        "tiny.weight": np.full((4, 8), 1e-38, dtype=np.float32),
        "huge.weight": np.full((4, 8), 1e33, dtype=np.float32),
        "one.weight": np.ones((1, 1), dtype=np.float32),
        "empty.weight": np.zeros((0, 8), dtype=np.float32),
        "hollow.weight": np.zeros((8, 0), dtype=np.float32),
        "scalar": np.array(2.5, dtype=np.float32),
    }
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", tensors)
    ran = run("quantize", checkpoint, "--bits", bits, "--method", method, "-q", "-o", tmp_path / "out.safetensors")
    assert (ran.code, ran.err) == (0, "")
    assert run("verify", tmp_path / "out.safetensors").code == 0
    state = qcompress.load_state_dict(tmp_path / "out.safetensors")
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in state.items()} == {
        name: (t.shape, f"torch.{t.dtype}") for name, t in tensors.items()
    }
    assert not state["zero.weight"].any()
    assert state["scalar"].item() == 2.5
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    for name in ("constant.weight", "tiny.weight", "huge.weight", "one.weight"):
        np.testing.assert_allclose(state[name].numpy(), tensors[name], rtol=2e-3)


@pytest.mark.parametrize("largest", [1e34, 1e36, 3.4e38])
@pytest.mark.parametrize(("method", "bits"), [("rtn", 1), ("mse", 3), ("squant", 4), ("hqq", 4)])
def test_weights_near_the_end_of_float32_are_compressed_or_refused(
    run: Run, tmp_path: Path, method: str, bits: int, largest: float
) -> None:
    weight = np.linspace(-largest, largest, 32, dtype=np.float32).reshape(4, 8)
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", {"weight": weight})
    output = tmp_path / "out.safetensors"
    ran = run("quantize", checkpoint, "--bits", bits, "--method", method, "-o", output)
    if ran.code == 0:
        assert run("verify", output).code == 0
        assert qcompress.load_state_dict(output)["weight"].isfinite().all()
    else:
        assert (ran.code, len(ran.error_lines), output.exists()) == (3, 1, False)


def test_a_checkpoint_without_weights_says_so(run: Run, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", {"bias": np.ones(3, dtype=np.float32)})
    ran = run("quantize", checkpoint, "--bits", 2)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert "compresses nothing" in ran.err
    checkpoint.write_bytes(safetensors_bytes({}))
    ran = run("quantize", checkpoint, "--bits", 2)
    assert (ran.code, ran.err.count("\n")) == (3, 1)


def test_an_artifact_is_not_compressed_again(run: Run, checkpoint: Path) -> None:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    ran = run("quantize", checkpoint.with_name("model-w2.safetensors"), "--bits", 2)
    assert (ran.code, ran.out) == (3, "")
    assert "is compressed already" in ran.err
    assert "export" in ran.err


def test_a_checkpoint_is_no_artifact(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    before = files_under(tmp_path)
    for command in (["verify"], ["report"], ["export", "--to", "safetensors"]):
        ran = run(*command, checkpoint)
        assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)
        assert "not" in ran.err
    assert files_under(tmp_path) == before


def test_a_recipe_that_matches_nothing_names_what_is_near(run: Run, checkpoint: Path) -> None:
    recipe = 'version: 1\nrules: [{match: "layr.weight", rtn: {bits: 4}}]'
    ran = run("quantize", checkpoint, "-r", "-", stdin=recipe)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert "layer.weight" in ran.err


@pytest.mark.parametrize("position", [0.02, 0.5, 0.9])
def test_a_flipped_bit_is_found(run: Run, checkpoint: Path, position: float) -> None:
    assert run("quantize", checkpoint, "--bits", 4).code == 0
    artifact = checkpoint.with_name("model-w4.safetensors")
    raw = bytearray(artifact.read_bytes())
    raw[int(position * len(raw))] ^= 4
    artifact.write_bytes(raw)
    ran = run("verify", artifact)
    assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)
