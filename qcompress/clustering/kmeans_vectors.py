"""Short vectors are clustered here: Lloyd's iterations with distances by matrix products, from a start on a sample.

clustering.codebooks calls `cluster_vectors` and `assign_vectors` for codes that name two rows or more, encode fills a
`VectorSample` for codebooks that tensors share. Cells of vectors are no runs of a sorted line, so that nothing of
lines.py serves them, and no optimum is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qcompress.clustering.kmeans import MOST_CLUSTERS, Clustering, Start, plus_plus
from qcompress.clustering.lines import Floats
from qcompress.coding.rows import spans

VectorStart: TypeAlias = Literal["k-means++", "random", "split"]
Codes: TypeAlias = NDArray[np.int16]

DISTANCES = 2**17
"""Distances at once: they stay in a core's cache."""
FEW_CENTROIDS = 32
"""Up to so many, the nearest are found centroid by centroid for many points at once, above that point by point."""
PIECE = 2**18
SAMPLE = 2**16
SAMPLE_EACH = 64
SAMPLE_ITERATIONS = 50
LEAST_GAIN = 1e-5
"""The share of the error that an iteration must take away for another to follow."""
MOST_VECTORS = 2**18


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
            each = torch.ones(len(few), dtype=torch.float64) if few_mass is None else torch.from_numpy(few_mass)
            centroids = plus_plus(few[None], each[None], clusters, generator)[0].numpy()
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
    """The number of the nearest centroid of each point, uint8 up to 256, else int16 [n]; the lower of a tie.

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
    if weights is None:
        return
    if weights.shape != points.shape[:1] or not (weights.min() >= 0 and weights.max() < torch.inf):
        raise ValueError("weights that are not one for each point, negative or not finite")


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@np.errstate(over="ignore", invalid="ignore")
def _nearest(points: Tensor, centroids: Floats) -> Codes:
    """int16 [n]: the least of |c|**2 - 2 p.c, seen from the centroids' mean so that little cancels.

    Between numbers near the largest that there is distances are infinite, of which numpy would warn.
    """
    dtype = _exact(points.dtype)
    centre = torch.from_numpy(centroids.mean(0))
    offset = torch.from_numpy(centroids) - centre
    # The norm is the last of a product's terms, beside a point's last coordinate of 1.
    terms = torch.cat((-2 * offset, offset.square().sum(1, keepdim=True)), 1).to(dtype).numpy()
    few = len(centroids) <= FEW_CENTROIDS
    factors = terms if few else np.ascontiguousarray(terms.T)
    codes = np.empty(len(points), np.int16)
    most = max(1, DISTANCES // len(centroids))
    room = np.empty(min(most, len(points)) * len(centroids), terms.dtype)
    for span in spans(len(points), most):
        piece = F.pad(points[span].to(dtype) - centre.to(dtype), (0, 1), value=1.0).numpy()
        distances = room[: len(piece) * len(centroids)]
        if few:
            codes[span] = _least_row(np.matmul(factors, piece.T, out=distances.reshape(-1, len(piece))))
        else:
            # numpy finds the least along rows some three times as fast as torch.
            codes[span] = np.matmul(piece, factors, out=distances.reshape(len(piece), -1)).argmin(1)
    return codes


def _least_row(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The row that holds the least of each column, the first of equals: uint8 [n] of float [up to 256, n]."""
    least, place = values[0], np.zeros(values.shape[1], np.uint8)
    less, own = np.empty(values.shape[1], np.bool_), np.empty_like(place)
    for row in range(1, len(values)):
        np.less(values[row], least, out=less)
        np.minimum(values[row], least, out=least)
        # A later row that is less has the larger number.
        np.maximum(place, np.multiply(less.view(np.uint8), np.uint8(row), out=own), out=place)
    return place


def _means(points: Tensor, mass: Floats | None, codes: NDArray[Any], centroids: Floats) -> tuple[Floats, Floats]:
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


def _error(points: Tensor, mass: Floats | None, codes: NDArray[Any], centroids: Floats) -> float:
    """The sum of weight * |point - centroid|**2."""
    error = 0.0
    for span in spans(len(points), PIECE):
        offset = points[span].double().numpy() - centroids[codes[span]]
        squares = np.einsum("ij,ij->i", offset, offset)
        error += float(squares.sum() if mass is None else squares @ mass[span])
    return error


