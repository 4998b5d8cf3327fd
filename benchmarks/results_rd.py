"""The rate-distortion section of docs/results.md: accuracy and divergence at real bits a weight, beside others.

    QCOMPRESS_DATA=data python benchmarks/results_rd.py --work results [--nncodec PYTHON]

Finished runs lie in the work folder and are not repeated; --only takes a part of a run's name. PYTHON is one that has
nncodec 2.1.3, of an environment by itself.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from page import average, put_section, words_beside
from runs import ROOT, call

from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.coding.packing import count_codes
from qcompress.compress.load import checkpoint_state, load_state_dict
from qcompress.data.sources import open_batches
from qcompress.model.build import build_network, load_weights
from qcompress.recipe import read_recipe
from qcompress.types.run import ModelRun

SEEDS = (0, 1, 2)
SMALL_RATES = (1.4, 1.8)
"""Of whole files in which what is not compressed is stored in 16 bits."""
NNCODEC_QPS = (-24, -22, -20, -18, -16, -14, -12)
"""Quantization parameters: the larger, the larger the steps."""


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
        (
            *("rtn_w4", "squant_w4", "gptq_w4", "huffman_w4", "rtn_w3", "squant_w3", "gptq_w3", "huffman_w3"),
            *("rtn_w2", "squant_w2", "gptq_w2", "huffman_w2"),
        ),
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
def against_checkpoint(network: Network, state: Mapping[str, torch.Tensor], data: Path) -> tuple[float, float, float]:
    """Of outputs against the checkpoint's on the eval data, each the mean over positions: divergence in nats, the share
    of the same largest output, and the top-1 accuracy, which is none of a language model's."""
    recipe = read_recipe(ROOT / "recipes" / f"{network.stem}_rd.yaml")
    model_run = ModelRun(recipe, torch.device("cpu"), allow_code=True)
    whole, coded = build_network(model_run).float(), build_network(model_run).float()
    source = data / network.checkpoint
    load_weights(whole, checkpoint_state(read_checkpoint(source)), str(source))
    load_weights(coded, dict(state), "the artifact")
    total, agreed, right, count = 0.0, 0, 0, 0
    for batch in open_batches(model_run, "eval"):
        one, other = (module(*batch.args, **batch.kwargs).log_softmax(-1) for module in (whole, coded))
        each, same = (one.exp() * (one - other)).sum(-1), one.argmax(-1) == other.argmax(-1)
        if batch.lengths is not None:
            inside = torch.arange(each.shape[1]) < batch.lengths.unsqueeze(1) - 1
            each, same = each[inside], same[inside]
        elif batch.labels is not None:
            right += int((other.argmax(-1) == batch.labels).sum())
        total, agreed, count = total + float(each.sum()), agreed + int(same.sum()), count + each.numel()
    return total / count, agreed / count, right / count


def recipe_of(network: Network, name: str, work: Path) -> Path:
    """The network's recipe, of a rival with its method and width in place of ours."""
    own = ROOT / "recipes" / f"{network.stem}_rd.yaml"
    if name not in network.rivals:
        return own
    method, _, bits = name.partition("_w")
    rule = f"{'kmeans' if method == 'huffman' else method}: {{bits: {bits}}}"
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
    if not figures.is_file() or "agreement" not in json.loads(figures.read_text()):
        recipe = recipe_of(network, name, work)
        common = ["-r", str(recipe), "--allow-code", "--json", "-"]
        command = "cluster" if name.startswith("huffman") else "quantize"
        source = str(data / network.checkpoint)
        if "-r" in words or "free" in name:
            call(["quantize", source, *words, "-o", str(output), "--force", "--json", "-"], work / f"{stem}.json")
            found = call(["eval", str(output), *common], work / f"{stem}.eval.json")
            report = json.loads((work / f"{stem}.json").read_text())
            value = next(one["value"] for one in found["metrics"] if one["metric"] == network.metric)
        else:
            report = call([command, source, *words, "-o", str(output), "--force", *common], work / f"{stem}.json")
            value = next(one["artifact"] for one in report["accuracy"] if one["metric"] == network.metric)
        divergence, agreement, _ = against_checkpoint(network, load_state_dict(output), data)
        n_bytes, weights = report["size"]["artifact_bytes"], report["size"]["compressed_weights"]
        more = _more_by_huffman(output) if name.startswith("huffman") else 0
        row = {
            "value": value,
            "divergence": divergence,
            "agreement": agreement,
            "bpw": report["size"]["bits_per_weight"] + 8 * more / weights,
            "bytes": n_bytes + more,
            "seconds": report["run"]["cpu_seconds"],
        }
        figures.write_text(json.dumps(row))
    read: dict[str, float] = json.loads(figures.read_text())
    print(f"{stem}: {read}", flush=True)
    return read


