"""Small checkpoints, recipes and artifacts, and the means to change what a file says."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import save_file
from torch import Tensor

from artifact.educational_compact import compact_header
from artifact.educational_decoder import Dense, checksums, read_manifest
from qcompress.artifact import stored_tensor
from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.coding import ans, payload
from qcompress.coding.ans import varint
from qcompress.coding.unbounded import payload as unbounded_payload
from qcompress.coding.unbounded import streams
from qcompress.compress.compress import compress
from qcompress.plan.plan import make_plan
from qcompress.registry import METHODS
from qcompress.report.document import Report
from qcompress.types.plan import Plan, Recipe, Rule
from qcompress.types.run import Options

torch.set_num_threads(1)

Header = dict[str, Any]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rule(match: str, method: str | None = None, **options: Any) -> Rule:
    config = METHODS[method].config(**options) if method else None
    return Rule(match, method, config, f"rule {match}")


def recipe(*rules: Rule) -> Recipe:
    return Recipe("quantize", rules, source="test")


def rtn(bits: int = 4, match: str = "*", **options: Any) -> Recipe:
    return recipe(rule(match, "rtn", bits=bits, **options))


def plan_for(checkpoint: Checkpoint, asked: Recipe, **known: Any) -> Plan:
    return make_plan(asked, checkpoint.tensors, checkpoint.tied, checkpoint.config, **known)


def run(
    source: Path, output: Path, asked: Recipe, choice: str = "packed", *, compact: bool = False, **options: Any
) -> Report:
    checkpoint = read_checkpoint(source)
    plan = replace(plan_for(checkpoint, asked), compact=compact)
    return compress(checkpoint, plan, Options(output, choice=choice, **options))


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A checkpoint file as the safetensors library writes it."""
    save_file(dict(tensors), path, metadata)
    return path


def save_folder(
    folder: Path, shards: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any] | None = None
) -> Path:
    """A sharded checkpoint folder with its index, and config.json where one is given."""
    folder.mkdir()
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_raw(path: Path, header: Header | bytes, data: bytes = b"") -> Path:
    """A file with any header at all before its data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def make_artifact(folder: Path, tensors: Mapping[str, Tensor] | None = None, choice: str = "packed") -> Path:
    """An artifact of the weights "w" [6, 10] with integer zero points and "v" [4, 7] without, and the kept "b" [3]."""
    default = {"w": gaussian(6, 10), "v": gaussian(4, 7, seed=1), "b": gaussian(3, seed=2)}
    source = save(folder / "source.safetensors", default if tensors is None else tensors)
    asked = recipe(rule("v", "rtn", bits=3, symmetric=True), rule("*", "rtn", bits=3)) if tensors is None else rtn(3)
    run(source, folder / "artifact.safetensors", asked, choice, force=True)
    return folder / "artifact.safetensors"


def rewrite(path: Path, change: Callable[[Header, Header, bytearray], Any]) -> Path:
    """Let `change` edit header, manifest and data of an artifact, and make its file's checksums true again.

    The data are those before the manifest, which has its numbers by kind and name under `numbers`, where `change` finds
    them; what it puts into an entry for a number is left alone.
    """
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    begin, end = header.pop("qcompress.manifest")["data_offsets"]
    data = bytearray(raw[start : start + begin])
    manifest = read_manifest(raw[start + begin : start + end], header)
    for entry in manifest["tensors"].values():
        for number in ("coding", "exponent", "entries", "value"):
            entry.pop(number, None)
    change(header, manifest, data)
    return assemble(path, header, manifest, bytes(data))


def assemble(path: Path, header: Header, manifest: Header, data: bytes) -> Path:
    """An artifact of these, with its file's checksums."""
    numbers = {**manifest["numbers"], "sha256": hashlib.sha256(data).hexdigest()}
    for _ in range(2):
        frame = pack_manifest(manifest, numbers)
        span = {"dtype": "U8", "shape": [len(frame)], "data_offsets": [len(data), len(data) + len(frame)]}
        write_raw(path, {**header, "qcompress.manifest": span}, data + frame)
        raw = path.read_bytes()
        numbers["header_crc32"] = zlib.crc32(raw[: 8 + int.from_bytes(raw[:8], "little")])
    return path


def pack_manifest(manifest: Header, numbers: Header) -> bytes:
    """The frame of a manifest; its numbers are not compressed, so that none changes its length."""
    text = {key: value for key, value in manifest.items() if key != "numbers"}
    parts = [bytes.fromhex(numbers["sha256"] + numbers["input_sha256"]), struct.pack("<I", numbers["header_crc32"])]
    for kind, letter in (("coding", "B"), ("exponent", "b"), ("entries", "H"), ("value", "d"), ("crc32", "I")):
        parts += [struct.pack(f"<{letter}", value) for value in numbers[kind].values()]
    parts += [varint(length) for length in numbers["lengths"].values()]
    return framed(json.dumps(text, ensure_ascii=False).encode() + b"\n" + b"".join(parts))


def framed(content: bytes) -> bytes:
    """A frame with a checksum, of blocks that are not compressed."""
    checksum = zstandard.ZstdCompressor(write_checksum=True).compress(content)[-4:]
    pieces = [content[at : at + 2**17] for at in range(0, len(content), 2**17)] or [b""]
    blocks = [(len(one) << 3 | (one is pieces[-1])).to_bytes(3, "little") + one for one in pieces]
    return b"\x28\xb5\x2f\xfd\xa4" + len(content).to_bytes(4, "little") + b"".join(blocks) + checksum


def same_content(frame: bytes, other: bytes) -> bool:
    """Whether two frames expand to the same: some bits of a compressed block say nothing."""
    try:
        one, two = (zstandard.ZstdDecompressor().decompress(bytes(raw)) for raw in (frame, other))
    except zstandard.ZstdError:
        return False
    return one == two


def seal(header: Header, manifest: Header, data: bytes, name: str) -> None:
    """Make the CRC-32 of a tensor true again."""
    numbers = manifest["numbers"]
    codings = {one: ("packed", "zstd", "ans")[code] for one, code in numbers["coding"].items()}
    told = {"coding": codings, **{kind: numbers[kind] for kind in ("exponent", "entries", "value")}}
    entries = {
        one: entry | {kind: values[one] for kind, values in told.items() if one in values}
        for one, entry in manifest["tensors"].items()
    }
    plain = {one: stored for one, stored in header.items() if one != "__metadata__"}
    if "kept" in manifest:
        plain = compact_header({**manifest, "tensors": entries})
    found = checksums(plain, data, {**manifest, "tensors": entries})
    numbers["crc32"][name] = found[name]


def damage(path: Path, stored: str) -> None:
    """Flip a bit of the first byte of a stored tensor."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + json.loads(raw[8:start])[stored]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)


def verify(path: Path) -> Artifact:
    """The artifact once all of it was checked."""
    artifact = read_artifact(path)
    assert [name for name, _ in artifact.verify()] == [
        name for file in artifact.files for name in file.manifest.tensors
    ]
    return artifact


SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}


def dense(tensor: Tensor) -> Dense:
    """A torch tensor as the educational decoder gives it."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return Dense(SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape), raw)


def denses(state: Mapping[str, Tensor]) -> dict[str, Dense]:
    return {name: dense(tensor) for name, tensor in state.items()}


def cut_into(codes: int, patch: pytest.MonkeyPatch) -> None:
    """Make chunks and blocks of so few codes, a multiple of 8; of `ans` both writers and readers have to be so cut."""
    for module in (ans, payload, streams, unbounded_payload, stored_tensor):
        patch.setattr(module, "CHUNK_CODES", codes)
