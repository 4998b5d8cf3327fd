"""How fast artifacts are decoded, by the loops that are always there and by those that numba compiles.

    python benchmarks/decoding.py CHECKPOINT [--turns 7] [--json FILE|-]

`load_state_dict` of all of an artifact, one thread, process CPU time, in turns: safetensors' own tensors, cloned; the
artifact without numba; the artifact with it, once the loops were compiled. M weights a core-second are medians, and so
are the ratios, each of one turn. What is decoded is compared first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from timing import render, seconds_of, show

from qcompress.cli.app import run
from qcompress.coding.compiled import LEAST_CODES, Compiler
from qcompress.compress.load import load_state_dict

GROUPS = ("--bits", "4", "--method", "rtn", "--granularity", "group", "--group-size", "64")
MADE = {
    "packed": (*GROUPS, "--coding", "packed"),
    "zstd": (*GROUPS, "--coding", "zstd"),
    "ans": (*GROUPS, "--coding", "ans"),
    "rd": ("--bpw", "2", "--effort", "fast"),
}
"""Artifacts by their coding, and how each is made."""


def make(checkpoint: Path, name: str, folder: Path) -> Path:
    path = folder / f"{name}.safetensors"
    # stdout is for the figures.
    with redirect_stdout(sys.stderr):
        code = run(["quantize", str(checkpoint), *MADE[name], "--threads", "1", "-q", "-o", str(path)])
    if code:
        raise SystemExit(f"cannot make {path}")
    return path


def measure(checkpoint: Path, path: Path, turns: int) -> dict[str, float]:
    def load(compiled: bool) -> dict[str, torch.Tensor]:
        with mock.patch.object(Compiler, "pays", lambda *_: compiled):
            return load_state_dict(path)

    slow, fast = load(False), load(True)
    assert all(torch.equal(slow[name], fast[name]) for name in slow), "compiled loops decode something else"
    weights = sum(tensor.numel() for tensor in slow.values())
    del slow, fast
    seconds = [
        (
            seconds_of(lambda: {name: tensor.clone() for name, tensor in load_file(checkpoint).items()}, 1),
            seconds_of(lambda: load(False), 1),
            seconds_of(lambda: load(True), 1),
        )
        for _ in range(turns)
    ]
    dense, plain, compiled = (weights / statistics.median(one) / 1e6 for one in zip(*seconds, strict=True))
    return {
        "safetensors": dense,
        "without": plain,
        "with": compiled,
        "times": statistics.median(slow / fast for _, slow, fast in seconds),
        "dense times": statistics.median(fast / own for own, _, fast in seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for stdout, in place of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not Compiler().pays(LEAST_CODES):
        raise SystemExit("numba is not installed: pip install 'qcompress[rd]'")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.checkpoint.parent) as name:
        for coding in MADE:
            path = make(arguments.checkpoint, coding, Path(name))
            rows.append({"name": coding, **measure(arguments.checkpoint, path, arguments.turns)})
            path.unlink()
    text = render(rows)
    show({row.pop("name"): row for row in rows}, text, arguments.json)


if __name__ == "__main__":
    main()
