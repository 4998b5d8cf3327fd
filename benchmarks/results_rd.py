"""The rate-distortion section of docs/results.md: accuracy and divergence at real bits a weight, beside fixed widths.

    QCOMPRESS_DATA=data python benchmarks/results_rd.py --work results

Finished runs lie in the work folder and are not repeated; --only takes a part of a run's name.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from page import average, put_section, words_beside
from runs import ROOT, call

from qcompress.checkpoint import read_checkpoint
from qcompress.evaluate import Setting
from qcompress.load import checkpoint_state, load_state_dict
from qcompress.model.build import load_weights
from qcompress.recipe import read_recipe

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Network:
    """A checkpoint, the folder and stem of its recipes, its metric and the budgets that it is coded at."""

    title: str
    checkpoint: str
    stem: str
    metric: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    rivals: tuple[str, ...]


NETWORKS = (
    Network(
        "CIFAR-10 ResNet-20, 5,000 test images",
        "cifar10/resnet20.safetensors",
        "cifar10/resnet20",
        "top1",
        (1.0, 1.5, 2.0, 2.5, 3.0),
        SEEDS,
        ("rtn_w4", "squant_w4", "gptq_w4", "rtn_w3", "squant_w3", "gptq_w3", "rtn_w2", "squant_w2", "gptq_w2"),
    ),
    Network(
        "stories260K, 300 texts",
        "stories/stories260K.safetensors",
        "stories/stories260k",
        "perplexity",
        (2.0, 3.0, 4.0),
        SEEDS,
        ("rtn_w4", "gptq_w4", "rtn_w3", "gptq_w3", "rtn_w2", "gptq_w2"),
    ),
    Network(
        "ImageNet MobileNetV1 0.75, 400 photos",
        "imagenet/mobilenet_v1_075_224.safetensors",
        "imagenet/mobilenet_v1_075",
        "top1",
        (2.0, 2.5, 3.0, 4.0),
        (0,),
        ("gptq_w4", "gptq_w3", "gptq_w2"),
    ),
)


@torch.no_grad()
def divergence(network: Network, artifact: Path, data: Path) -> float:
    """The mean divergence of the artifact's outputs from the checkpoint's, in nats a position, on the eval data."""
    recipe = read_recipe(ROOT / "recipes" / f"{network.stem}_rd.yaml")
    setting = Setting(recipe, torch.device("cpu"), allow_code=True)
    whole, coded = setting.build().float(), setting.build().float()
    source = data / network.checkpoint
    load_weights(whole, checkpoint_state(read_checkpoint(source)), str(source))
    load_weights(coded, load_state_dict(artifact), str(artifact))
    total, count = 0.0, 0
    for batch in setting.batches("eval"):
        one, other = (module(*batch.args, **batch.kwargs).log_softmax(-1) for module in (whole, coded))
        each = (one.exp() * (one - other)).sum(-1)
        if batch.lengths is not None:
            inside = torch.arange(each.shape[1]) < batch.lengths.unsqueeze(1) - 1
            each = each[inside]
        total, count = total + float(each.sum()), count + each.numel()
    return total / count


def recipe_of(network: Network, name: str, work: Path) -> Path:
    """The network's recipe, of a rival with its method and width in place of ours."""
    own = ROOT / "recipes" / f"{network.stem}_rd.yaml"
    if name not in network.rivals:
        return own
    method, _, bits = name.partition("_w")
    rule = f"{method}: {{bits: {bits}}}"
    text = own.read_text().replace("rd: {}", rule).replace("../nets", str(own.parent.parent / "nets"))
    # Calibrated methods know no tables; theirs are rounded to the least squared error.
    table = f'  - {{match: "tok_embeddings.weight", mse: {{bits: {bits}}}}}'
    text = text.replace("rules:", f"rules:\n{table}") if "blocks" in text else text
    made = work / f"{own.stem}_{name}.yaml"
    made.write_text("\n".join(line for line in text.splitlines() if not line.startswith("budget")))
    return made


