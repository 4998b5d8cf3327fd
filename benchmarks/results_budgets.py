"""The budgets section of docs/results.md: widths chosen by a budget against one width for all, at equal bytes.

    QCOMPRESS_DATA=data python benchmarks/results_budgets.py --work results

ResNet-20 on the first 2,000 test images, packed codes, float activations. Finished runs lie in the work folder as JSON
and are not repeated.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from page import put_section, words_beside
from runs import ROOT, call, top1

CHECKPOINT = "cifar10/resnet20.safetensors"
UNIFORM = (2, 3)
BETWEEN = (2.5, 3.5)
RECIPE = """version: 1
model: {{factory: {root}/recipes/nets/cifar_resnet.py:resnet20}}
data:
  calibration: {{npz: cifar10/train20k.npz, samples: 1024, batch_size: 128}}
  eval: {{npz: cifar10/test5000.npz, samples: 2000, batch_size: 250}}
  normalize: {{mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
task: {{classification: {{metric: top1}}}}
rules:
  - {{match: "*.weight", {method}: {{{bits}}}}}
"""


def recipe(method: str, bits: int | None, work: Path) -> Path:
    path = work / f"budget_{method}_{bits or 'open'}.yaml"
    path.write_text(RECIPE.format(root=ROOT, method=method, bits="" if bits is None else f"bits: {bits}"))
    return path


def live(method: str, data: Path, work: Path, *, bits: int | None = None, bpw: float | None = None) -> dict[str, Any]:
    """The report of a run with the model: one width for all, or a budget spent by measured divergences."""
    name = f"budget_{method}_{f'w{bits}' if bpw is None else f'{bpw}bpw'}"
    words = ["quantize", str(data / CHECKPOINT), "-r", str(recipe(method, bits, work)), "--allow-code", "--force"]
    words += ["--coding", "packed", "-o", str(work / f"{name}.safetensors"), "--json", "-"]
    return call([*words, *([] if bpw is None else ["--bpw", str(bpw)])], work / f"{name}.json")


def bare(method: str, data: Path, work: Path, bpw: float) -> tuple[float, float]:
    """Bits per weight and top-1 of a budget spent by the weights alone."""
    name = f"budget_{method}_{bpw}bpw_bare"
    output = work / f"{name}.safetensors"
    words = ["quantize", str(data / CHECKPOINT), "--method", method, "--bpw", str(bpw), "--coding", "packed"]
    report = call([*words, "--force", "-o", str(output), "--json", "-"], work / f"{name}.json")
    found = call(
        ["eval", str(output), "-r", str(recipe("squant", 2, work)), "--allow-code", "--json", "-"],
        work / f"{name}_eval.json",
    )
    metrics = {one["metric"]: one["value"] for one in found["metrics"]}
    return report["size"]["bits_per_weight"], metrics["top1"]


HEAD = """## Budgets

Written by `benchmarks/results_budgets.py`. CIFAR-10 ResNet-20, the first 2,000 test images (FP32 {fp32:.4f}), all
layers, one grid a channel, float activations, codes packed, so that equal bits per weight are equal bytes. One run
each, good to about 0.005.

    QCOMPRESS_DATA=/path/to/data python benchmarks/results_budgets.py --work results

| bits per weight | squant, one width | squant, by weights | squant, measured | gptq, one width | gptq, measured |
|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results"))
    options = parser.parse_args()
    data, work = Path(os.environ["QCOMPRESS_DATA"]), options.work
    work.mkdir(exist_ok=True, parents=True)
    rows: dict[float, dict[str, float]] = {}
    fp32 = 0.0
    for bits in UNIFORM:
        for method in ("squant", "gptq"):
            report = live(method, data, work, bits=bits)
            fp32 = report["accuracy"][0]["baseline"]
            bpw = math.ceil(report["size"]["bits_per_weight"] * 1e4) / 1e4
            rows.setdefault(bpw, {})[f"{method} w"] = top1(report)["artifact"]
            print(f"{method} {bits} bits, {bpw} bpw: {top1(report)['artifact']:.4f}", flush=True)
    for bpw in sorted({*rows, *BETWEEN}):
        row = rows.setdefault(bpw, {})
        row["bare"] = bare("squant", data, work, bpw)[1]
        for method in ("squant", "gptq"):
            row[method] = top1(live(method, data, work, bpw=bpw))["artifact"]
        print(bpw, row, flush=True)
    lines = [HEAD.format(fp32=fp32)]
    for bpw, row in sorted(rows.items()):
        cells = (row.get(key) for key in ("squant w", "bare", "squant", "gptq w", "gptq"))
        lines.append(f"| {bpw:g} | " + " | ".join("-" if one is None else f"{one:.4f}" for one in cells) + " |")
    put_section("budgets", [*lines, "", *words_beside("budgets")])


if __name__ == "__main__":
    main()
