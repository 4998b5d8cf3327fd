"""Checkpoints of other quantizers are refused in one line with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run, refused
from safetensors.torch import save_file
from torch import Tensor

from qcompress.checkpoint.checkpoint import read_checkpoint

I32, U8, I8 = torch.zeros(4, 8).int(), torch.zeros(4, 8).byte(), torch.zeros(4, 8).char()
F8, F16, U32 = torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(4, 1).half(), torch.zeros(4, 8).to(torch.uint32)

CASES: dict[str, tuple[dict[str, Tensor], str, str | None]] = {
    "compressed-tensors": ({"weight_packed": I32, "weight_scale": F16}, "compressed-tensors", "dequantize=True"),
    "compressed-tensors fp8": ({"weight": F8, "weight_scale": F16}, "compressed-tensors", "dequantize=True"),
    "gptq": ({"qweight": I32, "qzeros": I32, "scales": F16, "g_idx": I32}, "GPTQ", "that it was made from"),
    "awq": ({"qweight": I32, "qzeros": I32, "scales": F16}, "AWQ", "that it was made from"),
    "bitsandbytes 4": ({"weight": U8, "weight.absmax": U8, "weight.quant_map": F16}, "bitsandbytes", "dequantize()"),
    "bitsandbytes 8": ({"weight": I8, "SCB": F16}, "bitsandbytes", "model.dequantize()"),
    "mlx": ({"weight": U32, "scales": F16, "biases": F16}, "MLX", "that it was made from"),
    "hqq": ({"W_q": U8, "scale": F16, "zero": F16}, "HQQ", "dequantize()"),
    "quanto": ({"weight._data": I8, "weight._scale": F16}, "quanto", "dequantize()"),
    "openai": ({"mlp1_weight.blocks": U8, "mlp1_weight.scales": U8}, "MXFP4 in OpenAI's layout", "config.json"),
}


def write(folder: Path, tensors: dict[str, Tensor], method: str | None = None) -> Path:
    folder.mkdir()
    named = {f"model.layers.0.q_proj.{leaf}": value.clone() for leaf, value in tensors.items()}
    save_file({**named, "norm.weight": torch.ones(4)}, folder / "model.safetensors")
    config = {} if method is None else {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_names_of_tensors_tell_the_tool(case: str, run: Run, tmp_path: Path) -> None:
    tensors, tool, hint = CASES[case]
    line = refused(run, tmp_path, "quantize", write(tmp_path / "m", tensors), "--bits", 4)
    assert f"m: is quantized already, by {tool}" in line and str(hint) in line
    alone = refused(run, tmp_path, "cluster", tmp_path / "m" / "model.safetensors", "--bits", 4)
    assert f"is quantized already, by {tool}" in alone


@pytest.mark.parametrize(
    ("method", "tool"),
    [
        *(("gptq", "GPTQ"), ("awq", "AWQ"), ("bitsandbytes", "bitsandbytes"), ("torchao", "torchao")),
        *(("compressed-tensors", "compressed-tensors"), ("a_newer_one", "a_newer_one")),
    ],
)
def test_config_tells_the_tool_of_codes_of_any_name(method: str, tool: str, run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"strange": I8}, method)
    assert f"is quantized already, by {tool}; " in refused(run, tmp_path, "quantize", path, "--bits", 4)


def test_dense_weights_are_dense_whatever_config_says(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"weight": torch.ones(4, 8)}, "gptq")
    assert len(read_checkpoint(path).tensors) == 2


def test_integers_that_are_nobodys_codes_are_no_quantizers(tmp_path: Path) -> None:
    """Position ids, masks, lookups: kept, as ever."""
    path = write(tmp_path / "m", {"position_ids": I32, "mask": U8, "scales": F16, "weight": torch.ones(2, 2)})
    assert len(read_checkpoint(path).tensors) == 5


def test_our_own_artifact_is_refused_file_and_folder(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"weight": torch.randn(8, 16)})
    assert run("quantize", path, "--bits", 4, "-q", "-o", tmp_path / "a").code == 0
    for artifact in (tmp_path / "a", tmp_path / "a" / "model.qcompress.safetensors"):
        line = refused(run, tmp_path, "quantize", artifact, "--bits", 4, "-o", tmp_path / "b")
        assert "is compressed already" in line and "qcompress export ARTIFACT --to safetensors" in line
