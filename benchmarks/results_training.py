"""The training section of docs/results.md: ResNet-20 fine-tuned with each regularizer, then quantized.

    QCOMPRESS_DATA=data python benchmarks/results_training.py --work results

Finished runs lie in the work folder as JSON and are not repeated; --only takes a part of a run's name.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page import average, put_section, words_beside
from runs import ROOT, call, top1

CHECKPOINT = "cifar10/resnet20.safetensors"
ROWS = {
    "none": "no regularizer",
    "heavy_l2": "heavy L2",
    "dsmm_alpha10": "DSMM, alpha 10",
    "dsmm_paper": "DSMM, paper",
    "dsmm": "DSMM, practical",
    "linf": "L-infinity",
    "kurtosis": "kurtosis",
    "sine": "sine on the grid",
}
SEEDS = (0, 1, 2)
DEEP_ROWS = ("none", "heavy_l2", "dsmm_paper", "dsmm")
"""Rows that also get the methods with a graph or calibration, on the first seed."""
METHODS = {"naive": "rtn", "squant": "squant"}
DEEP_METHODS = {"dfq": "dfq", "adaround": "adaround", "pdquant": "pdquant"}
WIDTHS = (4, 2)


def train(row: str, seed: int, data: Path, work: Path) -> Path:
    """The checkpoint of a row, trained where that was not done before."""
    output = work / f"{row}_{seed}.safetensors"
    recipe = ROOT / "recipes" / "cifar10" / f"resnet20_train_{row}.yaml"
    # Accuracy is measured by the runs that quantize; here a glance is enough.
    glance = ["--set", "data.eval.samples=500", "--set", "finetune.naive_bits=[]"]
    words = ["finetune-reg", str(data / CHECKPOINT), "-r", str(recipe), "--seed", str(seed), *glance]
    call([*words, "--allow-code", "--force", "-o", str(output), "--json", "-"], work / f"{row}_{seed}.json")
    return output


def quantize(row: str, seed: int, method: str, bits: int, data: Path, work: Path) -> dict[str, Any]:
    """The top-1 figures of a trained checkpoint and of its artifact."""
    output = work / f"{row}_{seed}_{method}_w{bits}.safetensors"
    recipe = ROOT / "recipes" / "cifar10" / f"resnet20_{method}_w{bits}a8.yaml"
    words = ["quantize", str(work / f"{row}_{seed}.safetensors"), "-r", str(recipe), "--allow-code", "--force"]
    report = call([*words, "-o", str(output), "--json", "-"], output.with_suffix(".json"))
    return top1(report)


def cells(row: str, data: Path, work: Path, chosen: str) -> Iterator[tuple[str, list[float]]]:
    """column -> the accuracies of the seeds that were run."""
    full: list[float] = []
    for seed in SEEDS:
        if chosen in f"{row}_{seed}" or (work / f"{row}_{seed}.json").is_file():
            train(row, seed, data, work)
            first = quantize(row, seed, "rtn", 4, data, work)
            full.append(first["baseline"])
            print(f"{row}, seed {seed}: FP32 {first['baseline']:.4f}", flush=True)
    yield "FP32", full
    for (name, method), bits in itertools.product({**METHODS, **DEEP_METHODS}.items(), WIDTHS):
        deep = name in DEEP_METHODS
        seeds = SEEDS[: len(full)] if not deep else SEEDS[: min(len(full), 1)] if row in DEEP_ROWS else ()
        found = [quantize(row, seed, method, bits, data, work)["artifact"] for seed in seeds]
        if found:
            print(f"{row} {name} W{bits}A8: {average(found)}", flush=True)
        yield f"{name} W{bits}A8", found


HEAD = """## Training with regularizers

Written by `benchmarks/results_training.py`. CIFAR-10 ResNet-20 from its checkpoint (FP32 0.9146 on 5,000 test images),
fine-tuned on 20,000 images for two epochs by the recipes `recipes/cifar10/resnet20_train_*.yaml`, then quantized: all
layers, one grid a channel, inputs at 8 bits. Mean and standard deviation over three seeds; dfq, adaround and pdquant on
one.

    QCOMPRESS_DATA=/path/to/data python benchmarks/results_training.py --work results
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results"))
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    data = Path(os.environ["QCOMPRESS_DATA"])
    options.work.mkdir(exist_ok=True, parents=True)
    lines = [HEAD]
    for row, title in ROWS.items():
        found = dict(cells(row, data, options.work, options.only))
        if len(lines) == 1:
            lines += ["| trained with | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
        lines.append(f"| {title} | " + " | ".join(average(values) for values in found.values()) + " |")
    put_section("training", [*lines, "", *words_beside("training")])


if __name__ == "__main__":
    main()
