"""Weights near the ends of their dtypes: as good as others, or refused with a way out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from artifact.educational_decoder import expand
from artifact.examples import gaussian, save
from conftest import Run

from qcompress.compress.load import load_state_dict

BASE = gaussian(8, 64, seed=0)
WEIGHTS = {
    "bf16 3e38": (BASE / BASE.abs().max() * 3e38).bfloat16(),
    "f32 3.4e38": BASE / BASE.abs().max() * 3.4e38,
    "bf16 1e-38": (BASE * 1e-38).bfloat16(),
    "f16 65504": (BASE / BASE.abs().max() * 65504).half(),
    "f16 1e-7": (BASE * 1e-7).half(),
    "f64 1e30": BASE.double() * 1e30,
}


def sqnr(weight: torch.Tensor, found: torch.Tensor) -> float:
    exact = weight.double()
    error = float((found.double() - exact).square().sum() / exact.square().sum())
    return -10 * math.log10(error) if error else math.inf


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("words", "least"),
    [
        (["--bits", 8], 43.0),
        (["--bits", 8, "--method", "mse"], 43.0),
        (["--bits", 8, "--method", "hqq"], 43.0),
        (["--bits", 8, "--method", "rtn"], 42.0),
        (["--bpw", 7], 28.0),
    ],
    ids=["squant", "mse", "hqq", "rtn", "rd"],
)
def test_weights_near_the_ends_of_their_dtypes(
    run: Run, tmp_path: Path, name: str, words: list[object], least: float
) -> None:
    weight, output = WEIGHTS[name], tmp_path / "o.safetensors"
    source = save(tmp_path / "m.safetensors", {"w.weight": weight})
    ran = run("quantize", source, *words, "-o", output, "-q")
    assert ran.code == 0 and not ran.err.startswith("warning"), ran.err
    found = load_state_dict(output)["w.weight"]
    assert sqnr(weight, found) >= least
    if "--bpw" not in words:
        # The decoder written from the SPEC gives the same bytes.
        assert expand(output)["w.weight"].data == found.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("words", [["--bits", 8], ["--bpw", 6]])
def test_what_float32_does_not_hold_is_refused(run: Run, tmp_path: Path, words: list[object]) -> None:
    for scale, what in ((1e300, "beyond float32"), (1e-60, "below those that float32 holds")):
        source = save(tmp_path / "m.safetensors", {"w.weight": BASE.double() * scale})
        ran = run("quantize", source, *words, "-o", tmp_path / "o.safetensors", "-q")
        assert ran.code == 3 and what in ran.err
