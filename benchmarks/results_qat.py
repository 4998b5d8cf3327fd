"""The quantization-aware section of docs/results.md: ResNet-20 trained by LSQ and PACT from two checkpoints.

    QCOMPRESS_DATA=data python benchmarks/results_qat.py --work results --start dsmm=results/dsmm_0.safetensors

Finished runs lie in the work folder as JSON and are not repeated; --only takes a part of a run's name. A command before
each run, such as nice, is given by --before.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

from page import average, put_section, words_beside
from runs import ROOT, call, top1

CHECKPOINT = "cifar10/resnet20.safetensors"
METHODS = {"pact": "PACT", "lsq": "LSQ"}
WIDTHS = (2, 4)
SEEDS = (0, 1)
EPOCHS = {2: 2, 4: 1}
IMAGES = 10_000


def run(method: str, bits: int, start: str, checkpoint: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The report of a run, read back where it was run before."""
    name = f"{method}_w{bits}a{bits}_{start}_{seed}"
    kept: Path = options.work / f"{name}.json"
    if not kept.is_file() and options.only not in name:
        return {}
    recipe = ROOT / "recipes" / "cifar10" / f"resnet20_{method}_w{bits}a{bits}.yaml"
    fewer = [f"finetune.epochs={EPOCHS[bits]}", f"data.train.samples={IMAGES}"]
    words = ["quantize", str(checkpoint), "-r", str(recipe), "--seed", str(seed), "--allow-code", "--force"]
    words += [word for one in fewer for word in ("--set", one)]
    words += ["-o", str(options.work / f"{name}.safetensors"), "--json", "-"]
    return call(words, kept, before=options.before, shown=top1)


def head() -> str:
    epochs = " and ".join(f"{count} at {bits} bits" for bits, count in EPOCHS.items())
    return f"""## Quantization-aware training

Written by `benchmarks/results_qat.py`. CIFAR-10 ResNet-20, weights and inputs of every layer at the same width, one
grid a channel, the network's own input at 8 bits: `recipes/cifar10/resnet20_{{pact,lsq}}_w{{2a2,4a4}}.yaml`, with
distillation from the checkpoint. Short runs: {IMAGES:,} of the 20,000 training images, epochs: {epochs}
(the recipes have more). Top-1 of 5,000 test images, mean and standard deviation over two seeds; a 95 % interval is
about 0.8 points wide each way at 91 %. The DSMM start is what `resnet20_train_dsmm.yaml` makes of the checkpoint.

    QCOMPRESS_DATA=/path/to/data python benchmarks/results_qat.py --work results --start dsmm=results/dsmm_0.safetensors
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results"))
    parser.add_argument("--start", action="append", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--only", default="")
    parser.add_argument("--before", default="")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True, parents=True)
    starts = {"fp32": Path(os.environ["QCOMPRESS_DATA"]) / CHECKPOINT}
    starts |= {name: Path(path) for name, path in (one.split("=") for one in options.start)}
    reports: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    # Seeds last, so that a run that is broken off has one of everything.
    for seed, bits, (start, checkpoint), method in itertools.product(SEEDS, WIDTHS, starts.items(), METHODS):
        report = run(method, bits, start, checkpoint, seed, options)
        if report:
            reports.setdefault((start, method, bits), []).append(top1(report))
    cells = [(method, bits) for bits in WIDTHS for method in METHODS]
    titles = [f"{METHODS[method]} W{bits}A{bits}" for method, bits in cells]
    lines = [head(), f"| start | FP32 | {' | '.join(titles)} |", "|---|---|" + "---|" * len(cells)]
    for start in starts:
        found = [reports.get((start, method, bits), []) for method, bits in cells]
        before = next((one[0]["baseline"] for one in found if one), None)
        full = "-" if before is None else f"{before:.4f}"
        row = [average([one["artifact"] for one in cell]) for cell in found]
        lines.append(f"| {'the checkpoint' if start == 'fp32' else start.upper()} | {full} | {' | '.join(row)} |")
    put_section("qat", [*lines, "", *words_beside("qat")])


if __name__ == "__main__":
    main()
