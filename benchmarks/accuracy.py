"""What each data-free method costs in accuracy on small real networks, all convolutions and linear layers compressed.

    QCOMPRESS_DATA=/path/to/data python benchmarks/accuracy.py [--networks resnet20,mobilenet] [--bits 4,3,2]
        [--methods rtn,squant] [--group-size 64] [--limit 2000] [--json FILE|-]

Prints for every network, width and method: the score, the relative squared error of all compressed weights together,
and the bits per weight with rows padded to bytes and all side information counted. A weight has one grid per output
channel unless --group-size is given. benchmarks/networks.py holds the networks and what lies under QCOMPRESS_DATA.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from networks import CASES, Case, compressible
from timing import render, show
from torch import Tensor

from qcompress.coding.grids import decode, exponent_for
from qcompress.coding.rows import rows_from_weight
from qcompress.registry import METHODS
from qcompress.types.encoded import Affine
from qcompress.types.run import EncodeContext, seeded_generator

VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "rtn symmetric": ("rtn", {"symmetric": True}),
    "mse": ("mse", {}),
    "mse normal": ("mse", {"effort": "normal"}),
    "mse symmetric": ("mse", {"symmetric": True}),
    "mse grid": ("mse", {"search": "grid"}),
    "hqq": ("hqq", {}),
    "squant": ("squant", {}),
    "squant symmetric": ("squant", {"symmetric": True}),
    "squant EK": ("squant", {"stages": "EK"}),
    "squant EC": ("squant", {"stages": "EC"}),
    "squant paper": ("squant", {"preset": "paper"}),
    "squant paper EK": ("squant", {"preset": "paper", "stages": "EK"}),
    "squant minmax": ("squant", {"range": "minmax"}),
    "squant minmax EK": ("squant", {"range": "minmax", "stages": "EK"}),
    "squant minmax E": ("squant", {"range": "minmax", "stages": "E"}),
}


@dataclass(frozen=True, slots=True)
class Result:
    network: str
    bits: int
    method: str
    score: float
    relative_error: float
    bits_per_weight: float
    seconds: float


def stored_bits(encoded: Affine) -> int:
    """Bits on disk, uncoded: rows of codes padded to bytes, and the grid."""
    rows, columns = encoded.codes.shape
    grid = (encoded.scale, encoded.zero_point, encoded.offset)
    side = sum(8 * part.numel() * part.element_size() for part in grid if part is not None)
    return rows * (-(-columns * encoded.bits // 8) * 8) + side


def compress(state: dict[str, Tensor], method: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], float, float]:
    """The weights as they decode, their relative squared error and their bits per weight."""
    encode, config_class = METHODS[method].load_encode(), METHODS[method].config
    decoded: dict[str, Tensor] = {}
    error = power = bits = count = 0.0
    for name, weight in compressible(state):
        rows = rows_from_weight(weight, (0,))
        wanted = dict(options)
        if rows[0].numel() % wanted.get("group_size", 1):
            # Where the group does not divide a channel, as in depthwise kernels, the channel is the group.
            del wanted["group_size"]
        context = EncodeContext(exponent_for(float(weight.abs().max())), seeded_generator(0, name, "cpu"))
        encoded = encode(rows, config_class(**wanted), context)
        decoded[name] = decode(encoded)
        error += float((decoded[name] - weight).double().square().sum())
        power += float(weight.double().square().sum())
        bits, count = bits + stored_bits(encoded), count + weight.numel()
    return decoded, error / power, bits / count


def measure(name: str, case: Case, folder: Path, arguments: argparse.Namespace) -> list[Result]:
    network, state = case.network(folder)
    samples = min(case.samples, arguments.limit or case.samples)
    batches = case.batches(folder, samples)
    baseline = case.measure(network, batches)
    if samples == case.samples and abs(baseline - case.fp32) > 5e-4 * case.fp32:
        raise SystemExit(f"{name}: the uncompressed network scores {baseline}, not {case.fp32}")
    results = [Result(name, 32, "none", baseline, 0.0, 32.0, 0.0)]
    for bits in arguments.bits:
        for label in arguments.methods:
            method, options = VARIANTS[label]
            group = {"group_size": arguments.group_size} if arguments.group_size else {}
            started = time.process_time()
            decoded, error, stored = compress(state, method, {"bits": bits, **options, **group})
            seconds = time.process_time() - started
            network.load_state_dict(decoded, strict=False)
            score = case.measure(network, batches)
            results.append(Result(name, bits, label, score, error, stored, seconds))
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, labels = list(CASES), list(VARIANTS)
    parser.add_argument("--networks", type=lambda text: text.split(","), default=names, help=", ".join(names))
    parser.add_argument("--bits", type=lambda text: [int(bits) for bits in text.split(",")], default=[4, 3, 2])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=labels, help=", ".join(labels))
    parser.add_argument("--group-size", type=int, help="one grid per so many weights of a channel")
    parser.add_argument("--limit", type=int, help="use only the first so many samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", metavar="FILE|-", help="network, method and width -> figures; - for stdout, in place of the tables"
    )
    arguments = parser.parse_args()
    for given, known in ((arguments.networks, names), (arguments.methods, labels)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    folder = os.environ.get("QCOMPRESS_DATA")
    if not folder:
        sys.exit("accuracy.py: QCOMPRESS_DATA is not set; point it at the folder with the networks and their data")
    torch.set_num_threads(arguments.threads)
    results = [r for name in arguments.networks for r in measure(name, CASES[name], Path(folder), arguments)]
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for one in results:
        figures = {"score": one.score, "relative_error": one.relative_error, "bits_per_weight": one.bits_per_weight}
        found.setdefault(one.network, {}).setdefault(one.method, {})[f"W{one.bits}"] = figures
    show(found, render([asdict(one) for one in results]), arguments.json)


if __name__ == "__main__":
    main()
