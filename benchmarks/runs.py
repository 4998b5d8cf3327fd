"""Runs of the command line for docs/results.md: each is made once, and its JSON kept in the work folder."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def call(
    words: Sequence[str], kept: Path, *, before: str = "", shown: Callable[[Any], object] | None = None
) -> dict[str, Any]:
    """The JSON that a command prints, read back where it was run before. Exits where the command fails.

    words   of the command line, behind `qcompress`
    before  a command to run it by, such as nice
    shown   what to print of the JSON of a command that was run now
    """
    if not kept.is_file():
        command = [*shlex.split(before), sys.executable, "-m", "qcompress", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{kept.stem}: exit {done.returncode}\n{done.stderr}")
        kept.write_text(done.stdout)
        if shown is not None:
            print(f"{kept.stem}: {shown(json.loads(done.stdout))}", flush=True)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def top1(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of checkpoint and artifact on this metric."""
    found: dict[str, Any] = next(one for one in report["accuracy"] if one["metric"] == "top1")
    return found
