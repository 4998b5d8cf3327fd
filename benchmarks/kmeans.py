"""k-means: processor time and squared error against scikit-learn, for one codebook, one a row, and vectors.

    python benchmarks/kmeans.py [--weights 10000000] [--peer-weights 1000000] [--repeats 3] [--json FILE|-]

One thread, process CPU time, the median of the repeats; the peer, which is slow, runs once. `time` is the peer's over
ours and `error` ours over the peer's, both on the same weights: Gaussian, one in ten thousand of them times ten. For
scikit-learn, `KMeans(16, n_init=1)` from its own k-means++. `bound` is how far from the optimum our error may be at
most.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from timing import render, seconds_of, show
from torch import Tensor

from qcompress.clustering.kmeans import Clustering, cluster_rows, cluster_scalars
from qcompress.clustering.kmeans_vectors import cluster_vectors

DEVIATION = 0.05


def weights_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = DEVIATION * torch.randn(count, generator=generator)
    weights[torch.randint(count, (count // 10_000,), generator=generator)] *= 10
    return weights


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The median CPU seconds of a call and its last result."""
    results: list[Any] = []

    def keep() -> None:
        results[:] = [call()]

    return seconds_of(keep, repeats), results[0]


def scikit_learn(points: Tensor, clusters: int) -> tuple[float, float]:
    """CPU seconds and squared error."""
    from sklearn.cluster import KMeans

    array = points.float().reshape(len(points), -1).numpy()
    seconds, peer = timed(lambda: KMeans(clusters, n_init=1, random_state=0).fit(array), 1)
    centroids = torch.from_numpy(peer.cluster_centers_).double()[torch.from_numpy(peer.labels_).long()]
    return seconds, float((points.double().reshape(len(points), -1) - centroids).square().sum())


def row(name: str, count: int, seconds: float, found: Clustering, peer: tuple[float, float] | None) -> dict[str, Any]:
    error = float(found.error.sum())
    return {
        "name": name,
        "M weights": count / 1e6,
        "core-s": seconds,
        "M/core-s": count / seconds / 1e6,
        "bound": float(found.bound.sum()) / max(error, 1e-300),
        "time": peer[0] / seconds if peer else None,
        "error": error / peer[1] if peer else None,
    }


def measure(count: int, peer_count: int, repeats: int) -> list[dict[str, Any]]:
    weights = weights_of(count)
    rows = []
    for name, values in (("bf16", weights.bfloat16()), ("fp32", weights)):
        seconds, found = timed(lambda v=values: cluster_scalars(v, 16), repeats)
        rows.append(row(f"{name} 16", count, seconds, found, scikit_learn(values, 16)))
    for name, values in (("bf16", weights.bfloat16()), ("fp32", weights)):
        for clusters in (256, 4096):
            seconds, found = timed(lambda v=values, k=clusters: cluster_scalars(v, k), repeats)
            rows.append(row(f"{name} {clusters}", count, seconds, found, None))
    for length in (576, 4608):
        matrix = weights[: peer_count // length * length].reshape(-1, length)
        seconds, found = timed(lambda m=matrix: cluster_rows(m, 16), repeats)
        few = max(1, 50_000 // length)
        peers = [scikit_learn(line, 16) for line in matrix[:few]]
        share = len(matrix) / few
        seconds_, error = sum(peer[0] for peer in peers) * share, sum(peer[1] for peer in peers)
        ratio = float(found.error.sum()) / float(found.error[:few].sum())
        rows.append(row(f"rows of {length}, 16", matrix.numel(), seconds, found, (seconds_, error * ratio)))
    for dim, clusters in ((2, 16), (2, 256), (4, 256)):
        few = weights[: peer_count // dim * dim].reshape(-1, dim)
        seconds, found = timed(lambda p=few, k=clusters: cluster_vectors(p, k), 1)
        name = f"vectors of {dim}, {clusters}"
        rows.append(row(name, few.numel(), seconds, found, scikit_learn(few, clusters)))
        points = weights[: count // dim * dim].reshape(-1, dim)
        seconds, found = timed(lambda p=points, k=clusters: cluster_vectors(p, k), 1)
        rows.append(row(name, count, seconds, found, None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=10_000_000)
    parser.add_argument("--peer-weights", type=int, default=1_000_000, help="for rows and vectors")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for stdout, in place of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.weights, options.peer_weights, options.repeats)
    show(rows, render(rows), options.json)


if __name__ == "__main__":
    main()
