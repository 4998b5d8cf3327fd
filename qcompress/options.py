"""How a run of quantize or cluster goes. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qcompress.coding.payload import CodingChoice

Progress = Callable[[str, int], None]
"""Called with a tensor's name and its bytes in the checkpoint once it is done."""


@dataclass(frozen=True)
class Options:
    """How to run, not what: none of it changes the bytes, but for `choice`, `device`, `rate` and the files.

    statistics       a file of the layers' input statistics, for the methods that can work from them
    representatives  a file of what finetune-reg has learned, for the methods that take it up
    rate             bits a weight that the codes of methods without widths may take; a budget's search sets it
    """

    output: Path
    choice: CodingChoice = "auto"
    force: bool = False
    threads: int = 1
    device: str = "cpu"
    max_memory: int | None = None
    resume: bool = False
    statistics: Path | None = None
    representatives: Path | None = None
    rate: float | None = None
    progress: Progress | None = None
