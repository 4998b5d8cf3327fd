"""Clustering of short vectors: Lloyd's iterations with distances by matrix products, from a start found on a sample."""

from __future__ import annotations

from typing import Literal, TypeAlias, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.solvers.blocks import spans
from qcompress.solvers.kmeans import Clustering
from qcompress.solvers.kmeans_lines import Floats

__all__ = ["VectorStart", "assign_vectors", "cluster_vectors", "recentre_vectors"]

VectorStart: TypeAlias = Literal["k-means++", "random", "split"]
Codes: TypeAlias = NDArray[np.int16]

MOST_CLUSTERS = 2**15
DISTANCES = 2**21
PIECE = 2**18
SAMPLE = 2**16
SAMPLE_EACH = 64
SAMPLE_ITERATIONS = 30
LEAST_GAIN = 1e-5
"""The share of the error that an iteration must take away for another to follow."""


def cluster_vectors(
    points: Tensor,
    clusters: int,
    weights: Tensor | None = None,
    *,
    start: VectorStart = "k-means++",
    generator: torch.Generator | None = None,
    iterations: int = 30,
) -> Clustering:
    """A codebook of vectors that Lloyd's iterations find, a local optimum; fewer where fewer points differ.

    points      float [n, dim], finite, on the CPU
    clusters    1 to 2**15
    weights     float [n], not negative: what a squared distance counts; all zero counts as all one
    start       k-means++: drawn by weight * squared distance to the nearest drawn before (Arthur, Vassilvitskii 2007);
                random: points drawn without replacement; split: the cluster of the greatest squared error along its
                principal axis is halved until there are enough, which draws nothing. Above 2**16 points and 64 a
                cluster, on a sample of so many, with iterations on it
    generator   a new one with seed 0 where absent
    iterations  at most, over all points; fewer once less than 1e-5 of the error goes
    returns     `bound` is the error: nothing is known of the optimum

    Raises ValueError for no points, points that are not finite and negative weights.
    """
    _check(points, clusters, weights)
    points = points.detach()
    mass = None if weights is None or not weights.any() else weights.detach().double().numpy()
    generator = generator or torch.Generator().manual_seed(0)
    few, few_mass = points, mass
    most = max(SAMPLE, SAMPLE_EACH * clusters)
    if len(points) > most:
        chosen = torch.randperm(len(points), generator=generator)[:most].sort().values
        few, few_mass = points[chosen], None if mass is None else mass[chosen.numpy()]
    few = few.double()
    match start:
        case "k-means++":
            centroids = _spread(few, few_mass, clusters, generator)
        case "random":
            drawn = torch.randperm(len(few), generator=generator)[:clusters]
            centroids = few[drawn].numpy()
        case "split":
            centroids = _split(few.numpy(), few_mass, clusters)
        case _:
            assert_never(start)
    if few.shape != points.shape:
        centroids = _lloyd(few.to(_exact(points.dtype)), few_mass, centroids, SAMPLE_ITERATIONS)
    return _finish(points, mass, _lloyd(points, mass, centroids, iterations))


def assign_vectors(points: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest centroid of each point: uint8 up to 256, else int16 [n]; a tie to the lower, but for rounding.

    points     float [n, dim]
    centroids  float [clusters, dim]
    """
    codes = _nearest(points.detach(), centroids.detach().double().numpy())
    return torch.from_numpy(codes.astype(np.uint8) if len(centroids) <= 256 else codes)


def recentre_vectors(points: Tensor, codes: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weighted mean of the points of each code, like centroids [clusters, dim]; as it was where there are none."""
    mass = None if weights is None else weights.detach().double().numpy()
    means, _ = _means(points.detach(), mass, codes.numpy(), centroids.detach().double().numpy())
    return torch.from_numpy(means).to(centroids.dtype)


def _check(points: Tensor, clusters: int, weights: Tensor | None) -> None:
    if points.ndim != 2 or not points.numel():
        raise ValueError(f"no points in {tuple(points.shape)}")
    if not 1 <= clusters <= MOST_CLUSTERS:
        raise ValueError(f"{clusters} clusters, not 1 to {MOST_CLUSTERS}")
    if not all(bool(points[span].isfinite().all()) for span in spans(len(points), PIECE)):
        raise ValueError("only finite values can be clustered")
    if weights is not None and (weights.shape != points.shape[:1] or not (weights.min() >= 0 and weights.max() < torch.inf)):
        raise ValueError("weights that are not one for each point, negative or not finite")


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _nearest(points: Tensor, centroids: Floats) -> Codes:
    """int16 [n]: the least of |c|**2 - 2 p.c, seen from the centroids' mean so that little cancels."""
    dtype = _exact(points.dtype)
    centre = torch.from_numpy(centroids.mean(0))
    offset = torch.from_numpy(centroids) - centre
    norms, directions = offset.square().sum(1).to(dtype), (-2 * offset.T).to(dtype).contiguous()
    codes = np.empty(len(points), np.int16)
    for span in spans(len(points), max(1, DISTANCES // len(centroids))):
        piece = points[span].to(dtype) - centre.to(dtype)
        # numpy finds the least along rows some three times as fast as torch.
        codes[span] = torch.addmm(norms, piece, directions).numpy().argmin(1)
    return codes


def _means(points: Tensor, mass: Floats | None, codes: NDArray[np.integer], centroids: Floats) -> tuple[Floats, Floats]:
    """The means [clusters, dim] and the weights [clusters] of the cells; a cell without weight keeps its centroid."""
    clusters, dim = centroids.shape
    weight, sums = np.zeros(clusters), np.zeros((clusters, dim))
    for span in spans(len(points), PIECE):
        index = codes[span].astype(np.intp)
        each = None if mass is None else mass[span]
        weight += np.bincount(index, each, minlength=clusters)
        piece = points[span].to(_exact(points.dtype)).numpy()
        for axis in range(dim):
            column = piece[:, axis] if each is None else piece[:, axis] * each
            sums[:, axis] += np.bincount(index, column, minlength=clusters)
    return np.divide(sums, weight[:, None], out=centroids.copy(), where=weight[:, None] > 0), weight


def _lloyd(points: Tensor, mass: Floats | None, centroids: Floats, iterations: int) -> Floats:
    """Centroids [clusters, dim] whose error has not grown; those that died take half of the cells of most weight."""
    squares = _error(points, mass, np.zeros(len(points), np.int16), np.zeros_like(centroids[:1]))
    before = np.inf
    for _ in range(iterations):
        codes = _nearest(points, centroids)
        centroids, weight = _means(points, mass, codes, centroids)
        error = squares - float((weight * (centroids**2).sum(1)).sum())
        if (weight <= 0).any():
            centroids = _revive(points, mass, codes, centroids, weight)
        elif before - error <= LEAST_GAIN * before:
            break
        before = error
    return centroids
