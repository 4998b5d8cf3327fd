"""The command line on a GPU: every method held against the CPU, and large networks timed; writes a page.

    python benchmarks/gpu.py docs/gpu.md [--device cuda] [--methods gptq,rd] [--networks Llama] [--small]

Needs no data: networks have random weights, and images and tokens are drawn. Equality takes ResNet-20 through each
method on both devices. Times are those of the whole command on the device alone: rd, gptq, adaround and lsq on a Llama
of 1.1 B weights (which needs transformers) and on a ResNet-50 (which needs torchvision), one run each, so no more than
the order of what to expect. --small takes little ones. Ends with code 1 where a method gives something else there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from qcompress.cli.app import run
from qcompress.compress.load import load_state_dict
from qcompress.model.build import build_network
from qcompress.recipe import read_recipe
from qcompress.types.run import ModelRun

ROOT = Path(__file__).parents[1]
NETS = ROOT / "recipes" / "nets"
TRAINED = {"epochs": 1, "optimizer": {"sgd": {"lr": 1e-3, "momentum": 0.9}}}


@dataclass(frozen=True)
class Case:
    """A method, its options, and how near what it gives on a device must come to what it gives on the CPU.

    command    of the command line
    decibels   by which the median SQNR of the layers may differ
    finetune   whether it is trained
    """

    options: Mapping[str, Any]
    decibels: float
    command: str = "quantize"
    finetune: bool = False


CASES = {
    "rtn": Case({"bits": 4}, 1e-3),
    "mse": Case({"bits": 3}, 1e-3),
    "squant": Case({"bits": 3}, 1e-3),
    "hqq": Case({"bits": 4}, 1e-3),
    "kmeans": Case({"bits": 3}, 1e-3, "cluster"),
    "dfq": Case({"bits": 4}, 0.02),
    "gptq": Case({"bits": 3}, 0.05),
    "adaround": Case({"bits": 3, "iterations": 100}, 0.2),
    "pdquant": Case({"bits": 3, "iterations": 20, "correction_steps": 2}, 0.2),
    "rd": Case({"effort": "fast"}, 0.2),
    "lsq": Case({"bits": 3}, 0.5, finetune=True),
    "pact": Case({"bits": 3}, 0.5, finetune=True),
    "dkm": Case({"bits": 2}, 0.5, "cluster", finetune=True),
}
"""Weights alone are encoded on the CPU whatever the device; sums on a device round otherwise, and training goes on from
there."""


@dataclass(frozen=True)
class Network:
    """A network to time, its recipe's model, and the samples that it is calibrated and trained on."""

    model: Mapping[str, Any]
    samples: Mapping[str, np.ndarray]
    batch_size: int
    task: str
    dtype: torch.dtype


