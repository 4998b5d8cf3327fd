"""How small and how fast lattices are coded: real bytes over the entropy, M weights a core-second, a model's error.

    python benchmarks/rd_coding.py [--weights 4194304] [--repeats 5] [--json FILE|-]

Gaussian weights whose rows and columns differ in scale, rounded so that the order-0 entropy is about 1 to 4 bits; one
thread, process CPU time, the median of the repeats. Where QCOMPRESS_DATA is set, ResNet-20 and MobileNetV1 too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timing import render, seconds_of, show

from qcompress.coding.payload import entropy_bits
from qcompress.coding.stored import in_memory
from qcompress.coding.unbounded.lengths import coded_bits, make_pools
from qcompress.coding.unbounded.payload import decode_codes, encode_pool, join_side
from qcompress.coding.unbounded.side import Matrix, parse_side
from qcompress.report.counts import count_values
from qcompress.types.config import CodingChoice
from qcompress.types.encoded import Unbounded

NETWORKS = ("cifar10/resnet20", "imagenet/mobilenet_v1_075_224")


def rounded(weight: torch.Tensor, step: float, *, trellis: bool = False) -> Unbounded:
    rows = weight.reshape(len(weight), -1).float()
    codes = torch.round(rows / step).int()
    return Unbounded(codes, torch.tensor(step).half(), 0, tuple(weight.shape), trellis=trellis)


def gaussian(weights: int) -> torch.Tensor:
    """[rows, 1024] with scales of rows and columns that vary by factors of about two and one and a half."""
    generator = torch.Generator().manual_seed(0)
    rows = weights // 1024
    sizes = torch.exp2(torch.randn(rows, 1, generator=generator) / 2 + torch.randn(1, 1024, generator=generator) / 4)
    return torch.randn(rows, 1024, generator=generator) * sizes


def write(
    unbounded_tensors: Sequence[Unbounded], choice: CodingChoice
) -> list[tuple[list[int], bytes, tuple[Any, ...]]]:
    """Of every pool its members, its side information, and (codings, payloads)."""
    found = []
    for members, own in make_pools(unbounded_tensors):
        coded = encode_pool([unbounded_tensors[member] for member in members], choice)
        side = b"".join(map(bytes, join_side(coded.side, in_memory(b"")).pieces())) if own else coded.side
        payloads = [b"".join(map(bytes, payload.pieces())) for payload in coded.payloads]
        found.append((members, side, (coded.side, coded.codings, payloads)))
    return found


def read(unbounded_tensors: Sequence[Unbounded], written: list[tuple[list[int], bytes, tuple[Any, ...]]]) -> None:
    for members, _, (side, codings, payloads) in written:
        sources = [matrix_of(unbounded_tensors[member]) for member in members]
        grids, pool = parse_side(memoryview(side), sources)
        for place, (grid, matrix) in enumerate(zip(grids, sources, strict=True)):
            shape = (matrix.rows, matrix.columns)
            decode_codes(memoryview(payloads[place]), codings[place], pool, place, grid.trellis, shape)


def matrix_of(unbounded: Unbounded) -> Matrix:
    rows, columns = unbounded.codes.shape
    taps = int(np.prod(unbounded.shape[2:])) if len(unbounded.shape) > 2 else 1
    return Matrix(rows, columns, taps)


def measure(
    name: str, unbounded_tensors: Sequence[Unbounded], choices: Sequence[CodingChoice], repeats: int
) -> list[Any]:
    weights = sum(unbounded.codes.numel() for unbounded in unbounded_tensors)
    entropy = (
        sum(entropy_bits(count_values(one.codes.numpy())) * one.codes.numel() for one in unbounded_tensors) / weights
    )
    model_seconds = seconds_of(lambda: coded_bits(unbounded_tensors), repeats)
    rows = []
    for choice in choices:
        written = write(unbounded_tensors, choice)
        n_bytes = sum(len(side) + sum(map(len, parts[2])) for _, side, parts in written)
        row = {
            "name": f"{name}, {choice}",
            "entropy": entropy,
            "bits": 8 * n_bytes / weights,
            "over_percent": 100 * (8 * n_bytes / weights / entropy - 1),
            "side_bits": 8 * sum(len(side) for _, side, _ in written) / weights,
            "model_percent": 100 * (coded_bits(unbounded_tensors) / 8 / n_bytes - 1) if choice == "ans" else None,
            "model_ms": 1000 * model_seconds,
            "encode_m": weights / seconds_of(lambda c=choice: write(unbounded_tensors, c), repeats) / 1e6,
            "decode_m": weights / seconds_of(lambda w=written: read(unbounded_tensors, w), repeats) / 1e6,
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for stdout, in place of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight = gaussian(arguments.weights)
    rows = []
    for step in (3.0, 1.2, 0.6, 0.3):
        rows += measure(f"gaussian, step {step}", [rounded(weight, step)], ("ans", "zstd"), arguments.repeats)
    rows += measure("trellis, step 1.2", [rounded(weight, 1.2, trellis=True)], ("ans", "zstd"), arguments.repeats)
    if "QCOMPRESS_DATA" in os.environ:
        for name in NETWORKS:
            state = load_file(Path(os.environ["QCOMPRESS_DATA"]) / f"{name}.safetensors")
            weights = [value for value in state.values() if value.ndim > 1]
            unbounded_tensors = [rounded(value, 0.4 * float(value.float().std()) ** 0.5) for value in weights]
            rows += measure(name.partition("/")[2], unbounded_tensors, ("ans", "zstd"), arguments.repeats)
    show(rows, render(rows), arguments.json)


if __name__ == "__main__":
    main()
