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

from qcompress.coding.lattice_payload import decode_lattice, encode_pool, join_side
from qcompress.coding.lengths import coded_bits, make_pools
from qcompress.coding.payload import CodingChoice, entropy_bits
from qcompress.coding.side import Matrix, parse_side
from qcompress.encoded import Lattice
from qcompress.report.counts import count_values

NETWORKS = ("cifar10/resnet20", "imagenet/mobilenet_v1_075_224")


def rounded(weight: torch.Tensor, step: float, *, trellis: bool = False) -> Lattice:
    rows = weight.reshape(len(weight), -1).float()
    codes = torch.round(rows / step).int()
    return Lattice(codes, torch.tensor(step).half(), 0, tuple(weight.shape), trellis=trellis)


def gaussian(weights: int) -> torch.Tensor:
    """[rows, 1024] with scales of rows and columns that vary by factors of about two and one and a half."""
    generator = torch.Generator().manual_seed(0)
    rows = weights // 1024
    sizes = torch.exp2(torch.randn(rows, 1, generator=generator) / 2 + torch.randn(1, 1024, generator=generator) / 4)
    return torch.randn(rows, 1024, generator=generator) * sizes


def write(lattices: Sequence[Lattice], choice: CodingChoice) -> list[tuple[list[int], bytes, tuple[Any, ...]]]:
    """Of every pool its members, its side information, and (codings, payloads)."""
    found = []
    for members, own in make_pools(lattices):
        coded = encode_pool([lattices[member] for member in members], choice)
        side = join_side(coded.side, b"") if own else coded.side
        found.append((members, side, (coded.side, coded.codings, coded.payloads)))
    return found


def read(lattices: Sequence[Lattice], written: list[tuple[list[int], bytes, tuple[Any, ...]]]) -> None:
    for members, _, (side, codings, payloads) in written:
        sources = [matrix_of(lattices[member]) for member in members]
        grids, pool = parse_side(memoryview(side), sources)
        for place, (grid, matrix) in enumerate(zip(grids, sources, strict=True)):
            shape = (matrix.rows, matrix.columns)
            decode_lattice(memoryview(payloads[place]), codings[place], pool, place, grid.trellis, shape)


def matrix_of(lattice: Lattice) -> Matrix:
    rows, columns = lattice.codes.shape
    taps = int(np.prod(lattice.shape[2:])) if len(lattice.shape) > 2 else 1
    return Matrix(rows, columns, taps)


def measure(name: str, lattices: Sequence[Lattice], choices: Sequence[CodingChoice], repeats: int) -> list[Any]:
    weights = sum(lattice.codes.numel() for lattice in lattices)
    entropy = sum(entropy_bits(count_values(one.codes.numpy())) * one.codes.numel() for one in lattices) / weights
    model_seconds = seconds_of(lambda: coded_bits(lattices), repeats)
    rows = []
    for choice in choices:
        written = write(lattices, choice)
        n_bytes = sum(len(side) + sum(map(len, parts[2])) for _, side, parts in written)
        row = {
            "source": name,
            "coding": choice,
            "entropy": entropy,
            "bits": 8 * n_bytes / weights,
            "over_percent": 100 * (8 * n_bytes / weights / entropy - 1),
            "side_bits": 8 * sum(len(side) for _, side, _ in written) / weights,
            "model_percent": 100 * (coded_bits(lattices) / 8 / n_bytes - 1) if choice == "ans" else float("nan"),
            "model_ms": 1000 * model_seconds,
            "encode_m": weights / seconds_of(lambda c=choice: write(lattices, c), repeats) / 1e6,
            "decode_m": weights / seconds_of(lambda w=written: read(lattices, w), repeats) / 1e6,
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
        rows += measure("gaussian", [rounded(weight, step)], ("ans", "zstd"), arguments.repeats)
    rows += measure("trellis", [rounded(weight, 1.2, trellis=True)], ("ans", "zstd"), arguments.repeats)
    if "QCOMPRESS_DATA" in os.environ:
        for name in NETWORKS:
            state = load_file(Path(os.environ["QCOMPRESS_DATA"]) / f"{name}.safetensors")
            weights = [value for value in state.values() if value.ndim > 1]
            lattices = [rounded(value, 0.4 * float(value.float().std()) ** 0.5) for value in weights]
            rows += measure(name.partition("/")[2], lattices, ("ans", "zstd"), arguments.repeats)
    show(rows, render(rows), arguments.json)


if __name__ == "__main__":
    main()