def _more_by_huffman(path: Path) -> int:
    """Bytes by which an artifact grows when a Huffman code for each tensor replaces the stored coding.

    Deep Compression's pipeline (Han, Mao, Dally 2016); a code's table is its lengths, half a byte an entry.
    """
    more = 0
    for file in read_artifact(path).files:
        for name, entry in file.manifest.tensors.items():
            counts = count_codes(file.packed_codes(name), entry.bits, entry.columns)
            bits = sum(weight for weight, _ in _merges([int(count) for count in counts if count]))
            more += -(-bits // 8) + 2**entry.bits // 2 - file.parts_of(name)["codes"].n_bytes
    return more


def _merges(counts: list[int]) -> Iterator[tuple[int, int]]:
    """The weight of every inner node of a Huffman tree; they sum to the bits of all codes."""
    heap = [(count, place) for place, count in enumerate(counts)]
    heapq.heapify(heap)
    for place in range(len(counts), 2 * len(counts) - 1):
        joined = heapq.heappop(heap)[0] + heapq.heappop(heap)[0]
        heapq.heappush(heap, (joined, place))
        yield joined, place


def nncodec(network: Network, options: argparse.Namespace, data: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Title and figures of each of NNCodec's quantization parameters, dependent quantization on, no data."""
    for qp in NNCODEC_QPS:
        stem = f"{Path(network.stem).name}_nncodec_{-qp}"
        figures, dense = options.work / f"{stem}.figures.json", options.work / f"{stem}.safetensors"
        if not figures.is_file():
            if options.nncodec is None or options.only not in stem:
                continue
            script = Path(__file__).resolve().with_name("nncodec_peer.py")
            words = [options.nncodec, script, data / network.checkpoint, str(qp), options.work / f"{stem}.nnc", dense]
            # It leaves files where it runs.
            done = subprocess.run(list(map(str, words)), cwd=options.work, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            state = checkpoint_state(read_checkpoint(dense))
            divergence, agreement, top1 = against_checkpoint(network, state, data)
            row = {"value": top1, "divergence": divergence, "agreement": agreement, **found}
            figures.write_text(json.dumps(row))
        yield f"NNCodec, qp {qp}", json.loads(figures.read_text())


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
        for rate in SMALL_RATES:
            words = ["--bpw", str(rate), "--keep-dtype", "f16"]
            found[f"rd, rest as f16, {rate:.1f}"] = [(f"small_{rate}", words)]
        for rate in SMALL_RATES:
            words = ["--bpw", str(rate), "--keep-dtype", "f16"]
            found[f"rd without data, rest as f16, {rate:.1f}"] = [(f"small_free_{rate}", words)]
    for rival in network.rivals:
        method, _, bits = rival.partition("_w")
        title = f"k-means, {bits} bits, Huffman" if method == "huffman" else f"{method}, {bits} bits a channel"
        found[title] = [(rival, [])]
    return found


def row_of(title: str, figures: Sequence[dict[str, float]]) -> str:
    cells = [
        average([one["value"] for one in figures]),
        average([one["divergence"] for one in figures]),
        average([one["agreement"] for one in figures], 3),
        f"{statistics.mean(one['bpw'] for one in figures):.3f}",
        f"{statistics.mean(one['bytes'] for one in figures):,.0f}",
        f"{statistics.mean(one['seconds'] for one in figures):.0f}",
    ]
    return f"| {title} | " + " | ".join(cells) + " |"


HEAD = """## Rate-distortion

Written by `benchmarks/results_rd.py`. Real bytes on the disk; bits a weight with all side information, over the
compressed weights; the divergence of the outputs from the checkpoint's in nats; the share of inputs, or tokens, for
which the largest output is the checkpoint's; processor seconds of the whole command, evaluations included. Where seeds
0, 1 and 2 were run, their mean and standard deviation; else seed 0. Fixed widths are entropy coded too where that pays.
NNCodec 2.1.3 with dependent quantization, without data and its other tools; its bits are of the whole file over all
weights. k-means with a codebook a tensor and Huffman codes is Deep Compression's pipeline without pruning.

    QCOMPRESS_DATA=/path/to/data python benchmarks/results_rd.py --work results
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), default=Path("results").resolve())
    parser.add_argument("--only", default="")
    parser.add_argument("--nncodec", metavar="PYTHON")
    parser.add_argument("--skip", default="nothing is called so")
    options = parser.parse_args()
    data = Path(os.environ["QCOMPRESS_DATA"])
    options.work.mkdir(exist_ok=True, parents=True)
    lines = [HEAD]
    for network in NETWORKS:
        heads = f"| | {network.metric} | divergence | agreement | bits a weight | bytes | seconds |"
        lines += [f"### {network.title}", "", heads, "|---|---|---|---|---|---|---|"]
        for title, parts in runs(network).items():
            figures = []
            for name, words in parts:
                stem = f"{Path(network.stem).name}_{name}"
                known = (options.work / f"{stem}.figures.json").is_file()
                if known or (options.only in stem and options.skip not in stem):
                    figures.append(coded(network, name, words, data, options.work))
            if figures:
                lines.append(row_of(title, figures))
        if network is NETWORKS[0]:
            lines += [row_of(title, [figures]) for title, figures in nncodec(network, options, data)]
        lines.append("")
    put_section("rd", [*lines, *words_beside("rd")])


if __name__ == "__main__":
    main()
