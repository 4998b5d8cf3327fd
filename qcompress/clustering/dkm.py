"""Weights become means of centroids under attention here, with the true gradient through all iterations: DKM.

Cho et al. 2022, arXiv 2108.12659. For n points w_i, k centroids c_j and a temperature, one iteration is

    A_ij = softmax over j of -distance(w_i, c_j) / temperature        c'_j = sum_i A_ij w_i / sum_i A_ij

and the soft weight is sum_j A_ij c'_j, with the last iteration's A. With G and H the gradients in the soft weights and
in c', S_j = sum_i A_ij and q_j = H_j / S_j, backward is, from the last iteration to the first,

    H_j += sum_i A_ij G_i                                             in the last iteration only
    r_ij = G_i . c'_j + q_j . (w_i - c'_j)                            the first term in the last iteration only
    E_ij = A_ij (r_ij - sum_k A_ik r_ik)
    gradient in w_i += sum_j A_ij q_j - sum_j E_ij slope_ij           gradient in c_j = sum_i E_ij slope_ij

where slope_ij, of distance / temperature in w_i, is 2 (w_i - c_j) / temperature for the squared distance. Plain
autograd keeps n x k scores for each iteration; here they are made anew, chunk by chunk, 2 (iterations + 1) times in
all, and only the weights and the iterations' centroids are kept.

Two centroids with a gap g and a squared metric give the soft weight (g / 2) tanh(g w / temperature) about their middle,
of slope g**2 / (2 * temperature) there: 1 at a temperature of g**2 / 2. Far below, all gradient sits at such borders;
above the critical temperature there is one cluster only. Temperatures are therefore given as shares of g**2 (of g for
the plain metric), which mean the same in every layer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.coding.rows import row_slices

Metric: TypeAlias = Literal["squared", "plain"]
"""The distance that is softened: Euclidean, squared or not."""

CHUNK_SCORES = 1 << 18
"""Scores made at a time: a few buffers of them stay in a core's cache, and calls of many small ones cost little."""
FEWEST_ROWS = 128
CHUNK_POINTS = 1 << 16
START_SHARE = 0.5
END_SHARE = 0.02


