"""What reading takes is held against what the user allows, before it begins. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from qcompress.errors import ResourceError, Subject

BLOCK_BYTES = 64_000_000
"""What any reader takes at most for a block: a piece of each part of a tensor, and codes and weights of some chunks."""
WEIGHT_BYTES = 64
"""What it takes at most for each weight of a smaller tensor."""
PROCESS_BYTES = 160_000_000
"""What a process takes at most that decodes chunks for another one, with the chunks that wait for it."""
NUMBER_BYTES = 48
"""What a number of side information takes while it is parsed."""

ALLOW = "allow more with --max-memory (in Python max_memory)"


def block_bytes(weights: int) -> int:
    """What reading a tensor of so many weights block by block takes at most."""
    return min(BLOCK_BYTES, WEIGHT_BYTES * weights)


def refuse_memory(most: int | None, needed: int, path: Path, name: str, doing: str, hint: str) -> None:
    """Raise ResourceError where reading takes more memory than may be used.

    most    bytes; None: all that there is
    needed  bytes, besides those of the program itself, for what `doing` names
    name    of the tensor that takes it
    """
    if most is not None and needed > most:
        what = f"{doing} takes about {needed:,} bytes of memory, more than the {most:,} that it may"
        raise ResourceError(str(path), what, hint, Subject(name))
