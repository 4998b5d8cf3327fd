"""Whole commands at a budget without data, against fixed widths in the same run: CPU seconds, memory, error at bytes.

    python benchmarks/make_checkpoint.py /tmp/m.safetensors --dtype F32 --size 100MB
    python benchmarks/budgets.py /tmp/m.safetensors [--repeats 3] [--json FILE|-]

Each command runs in a process of its own with one thread, from the file to the written, re-read and reported artifact;
its imports count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import ROOT
from timing import render, show

COMMANDS = {
    "rtn, 2 bits": ["--method", "rtn", "--bits", "2"],
    "squant, 2 bits": ["--method", "squant", "--bits", "2"],
    "squant, 2 bits a weight": ["--method", "squant", "--bpw", "2"],
    "rd, 2 bits a weight": ["--bpw", "2"],
    "rd, 2 bits a weight, fast": ["--bpw", "2", "--effort", "fast"],
    "rd, 4 bits a weight": ["--bpw", "4"],
}


def run(checkpoint: Path, words: list[str], repeats: int) -> dict[str, Any]:
    """Medians of a command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qcompress", "quantize", str(checkpoint), *words, "--threads", "1"]
        command += ["-o", f"{folder}/out.safetensors", "--force", "--json", "-"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        reports, seconds = [], []
        for _ in range(repeats):
            before = os.times()
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            seconds.append(used)
            reports.append(json.loads(done.stdout))
    report = reports[0]
    layers = [one for one in report["layers"] if one["figures"]]
    errors = [one["figures"]["relative_error"] for one in layers]
    return {
        "seconds": statistics.median(seconds),
        "peak_mb": statistics.median(one["run"]["peak_memory_bytes"] for one in reports) / 1e6,
        "bits_per_weight": report["size"]["bits_per_weight"],
        "mean_relative_error": statistics.mean(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for stdout, in place of the table")
    arguments = parser.parse_args()
    rows = [
        {"command": name, **run(arguments.checkpoint, words, arguments.repeats)} for name, words in COMMANDS.items()
    ]
    show(rows, render(rows), arguments.json)


if __name__ == "__main__":
    main()
