"""GPTQ: weights a core-second and output error, ours against the algorithm as its authors' code has it.

    python benchmarks/gptq.py [--sizes 1024,2048] [--repeats 3] [--json FILE|-]

The reference is that code's loop in plain torch (float32, blocks of 128 columns, 1 % damping, min-max grid a row). Both
get the same Hessian, so that gathering it, which is one product an input batch, is in neither.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from timing import render, seconds_of, show
from torch import Tensor

from qcompress.coding.grids import decode, exponent_for
from qcompress.methods.gptq import encode
from qcompress.registry import GptqConfig
from qcompress.types.run import EncodeContext, Gram


def reference(weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """The quantized weight of the official loop."""
    w, h = weight.clone(), hessian.clone()
    rows, columns = w.shape
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    found = torch.zeros_like(w)
    for start in range(0, columns, 128):
        stop = min(start + 128, columns)
        block, errors = w[:, start:stop].clone(), torch.zeros(rows, stop - start)
        inner = upper[start:stop, start:stop]
        for i in range(stop - start):
            q = scale * (((block[:, i] / scale).round() + zero).clamp(0, 2**bits - 1) - zero)
            found[:, start + i] = q
            error = (block[:, i] - q) / inner[i, i]
            block[:, i:] -= error.unsqueeze(1) * inner[i, i:].unsqueeze(0)
            errors[:, i] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for size in options.sizes for bits in (4, 2) for row in measure(size, bits, options.repeats)]
    show(rows, render(rows), options.json)


def measure(size: int, bits: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each setting, ratios to the reference, on inputs as behind a ReLU, of a quarter of the rank."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size // 4, size, generator=generator)
    x = (torch.randn(4 * size, size // 4, generator=generator) @ mix).relu_()
    x += 0.1 * torch.randn(x.shape, generator=generator)
    weight, hessian = torch.randn(size, size, generator=generator), x.T @ x / len(x)
    mean = x.mean(0, keepdim=True).double()
    gram = Gram(hessian.double().unsqueeze(0), None, mean, mean, len(x))
    plain = reference(weight, hessian, bits)
    slow = seconds_of(lambda: reference(weight, hessian, bits), repeats)
    configs = {
        "paper": GptqConfig(bits=bits, preset="paper"),
        "without descent": GptqConfig(bits=bits, descent=0, range="mse"),
        "default": GptqConfig(bits=bits),
    }
    for name, config in configs.items():

        def run(config: GptqConfig = config) -> Tensor:
            context = EncodeContext(exponent_for(float(weight.abs().max())), torch.Generator().manual_seed(0), gram)
            return decode(encode(weight, config, context))

        found, fast = run(), seconds_of(run, repeats)
        errors = [float((((v - weight) @ hessian) * (v - weight)).sum()) for v in (found, plain)]
        yield {
            "name": f"{size}x{size} W{bits} {name}",
            "M weights/core-s": weight.numel() / fast / 1e6,
            "time": fast / slow,
            "output error": errors[0] / errors[1],
        }


if __name__ == "__main__":
    main()
