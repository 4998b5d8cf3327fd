"""Speed, memory and error of data-free quantization, whole checkpoint to file, against peers in the same run.

    python benchmarks/throughput.py CHECKPOINT [--peers PYTHON] [--tools NAME ...] [--runs 3] [--json FILE|-]

Each tool runs in a process of its own with one thread: `cpu` is its processor time less its imports, `anon` the growth
of its anonymous memory over that after the imports. The peers quantize in memory and write nothing; qcompress reads,
measures, writes, reads back and reports. PYTHON belongs to an environment made from benchmarks/requirements-peers.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from timing import render, show

GROUP = 64
OURS: dict[str, tuple[str, int, str, dict[str, int]]] = {
    "qcompress rtn 4": ("rtn", 4, "packed", {"group_size": GROUP}),
    "qcompress rtn 4 auto": ("rtn", 4, "auto", {"group_size": GROUP}),
    "qcompress mse 4": ("mse", 4, "packed", {"group_size": GROUP}),
    "qcompress mse 2": ("mse", 2, "packed", {"group_size": GROUP}),
    "qcompress hqq 4": ("hqq", 4, "packed", {"group_size": GROUP}),
    "qcompress squant 4, channel": ("squant", 4, "packed", {}),
}
PEERS = ("torch rtn 4", "quanto 4", "compressed-tensors 4", "hqq 4", "hqq 2")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class PeakWatch:
    """Samples anonymous memory every few milliseconds; what its thread costs is not counted as the tool's time."""

    def __init__(self) -> None:
        self.base = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._cpu = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())
            self._cpu = time.thread_time()

    def finish(self) -> tuple[int, float]:
        self._stop.set()
        self._thread.join()
        return max(self.peak, anonymous_bytes()) - self.base, self._cpu


def weights_of(path: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            if len(file.get_slice(name).get_shape()) > 1:
                yield name, file.get_tensor(name)


def torch_rtn(weight: Any) -> tuple[Any, float]:
    """Plain torch: asymmetric min-max, float16 scale, codes in bytes."""
    import torch

    blocks = weight.float().reshape(-1, GROUP)
    low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-8)
    zero = (-low / scale).round()
    codes = ((blocks / scale).round() + zero).clamp(0, 15).to(torch.uint8)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return (packed, scale.half(), zero.to(torch.uint8)), 4 + 24 / GROUP


def torch_rtn_decode(made: Any, shape: Any) -> Any:
    import torch

    packed, scale, zero = made
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return ((codes.float() - zero.float()) * scale.float()).reshape(shape)


def quanto(weight: Any) -> tuple[Any, float]:
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    scale, shift = MaxOptimizer()(weight, qint4, 0, GROUP)
    return quantize_weight(weight, qint4, 0, scale=scale, shift=shift, group_size=GROUP), 4 + 32 / GROUP


def compressed_tensors(weight: Any) -> tuple[Any, float]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)
    blocks = weight.reshape(weight.shape[0], -1, GROUP)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
    codes = quantize(weight, scale, zero, arguments, dtype=__import__("torch").int8)
    return (pack_to_int32(codes, 4), codes, scale), 4 + 16 / GROUP


def hqq(bits: int) -> Callable[[Any], tuple[Any, float]]:
    def quantize(weight: Any) -> tuple[Any, float]:
        import torch
        from hqq.core.quantize import Quantizer

        made = Quantizer.quantize(
            weight.float(), nbits=bits, group_size=GROUP, axis=1, compute_dtype=torch.float32, device="cpu"
        )
        return made, bits + 32 / GROUP

    return quantize


def decode_peer(tool: str, made: Any, shape: Any) -> Any:
    if tool.startswith("torch"):
        return torch_rtn_decode(made, shape)
    if tool.startswith("quanto"):
        return made.dequantize().float()
    if tool.startswith("compressed"):
        _, codes, scale = made
        return (codes.float().reshape(*scale.shape, GROUP) * scale.float().unsqueeze(-1)).reshape(shape)
    from hqq.core.quantize import Quantizer

    return Quantizer.dequantize(*made).float().reshape(shape)


