"""Differentiable k-means: time and memory of a training step's forward and backward, ours against plain autograd.

    python benchmarks/dkm.py [--shape 512,512,3,3] [--repeats 3] [--share 0.1] [--json FILE|-]

Each form runs in a process of its own, on one thread. Memory is that process's largest resident size (getrusage) less
its size before the step. Errors are relative and of the gradient in the weights, against float64 on the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from timing import render, show

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

SETTINGS = ((4, 1), (2, 1), (4, 4))
"""Bits of a code, and weights that share one."""
PLAIN = ("plain autograd, expanded squares", "plain autograd, differences")
"""Distances as |w|^2 - 2 w.c + |c|^2, which takes less time and memory and is what ratios are to, or as (w - c)^2."""
FORMS = (*PLAIN, "chunked", "table bfloat16", "table float16")
ITERATIONS = 3


def plain(weights: Any, centroids: Any, temperature: float, form: str) -> Any:
    """The usual implementation: all scores of an iteration at once, autograd keeps what it needs."""
    squares = weights.square().sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        if form == PLAIN[0]:
            distance = squares - 2 * weights @ centroids.T + centroids.square().sum(1)
        else:
            distance = (weights.unsqueeze(1) - centroids).square().sum(2)
        attention = (-distance / temperature).softmax(1)
        centroids = (attention.T @ weights) / attention.sum(0).unsqueeze(1)
    return attention @ centroids


def start(points: Any, bits: int) -> Any:
    """Centroids [2**bits, d]: quantiles in one dimension, distinct points in more."""
    import torch

    clusters = 2**bits
    if points.shape[1] > 1:
        return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:clusters]].clone()
    shares = (torch.arange(clusters) + 0.5) / clusters
    return points[: 1 << 20].quantile(shares, dim=0)


def run_form(form: str, bits: int, dim: int, options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds a step, bytes it takes, and the error of its gradient."""
    import torch

    from qcompress.clustering.dkm import relative_temperature, soft_cluster
    from qcompress.clustering.dkm_table import soft_cluster_table

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(options.shape, generator=generator).mul_(0.02).reshape(-1, dim)
    upstream = torch.randn(weights.shape, generator=generator)
    centroids = start(weights, bits)
    temperature = relative_temperature(centroids, options.share)
    levels = {"table bfloat16": torch.bfloat16, "table float16": torch.float16}.get(form)

    def step(weights: Any, upstream: Any) -> Any:
        weights.grad = None
        if form in PLAIN:
            soft = plain(weights, centroids, temperature, form)
        elif levels is None:
            soft, _ = soft_cluster(weights, centroids, temperature, ITERATIONS)
        else:
            soft, _ = soft_cluster_table(weights, centroids, temperature, ITERATIONS, levels=levels)
        soft.backward(upstream)
        return weights.grad

    # A small step first, so that what a first call sets up is in neither figure.
    few = 4096
    step(weights[:few].clone().requires_grad_(), upstream[:few])
    weights.requires_grad_()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seconds = []
    gradient = None
    for _ in range(options.repeats):
        del gradient
        begun = time.process_time()
        gradient = step(weights, upstream)
        seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    seen = weights.detach() if levels is None else weights.detach().to(levels)
    exact = seen.double().requires_grad_()
    soft_cluster(exact, centroids.double(), temperature, ITERATIONS)[0].backward(upstream.double())
    error = float((gradient - exact.grad).norm() / exact.grad.norm())
    return {"seconds": statistics.median(seconds), "bytes": peak, "error": error}


def measure(form: str, bits: int, dim: int, options: argparse.Namespace) -> dict[str, Any]:
    """`run_form` in a fresh process."""
    shape = ",".join(map(str, options.shape))
    arguments = ["--shape", shape, "--repeats", str(options.repeats), "--share", str(options.share)]
    command = [sys.executable, __file__, *arguments, "--form", form, "--bits", str(bits), "--dim", str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"bits": bits, "dim": dim, "form": form, **json.loads(done.stdout)}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with how many times less time and memory it takes than plain autograd of its setting."""
    plain = {(row["bits"], row["dim"]): row for row in rows if row["form"] == PLAIN[0]}
    found = []
    for row in rows:
        base = plain[row["bits"], row["dim"]]
        ratios = {
            "times less time": base["seconds"] / row["seconds"],
            "times less memory": base["bytes"] / row["bytes"],
        }
        found.append({"name": f"{row['bits']}/{row['dim']} {row['form']}", **row, **ratios})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=lambda text: [int(size) for size in text.split(",")], default=[512, 512, 3, 3])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1, help="of the squared centroid gap: the temperature")
    parser.add_argument("--json", metavar="FILE|-")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dim", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(run_form(options.form, options.bits, options.dim, options)))
        return
    rows = [
        measure(form, bits, dim, options)
        for bits, dim in SETTINGS
        for form in FORMS
        if dim == 1 or not form.startswith("table")
    ]
    found = with_ratios(rows)
    show(found, render(found), options.json)


if __name__ == "__main__":
    main()
