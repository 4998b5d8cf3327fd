"""95 % intervals: of a share, of a mean, and of what changed between two runs on the same samples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""The normal quantile at 97.5 %."""


def wilson(hits: float, samples: int) -> tuple[float, float]:
    """Of a share of `hits` among `samples` (Wilson 1927): within [0, 1], and not empty at either end."""
    share, spread = hits / samples, Z * Z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> tuple[float, float]:
    """Of a mean of independent values, or of the ratio sum(values) / sum(weights), by the normal approximation."""
    samples = len(values)
    weights = np.ones(samples) if weights is None else weights
    mean = float(values.sum() / weights.sum())
    if samples < 2:
        return -math.inf, math.inf
    residual = values - mean * weights
    error = math.sqrt(float(np.square(residual).sum()) * samples / (samples - 1)) / float(weights.sum())
    return mean - Z * error, mean + Z * error
