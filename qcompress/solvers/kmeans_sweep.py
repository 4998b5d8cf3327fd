"""One step of the dynamic programme over all atoms of all lines, and the way back through its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.solvers.kmeans_lines import Floats, Ints


def trace(starts: NDArray[Any], end: Ints, clusters: int) -> Ints:
    """The cuts [lines, clusters + 1] that lead to `end`; `starts` [clusters + 1, lines, n + 1], [1, ...] for all k."""
    cuts = np.zeros((len(end), clusters + 1), np.intp)
    cuts[:, clusters] = end
    lines = np.arange(len(end))
    for k in range(clusters, 0, -1):
        cuts[:, k - 1] = starts[k % len(starts), lines, cuts[:, k]]
    return cuts


def sweep(value: Floats, mass: Floats, first: Floats) -> tuple[Floats, Ints]:
    """For each end j > 0 the greatest value[i] + gain(i, j) over i < j, and the leftmost such i; both [lines, n + 1].

    Ends are solved by halving strides: the best starts of the two neighbours that are already solved enclose those of
    the end between, so each stride looks at every start about once, as one array over all lines. Cells without weight
    are left out: the same without them gains as much.
    """
    lines, width = value.shape
    best, start = np.zeros((lines, width)), np.zeros((lines, width), np.intp)
    base = (np.arange(lines) * width)[:, None]
    flat_value, flat_mass, flat_first = value.reshape(-1), mass.reshape(-1), first.reshape(-1)
    stride = 1 << (width - 1).bit_length() - 1
    while stride:
        ends = np.arange(stride, width, 2 * stride)
        low = start[:, ends - stride]
        high = start[:, np.minimum(ends + stride, width - 1)]
        counts = np.concatenate([low[:, 1:], np.full((lines, 1), width)], 1) - low
        runs = (low + base).reshape(-1)
        spread = _spread(runs, counts.reshape(-1), value.size)
        end_first, end_mass = first[:, ends].reshape(-1), mass[:, ends].reshape(-1)
        gain, weight = spread(end_first), spread(end_mass)
        gain -= flat_first
        weight -= flat_mass
        top, where = _greatest(gain, weight, flat_value, runs, spread)
        # The next run, if there is one, begins at `high`, which may be the best start of both.
        last = (high + base).reshape(-1)
        gain, weight = end_first - flat_first[last], end_mass - flat_mass[last]
        gain = np.divide(gain * gain, weight, out=np.full_like(gain, -np.inf), where=weight > 0) + flat_value[last]
        empty = counts.reshape(-1) == 0
        better = (gain > top) | empty
        best[:, ends] = np.where(better, gain, top).reshape(low.shape)
        start[:, ends] = np.where(better, last, where).reshape(low.shape) - base
        stride //= 2
    nothing = mass <= 0
    best[nothing], start[nothing] = 0.0, 0
    return best, start


def _spread(runs: Ints, counts: Ints, size: int) -> Callable[[Floats], Floats]:
    """A function that repeats the value of each run over all of it."""
    if 8 * len(runs) < size:
        return lambda values: np.repeat(values, counts)
    owners = np.bincount(runs, minlength=size).cumsum() - 1
    return lambda values: values[owners]


def _greatest(
    gain: Floats, weight: Floats, value: Floats, runs: Ints, spread: Callable[[Floats], Floats]
) -> tuple[Floats, Ints]:
    """The greatest gain**2 / weight + value of each run, and where it first is; what has no weight does not count."""
    gain *= gain
    outside = weight <= 0
    np.copyto(weight, 1.0, where=outside)
    gain /= weight
    gain += value
    np.copyto(gain, -np.inf, where=outside)
    top = np.maximum.reduceat(gain, runs)
    hits = np.flatnonzero(gain == spread(top))
    return top, hits[np.minimum(np.searchsorted(hits, runs), len(hits) - 1)]
