"""The methods' section of docs/results.md: accuracy of every method, each figure from one run of the command line.

    QCOMPRESS_DATA=data python benchmarks/results.py --work results

Finished runs lie in the work folder as JSON and are not repeated; --only takes a part of a run's name.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from page import put_section
from runs import ROOT, call, top1

METHODS = {
    "naive": "rtn",
    "dfq": "dfq",
    "adaround": "adaround",
    "squant": "squant",
    "pdquant": "pdquant",
    "gptq": "gptq",
}
WIDTHS = (4, 3, 2)
WIDE_PDQUANT = (("channel", 4), ("channel", 2))
"""The grids at which pdquant is run on the large network."""


@dataclass(frozen=True)
class Network:
    """One network, and the settings over its ready recipes."""

    title: str
    weights: str
    recipes: str
    grains: tuple[str, ...]
    calibration: str


NETWORKS = (
    Network(
        "CIFAR-10 ResNet-20, 5,000 test images, 1,024 images for calibration",
        "cifar10/resnet20.safetensors",
        "cifar10/resnet20",
        ("channel", "tensor"),
        "cifar10/train20k.npz",
    ),
    Network(
        "MobileNetV1 0.75, 400 photos (not comparable with accuracies on all of ImageNet), 256 photos for calibration",
        "imagenet/mobilenet_v1_075_224.safetensors",
        "imagenet/mobilenet_v1_075",
        ("channel", "tensor"),
        "imagenet/calib256",
    ),
)


@dataclass(frozen=True)
class Run:
    network: Network
    column: str
    bits: int
    grain: str

    @property
    def name(self) -> str:
        return f"{Path(self.network.recipes).name}_{self.column}_w{self.bits}_{self.grain}"

    @property
    def is_large(self) -> bool:
        return "mobilenet" in self.network.recipes

    @property
    def skipped(self) -> str | None:
        """Why this run is not made."""
        if self.column == "pdquant" and self.is_large and (self.grain, self.bits) not in WIDE_PDQUANT:
            return "not run"
        return None

    def words(self, data: Path, output: Path) -> list[str]:
        """Of the command line."""
        method = METHODS[self.column]
        recipe = ROOT / "recipes" / f"{self.network.recipes}_{method}_w4a8.yaml"
        return [
            *("quantize", str(data / self.network.weights), "-r", str(recipe)),
            *("--set", f"rules.0.{method}.bits={self.bits}", "--set", f"rules.0.{method}.granularity={self.grain}"),
            *(("--set", "rules.0.pdquant.iterations=20") if method == "pdquant" and self.is_large else ()),
            *("--allow-code", "--threads", "1", "--force", "-o", str(output), "--json", "-"),
        ]


def runs() -> Iterator[Run]:
    for network in NETWORKS:
        for grain, bits, column in itertools.product(network.grains, WIDTHS, METHODS):
            run = Run(network, column, bits, grain)
            if run.skipped is None:
                yield run


def measure(run: Run, data: Path, work: Path) -> dict[str, Any]:
    """The run's report, read back where it was made before."""
    return call(run.words(data, work / f"{run.name}.safetensors"), work / f"{run.name}.json", shown=cell)


def cell(report: dict[str, Any]) -> str:
    """Accuracy, and the processor seconds of the whole run."""
    return f"{top1(report)['artifact']:.4f} ({report['run']['cpu_seconds']:.0f} s)"


def table(network: Network, reports: dict[str, dict[str, Any]]) -> list[str]:
    any_report = next(report for name, report in reports.items() if name.startswith(Path(network.recipes).name))
    lines = [
        f"### {network.title}",
        "",
        f"FP32: {top1(any_report)['baseline']:.4f}.",
        "",
        "| grid a | bits | " + " | ".join(METHODS) + " |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    for grain, bits in itertools.product(network.grains, WIDTHS):
        cells = []
        for column in METHODS:
            report = reports.get(Run(network, column, bits, grain).name)
            cells.append(cell(report) if report else "-")
        lines.append(f"| {grain} | W{bits}A8 | " + " | ".join(cells) + " |")
    return [*lines, ""]


HEAD = """## Methods after training

Written by `benchmarks/results.py`: every figure is one run of the command line on the ready [recipes](../recipes), the
artifact read back from disk and measured.

    QCOMPRESS_DATA=/path/to/data python benchmarks/results.py --work results

All layers are compressed, first and last included; inputs of all layers have 8 bits, their ranges from calibration data
(dfq and squant: from the batch norms). `naive` is rounding to nearest on the min-max range. In brackets: processor
seconds of the whole run on one core, measuring before and after included. No companion was used.
"""

READING = """### How to read this

- 95 % intervals are about 0.8 points wide each way on 5,000 images, and 4 points on 400 photos: what lies nearer
  together is equal here.
- The order of the first paper's Table 1 (naive <= dfq, squant <= adaround, pdquant) shows but for noise, with gaps that
  grow to 2 bits. That pdquant is above adaround does not show: both start here from the same closed form and end within
  noise of each other.
- AdaRound by AIMET on the same ResNet-20 (first 2,000 images, one grid a channel): W4A8 .9195, W2A8 .8695 with 2,000
  steps (236 core-seconds) and .884 with 10,000 (980 core-seconds). On these images `adaround` here has .9155 at W2A8.
- Data-free methods leave little of MobileNet at 3 bits and nothing at 2; calibrated ones keep 73 % and some 40 % of the
  photos, with one grid a channel.
- pdquant on MobileNet ran with 20 steps a block, for time's sake, and with one grid a channel only.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results"))
    parser.add_argument("--only", default="")
    parser.add_argument("--without", default="nothing", help="leave out the runs whose name has this part")
    options = parser.parse_args()
    data = Path(os.environ["QCOMPRESS_DATA"])
    options.work.mkdir(exist_ok=True, parents=True)
    reports = {}
    for run in runs():
        chosen = options.only in run.name and options.without not in run.name
        if chosen or (options.work / f"{run.name}.json").is_file():
            reports[run.name] = measure(run, data, options.work)
    parts = [
        table(network, reports) for network in NETWORKS if any(Path(network.recipes).name in name for name in reports)
    ]
    put_section("methods", [HEAD, *itertools.chain.from_iterable(parts), READING])


if __name__ == "__main__":
    main()
