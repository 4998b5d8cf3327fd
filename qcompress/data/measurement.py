"""A Measurement is one metric with its 95 % interval, of a share or of a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""The normal quantile at 97.5 %."""

Values: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """One metric of one network on some samples.

    low, high    its 95 % interval
    higher       whether more is better
    per_sample   what each sample gave, float64 [samples]: a hit, a loss, an error
    weights      how much each sample counts: 1, or its tokens
    """

    metric: str
    value: float
    samples: int
    low: float
    high: float
    higher: bool
    per_sample: Values
    weights: Values

    @property
    def scale(self) -> str:
        """How the metric follows from the mean of its samples."""
        return {"perplexity": "exp", "psnr": "decibel"}.get(self.metric, "mean")


def wilson(hits: float, samples: int) -> tuple[float, float]:
    """Of a share of `hits` among `samples` (Wilson 1927): within [0, 1], and not empty at either end."""
    share, spread = hits / samples, Z * Z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Values, weights: Values | None = None) -> tuple[float, float]:
    """Of a mean of independent values, or of the ratio sum(values) / sum(weights), by the normal approximation."""
    samples = len(values)
    weights = np.ones(samples) if weights is None else weights
    mean = float(values.sum() / weights.sum())
    if samples < 2:
        return -math.inf, math.inf
    residual = values - mean * weights
    error = math.sqrt(float(np.square(residual).sum()) * samples / (samples - 1)) / float(weights.sum())
    return mean - Z * error, mean + Z * error
