"""How hard differentiable k-means decides: the temperature, its limits, and what remains when it has gone.

Two centroids with a gap g and a squared metric give the soft weight (g / 2) tanh(g w / temperature) about their middle,
of slope g**2 / (2 * temperature) there: 1 at a temperature of g**2 / 2. Far below, all gradient sits at such borders;
above the critical temperature there is one cluster only. Temperatures are therefore given as shares of g**2 (of g for
the plain metric), which mean the same in every layer.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from qcompress.solvers.dkm import Metric

START_SHARE = 0.5
END_SHARE = 0.02
CHUNK_POINTS = 1 << 16


def critical_temperature(points: Tensor, metric: Metric = "squared") -> float:
    """The temperature above which centroids near the points' mean fall into it, and below which they leave it.

    points  [n, d], n > 0

    With x = w - mean it is twice the largest eigenvalue of E[x x^T], for the plain metric that of E[x x^T / |x|]: in
    one dimension 2 Var and E|x|. Linearising an iteration about merged centroids gives both.
    """
    dim = points.shape[1]
    mean = torch.zeros(dim, dtype=torch.float64, device=points.device)
    for part in torch.split(points.detach(), CHUNK_POINTS):
        mean += part.double().sum(0) / len(points)
    moment = mean.new_zeros(dim, dim)
    for part in torch.split(points.detach(), CHUNK_POINTS):
        x = part.double() - mean
        if metric == "squared":
            moment += 2 * x.T @ x
        else:
            moment += x.T @ (x / x.norm(dim=1, keepdim=True).clamp_min(sys.float_info.min))
    return float(torch.linalg.eigvalsh(moment / len(points))[-1])


def relative_temperature(centroids: Tensor, share: float, metric: Metric = "squared") -> float:
    """share * g**2, or share * g for the plain metric, g being the mean gap between neighbouring centroids, [k, d].

    In one dimension neighbours are next in order; in more, each centroid's gap is to its nearest. Never 0, even where
    there is but one centroid.
    """
    values = centroids.detach().double()
    if len(values) < 2:
        gap = 0.0
    elif values.shape[1] == 1:
        gap = float(values.max() - values.min()) / (len(values) - 1)
    else:
        distances = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
        gap = float(distances.fill_diagonal_(torch.inf).amin(1).mean())
    return max(share * (gap**2 if metric == "squared" else gap), sys.float_info.min)


def share_at(progress: float, start: float = START_SHARE, end: float = END_SHARE) -> float:
    """The share of g**2 after `progress`, in [0, 1], of the training: from start to end by equal factors."""
    return float(start * (end / start) ** min(max(progress, 0.0), 1.0))


def hard_codes(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each point, int64 [n]; of equally near ones the lower in one dimension, else the first.

    points [n, d], centroids [k, d]; compared in float64, so that a border lies where the stored numbers put it
    """
    values, points = centroids.detach().double(), points.detach()
    if values.shape[1] == 1:
        levels, level_of = torch.unique(values.squeeze(1), return_inverse=True)
        numbers = torch.arange(len(values), device=values.device)
        first = torch.full_like(level_of[: len(levels)], len(values)).scatter_reduce_(0, level_of, numbers, "amin")
        borders = (levels[1:] + levels[:-1]) / 2
        parts = [torch.bucketize(part.squeeze(1).double(), borders) for part in torch.split(points, CHUNK_POINTS)]
        return first[torch.cat(parts)]
    rows = max(CHUNK_POINTS // len(values), 1)
    parts = []
    for part in torch.split(points, rows):
        distance = values.new_zeros(len(values), len(part))
        for axis, x in enumerate(part.double().T):
            distance += (x - values[:, axis : axis + 1]).square_()
        parts.append(distance.argmin(0))
    return torch.cat(parts)
