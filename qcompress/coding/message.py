"""Codes as plain values and tensors, which a file can hold, and as bytes, which one rank tells the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from qcompress.types.encoded import Affine, Blocked, Codebook, Constant, Encoded, Kept, Table, Unbounded
from qcompress.types.ranks import World

KINDS = {kind.__name__: kind for kind in (Kept, Affine, Table, Blocked, Codebook, Unbounded, Constant)}


def flatten(encoded: Encoded) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A value of JSON that says what it is, and the tensors of its fields, by their names."""
    values = {one.name: getattr(encoded, one.name) for one in fields(encoded)}
    tensors = {key: one for key, one in values.items() if isinstance(one, Tensor)}
    plain = {key: one for key, one in values.items() if key not in tensors}
    return {"kind": type(encoded).__name__, "values": plain}, tensors


def restore(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoded:
    """The inverse of `flatten`."""
    values = {key: tuple(one) if isinstance(one, list) else one for key, one in document["values"].items()}
    kind: Any = KINDS[document["kind"]]
    found: Encoded = kind(**values, **tensors)
    return found


def to_bytes(encoded: Mapping[str, Encoded], others: Mapping[str, Tensor]) -> bytes:
    """Codes by name, and other tensors by theirs: 8 bytes of length, a JSON document, and what the tensors hold."""
    documents: dict[str, dict[str, Any]] = {}
    tensors: dict[tuple[str, str], Tensor] = {}
    for name, one in encoded.items():
        documents[name], parts = flatten(one)
        tensors |= {(name, key): value for key, value in parts.items()}
    tensors |= {("", name): value for name, value in others.items()}
    cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    named = [[*key, str(value.dtype).removeprefix("torch."), [*value.shape]] for key, value in cpu.items()]
    head = json.dumps([documents, named]).encode()
    data = (value.reshape(-1).view(torch.uint8).numpy().tobytes() for value in cpu.values())
    return b"".join([len(head).to_bytes(8, "little"), head, *data])


def from_bytes(message: bytes) -> tuple[dict[str, Encoded], dict[str, Tensor]]:
    """The inverse of `to_bytes`, on the CPU."""
    position = 8 + int.from_bytes(message[:8], "little")
    documents, named = json.loads(message[8:position])
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("", *documents)}
    for name, key, dtype, shape in named:
        value = torch.empty(shape, dtype=getattr(torch, dtype))
        size = value.nbytes
        if size:
            piece = torch.frombuffer(bytearray(message[position : position + size]), dtype=torch.uint8)
            value.reshape(-1).view(torch.uint8).copy_(piece)
        parts[name][key] = value
        position += size
    return {name: restore(documents[name], parts[name]) for name in documents}, parts[""]


def share_codes(
    encoded: Mapping[str, Encoded], others: Mapping[str, Tensor], world: World
) -> tuple[dict[str, Encoded], dict[str, Tensor]]:
    """What all ranks have, of codes and of other tensors, on the CPU; of one process alone just that."""
    if world.size == 1:
        return dict(encoded), dict(others)
    all_codes: dict[str, Encoded] = {}
    all_others: dict[str, Tensor] = {}
    for message in world.exchange(to_bytes(encoded, others)):
        codes, tensors = from_bytes(message)
        all_codes |= codes
        all_others |= tensors
    return all_codes, all_others
