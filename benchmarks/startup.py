"""Processor time of commands that must start fast, as a multiple of importing typer and rich.

python benchmarks/startup.py [--runs 9]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "import typer, rich": ["-c", "import typer, rich"],
    "qcompress --help": ["-m", "qcompress", "--help"],
    "qcompress quantize --help": ["-m", "qcompress", "quantize", "--help"],
    "qcompress recipe schema": ["-m", "qcompress", "recipe", "schema"],
    "import torch": ["-c", "import torch"],
}


def cpu_seconds(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    # In turn, so that a machine that slows down slows all of them.
    rounds = [{name: cpu_seconds(words) for name, words in COMMANDS.items()} for _ in range(runs)]
    base = statistics.median(one["import typer, rich"] for one in rounds)
    print(f"{'command':28}{'cpu s':>8}{'ratio':>8}")
    for name in COMMANDS:
        middle = statistics.median(one[name] for one in rounds)
        print(f"{name:28}{middle:8.3f}{middle / base:8.2f}")


if __name__ == "__main__":
    main()
