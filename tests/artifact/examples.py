"""Small checkpoints, recipes and artifacts, and the means to change what a file says."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from artifact.educational_decoder import Dense
from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
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
    return make_plan(asked, checkpoint.tensors, checkpoint.tied, checkpoint.axes, **known)


def run(source: Path, output: Path, asked: Recipe, choice: str = "packed", **options: Any) -> Report:
    checkpoint = read_checkpoint(source)
    return compress(checkpoint, plan_for(checkpoint, asked), Options(output, choice=choice, **options))


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


def rewrite(path: Path, change: Callable[[Header, Header, bytearray], None]) -> Path:
    """Let `change` edit header, manifest and data of an artifact, and make its checksums true again."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:start]), bytearray(raw[start:])
    manifest = json.loads(header["__metadata__"]["qcompress"])
    change(header, manifest, data)
    manifest["sha256"] = hashlib.sha256(data).hexdigest()
    for crc32 in ("0" * 8, ""):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        manifest["header_crc32"] = crc32 or f"{zlib.crc32(raw[:start]):08x}"
        header["__metadata__"]["qcompress"] = json.dumps(manifest, separators=(",", ":"))
        write_raw(path, header, bytes(data))
    return path


def seal(header: Header, manifest: Header, data: bytes, name: str) -> None:
    """Make the CRC-32 of a tensor with packed codes true again."""
    parts = [
        header[f"{name}.qc.{part}"]
        for part in ("codes", "scale", "zero_point", "offset", "codebook")
        if f"{name}.qc.{part}" in header
    ]
    spans = [part["data_offsets"] for part in parts]
    manifest["tensors"][name]["crc32"] = zlib.crc32(b"".join(bytes(data[begin:end]) for begin, end in spans))


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
