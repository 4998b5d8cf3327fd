"""What the checksums of tensors cost every reader, and how much memory readers take.

    python benchmarks/reading.py CHECKPOINT [--pairs 9] [--json FILE|-]

One thread, process CPU time: pairs of a run with the checks and one without, in turns of either order, the median of
their ratios. Memory is what the peak of a process of its own grows by, once it has read a small artifact
(/proc of Linux: what `getrusage` tells is, after a fork, at least what the parent takes).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import render, seconds_of, show

from qcompress.artifact.artifact_file import ArtifactFile
from qcompress.artifact.reader import read_artifact
from qcompress.artifact.stored_tensor import StoredTensor
from qcompress.checkpoint.checkpoint import write_checkpoint
from qcompress.cli.app import run
from qcompress.compress.load import load_state_dict
from qcompress.exporters.safetensors import export
from qcompress.report.gather import gather_report

MADE = {
    "packed": ("--bits", "4", "--method", "rtn", "--coding", "packed"),
    "ans": ("--bits", "4", "--method", "rtn", "--coding", "ans"),
    "rd": ("--bpw", "2.5", "--effort", "fast"),
}
"""Artifacts by their coding, and how each is made."""
PEAK = """
import re, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from reading import readers
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for path in {paths!r}:
    before = peak()
    readers(Path(path), Path({out!r}))[{reader!r}]()
print((peak() - before) / 1e3)
"""


def readers(path: Path, output: Path) -> dict[str, Callable[[], object]]:
    """Every way to read all of an artifact."""
    return {
        "load_state_dict": lambda: load_state_dict(path),
        "export": lambda: export(read_artifact(path), output, force=True),
        "verify": lambda: list(read_artifact(path).verify()),
        "report": lambda: gather_report(path),
    }


@contextmanager
def unchecked() -> Iterator[None]:
    """Reading without a look at the checksums of tensors."""
    with (
        mock.patch.object(StoredTensor, "check_seal", lambda _: None),
        mock.patch.object(ArtifactFile, "check_kept", lambda *_: None),
    ):
        yield


def cost(call: Callable[[], object], pairs: int) -> dict[str, float]:
    """Median CPU seconds with checks, and by how many percent they are more than without."""

    def without() -> float:
        with unchecked():
            return seconds_of(call, 1)

    call()
    checked, ratios = [], []
    for turn in range(pairs):
        first = without() if turn % 2 else 0.0
        checked.append(seconds_of(call, 1))
        ratios.append(checked[-1] / (first or without()))
    return {"cpu": statistics.median(checked), "percent": 100 * (statistics.median(ratios) - 1)}


def memory(reader: str, small: Path, large: Path, output: Path) -> float:
    """MB by which the peak of a process of its own grows."""
    code = PEAK.format(here=str(Path(__file__).parent), paths=[str(small), str(large)], out=str(output), reader=reader)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(ran.stdout)


def make(checkpoint: Path, name: str, folder: Path) -> Path:
    """An artifact without its report, so that `report` reads it."""
    path = folder / f"{checkpoint.stem}-{name}.safetensors"
    # stdout is for the figures.
    with redirect_stdout(sys.stderr):
        code = run(["quantize", str(checkpoint), *MADE[name], "--threads", "1", "-q", "-o", str(path)])
    if code:
        raise SystemExit(f"cannot make {path}")
    path.with_suffix(".report.json").unlink()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for stdout, in place of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.checkpoint.parent) as name:
        folder = Path(name)
        write_checkpoint({"w": torch.randn(64, 96, generator=torch.manual_seed(0))}, folder / "small.safetensors")
        for coding in MADE:
            small, path = (make(one, coding, folder) for one in (folder / "small.safetensors", arguments.checkpoint))
            for reader, call in readers(path, folder / "dense.safetensors").items():
                figures = {**cost(call, arguments.pairs), "memory MB": memory(reader, small, path, folder / "d.out")}
                rows.append({"name": f"{reader}, {coding}", **figures, "artifact MB": path.stat().st_size / 1e6})
    text = render(rows)
    show({row.pop("name"): row for row in rows}, text, arguments.json)


if __name__ == "__main__":
    main()
