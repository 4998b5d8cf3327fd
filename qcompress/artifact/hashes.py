"""What names an artifact, and what it was made from. Imports no numpy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from qcompress.types.plan import TensorInfo


def input_hash(tensors: Sequence[TensorInfo], crcs: Mapping[str, int]) -> str:
    """SHA-256 over a JSON line [name, dtype, shape, crc32] for each tensor, sorted by name."""
    digest = hashlib.sha256()
    for info in sorted(tensors, key=lambda info: info.name):
        line = json.dumps([info.name, info.dtype, list(info.shape), crcs[info.name]], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def artifact_hash(files: Sequence[tuple[str, str]]) -> str:
    """What ties a report to its artifact: the SHA-256 of its manifest; of several files, of names and hashes."""
    if len(files) == 1:
        return files[0][1]
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(files)).encode()).hexdigest()