def soft_cluster(
    weights: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int,
    metric: Metric = "squared",
    *,
    tolerance: float = 0.0,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The soft weights, [n, d] like `weights`, and the centroids that they are means of, [k, d] like `centroids`.

    weights      [n, d], n points of d weights each
    centroids    [k, d], where the iterations start; in training those of the step before, detached
    temperature  > 0, in units of the metric
    iterations   at least 1, all of them unrolled by the gradient
    tolerance    an iteration that moves every coordinate of every centroid by less is the last; 0 makes all of them
    rows         points a chunk, which changes nothing but speed and memory

    Differentiable once, in both; float32 sums within a chunk, float64 across chunks. A centroid that no point attends
    to stays where it is. Memory beyond weights, soft weights and gradients is some ten chunks of scores.
    """
    check(weights, centroids, temperature, iterations)
    problem = SoftKMeans(weights.detach(), None, temperature, metric, rows)
    path = (iterations, tolerance)
    # Products of 16 bits, as autocast would have them, are too coarse for small differences of centroids.
    with torch.autocast(weights.device.type, enabled=False):
        soft, moved = _SoftCluster.apply(weights, centroids, problem, *path)  # type: ignore[no-untyped-call]
    return soft, moved


def check(weights: Tensor, centroids: Tensor, temperature: float, iterations: int) -> None:
    """Raise ValueError unless shapes are [n, d] and [k, d], the temperature is positive and iterations are made."""
    if weights.ndim != 2 or centroids.ndim != 2 or weights.shape[1] != centroids.shape[1] or not centroids.numel():
        raise ValueError(f"points {tuple(weights.shape)} and centroids {tuple(centroids.shape)} are not [n, d], [k, d]")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} is not a positive number")
    if iterations < 1:
        raise ValueError(f"{iterations} iterations; at least 1")


class _SoftCluster(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, centroids: Tensor, like: SoftKMeans, iterations: int, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        sets, masses = like.path(centroids, iterations, tolerance)
        ctx.save_for_backward(weights, sets, masses)
        ctx.like = (like.temperature, like.metric, like.rows)
        ctx.centroid_dtype = centroids.dtype
        ctx.set_materialize_grads(False)
        return like.soften(sets[-2], sets[-1], torch.empty_like(weights)), sets[-1].to(centroids.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, centroid_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, sets, masses = ctx.saved_tensors
        problem = SoftKMeans(weights, None, *ctx.like)
        into = torch.zeros_like(weights, dtype=problem.dtype)
        gradient = torch.zeros_like(sets[-1]) if centroid_gradient is None else centroid_gradient.double()
        with torch.autocast(weights.device.type, enabled=False):
            if upstream is not None:
                gradient = gradient + problem.totals(sets[-2], upstream)[1]
            gradient = problem.pull_back(sets, masses, into, gradient, upstream)
        return into.to(weights.dtype), gradient.to(ctx.centroid_dtype), None, None, None


@dataclass(frozen=True, slots=True)
class SoftKMeans:
    """Points, and how they attend to centroids.

    points       [n, d]; float64 is worked on in float64, everything else in float32
    counts       float64 [n], how often each point occurs; None for once each
    temperature  > 0, in units of the distance
    rows         points a chunk; None chooses
    """

    points: Tensor
    counts: Tensor | None
    temperature: float
    metric: Metric
    rows: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.points.dtype == torch.float64 else torch.float32

    def parts(self, clusters: int) -> Iterator[slice]:
        rows = self.rows or max(CHUNK_SCORES // clusters, FEWEST_ROWS)
        return (slice(start, start + rows) for start in range(0, len(self.points), rows))

    @property
    def sharpness(self) -> float:
        """1 / temperature, as far as the dtype can hold it."""
        return min(1 / self.temperature, torch.finfo(self.dtype).max / 4)

    @property
    def floor(self) -> float:
        """The least log2 of a score: nothing beside 1, and its products are still normal numbers, which are faster."""
        return 0.8 * math.log2(torch.finfo(self.dtype).tiny)

    def columns(self, values: Tensor, part: slice) -> Tensor:
        """Rows of [n, d] as [d, rows], in the dtype that is worked in."""
        return values[part].to(self.dtype).T.contiguous()

    def attend(self, x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor | None]:
        """A [k, rows], whose columns sum to 1, and the distances where plain; x [d, rows], centroids [k, d]."""
        # Differences first: the expanded square would lose the digits that a low temperature brings out.
        gap = x[0] - centroids[:, :1]
        if self.metric == "plain" and len(x) == 1:
            distance = gap.abs_()
        else:
            distance = gap.mul_(gap)
            for axis in range(1, len(x)):
                gap = x[axis] - centroids[:, axis : axis + 1]
                distance.addcmul_(gap, gap)
            if self.metric == "plain":
                distance.sqrt_()
        least = distance.amin(0)
        beyond = distance.sub_(least) if self.metric == "squared" else distance - least
        # Powers of two: torch's exp takes four times as long on a CPU, and far longer where it underflows.
        a = beyond.mul_(-math.log2(math.e) * self.sharpness).clamp_(min=self.floor).exp2_()
        return a.div_(a.sum(0)), None if self.metric == "squared" else distance

    def totals(self, centroids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """sum_i n_i A_ij, float64 [k], and sum_i n_i A_ij v_i, float64 [k, e]; values [n, e]."""
        near = centroids.to(self.dtype)
        mass = centroids.new_zeros(len(centroids), dtype=torch.float64)
        sums = centroids.new_zeros(len(centroids), values.shape[1], dtype=torch.float64)
        for part in self.parts(len(centroids)):
            a, _ = self.attend(self.columns(self.points, part), near)
            if self.counts is not None:
                a.mul_(self.counts[part])
            mass += a.sum(1)
            for axis, value in enumerate(self.columns(values, part)):
                sums[:, axis] += (a * value).sum(1)
        return mass, sums

    def path(self, centroids: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
        """The centroids before and after each iteration, float64 [r + 1, k, d], and S, float64 [r, k].

        S is infinite for a centroid without any point, which stays where it is.
        """
        sets, masses = [centroids.double()], []
        # All that such a centroid has may be scores at their floor.
        empty = len(self.points) * 2**self.floor / torch.finfo(self.dtype).eps
        for _ in range(iterations):
            mass, sums = self.totals(sets[-1], self.points)
            dead = mass <= empty
            sets.append(torch.where(dead.unsqueeze(1), sets[-1], sums / mass.unsqueeze(1)))
            masses.append(mass.masked_fill(dead, math.inf))
            if tolerance > 0 and float((sets[-1] - sets[-2]).abs().max()) < tolerance:
                break
        return torch.stack(sets), torch.stack(masses)

    def soften(self, centroids: Tensor, moved: Tensor, into: Tensor) -> Tensor:
        """`into`, [n, d], filled with sum_j A_ij moved_j, A from `centroids`."""
        near, values = centroids.to(self.dtype), moved.T.to(self.dtype)
        for part in self.parts(len(centroids)):
            a, _ = self.attend(self.columns(self.points, part), near)
            into[part] = (values @ a).T
        return into

    def pull(self, centroids: Tensor, moved: Tensor, q: Tensor, upstream: Tensor | None, into: Tensor) -> Tensor:
        """The gradient in `centroids`, float64 [k, d], of one iteration; `into`, [n, d], gains that in the points.

        centroids, moved, q  float64 [k, d]: c, c' and q above
        upstream             G, [n, d], in the last iteration
        """
        pulled = torch.zeros_like(centroids)
        near, slope = centroids.to(self.dtype), q.T.to(self.dtype)
        forms = [-(q * moved).sum(1, keepdim=True), q, *(() if upstream is None else (moved,))]
        left = torch.cat(forms, 1).to(self.dtype)
        scale = self.sharpness * (2 if self.metric == "squared" else 1)
        for part in self.parts(len(centroids)):
            x = self.columns(self.points, part)
            given = () if upstream is None else (self.columns(upstream, part),)
            a, distance = self.attend(x, near)
            e = left @ torch.cat([torch.ones_like(x[:1]), x, *given])
            e.sub_((a * e).sum(0)).mul_(a)
            if distance is not None:
                # On a centroid the distance has no slope; 0 is in its subgradient.
                e.div_(distance).masked_fill_(distance == 0, 0)
            gain = slope @ a
            for axis, value in enumerate(x):
                turned = (value - near[:, axis : axis + 1]).mul_(e)
                gain[axis].sub_(turned.sum(0), alpha=scale)
                row_sums = turned.sum(1) if self.counts is None else turned @ self.counts[part]
                pulled[:, axis].add_(row_sums, alpha=scale)
            into[part] += gain.T
        return pulled

    def pull_back(
        self, sets: Tensor, masses: Tensor, into: Tensor, gradient: Tensor, upstream: Tensor | None = None
    ) -> Tensor:
        """The gradient in the first of `sets`, float64 [k, d]; `into`, [n, d], gains that in the points.

        sets, masses  as of `path`
        gradient      in the last of `sets`, that of the soft weights in it included
        upstream      G, [n, d], the gradient in the soft weights, at fixed last centroids
        """
        for centroids, moved, mass in zip(sets[:-1].flip(0), sets[1:].flip(0), masses.flip(0), strict=True):
            stayed = torch.isinf(mass).unsqueeze(1)
            pulled = self.pull(centroids, moved, gradient / mass.unsqueeze(1), upstream, into)
            gradient = pulled + gradient.masked_fill(~stayed, 0)
            upstream = None
        return gradient


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
    parts = []
    for span in row_slices(len(points), len(values), CHUNK_POINTS):
        x_of_axis = points[span].double().T
        distance = values.new_zeros(len(values), x_of_axis.shape[1])
        for axis, x in enumerate(x_of_axis):
            distance += (x - values[:, axis : axis + 1]).square_()
        parts.append(distance.argmin(0))
    return torch.cat(parts)


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