def run_peer(tool: str, path: Path, with_error: bool) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    kind, bits = tool.rsplit(" ", 1)
    encode = {
        "torch rtn": torch_rtn,
        "quanto": quanto,
        "compressed-tensors": compressed_tensors,
        "hqq": hqq(int(bits)),
    }[kind]
    encode(torch.randn(8, 256))
    watch, started = PeakWatch(), time.process_time()
    kept, n_weights, bits_per_weight = {}, 0, 0.0
    for name, weight in weights_of(path):
        kept[name], bits_per_weight = encode(weight)
        n_weights += weight.numel()
    cpu = time.process_time() - started
    anon, watching = watch.finish()
    result = {"cpu": cpu - watching, "anon": anon, "weights": n_weights, "bits_per_weight": bits_per_weight}
    if with_error:
        error = energy = 0.0
        for name, weight in weights_of(path):
            decoded = decode_peer(tool, kept.pop(name), weight.shape)
            error += float((weight.float() - decoded).square().sum())
            energy += float(weight.float().square().sum())
        result["error"] = error / energy
    return result


def run_ours(tool: str, path: Path, with_error: bool) -> dict[str, float]:
    import torch

    from qcompress.checkpoint.checkpoint import read_checkpoint
    from qcompress.compress.compress import compress
    from qcompress.compress.load import load_state_dict
    from qcompress.plan.plan import make_plan
    from qcompress.recipe import recipe_from_flags
    from qcompress.registry import METHODS
    from qcompress.types.run import Options

    torch.set_num_threads(1)
    method, bits, coding, grid = OURS[tool]
    METHODS[method].load_encode()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / "out.safetensors"
        watch, started = PeakWatch(), time.process_time()
        source = read_checkpoint(path)
        recipe = recipe_from_flags(method, {"bits": bits, **grid})
        plan = make_plan(recipe, source.tensors, source.tied, source.config)
        report = compress(source, plan, Options(output, choice=coding))
        cpu = time.process_time() - started
        anon, watching = watch.finish()
        result = {
            "cpu": cpu - watching,
            "anon": anon,
            "weights": report.size.compressed_weights,
            "bits_per_weight": report.size.bits_per_weight or 0.0,
        }
        if with_error:
            decoded = load_state_dict(output)
            error = energy = 0.0
            for name, weight in weights_of(path):
                error += float((weight.float() - decoded[name].float()).square().sum())
                energy += float(weight.float().square().sum())
            result["error"] = error / energy
    return result


def measure(tool: str, python: str, path: Path, runs: int) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    small = path.stat().st_size < 5e8
    results = []
    for run in range(runs):
        words = [python, __file__, "--worker", tool, str(path), *(["--with-error"] if run == 0 and small else [])]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            sys.exit(f"{tool} failed:\n{done.stderr}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {key: statistics.median(result[key] for result in results) for key in ("cpu", "anon")}
    return {**results[0], **middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--peers", metavar="PYTHON", help="interpreter that has the peers; plain torch alone without it"
    )
    parser.add_argument("--tools", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", metavar="FILE|-")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--with-error", action="store_true", help=argparse.SUPPRESS)
    if "--worker" in sys.argv:
        tool, path = sys.argv[2], Path(sys.argv[3])
        run = run_ours if tool in OURS else run_peer
        print(json.dumps(run(tool, path, "--with-error" in sys.argv)))
        return
    arguments = parser.parse_args()
    rows = []
    for tool in arguments.tools:
        needs_peers = tool in PEERS and not tool.startswith("torch")
        if needs_peers and not arguments.peers:
            continue
        python = arguments.peers if needs_peers else sys.executable
        one = measure(tool, python, arguments.checkpoint, arguments.runs)
        rows.append(
            {
                "name": tool,
                "cpu": one["cpu"],
                "M weights/core-s": one["weights"] / one["cpu"] / 1e6,
                "memory MB": one["anon"] / 1e6,
                "bits": one["bits_per_weight"],
                "error": one.get("error"),
            }
        )
    show(rows, render(rows), arguments.json)


if __name__ == "__main__":
    main()
