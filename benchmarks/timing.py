"""How benchmarks measure processor time and show their figures."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def seconds_of(call: Callable[[], object], repeats: int, *, warm: bool = False) -> float:
    """The median CPU seconds of a call, above 0; `warm`: after one that does not count."""
    if warm:
        call()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return max(statistics.median(seconds), 1e-9)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of aligned columns; None leaves a cell empty."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([cell(value) for value in each.values()] for each in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def show(document: Any, text: str, json_to: str | None) -> None:
    """Print the text, and write the document to a file as JSON; for "-" its JSON is printed instead."""
    if json_to == "-":
        json.dump(document, sys.stdout, indent=1)
        return
    if json_to:
        Path(json_to).write_text(json.dumps(document, indent=1) + "\n")
    print(text)
