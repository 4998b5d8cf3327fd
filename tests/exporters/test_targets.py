"""What is quantized for a target is exported to it whole: nothing refused, nothing rounded, every weight equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import gaussian
from conftest import Run
from safetensors.torch import load_file

from exporters.members import MEMBERS, load_folder
from exporters.networks import LLAMA, llama_tensors, save_network
from qcompress import load_state_dict
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.side_files import HESSIAN, MEAN, save_statistics
from qcompress.compress.export import export
from qcompress.registry import METHODS
from qcompress.registry.targets import TARGETS

METHODS_HERE = ("rtn", "mse", "squant", "hqq", "gptq", "adaround")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32, "vocab_size": 32}
HELD = [
    (target, method)
    for target in TARGETS
    for method in METHODS_HERE
    if TARGETS[target].refuse_method(METHODS[method]) is None
]


def network(folder: Path, dtype: str = "F32", **changes: Any) -> Path:
    """A small Llama, one of whose matrices has values that float16 holds with few bits alone, and a row of zeros."""
    config = {**LLAMA, **SMALL, **changes, "dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    tensors = llama_tensors(config, DTYPES[dtype])
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 2.0**-12
    tensors["model.layers.0.self_attn.q_proj.weight"][1] = 0
    return save_network(folder / "network", config, tensors)


def statistics(source: Path) -> Path:
    """Second moments of inputs of every matrix, in a file."""
    found = {}
    for seed, (name, value) in enumerate(load_file(source / "model.safetensors").items()):
        if value.ndim == 2:
            inputs = gaussian(200, value.shape[1], seed=seed)
            found |= {f"{name}{HESSIAN}": (inputs.T @ inputs / 200)[None], f"{name}{MEAN}": inputs.mean(0)[None]}
    save_statistics(found, source.parent / "statistics")
    return source.parent / "statistics"


def asked(folder: Path, target: str, method: str) -> list[object]:
    """What to say on the command line, with as few steps as do for adaround."""
    width = {} if TARGETS[target].only_bits else {"bits": 4}
    groups = {"group_size": 32} if len(TARGETS[target].groups) > 1 else {}
    if method != "adaround":
        flags = [(f"--{name.replace('_', '-')}", value) for name, value in (width | groups).items()]
        return ["--for", target, "--method", method, *(part for flag in flags for part in flag)]
    rules = [{"match": "*", method: {"iterations": 20, **width, **groups}}]
    (folder / "recipe.yaml").write_text(json.dumps({"version": 1, "for": target, "rules": rules}))
    return ["-r", folder / "recipe.yaml"]


def quantized(run: Run, source: Path, target: str, method: str) -> Path:
    """The artifact of a network for a target."""
    files = ["--statistics", statistics(source)] if METHODS[method].needs == "calibration" else []
    output = source.parent / "artifact"
    found = run("quantize", source, *asked(source.parent, target, method), *files, "-o", output)
    assert found.code == 0, found.err
    return output


def assert_exported_whole(artifact: Path, target: str) -> dict[str, int]:
    """The consumer reads the artifact's weights, in their dtype; the bytes of what is held as no plain dtype."""
    output = artifact.parent / "exported"
    plan = export(read_artifact(artifact), output, TARGETS[target].exporter)
    assert not [note for note in plan.notes if "token" not in note], "nothing is dense that was not kept, nor rounded"
    read, expected = MEMBERS[TARGETS[target].exporter].read(output), load_state_dict(artifact)
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(read[name].to(value.dtype), value), name
    return {held.name: held.n_bytes for held in plan.held if held.name not in DTYPES}


@pytest.mark.parametrize(("target", "method"), HELD)
def test_every_method_gives_what_a_target_holds(target: str, method: str, run: Run, tmp_path: Path) -> None:
    source = network(tmp_path)
    artifact = quantized(run, source, target, method)
    held = assert_exported_whole(artifact, target)
    codes = {name: entry for file in read_artifact(artifact).files for name, entry in file.manifest.tensors.items()}
    matrices = {name for name in load_state_dict(artifact) if name.endswith("_proj.weight")}
    assert matrices <= codes.keys()
    assert {codes[name].bits for name in matrices} == {TARGETS[target].only_bits or 4}
    files = ["--statistics", tmp_path / "statistics"] if METHODS[method].needs == "calibration" else []
    planned = run("quantize", source, *asked(tmp_path, target, method), *files, "-n", "--json", "-")
    assert json.loads(planned.out)["target"]["bytes"] == sum(held.values())


@pytest.mark.parametrize("target", ["compressed-tensors", "gguf-q4_1", "mlx"])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_scales_are_of_the_checkpoints_dtype(target: str, dtype: str, method: str, run: Run, tmp_path: Path) -> None:
    artifact = quantized(run, network(tmp_path, dtype), target, method)
    assert_exported_whole(artifact, target)
    if target.startswith("gguf"):
        return
    stored = load_folder(tmp_path / "exported")
    scales = {value.dtype for name, value in stored.items() if name.endswith(("_scale", ".scales", ".biases"))}
    assert scales == {DTYPES[dtype]}
