"""Whole commands, each in a process of its own: processor seconds, peak memory, and what their reports say.

    python benchmarks/commands.py start [--turns 9] [--json FILE|-]
    python benchmarks/commands.py budgets CHECKPOINT       a budget without data against fixed widths
    python benchmarks/commands.py layers                   a network of 1,000 layers
    python benchmarks/commands.py resnet50 CHECKPOINT      the weights of ResNet-50
    python benchmarks/commands.py large CHECKPOINT         a budget without data, of a checkpoint of any size

The commands take turns, so that a machine that slows down slows all of them; figures are medians, imports included.
`ratio` is to the command whose ratio is 1. One thread a process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ledger import ROOT
from safetensors.numpy import save_file
from timing import render, show

LAYERS = 1000
QUANTIZE = ("-m", "qcompress", "quantize", "IN")
REPORTED = ("--threads", "1", "-o", "OUT", "--force", "--json", "-")
REPORT = ("-m", "qcompress", "report", "OUT")

SETS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "start": {
        "import typer, rich": ("-c", "import typer, rich"),
        "qcompress --help": ("-m", "qcompress", "--help"),
        "qcompress quantize --help": ("-m", "qcompress", "quantize", "--help"),
        "qcompress recipe schema": ("-m", "qcompress", "recipe", "schema"),
        "import torch": ("-c", "import torch"),
    },
    "budgets": {
        "squant, 2 bits": (*QUANTIZE, "--method", "squant", "--bits", "2", *REPORTED),
        "rtn, 2 bits": (*QUANTIZE, "--method", "rtn", "--bits", "2", *REPORTED),
        "squant, 2 bits a weight": (*QUANTIZE, "--method", "squant", "--bpw", "2", *REPORTED),
        "rd, 2 bits a weight, fast": (*QUANTIZE, "--bpw", "2", "--effort", "fast", *REPORTED),
        "rd, 2 bits a weight": (*QUANTIZE, "--bpw", "2", *REPORTED),
        "rd, 4 bits a weight": (*QUANTIZE, "--bpw", "4", *REPORTED),
    },
    "layers": {
        "quantize, 3 bits": (*QUANTIZE, "--bits", "3", *REPORTED),
        "quantize, 3.3 bits a weight": (*QUANTIZE, "--bpw", "3.3", "--method", "squant", *REPORTED),
        "report": REPORT,
        "report as html": (*REPORT, "--format", "html", "-o", "PAGE", "-q"),
    },
    "large": {"rd, 2 bits a weight": (*QUANTIZE, "--bpw", "2", *REPORTED)},
    "resnet50": {"squant, 4 bits": (*QUANTIZE, "--method", "squant", "--bits", "4", *REPORTED)},
}
"""Set -> title of a command -> its words behind python. The first has the ratio 1."""


def write_layers(path: Path) -> None:
    """A network of many layers of 4,096 weights."""
    random = np.random.default_rng(0)
    save_file(
        {f"layers.{i}.weight": random.standard_normal((64, 64)).astype(np.float32) for i in range(LAYERS)}, str(path)
    )


def run(words: Sequence[str]) -> dict[str, Any]:
    """Processor seconds, peak megabytes, and of a report that the process prints bits and mean relative error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=printed, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"exit {process.returncode}: {words}")
        printed.seek(0)
        text = printed.read()
    found = {"cpu": used.ru_utime + used.ru_stime, "peak MB": used.ru_maxrss * 1024 / 1e6}
    if "--json" in words:
        report = json.loads(text)
        errors = [layer["figures"]["relative_error"] for layer in report["layers"] if layer["figures"]]
        found |= {"bits": report["size"]["bits_per_weight"], "error": statistics.mean(errors)}
    return found


def measure(name: str, checkpoint: Path | None, turns: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        places = {"IN": str(checkpoint or f"{folder}/in.safetensors"), "OUT": f"{folder}/out.safetensors"}
        places["PAGE"] = f"{folder}/out.html"
        if name == "layers":
            write_layers(Path(places["IN"]))
        commands = {title: [places.get(word, word) for word in words] for title, words in SETS[name].items()}
        rounds = [{title: run(words) for title, words in commands.items()} for _ in range(turns)]
        page = Path(places["PAGE"])
        page_mb = page.stat().st_size / 1e6 if page.is_file() else None
    base, rows = None, []
    for title in commands:
        found = {key: statistics.median(one[title][key] for one in rounds) for key in rounds[0][title]}
        base = base or found["cpu"]
        row = {"name": title, "cpu": found["cpu"], "ratio": found["cpu"] / base, "peak MB": found["peak MB"]}
        rows.append(row | {"bits": found.get("bits"), "error": found.get("error")})
    if page_mb is not None:
        rows[-1]["page MB"] = page_mb
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    if options.set in ("budgets", "large", "resnet50") and options.checkpoint is None:
        parser.error(f"{options.set} needs a checkpoint; benchmarks/make_checkpoint.py writes one")
    rows = measure(options.set, options.checkpoint, options.turns)
    show(rows, render(rows), options.json)


if __name__ == "__main__":
    main()
