"""A second reader of GGUF, one weight at a time: an obvious slow reference of container and blocks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
BLOCK_BYTES = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 20: 18}


class Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        size = self.take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.take("<I"), self.take("<Q")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and tensors: those of blocks in float32."""
    cursor = Cursor(path.read_bytes())
    assert cursor.data[:4] == b"GGUF"
    cursor.at = 4
    assert cursor.take("<I") == 3
    tensors, values = cursor.take("<Q"), cursor.take("<Q")
    metadata = {cursor.text(): cursor.value(cursor.take("<I")) for _ in range(values)}
    infos = []
    for _ in range(tensors):
        name = cursor.text()
        shape = [cursor.take("<Q") for _ in range(cursor.take("<I"))][::-1]
        infos.append((name, shape, cursor.take("<I"), cursor.take("<Q")))
    start = -(-cursor.at // 32) * 32
    return metadata, {name: decode(cursor.data, start + at, shape, kind) for name, shape, kind, at in infos}


def decode(data: bytes, at: int, shape: list[int], kind: int) -> Tensor:
    assert at % 32 == 0
    count = int(torch.tensor(shape).prod())
    if kind in DENSE:
        return torch.frombuffer(bytearray(data), dtype=DENSE[kind], count=count, offset=at).reshape(shape).clone()
    size = BLOCK_BYTES[kind]
    blocks = [decode_block(data[at + i * size : at + (i + 1) * size], kind) for i in range(count // 32)]
    return torch.from_numpy(np.concatenate(blocks)).reshape(shape)


def decode_block(block: bytes, kind: int) -> NDArray[np.float32]:
    d = np.float32(struct.unpack_from("<e", block)[0])
    if kind == 8:
        return d * np.frombuffer(block, np.int8, offset=2).astype(np.float32)
    m = np.float32(struct.unpack_from("<e", block, 2)[0]) if kind in (3, 7) else None
    head = 2 if m is None else 4
    fifth = int.from_bytes(block[head : head + 4], "little") if kind in (6, 7) else 0
    nibbles = block[head + 4 :] if kind in (6, 7) else block[head:]
    codes = [nibbles[j % 16] >> 4 * (j // 16) & 15 | (fifth >> j & 1) << 4 for j in range(32)]
    if kind == 20:
        codes = [IQ4_NL[code] for code in codes]
    values = d * (np.array(codes, np.float32) - {2: 8, 6: 16}.get(kind, 0))
    return (values if m is None else values + m).astype(np.float32)