def networks(small: bool) -> dict[str, Network]:
    random = np.random.default_rng(0)
    size = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    size |= {"num_key_value_heads": 4, "vocab_size": 32000}
    length, side, images = 256, 224, 64
    if small:
        size = {key: max(2, value // 64) for key, value in size.items()} | {"num_attention_heads": 2, "vocab_size": 64}
        size["num_key_value_heads"] = 1
        length, side, images = 16, 32, 4
    tokens = random.integers(0, size["vocab_size"], (8, length))
    pixels = random.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    llama = {"factory": "transformers:LlamaForCausalLM", "args": size, "blocks": "model.layers.*"}
    resnet = {"factory": f"{NETS / 'cifar_resnet.py'}:resnet20" if small else "torchvision.models:resnet50"}
    labels = np.arange(images) % 10
    return {
        "Llama": Network(llama, {"input_ids": tokens}, 2, "causal-lm", torch.bfloat16),
        "ResNet-50": Network(resnet, {"x": pixels, "y": labels}, images // 2, "classification", torch.float32),
    }


EQUALITY = """A ResNet-20 of random weights: decibels are the median SQNR of its layers, `equal` is the share of decoded
weights that are the same on both devices."""
TIMES = """Whole commands, of networks of random weights; M weights a second of all that the command does. The memory is
the most that the device's allocator has held."""


def head(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU itself, which shows only that this runs"
    versions = f"torch {torch.__version__}"
    return f"# On a GPU\n\nWritten by `python benchmarks/gpu.py docs/gpu.md` on {name}, {versions}."


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = [*rows[0]] if rows else []
    lines = ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows)])


def write_recipe(folder: Path, name: str, document: Mapping[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    # JSON is YAML, and has no anchors.
    path.write_text(json.dumps({"version": 1, **document}), encoding="utf-8")
    return path


def carried_out(words: Sequence[str]) -> dict[str, Any]:
    """The report of a command. Ends the script where it fails."""
    printed, told = StringIO(), StringIO()
    with redirect_stdout(printed), redirect_stderr(told):
        code = run([*words, "--json", "-"])
    if code:
        sys.exit(f"exit {code}: qcompress {' '.join(words)}\n{told.getvalue()[-2000:]}")
    report: dict[str, Any] = json.loads(printed.getvalue())
    return report


def save_network(recipe: Path, path: Path, dtype: torch.dtype = torch.float32) -> int:
    """The weights of the network that a recipe names, as its constructor draws them; how many there are."""
    module = build_network(ModelRun(read_recipe(recipe), torch.device("cpu"), allow_code=True))
    # Twins of one storage are stored once.
    found = {
        name: value.to(dtype).contiguous() for name, value in module.state_dict().items() if value.is_floating_point()
    }
    first = {value.data_ptr(): name for name, value in reversed(found.items())}
    save_file({name: found[name].clone() for name in first.values()}, path)
    return sum(value.numel() for value in module.parameters())


def equality(folder: Path, methods: Sequence[str], device: str) -> Iterator[dict[str, Any]]:
    """A row for each method: what it gives on the CPU and on the device."""
    random = np.random.default_rng(0)
    np.savez(folder / "images.npz", x=random.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8), y=np.arange(64) % 10)
    source = {"npz": "images.npz", "batch_size": 32}
    base = {
        "model": {"factory": f"{NETS / 'cifar_resnet.py'}:resnet20"},
        "data": {"calibration": source, "eval": source, "train": source, "normalize": {"mean": [0.5], "std": [0.25]}},
        "task": {"classification": {"metric": "top1"}},
    }
    checkpoint = folder / "resnet20.safetensors"
    save_network(
        write_recipe(folder, "network", {**base, "rules": [{"match": "*.weight", "squant": {"bits": 4}}]}), checkpoint
    )
    for method in methods:
        case = CASES[method]
        document = {**base, "rules": [{"match": "*.weight", method: dict(case.options)}]}
        document |= {"finetune": TRAINED} if case.finetune else {}
        document |= {"budget": {"bpw": 3.0}} if method == "rd" else {}
        recipe = write_recipe(folder, method, document)
        weights, decibels = [], []
        for place in ("cpu", device):
            output = folder / f"{method}-{place}.safetensors"
            words = [case.command, str(checkpoint), "-r", str(recipe), "--allow-code", "--device", place, "-f"]
            report = carried_out([*words, "-o", str(output)])
            decibels.append(float(np.median([one["figures"]["sqnr_db"] for one in report["layers"] if one["figures"]])))
            weights.append(load_state_dict(output))
        total = sum(value.numel() for value in weights[0].values())
        equal = sum(int((value == weights[1][name]).sum()) for name, value in weights[0].items()) / total
        holds = abs(decibels[0] - decibels[1]) <= case.decibels
        yield {"method": method, "CPU dB": decibels[0], "device dB": decibels[1], "equal": equal, "holds": holds}


def times(folder: Path, device: str, chosen: Mapping[str, Network]) -> Iterator[dict[str, Any]]:
    """A row for each network and method that is timed."""
    for title, network in chosen.items():
        np.savez(folder / f"{title}.npz", **network.samples)
        source: dict[str, Any] = {"npz": f"{title}.npz", "batch_size": network.batch_size}
        if network.task == "causal-lm":
            source["inputs"] = "input_ids"
        data = {"calibration": source, "train": source, "eval": source}
        base = {"model": network.model, "data": data, "task": network.task}
        rules = {
            "rd": {"effort": "fast"},
            "gptq": {"bits": 4},
            "adaround": {"bits": 4, "iterations": 100},
            "lsq": {"bits": 4},
        }
        checkpoint = folder / f"{title}.safetensors"
        first = write_recipe(folder, title, {**base, "rules": [{"match": "*.weight", "squant": {"bits": 4}}]})
        weights = save_network(first, checkpoint, network.dtype)
        for method, given in rules.items():
            document = {**base, "rules": [{"match": "*.weight", method: given}]}
            document |= {"budget": {"bpw": 3.0}} if method == "rd" else {}
            document |= {"finetune": TRAINED} if method == "lsq" else {}
            recipe, output = write_recipe(folder, f"{title}-{method}", document), folder / "out.safetensors"
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            words = ["quantize", str(checkpoint), "-r", str(recipe), "--allow-code", "--device", device, "-f"]
            carried_out([*words, "-o", str(output)])
            seconds = time.perf_counter() - started
            memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
            yield {
                "network": title,
                "M weights": weights / 1e6,
                "method": method,
                "seconds": seconds,
                "M weights a second": weights / 1e6 / seconds,
                "GB on the device": memory,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[*CASES])
    parser.add_argument("--networks", type=lambda text: text.split(","), default=["Llama", "ResNet-50"])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    os.environ.pop("QCOMPRESS_DATA", None)
    torch.manual_seed(0)
    lines = [head(options.device)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [*equality(folder, options.methods, options.device)]
        failed = any(not row["holds"] for row in rows)
        lines += ["\n## Against the CPU\n", EQUALITY, table(rows)]
        chosen = {name: one for name, one in networks(options.small).items() if name in options.networks}
        lines += ["\n## Times\n", TIMES, table([*times(folder, options.device, chosen)])]
    options.page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
