"""The container of GGUF, version 3: metadata, then where each tensor lies, then the tensors, each at a multiple of 32.

The format is ggml's (github.com/ggml-org/ggml, docs/gguf.md). Numbers are little-endian; dimensions are listed from the
innermost to the outermost.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qcompress.types.export import ExportFile, Target

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32
"""Weights of a block, of all types of blocks here."""


@dataclass(frozen=True)
class GgufType:
    """How ggml holds a tensor: its number, and the bytes of a block of weights; `filetype` is llama.cpp's number."""

    name: str
    number: int
    block_bytes: int
    weights: int = BLOCK
    filetype: int = 0


TYPES = {
    one.name: one
    for one in (
        GgufType("F32", 0, 4, 1, 0),
        GgufType("F16", 1, 2, 1, 1),
        GgufType("BF16", 30, 2, 1, 32),
        GgufType("Q4_0", 2, 18, filetype=2),
        GgufType("Q4_1", 3, 20, filetype=3),
        GgufType("Q5_0", 6, 22, filetype=8),
        GgufType("Q5_1", 7, 24, filetype=9),
        GgufType("Q8_0", 8, 34, filetype=7),
        GgufType("IQ4_NL", 20, 18, filetype=25),
    )
}

Value: TypeAlias = "int | float | bool | str | Sequence[str] | Sequence[int] | Sequence[float]"
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def _string(text: str | bytes) -> bytes:
    data = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """A value of metadata after its type: bool, unsigned or float of 32 bits, text, or a list of texts or numbers."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if all(isinstance(one, str) for one in value):
        kind, data = _STRING, b"".join(_string(str(one)) for one in value)
    elif all(isinstance(one, int) for one in value):
        kind, data = _I32, struct.pack(f"<{len(value)}i", *value)
    else:
        kind, data = _F32, struct.pack(f"<{len(value)}f", *value)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + data


def gguf_file(metadata: Mapping[str, Value], targets: Sequence[Target]) -> ExportFile:
    """The one file of an export; `dtype` of a target is a name of TYPES."""
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(targets), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    position = 0
    for target in targets:
        dimensions = target.shape[::-1]
        head.append(_string(target.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        head.append(struct.pack("<IQ", TYPES[target.dtype].number, position))
        position += target.n_bytes + -target.n_bytes % ALIGNMENT
    data = b"".join(head)
    return ExportFile("", data + bytes(-len(data) % ALIGNMENT), tuple(targets), ALIGNMENT)
