"""Against coremltools: a whole checkpoint in codebooks of 4 bits, and a training step of differentiable k-means.

    python benchmarks/make_checkpoint.py f32.safetensors --dtype F32 --size 100MB
    python benchmarks/palettize.py f32.safetensors --peer PYTHON [--shape 512,512,3,3] [--json FILE|-]

PYTHON is an interpreter with coremltools, torch and safetensors. Each measurement runs in a process of its own on one
thread: processor time, and the growth of the largest resident size. Ours of a checkpoint goes from file to file and
measures, packs, writes and reads back; the peer's palettizes in memory. `error` is squared error over squared weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from timing import render, show

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

BITS = 4
STEPS = ((4, 1), (2, 1), (4, 4))
"""Bits of a code, and weights that share one."""


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def resident() -> int:
    """Resident bytes now; the largest size is counted anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """The largest resident bytes since `resident`."""
    return status("VmHWM")


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def weights_of(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: value for name, value in load_file(path).items() if value.ndim == 2}


def relative_error(weights: dict[str, Any], decoded: dict[str, Any]) -> float:
    error = sum(float((decoded[name].float() - value.float()).square().sum()) for name, value in weights.items())
    return error / sum(float(value.float().square().sum()) for value in weights.values())


def our_checkpoint(path: Path) -> dict[str, float]:
    from qcompress.checkpoint.checkpoint import read_checkpoint
    from qcompress.compress.compress import compress
    from qcompress.compress.load import load_state_dict
    from qcompress.plan.plan import make_plan
    from qcompress.recipe import recipe_from_flags
    from qcompress.registry import METHODS
    from qcompress.types.run import Options

    METHODS["kmeans"].load_encode()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output, memory, started = Path(folder) / "out.safetensors", resident(), cpu_seconds()
        source = read_checkpoint(path)
        plan = make_plan(
            recipe_from_flags("kmeans", {"bits": BITS}, "cluster"), source.tensors, source.tied, source.config
        )
        report = compress(source, plan, Options(output, choice="packed"))
        seconds, memory = cpu_seconds() - started, peak() - memory
        error = relative_error(weights_of(path), load_state_dict(output))
    return {"seconds": seconds, "bytes": memory, "weights": report.size.compressed_weights, "error": error}


def peer_checkpoint(path: Path) -> dict[str, float]:
    import logging

    import torch
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    logging.disable()
    weights = weights_of(path)
    names = list(weights)
    model = torch.nn.Sequential(*(torch.nn.Linear(*value.shape[::-1], bias=False) for value in weights.values()))
    for layer, name in zip(model, names, strict=True):
        layer.weight.data = weights[name].float()
    settings = {"global_config": {"n_bits": BITS, "granularity": "per_tensor"}}
    palettizer = PostTrainingPalettizer(model, PostTrainingPalettizerConfig.from_dict(settings))
    memory, started = resident(), cpu_seconds()
    found = palettizer.compress(num_kmeans_workers=1)
    seconds, memory = cpu_seconds() - started, peak() - memory
    decoded = {name: layer.weight.data for name, layer in zip(names, found, strict=True)}
    count = sum(value.numel() for value in weights.values())
    return {"seconds": seconds, "bytes": memory, "weights": count, "error": relative_error(weights, decoded)}


def our_step(shape: tuple[int, ...], bits: int, dim: int) -> dict[str, float]:
    import torch

    from qcompress.methods.dkm import SoftShared
    from qcompress.registry import DkmConfig
    from qcompress.types.plan import Decision, TensorInfo

    weight = torch.nn.Parameter(0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    decision = Decision(TensorInfo("w", shape, "F32"), "dkm", DkmConfig(bits=bits, dim=dim), "")
    shared = SoftShared(weight, decision, torch.Generator().manual_seed(0)).train()
    return timed_step(lambda: shared(weight).sum().backward())


def peer_step(shape: tuple[int, ...], bits: int, dim: int) -> dict[str, float]:
    import logging

    import torch
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

    logging.disable()
    layer = torch.nn.Conv2d(shape[1], shape[0], shape[2], padding=1, bias=False)
    layer.weight.data = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = {"global_config": {"n_bits": bits, "cluster_dim": dim, "weight_threshold": 0, "milestone": 0}}
    # Where its codebooks begin is no part of the step that is timed, and takes minutes.
    settings["global_config"]["kmeans_n_init"] = 1
    palettizer = DKMPalettizer(torch.nn.Sequential(layer), DKMPalettizerConfig.from_dict(settings))
    model = palettizer.prepare().train()
    x = torch.ones(1, shape[1], 1, 1)
    palettizer.step()
    return timed_step(lambda: model(x).sum().backward())


def timed_step(step: Any) -> dict[str, float]:
    """The second of two steps: the first may begin codebooks."""
    step()
    memory = resident()
    started = cpu_seconds()
    step()
    return {"seconds": cpu_seconds() - started, "bytes": peak() - memory}


def measure(what: str, options: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    kind, side, *numbers = what.split()
    shape = tuple(map(int, options.shape.split(",")))
    if kind == "checkpoint":
        return (our_checkpoint if side == "ours" else peer_checkpoint)(options.checkpoint)
    return (our_step if side == "ours" else peer_step)(shape, int(numbers[0]), int(numbers[1]))


def call(what: str, options: argparse.Namespace) -> dict[str, float]:
    python = options.peer if " peer" in what else sys.executable
    command = [python, __file__, str(options.checkpoint), "--shape", options.shape, "--run", what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--shape", default="512,512,3,3")
    parser.add_argument("--json")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.run, options)))
        return
    rows = []
    for what in ("checkpoint", *(f"step {bits} {dim}" for bits, dim in STEPS)):
        kind, *numbers = what.split()
        sides = {side: call(" ".join([kind, side, *numbers]), options) for side in ("ours", "peer")}
        ratio = sides["peer"]["seconds"] / sides["ours"]["seconds"]
        less = sides["peer"]["bytes"] / sides["ours"]["bytes"]
        row = {"name": what, "times less time": ratio, "times less memory": less}
        for side, found in sides.items():
            row |= {f"{side} {key}": found.get(key) for key in ("seconds", "bytes", "error")}
        rows.append(row)
    show(rows, render(rows), options.json)


if __name__ == "__main__":
    main()
