"""How small whole checkpoints become without loss, and how fast that goes, beside zstd and plain safetensors.

    python benchmarks/lossless.py sizes NAME=CHECKPOINT... [--json FILE|-]
    python benchmarks/lossless.py speed CHECKPOINT [--turns 5] [--json FILE|-]

`sizes` takes each checkpoint with its weights as float32, float16 and bfloat16: bytes of the whole file over those of
the plain one, of `quantize --lossless` and of zstd -3 and -19 of the file. `speed` is one thread, process CPU time,
in turns: M weights a core-second, the median over turns, of the whole way from a file to a file, and of reading all
tensors: plain safetensors' own, cloned; zstd -3 of the file, expanded in memory; the artifact without numba and with
it, once loops are compiled. What is read is compared first, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zstandard
from safetensors.torch import load, load_file, save_file
from timing import render, seconds_of, show
from torch import Tensor

from qcompress.cli.app import run
from qcompress.coding.compiled import LEAST_CODES, Compiler
from qcompress.compress.load import load_state_dict

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def compress(checkpoint: Path, output: Path, coding: str = "auto") -> None:
    """Write the artifact of a checkpoint."""
    # stdout is for the figures.
    with redirect_stdout(sys.stderr):
        words = ["--lossless", "--coding", coding, "--threads", "1", "-q", "-f", "-o", str(output)]
        code = run(["quantize", str(checkpoint), *words])
    if code:
        raise SystemExit(f"cannot make {output}")


def zstd(checkpoint: Path, level: int) -> bytes:
    """The frame of a whole file."""
    return zstandard.ZstdCompressor(level=level).compress(checkpoint.read_bytes())


def expanded(frame: bytes) -> dict[str, Tensor]:
    return load(zstandard.ZstdDecompressor().decompress(frame))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all bits are equal, NaN and the sign of zero included."""

    def raw(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return one.keys() == other.keys() and all(torch.equal(raw(one[name]), raw(other[name])) for name in one)


def measure_sizes(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """dtype -> the share of the plain file's bytes that each way takes."""
    found: dict[str, Any] = {}
    tensors = load_file(checkpoint)
    for name, dtype in DTYPES.items():
        plain, artifact = folder / "plain.safetensors", folder / "artifact.safetensors"
        save_file({key: one.to(dtype) if one.is_floating_point() else one for key, one in tensors.items()}, plain)
        compress(plain, artifact)
        assert same(load_state_dict(artifact), load_file(plain)), f"{checkpoint} is not what it was"
        size = plain.stat().st_size
        found[name] = {
            "lossless": artifact.stat().st_size / size,
            **{f"zstd -{level}": len(zstd(plain, level)) / size for level in (3, 19)},
        }
    return found


def measure_speed(checkpoint: Path, folder: Path, turns: int) -> list[dict[str, Any]]:
    """Share, and M weights a core-second in and out, of each way."""
    artifacts = {coding: folder / f"{coding}.safetensors" for coding in ("auto", "zstd")}
    for coding, path in artifacts.items():
        compress(checkpoint, path, coding)
    frame, plain = zstd(checkpoint, 3), load_file(checkpoint)
    weights, size = sum(tensor.numel() for tensor in plain.values()), checkpoint.stat().st_size
    copy = folder / "copy.safetensors"

    def read(coding: str, compiled: bool) -> Callable[[], dict[str, Tensor]]:
        def call() -> dict[str, Tensor]:
            with mock.patch.object(Compiler, "pays", lambda *_: compiled):
                return load_state_dict(artifacts[coding])

        return call

    ways: dict[str, tuple[float, Callable[[], object], Callable[[], dict[str, Tensor]]]] = {
        "safetensors": (
            1.0,
            lambda: save_file(load_file(checkpoint), copy),
            lambda: {name: tensor.clone() for name, tensor in load_file(checkpoint).items()},
        ),
        "zstd -3 of the file": (
            len(frame) / size,
            lambda: copy.write_bytes(zstd(checkpoint, 3)),
            lambda: {name: tensor.clone() for name, tensor in expanded(frame).items()},
        ),
        "zstd": (
            artifacts["zstd"].stat().st_size / size,
            lambda: compress(checkpoint, copy, "zstd"),
            read("zstd", False),
        ),
        "auto": (artifacts["auto"].stat().st_size / size, lambda: compress(checkpoint, copy), read("auto", False)),
        "auto, numba": (artifacts["auto"].stat().st_size / size, lambda: None, read("auto", True)),
    }
    for name, (_, _, get) in ways.items():
        assert same(get(), plain), f"{name} reads something else"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, (_, put, get) in ways.items():
            times[name].append((seconds_of(put, 1), seconds_of(get, 1)))
    rows = []
    for name, (share, _, _) in ways.items():
        put, get = (weights / statistics.median(one) / 1e6 for one in zip(*times[name], strict=True))
        # Writing needs no loops of numba's.
        rows.append({"name": name, "share": share, "write": None if name == "auto, numba" else put, "read": get})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sizes", "speed"))
    parser.add_argument("checkpoints", nargs="+", help="of `sizes` NAME=CHECKPOINT, of `speed` one file")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for stdout, in place of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if arguments.what == "sizes":
            named = dict(text.split("=", 1) for text in arguments.checkpoints)
            document = {name_: measure_sizes(Path(path), Path(name)) for name_, path in named.items()}
            rows = [
                {"network": network, "dtype": dtype, **shares}
                for network, found in document.items()
                for dtype, shares in found.items()
            ]
            show(document, render(rows), arguments.json)
            return
        if not Compiler().pays(LEAST_CODES):
            raise SystemExit("numba is not installed: pip install 'qcompress[rd]'")
        rows = measure_speed(Path(arguments.checkpoints[0]), Path(name), arguments.turns)
    text = render(rows)
    show({row.pop("name"): row for row in rows}, text, arguments.json)


if __name__ == "__main__":
    main()
