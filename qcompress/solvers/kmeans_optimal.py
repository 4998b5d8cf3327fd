"""Optimal clustering of atoms on lines, by dynamic programming; every step is one long operation over all lines.

A cell of atoms i to j gains (sum of weight * x)**2 / weight over having its centroid at the origin, and the least
squared error is the greatest sum of gains. The gain obeys Monge's inequality: gain(a, c) + gain(b, d) >=
gain(a, d) + gain(b, c) for a <= b <= c <= d, so the best start of a cell never moves left when its end moves right
(Wu 1991, "Optimal quantization by matrix searching"; Groenlund et al. 2017, arXiv 1701.07204), and the greatest gain
of k cells is concave in k.

Few clusters take a sweep over all atoms for each cluster; many take a price, and sweeps that do not grow with them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompress.solvers.kmeans_lines import Floats, Ints
from qcompress.solvers.kmeans_priced import priced_cuts
from qcompress.solvers.kmeans_sweep import sweep, trace

LAYERS_UP_TO = 128


def optimal_cuts(mass: Floats, first: Floats, clusters: int) -> Ints:
    """[lines, clusters + 1], ascending from 0 to n: the cells of least squared error, some empty where atoms are few.

    mass   float64 [lines, n + 1], the weight of the atoms before
    first  float64 [lines, n + 1], the sum of weight * x of the atoms before; the origin is best near the mean
    """
    mass, first = np.ascontiguousarray(mass), np.ascontiguousarray(first)
    if clusters <= LAYERS_UP_TO:
        starts = _layers(mass, first, clusters)[-1]
        return trace(starts, np.full(len(mass), mass.shape[1] - 1), clusters)
    return priced_cuts(mass, first, clusters, sides=1)


def optimal_sides(mass: Floats, first: Floats, clusters: int) -> tuple[Ints, Ints]:
    """Cells on both sides of a centroid that stays at the origin: their cuts, and their number on the left [lines].

    mass, first  float64 [lines, 2, n + 1]: each side from its far end towards the origin, the sign of x not mattering
    cuts         [lines, 2, clusters]: cells a side, the first of them empty; what is after the last belongs to zero
    """
    lines, _, width = mass.shape
    mass, first = mass.reshape(-1, width), first.reshape(-1, width)
    if clusters - 1 > LAYERS_UP_TO:
        cuts = priced_cuts(mass, first, clusters - 1, sides=2).reshape(lines, 2, clusters)
        return cuts, np.count_nonzero(np.diff(cuts[:, 0]), axis=1)
    most, ends, starts = _layers(mass, first, clusters - 1)
    each = most.reshape(clusters, lines, 2)
    left = (each[:, :, 0] + each[::-1, :, 1]).argmax(0)
    cells = np.stack([left, clusters - 1 - left], 1).reshape(-1)
    end = ends[cells, np.arange(len(mass))]
    cuts = np.zeros((len(mass), clusters), np.intp)
    cuts[:, -1] = end
    for step in range(clusters - 1):
        layer = np.maximum(cells - step, 0)
        cuts[:, -2 - step] = starts[layer, np.arange(len(mass)), cuts[:, -1 - step]]
    return cuts.reshape(lines, 2, clusters), left


def _layers(mass: Floats, first: Floats, clusters: int) -> tuple[Floats, Ints, NDArray[np.int32]]:
    """Of at most k cells: the most they gain if they end anywhere, where they then end, where the last starts if not.

    float64 and intp [clusters + 1, lines]; int32 [clusters + 1, lines, n + 1], for each atom that may end the last cell
    """
    most, ends = np.zeros((clusters + 1, len(mass))), np.zeros((clusters + 1, len(mass)), np.intp)
    starts = np.zeros((clusters + 1, *mass.shape), np.int32)
    gains = np.zeros_like(mass)
    for k in range(1, clusters + 1):
        if k == 1:
            gains = np.divide(first * first, mass, out=np.zeros_like(mass), where=mass > 0)
        else:
            gains, starts[k] = sweep(gains, mass, first)
        most[k], ends[k] = gains.max(1), gains.argmax(1)
    return most, ends, starts
