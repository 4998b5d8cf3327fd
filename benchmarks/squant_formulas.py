"""SQuant by its official formulas, read literally, one kernel at a time in floats: an oracle for `preset: paper`.

    QCOMPRESS_DATA=/path/to/data python benchmarks/squant_formulas.py [--networks resnet20,resnet32] [--bits 4,3,2]
        [--limit 1000] [--json FILE|-]

Prints for every network, choice of stages and width the score, and the share of the weights that the preset of this
package puts on another level: its scales are float16.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import CASES, compressible
from numpy.typing import NDArray
from timing import render, show
from torch import Tensor

from qcompress.coding.grids import decode, exponent_for
from qcompress.methods.squant import encode
from qcompress.registry import SquantConfig
from qcompress.types.run import EncodeContext, seeded_generator

STAGES = ("EK", "EKC")
Floats = NDArray[np.float32]


class Channel:
    """One channel on its grid: positions x, codes q = round(x), errors e = q - x, levels `low` to `high`."""

    def __init__(self, x: Floats, bits: int) -> None:
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.x, self.q = x, np.round(x)
        self.e = self.q - x
        self.up = np.where((self.e < 0) & (x < self.high), -self.e, 0)
        self.down = np.where((self.e > 0) & (x > self.low), self.e, 0)
        # Where a weight goes that is flipped: one that cannot move so, to where it was rounded, even where too few can.
        self.other = {1: self.q + (self.up > 0), -1: self.q - (self.down > 0)}

    def flip(self, of: NDArray[np.int64], up: Floats, down: Floats) -> tuple[int, int, float] | None:
        """Flip what makes the errors of these weights sum to nearly nothing, highest priority first; then the weight
        that the next stage may flip, the direction and the priority that it has there."""
        total = self.e[of].sum()
        if total == 0:
            return None
        direction, priority = (1, up) if total < 0 else (-1, down)
        order = of[np.argsort(-priority[of], kind="stable")]
        count = int(np.round(abs(total)))
        flipped = order[:count]
        self.q[flipped] = self.other[direction][flipped]
        self.e[flipped] = self.q[flipped] - self.x[flipped]
        chosen, way = (order[count - 1], -direction) if count >= abs(total) else (order[count], direction)
        return int(chosen), way, abs(float(self.e[chosen]))

    def run(self, kernel: int, stages: str) -> Floats:
        everything = np.arange(len(self.x))
        up, down = self.up, self.down
        if "K" in stages and kernel > 1:
            up, down = np.zeros_like(self.up), np.zeros_like(self.down)
            for of in everything.reshape(-1, kernel):
                nominee = self.flip(of, self.up, self.down)
                if nominee is not None:
                    (up if nominee[1] > 0 else down)[nominee[0]] = nominee[2]
        if "C" in stages:
            self.flip(everything, up, down)
        return np.clip(self.q, self.low, self.high)


def quantized(weight: Tensor, bits: int, stages: str) -> Tensor:
    """The weight as it decodes: S = (2**b - 1) / (max - min), z = round(S min) + 2**(b-1), levels (q + z) / S."""
    rows: Floats = weight.flatten(1).numpy()
    kernel = math.prod(weight.shape[2:])
    decoded = np.empty_like(rows)
    for place, row in enumerate(rows):
        scale = np.float32((2**bits - 1) / max(row.max() - row.min(), 1e-8))
        zero_point = np.round(scale * row.min()) + 2 ** (bits - 1)
        decoded[place] = (Channel(scale * row - zero_point, bits).run(kernel, stages) + zero_point) / scale
    return torch.from_numpy(decoded).view_as(weight)


def differing(name: str, weight: Tensor, wanted: Tensor, bits: int, stages: Any) -> int:
    """How many weights the preset puts on another level."""
    context = EncodeContext(exponent_for(float(weight.abs().max())), seeded_generator(0, name, "cpu"))
    encoded = encode(weight, SquantConfig(bits=bits, preset="paper", stages=stages), context)
    step = encoded.scale.double() * 2.0**encoded.exponent
    return int(((decode(encoded) - wanted).flatten(1).abs() > step / 2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=lambda text: text.split(","), default=["resnet20", "resnet32"])
    parser.add_argument("--bits", type=lambda text: [int(bits) for bits in text.split(",")], default=[4, 3, 2])
    parser.add_argument("--limit", type=int, default=1000, help="use only the first so many samples")
    parser.add_argument("--json", metavar="FILE|-", help="network, stages and width -> figures; - for stdout")
    arguments = parser.parse_args()
    if not os.environ.get("QCOMPRESS_DATA"):
        sys.exit(
            "squant_formulas.py: QCOMPRESS_DATA is not set; point it at the folder with the networks and their data"
        )
    folder = Path(os.environ["QCOMPRESS_DATA"])
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name in arguments.networks:
        network, state = CASES[name].network(folder)
        batches = CASES[name].batches(folder, arguments.limit)
        for stages in STAGES:
            for bits in arguments.bits:
                weights = {key: quantized(weight, bits, stages) for key, weight in compressible(state)}
                network.load_state_dict(weights, strict=False)
                other = sum(differing(key, state[key], value, bits, stages) for key, value in weights.items())
                share = other / sum(value.numel() for value in weights.values())
                figures = {"score": CASES[name].measure(network, batches), "differing": share}
                found.setdefault(name, {}).setdefault(stages, {})[f"W{bits}"] = figures
    lines = [
        {"network": name, "stages": stages, "width": width, **figures}
        for name, by_stages in found.items()
        for stages, by_width in by_stages.items()
        for width, figures in by_width.items()
    ]
    show(found, render(lines), arguments.json)


if __name__ == "__main__":
    main()
