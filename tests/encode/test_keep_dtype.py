"""Tensors that are kept in half precision: smaller on disk, back in their own dtype, and only where they bear it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact.educational_decoder import expand
from artifact.examples import denses, gaussian, plan_for, recipe, rewrite, rtn, rule, run, save, verify
from artifact.test_hostile import refusal
from conftest import Run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.compress import compress
from qcompress.compress.export import export
from qcompress.compress.load import load_state_dict
from qcompress.plan.plan import make_plan
from qcompress.recipe import parse_recipe, recipe_yaml
from qcompress.report.gather import gather_report
from qcompress.types.encoded import Fitted, Kept
from qcompress.types.plan import Keep, Recipe
from qcompress.types.run import Options


def network() -> dict[str, Tensor]:
    return {
        "w": gaussian(6, 8),
        "bias": gaussian(6, seed=1),
        "mean": gaussian(6, seed=2, dtype=torch.float64),
        "brain": gaussian(6, seed=3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "large": torch.tensor([1e5, 1.0]),
        "tiny": torch.full((5,), 1e-12),
        "mixed": torch.tensor([1.0, -2.5, 1e-30]),
        "none": torch.empty(0),
    }


def asked(**options: object) -> Recipe:
    return replace(rtn(4, "w"), keep_dtype="f16", **options)


def stored_dtypes(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys() if ".qc." not in name}  # noqa: SIM118


HALVED = {"bias", "mean", "mixed"}


def test_what_bears_it_is_stored_in_halves_and_loads_in_its_own_dtype(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", network())
    report = run(source, tmp_path / "out.safetensors", asked())
    found = stored_dtypes(tmp_path / "out.safetensors")
    assert {name for name, dtype in found.items() if dtype == "F16"} == HALVED
    verify(tmp_path / "out.safetensors")
    state = load_state_dict(tmp_path / "out.safetensors")
    for name, value in network().items():
        assert state[name].dtype == value.dtype
        if name != "w":
            assert torch.equal(state[name], value.half().to(value.dtype) if name in HALVED else value)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["bias"] == "no rule matches; stored as F16"
    assert reasons["large"] == reasons["tiny"] == "no rule matches; float16 cannot hold its values"
    assert reasons["brain"] == reasons["count"] == "no rule matches"


def test_every_reader_agrees(tmp_path: Path) -> None:
    for tensors in (network(), {**network(), "half": gaussian(4, dtype=torch.float16)}):
        source = save(tmp_path / "in.safetensors", tensors)
        report = run(source, tmp_path / "out.safetensors", asked(), force=True)
        state = load_state_dict(tmp_path / "out.safetensors")
        assert denses(state) == expand(tmp_path / "out.safetensors")
        export(read_artifact(tmp_path / "out.safetensors"), tmp_path / "dense.safetensors", force=True)
        assert denses(load_file(tmp_path / "dense.safetensors")) == denses(state)
        gathered = gather_report(tmp_path / "out.safetensors")
        assert gathered.size.parts == report.size.parts
        mine = {layer.name: (layer.bytes, layer.baseline_bytes, layer.dtype) for layer in report.layers}
        assert {layer.name: (layer.bytes, layer.baseline_bytes, layer.dtype) for layer in gathered.layers} == mine


def test_the_plan_counts_what_will_be_stored(tmp_path: Path) -> None:
    tensors = {"w": gaussian(6, 8), "bias": gaussian(600)}
    checkpoint = read_checkpoint(save(tmp_path / "in.safetensors", tensors))
    plan = plan_for(checkpoint, asked())
    assert {d.tensor.name: d.stored for d in plan.decisions} == {"w": None, "bias": "F16"}
    small = compress(checkpoint, plan, Options(tmp_path / "half.safetensors"))
    large = compress(checkpoint, plan_for(checkpoint, rtn(4, "w")), Options(tmp_path / "whole.safetensors"))
    assert large.size.parts.kept - small.size.parts.kept == 1200


def test_a_rule_decides_for_its_own_tensors() -> None:
    text = 'version: 1\nrules:\n- {match: "a*", keep: {dtype: f16}}\n- {match: "*", rtn: {bits: 4}}\n'
    read = parse_recipe(text, "r.yaml")
    assert read.rules[0].config == Keep(dtype="f16")
    assert parse_recipe(recipe_yaml(read), "r.yaml").rules[0].config == read.rules[0].config
    from qcompress.types.plan import TensorInfo

    infos = [TensorInfo("a", (4,), "F32"), TensorInfo("b", (4,), "F32"), TensorInfo("w", (4, 4), "F32")]
    plan = make_plan(read, infos, {}, {})
    assert [decision.stored for decision in plan.decisions] == ["F16", None, None]


def test_the_recipe_says_it_once_for_all() -> None:
    read = parse_recipe('version: 1\nkeep_dtype: f16\nrules:\n- {match: "*", rtn: {bits: 4}}\n', "r.yaml")
    assert read.keep_dtype == "f16"
    assert parse_recipe(recipe_yaml(read), "r.yaml").keep_dtype == "f16"


def test_what_a_method_has_adjusted_is_judged_and_stored(tmp_path: Path) -> None:
    tensors = {"w": gaussian(6, 8), "bias": gaussian(6), "scale": gaussian(6, seed=1)}
    checkpoint = read_checkpoint(save(tmp_path / "in.safetensors", tensors))
    fitted = Fitted({"bias": Kept(torch.full((6,), 0.1)), "scale": Kept(torch.full((6,), 1e6))})
    compress(checkpoint, plan_for(checkpoint, asked()), Options(tmp_path / "out.safetensors"), fitted)
    state = load_state_dict(tmp_path / "out.safetensors")
    assert torch.equal(state["bias"], torch.full((6,), 0.1).half().float())
    assert torch.equal(state["scale"], torch.full((6,), 1e6))


def test_the_flag(run: Run, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": gaussian(6, 8), "bias": gaussian(6)})
    assert run("quantize", source, "--bits", 4, "--keep-dtype", "f16", "-q").code == 0
    assert stored_dtypes(tmp_path / "in-w4.safetensors")["bias"] == "F16"
    wrong = run("quantize", source, "--bits", 4, "--keep-dtype", "f8", "-f")
    assert wrong.code == 2
    assert "use --keep-dtype f16" in wrong.err


@pytest.mark.parametrize(
    ("halved", "words"),
    [
        ({"F32": ["w"]}, "tensor 'w' is in 'halved', and is not kept as F16"),
        ({"F32": ["count"]}, "tensor 'count' is in 'halved', and is not kept as F16"),
        ({"F32": ["nothing"]}, "tensor 'nothing' is in 'halved', and is not kept as F16"),
        ({"BF16": "*"}, "'halved' of 'BF16'"),
        ({"F32": "all"}, "'halved' of 'F32'"),
        ({"F32": [3]}, "not a list of names"),
        ({"F32": "*", "F64": "*"}, "two dtypes of all tensors"),
    ],
)
def test_halves_that_lie_are_refused(halved: object, words: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", network())
    run_recipe = recipe(rule("w", "rtn", bits=4), rule("*"))
    run(source, tmp_path / "out.safetensors", replace(run_recipe, keep_dtype="f16"))

    def change(_header: object, manifest: dict[str, object], _data: object) -> None:
        manifest["halved"] = halved

    assert words in refusal(rewrite(tmp_path / "out.safetensors", change))
