"""The folder for compressed-tensors: what transformers computes from it, and each thing that it cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import rule
from conftest import package_or_skip
from torch import Tensor

from exporters.networks import compress_llama, q4
from qcompress.artifact.reader import read_artifact
from qcompress.compress.export import export, plan_export
from qcompress.errors import InputError
from qcompress.types.export import ExportOptions
from qcompress.types.plan import Rule

TO = "compressed-tensors"


def logits(folder: Path, dtype: torch.dtype, **options: Any) -> Tensor:
    """What transformers computes from a folder, as it is loaded without a word or with these."""
    package_or_skip("compressed_tensors")
    transformers = package_or_skip("transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    with torch.no_grad():
        found: Tensor = network(torch.arange(40)[None] * 7 % 96).logits
    return found


def both(folder: Path, *rules: Rule, **changes: Any) -> tuple[Path, Path]:
    """The dense export of a small Llama's artifact, and the one for compressed-tensors."""
    artifact = read_artifact(compress_llama(folder, *rules, **changes))
    export(artifact, folder / "dense")
    export(artifact, folder / "packed", TO)
    return folder / "dense", folder / "packed"


ODD = q4("*.mlp.*_proj.weight", 3, granularity="channel", group_size=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "dtype", "tied"),
    [
        ((), torch.float32, False),
        ((ODD, q4(group_size=16), q4("*embed*", 8)), torch.float32, True),
        ((ODD, q4("*.v_proj.weight"), q4(), q4("lm_head.weight", 6)), torch.float32, False),
        # In bfloat16 scales are equal once they are bfloat16 numbers: those of rtn are, of weights that are.
        ((), torch.bfloat16, True),
    ],
)
def test_transformers_computes_what_the_dense_export_computes(
    rules: tuple[Rule, ...], dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    dense, packed = both(tmp_path, *rules, dtype=dtype, tie_word_embeddings=tied)
    assert torch.equal(logits(packed, dtype), logits(dense, dtype))


@pytest.mark.slow
def test_zero_points_are_loaded_as_the_note_says(tmp_path: Path) -> None:
    package_or_skip("compressed_tensors")
    dense, packed = both(tmp_path, q4(symmetric=False))
    config = package_or_skip("transformers").CompressedTensorsConfig(dequantize=True)
    expected = logits(dense, torch.float32)
    assert torch.equal(logits(packed, torch.float32, quantization_config=config), expected)
    notes = plan_export(read_artifact(tmp_path / "artifact"), TO).notes
    assert notes == ["zero points: transformers loads this folder only with CompressedTensorsConfig(dequantize=True)"]


GROUPED = {"granularity": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("rules", "lines"),
    [
        (
            (rule("*_proj.weight", "mse", bits=4, symmetric=False, **GROUPED),),
            ["an offset grid without an integer zero point"],
        ),
        ((rule("*_proj.weight", "mse", bits=2, symmetric=True, **GROUPED),), ["codes around a half"]),
        ((rule("*_proj.weight", "kmeans", bits=4),), ["of the form codebook"]),
        ((q4(group_size=40),), ["rows of 96, which groups of 40", "rows of 64, which groups of 40"]),
        ((q4("model.norm.weight", granularity="tensor", group_size=None),), ["no weight of a linear layer"]),
        (
            (q4("*.self_attn.q_proj.weight"), q4("*.k_proj.weight", 3), q4("*.v_proj.weight")),
            ["4 bits, groups of 32 and k_proj beside it 3 bits, groups of 32"],
        ),
        ((q4("*.gate_proj.weight"),), ["4 bits, groups of 32 and up_proj beside it none"]),
    ],
)
def test_what_it_cannot_hold_is_refused_a_line_a_cause(
    rules: tuple[Rule, ...], lines: list[str], tmp_path: Path
) -> None:
    artifact = read_artifact(compress_llama(tmp_path, *rules))
    with pytest.raises(InputError) as caught:
        plan_export(artifact, TO)
    found = caught.value.lines()
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert expected in line
    if "vLLM" in found[0]:
        assert plan_export(artifact, TO, ExportOptions(mixed=True)).held
    else:
        plan = plan_export(artifact, TO, ExportOptions(keep_unfit=True, mixed=True))
        assert [held.name for held in plan.held] == ["F32"]
        assert "compressed tensors that the format cannot hold are dense" in " ".join(plan.notes)


def test_scales_that_bfloat16_does_not_hold_stay_float32_and_are_told(tmp_path: Path) -> None:
    rules = (rule("*_proj.weight", "mse", bits=4, symmetric=True, **GROUPED),)
    plan = plan_export(read_artifact(compress_llama(tmp_path, *rules, dtype=torch.bfloat16)), TO)
    targets = {target.name: target for file in plan.files for target in file.targets}
    assert targets["model.layers.0.mlp.up_proj.weight_scale"].dtype == "F32"
    assert len(plan.notes) == 1
    assert "scales are no bfloat16 numbers: a model that is loaded in bfloat16 rounds them, by at most" in plan.notes[0]
    # Half a step of a number with 8 bits of mantissa.
    assert 0 < float(plan.notes[0].split("at most ")[1].split()[0]) <= 2**-8


def test_the_config_names_modules_by_few_patterns_and_what_is_dense(tmp_path: Path) -> None:
    _, packed = both(tmp_path, q4("model.layers.1.mlp.*_proj.weight", 8), q4())
    section = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert section["ignore"] == ["lm_head"]
    first, second = section["config_groups"]["group_0"], section["config_groups"]["group_1"]
    assert (first["weights"]["num_bits"], second["weights"]["num_bits"]) == (4, 8)
    assert "re:model\\.layers\\.\\d+\\.self_attn\\.q_proj$" in first["targets"]
    assert [name for name in first["targets"] if "mlp" in name] == [
        f"model.layers.0.mlp.{part}_proj" for part in ("down", "gate", "up")
    ]
    assert second["targets"] == [f"model.layers.1.mlp.{part}_proj" for part in ("down", "gate", "up")]
