"""The folder for mlx-lm: what it computes from it on a processor, and what it cannot hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from artifact.examples import rule
from conftest import package_or_skip

from exporters.networks import compress_llama, q4
from qcompress.artifact.reader import read_artifact
from qcompress.compress.export import export, plan_export
from qcompress.errors import InputError
from qcompress.types.export import ExportOptions
from qcompress.types.plan import Rule

GROUPED = {"granularity": "group", "group_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [
        (),
        (q4(symmetric=False), q4("*embed*", 8)),
        (rule("*_proj.weight", "mse", bits=4, symmetric=False, **GROUPED), q4("*embed*", 8)),
        (rule("*_proj.weight", "mse", bits=3, symmetric=False, granularity="channel"),),
    ],
)
def test_mlx_lm_computes_what_the_dense_export_computes(rules: tuple[Rule, ...], tmp_path: Path) -> None:
    mx = package_or_skip("mlx.core")
    utils = package_or_skip("mlx_lm.utils")
    transformers = package_or_skip("transformers")
    mx.set_default_device(mx.cpu)
    artifact = read_artifact(compress_llama(tmp_path, *rules, tie_word_embeddings=True))
    export(artifact, tmp_path / "dense")
    export(artifact, tmp_path / "mlx", "mlx")
    ids = torch.arange(40)[None] * 7 % 96
    network, _ = utils.load_model(tmp_path / "mlx")
    found = torch.tensor(network(mx.array(ids.numpy())).astype(mx.float32).tolist())
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = dense(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ((rule("*_proj.weight", "kmeans", bits=4),), "of the form codebook"),
        ((q4(group_size=16),), "rows of 96 in groups of 16, and MLX has groups of 32, 64 and 128"),
        ((q4("model.norm.weight", granularity="tensor", group_size=None),), "no weight of a linear layer"),
    ],
)
def test_what_it_cannot_hold_is_refused_or_dense(rules: tuple[Rule, ...], line: str, tmp_path: Path) -> None:
    artifact = read_artifact(compress_llama(tmp_path, *rules))
    with pytest.raises(InputError) as caught:
        plan_export(artifact, "mlx")
    assert line in caught.value.lines()[0]
    plan = plan_export(artifact, "mlx", ExportOptions(keep_unfit=True))
    assert [held.name for held in plan.held] == ["F32"]
    assert "quantization" not in json.loads(plan.texts["config.json"])


def test_a_scale_a_row_is_repeated_for_the_largest_group_that_divides_it(tmp_path: Path) -> None:
    rules = (q4("*.down_proj.weight", granularity="channel", group_size=None), q4(group_size=64))
    config = json.loads(plan_export(read_artifact(compress_llama(tmp_path, *rules)), "mlx").texts["config.json"])
    section = config["quantization"]
    assert (section["group_size"], section["bits"]) == (64, 4)
    # Rows of 96: neither 128 nor 64 divide them.
    assert section["model.layers.1.mlp.down_proj"] == {"group_size": 32, "bits": 4}


def test_a_head_of_its_own_is_told_where_the_config_does_not(tmp_path: Path) -> None:
    """mlx-lm takes heads for tied where config.json is silent, and transformers for their own."""
    for tied, expected in ((None, False), (False, False), (True, True)):
        folder = tmp_path / str(tied)
        folder.mkdir()
        changes = {} if tied is None else {"tie_word_embeddings": tied}
        plan = plan_export(read_artifact(compress_llama(folder, **changes)), "mlx")
        assert json.loads(plan.texts["config.json"])["tie_word_embeddings"] is expected
