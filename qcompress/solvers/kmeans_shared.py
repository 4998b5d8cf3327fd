"""One codebook of several tensors that are seen one after another: counts of numbers, or a sample of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.solvers.blocks import spans
from qcompress.solvers.kmeans import SIXTEEN_BITS, Clustering, cluster_scalars
from qcompress.solvers.kmeans_starts import Start
from qcompress.solvers.kmeans_vectors import VectorStart, cluster_vectors

BIN_BITS = 20
"""Leading bits of a float32 that name its bin: sign, exponent, 11 of the significand; 16-bit floats have no more."""
PIECE = 2**21
MOST_VECTORS = 2**18


class ScalarCounts:
    """Weight and weighted sum of the numbers in each of 2**20 bins, which lie as densely as floats do: a bin is one
    part in 2**11 wide.

    Of bfloat16 and float16 each distinct value has a bin of its own, so that their codebook is the optimum; of wider
    floats a bin counts as its mean.
    """

    def __init__(self) -> None:
        self._mass = np.zeros(2**BIN_BITS)
        self._sums = np.zeros(2**BIN_BITS)

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Count values, float of any shape, on the CPU, finite; weights alike, not negative, all zero counts as one."""
        flat = values.detach().reshape(-1)
        each = None if weights is None or not weights.any() else weights.reshape(-1).double().numpy()
        if flat.dtype in SIXTEEN_BITS:
            self._add_patterns(flat, each)
            return
        for span in spans(len(flat), PIECE):
            self._add(flat[span].float().numpy(), None if each is None else each[span])

    def _add_patterns(self, flat: Tensor, each: NDArray[np.float64] | None) -> None:
        patterns = flat.contiguous().view(torch.int16).numpy().view(np.uint16)
        mass = np.zeros(2**16)
        for span in spans(len(patterns), PIECE):
            mass += np.bincount(patterns[span], None if each is None else each[span], minlength=2**16)
        seen = np.flatnonzero(mass)
        points = torch.from_numpy(seen.astype(np.uint16).view(np.int16)).view(flat.dtype).float().numpy()
        self._add(points, mass[seen])

    def _add(self, points: NDArray[np.float32], mass: NDArray[np.float64] | None) -> None:
        # Adding zero makes -0 the same bin as +0.
        bins = (points + np.float32(0)).view(np.uint32) >> np.uint32(32 - BIN_BITS)
        sums = points.astype(np.float64) if mass is None else points * mass
        self._mass += np.bincount(bins, mass, minlength=2**BIN_BITS)
        self._sums += np.bincount(bins, sums, minlength=2**BIN_BITS)

    def cluster(self, clusters: int, start: Start, zero: bool, generator: torch.Generator) -> Clustering:
        """The codebook of all that was counted, as `cluster_scalars` finds it; error and bound are of the means."""
        used = np.flatnonzero(self._mass)
        means = (self._sums[used] / self._mass[used]).astype(np.float32)
        mass = torch.from_numpy(self._mass[used])
        return cluster_scalars(torch.from_numpy(means), clusters, mass, start=start, zero=zero, generator=generator)


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
