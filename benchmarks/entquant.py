"""The scheme of EntQuant (Putzky et al. 2026, arXiv 2601.22787) on a checkpoint, at so many bits a weight.

    python benchmarks/entquant.py CHECKPOINT --bpw 2.0 -o DENSE

Weights lie on the grid of 8-bit floats (e4m3) under a scale s a row. L-BFGS chooses its logarithm, from the largest
weight on, rounding passed straight through: the least sum |s q - w| / sum |w| + lambda * 4 mean |q|. The penalty draws
codes to the few that entropy coding makes short. One lambda for all tensors is bisected for the bits that are asked.

Bits are the ideal of order-0 entropy coding, of each tensor's codes by their own frequencies, without tables, and 16 a
scale. Every tensor of two or more dimensions is coded. DENSE holds what the codes stand for; the last line is JSON:
bits a weight, bytes of codes, scales and kept tensors together, lambda, processor seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST = 448.0
"""Of the 8-bit floats."""
ITERATIONS = 500
"""Of L-BFGS at most, as published; it ends before 60 on small networks."""
LAMBDAS = (0.3, 300.0)
TRIES = 9
"""Of lambda."""


def cast(x: Tensor) -> Tensor:
    """The nearest 8-bit floats; the gradient is that of x."""
    held = x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype)
    return x + (held - x).detach()


def fit_scales(rows: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The codes [rows, columns] and the scales [rows, 1], held in bfloat16 as it is published."""
    start = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST
    exponent = start.log2().requires_grad_()
    whole = rows.abs().mean().clamp_min(1e-30)
    search = torch.optim.LBFGS([exponent], lr=1.0, max_iter=ITERATIONS, history_size=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        codes = cast(rows * (-exponent).exp2())
        found = (codes * exponent.exp2() - rows).abs().mean() / whole + strength * 4 * codes.abs().mean()
        found.backward()
        return found

    search.step(loss)
    with torch.no_grad():
        scale = exponent.exp2().to(torch.bfloat16).float()
        return cast(rows / scale), scale


def code_bits(codes: Tensor) -> float:
    """The entropy of all codes together, in bits."""
    counts = codes.unique(return_counts=True)[1].double()
    return float(-(counts * (counts / codes.numel()).log2()).sum())


def encode(weights: dict[str, Tensor], strength: float) -> tuple[float, dict[str, Tensor]]:
    """Bits of codes and scales, and what they stand for."""
    bits, found = 0.0, {}
    for name, weight in weights.items():
        codes, scale = fit_scales(weight.float().flatten(1), strength)
        bits += code_bits(codes) + 16 * len(scale)
        found[name] = (codes * scale).reshape(weight.shape).to(weight.dtype)
    return bits, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bpw", type=float, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    state = load_file(asked.checkpoint)
    weights = {name: one for name, one in state.items() if one.is_floating_point() and one.ndim > 1 and one.numel()}
    count = sum(one.numel() for one in weights.values())
    low, high = map(math.log, LAMBDAS)
    best: tuple[float, float, dict[str, Tensor]] | None = None
    for _ in range(TRIES):
        middle = (low + high) / 2
        bits, found = encode(weights, math.exp(middle))
        if bits / count <= asked.bpw:
            best, high = (bits, math.exp(middle), found), middle
        else:
            low = middle
    if best is None:
        raise SystemExit(f"no lambda up to {LAMBDAS[1]:g} leaves {asked.bpw:g} bits a weight")
    bits, strength, found = best
    save_file(state | found, asked.output)
    kept = sum(one.nbytes for name, one in state.items() if name not in weights)
    told = {"bpw": bits / count, "bytes": math.ceil(bits / 8) + kept, "lambda": strength}
    print(json.dumps(told | {"seconds": time.process_time()}))


if __name__ == "__main__":
    main()