def _lloyd(points: Tensor, mass: Floats | None, centroids: Floats, iterations: int) -> Floats:
    """Centroids [clusters, dim], none of more error than the ones before; those that die halve the heaviest cells."""
    whole = np.zeros(len(points), np.int16)
    origin, _ = _means(points, mass, whole, np.zeros_like(centroids[:1]))
    squares, before = _error(points, mass, whole, origin), np.inf
    for _ in range(iterations):
        codes = _nearest(points, centroids)
        centroids, weight = _means(points, mass, codes, centroids)
        error = squares - float(weight @ ((centroids - origin) ** 2).sum(1))
        revived = _revive(points, mass, codes, centroids, weight)
        if not revived and before - error <= LEAST_GAIN * error:
            break
        before = error
    return centroids


def _revive(points: Tensor, mass: Floats | None, codes: Codes, centroids: Floats, weight: Floats) -> bool:
    """Whether a cell without weight has taken half of one of those of most weight, of which each gives once."""
    dead = np.flatnonzero(weight <= 0).tolist()
    if not dead:
        return False
    revived = False
    for donor in np.argsort(-weight, kind="stable").tolist():
        if not dead or weight[donor] <= 0:
            break
        index = np.flatnonzero(codes == donor)
        own = points[torch.from_numpy(index)].double().numpy()
        each = np.ones(len(own)) if mass is None else mass[index]
        offset = own - centroids[donor]
        axis = int((each @ offset**2).argmax())
        above = offset[:, axis] > 0
        if each[above].sum() > 0 and each[~above].sum() > 0:
            centroids[dead.pop()] = np.average(own[above], 0, each[above])
            centroids[donor] = np.average(own[~above], 0, each[~above])
            revived = True
    return revived


def _finish(points: Tensor, mass: Floats | None, centroids: Floats) -> Clustering:
    """The centroids that serve any point, in ascending order, as they are given back."""
    dtype = _exact(points.dtype)
    rounded = torch.from_numpy(centroids).to(dtype).double().numpy()
    rounded = np.unique(rounded, axis=0)
    codes = _nearest(points, rounded)
    used = np.bincount(codes, minlength=len(rounded)) > 0
    codes = (np.cumsum(used) - 1).astype(np.int16)[codes]
    found = torch.from_numpy(rounded[used])
    error = torch.tensor(_error(points, mass, codes, found.numpy()), dtype=torch.float64)
    narrow = codes.astype(np.uint8) if len(found) <= 256 else codes
    return Clustering(found.to(dtype), torch.from_numpy(narrow), error, error.clone())


def _split(points: Floats, mass: Floats | None, clusters: int) -> Floats:
    """The means of cells that are halved, as many at a time as there are, across their principal axes."""
    each = np.ones(len(points)) if mass is None else mass
    dim = points.shape[1]
    codes, count = np.zeros(len(points), np.intp), 1
    while True:
        weight = np.bincount(codes, each, minlength=count)
        held = np.maximum(weight, np.finfo(np.float64).tiny)
        means = np.stack([np.bincount(codes, each * column, minlength=count) for column in points.T], 1) / held[:, None]
        if count == clusters:
            return means
        offset = points - means[codes]
        spread = np.empty((count, dim, dim))
        for row in range(dim):
            for column in range(row + 1):
                product = np.bincount(codes, each * offset[:, row] * offset[:, column], minlength=count)
                spread[:, row, column] = spread[:, column, row] = product
        values, axes = np.linalg.eigh(spread)
        donors = np.argsort(-values[:, -1], kind="stable")[: clusters - count]
        target = np.full(count, -1)
        target[donors] = count + np.arange(len(donors))
        above = (np.einsum("ij,ij->i", offset, axes[codes, :, -1]) > 0) & (target[codes] >= 0)
        codes = np.where(above, target[codes], codes)
        count += len(donors)


@dataclass
class VectorSample:
    """Vectors of several tensors, all of them up to 2**18 in all, else so many drawn by the tensors' sizes.

    total  vectors of all the tensors together
    """

    total: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        self._points: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, points: Tensor, weights: Tensor | None = None) -> None:
        """Take from the vectors float [n, dim] of one tensor; weights float [n], not negative."""
        count = len(points)
        if weights is None or not weights.any():
            weights = torch.ones(count, dtype=torch.float64)
        if self.total > MOST_VECTORS:
            size = -(-count * MOST_VECTORS // self.total)
            drawn = torch.randint(count, (size,), generator=self.generator).sort().values
            points, weights = points[drawn], weights[drawn]
        self._points.append(points.float())
        self._weights.append(weights.double())

    def cluster(self, clusters: int, start: Start, generator: torch.Generator) -> Clustering:
        """The codebook of what was taken, as `cluster_vectors` finds it."""
        points, weights = torch.cat(self._points), torch.cat(self._weights)
        kind: VectorStart = "random" if start == "random" else "k-means++"
        return cluster_vectors(points, clusters, weights, start=kind, generator=generator)