def coded(network: Network, name: str, words: Sequence[str], data: Path, work: Path) -> dict[str, float]:
    """Accuracy, divergence, bits a weight and bytes of one run."""
    stem = f"{Path(network.stem).name}_{name}"
    output, figures = work / f"{stem}.safetensors", work / f"{stem}.figures.json"
    if not figures.is_file():
        recipe = recipe_of(network, name, work)
        common = ["-r", str(recipe), "--allow-code", "--json", "-"]
        source = str(data / network.checkpoint)
        if "-r" in words or "free" in name:
            call(["quantize", source, *words, "-o", str(output), "--force", "--json", "-"], work / f"{stem}.json")
            found = call(["eval", str(output), *common], work / f"{stem}.eval.json")
            report = json.loads((work / f"{stem}.json").read_text())
            value = next(one["value"] for one in found["metrics"] if one["metric"] == network.metric)
        else:
            report = call(["quantize", source, *words, "-o", str(output), "--force", *common], work / f"{stem}.json")
            value = next(one["artifact"] for one in report["accuracy"] if one["metric"] == network.metric)
        row = {
            "value": value,
            "divergence": divergence(network, output, data),
            "bpw": report["size"]["bits_per_weight"],
            "bytes": report["size"]["artifact_bytes"],
            "seconds": report["run"]["cpu_seconds"],
        }
        figures.write_text(json.dumps(row))
    read: dict[str, float] = json.loads(figures.read_text())
    print(f"{stem}: {read}", flush=True)
    return read


def runs(network: Network) -> dict[str, list[tuple[str, list[str]]]]:
    """Title of a row -> its runs, each a name and the words of its command."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for rate in network.rates:
        found[f"rd, {rate:.1f}"] = [
            (f"rd_{rate}_{seed}", ["--bpw", str(rate), "--seed", str(seed)]) for seed in network.seeds
        ]
    for rate in network.rates:
        found[f"rd without data, {rate:.1f}"] = [(f"free_{rate}", ["--bpw", str(rate)])]
    if network.metric == "top1" and "resnet" in network.stem:
        for rate in network.rates:
            words = ["--bpw", str(rate), "--effort", "high"]
            found[f"rd, trellis, {rate:.1f}"] = [(f"high_{rate}", words)]
    for rival in network.rivals:
        method, _, bits = rival.partition("_w")
        found[f"{method}, {bits} bits a channel"] = [(rival, [])]
    return found


def row_of(title: str, figures: Sequence[dict[str, float]]) -> str:
    cells = [
        average([one["value"] for one in figures]),
        average([one["divergence"] for one in figures]),
        f"{statistics.mean(one['bpw'] for one in figures):.3f}",
        f"{statistics.mean(one['bytes'] for one in figures):,.0f}",
        f"{statistics.mean(one['seconds'] for one in figures):.0f}",
    ]
    return f"| {title} | " + " | ".join(cells) + " |"


HEAD = """## Rate-distortion

Written by `benchmarks/results_rd.py`. Real bytes on the disk; bits a weight with all side information, over the
compressed weights; the divergence of the outputs from the checkpoint's in nats; processor seconds of the whole command,
evaluations included. Where seeds 0, 1 and 2 were run, their mean and standard deviation; else seed 0. Fixed widths are
entropy coded too where that pays.

    QCOMPRESS_DATA=/path/to/data python benchmarks/results_rd.py --work results
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results"))
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="nothing is called so")
    options = parser.parse_args()
    data = Path(os.environ["QCOMPRESS_DATA"])
    options.work.mkdir(exist_ok=True, parents=True)
    lines = [HEAD]
    for network in NETWORKS:
        lines += [f"### {network.title}", "", f"| | {network.metric} | divergence | bits a weight | bytes | seconds |"]
        lines.append("|---|---|---|---|---|---|")
        for title, parts in runs(network).items():
            figures = []
            for name, words in parts:
                stem = f"{Path(network.stem).name}_{name}"
                known = (options.work / f"{stem}.figures.json").is_file()
                if known or (options.only in stem and options.skip not in stem):
                    figures.append(coded(network, name, words, data, options.work))
            if figures:
                lines.append(row_of(title, figures))
        lines.append("")
    put_section("rd", [*lines, *words_beside("rd")])


if __name__ == "__main__":
    main()
