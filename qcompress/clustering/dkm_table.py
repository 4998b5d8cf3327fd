"""DKM (dkm.py) on 16-bit weights clusters each of their at most 65,536 values once, with its count.

The soft weight is a function of the weight's value alone, so that all attention is on a table of the distinct values u.
The gradient in a weight is linear in that of its own soft weight, with coefficients that are tables too:

    gradient in w_i = G_i t[u_i] + v[u_i]

eDKM (Cho et al. 2023, arXiv 2309.00964) stores attention by distinct values; here it is computed by them as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.clustering.dkm import Metric, SoftKMeans, check
from qcompress.coding.rows import spans

PATTERNS = 1 << 16
CHUNK_WEIGHTS = 1 << 18
LEVELS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Values:
    """Weights, [n], as indices into a table: the bit patterns of their rounding to `levels`, made chunk by chunk."""

    weights: Tensor
    levels: torch.dtype

    def indices(self) -> Iterator[tuple[slice, Tensor]]:
        """int32 in [0, PATTERNS), a chunk at a time."""
        for part in spans(len(self.weights), CHUNK_WEIGHTS):
            yield part, self.weights[part].to(self.levels).view(torch.int16).int() + PATTERNS // 2

    def counts(self) -> Tensor:
        """int64 [PATTERNS]."""
        counts = torch.zeros(PATTERNS, dtype=torch.int64, device=self.weights.device)
        for _, index in self.indices():
            counts += index.bincount(minlength=PATTERNS)
        return counts

    def sums(self, values: Tensor) -> Tensor:
        """The sum of `values`, [n], over all weights of each pattern, float64 [PATTERNS]."""
        sums = torch.zeros(PATTERNS, dtype=torch.float64, device=values.device)
        for part, index in self.indices():
            sums += index.bincount(values[part].double(), minlength=PATTERNS)
        return sums


def _values_at(present: Tensor, levels: torch.dtype) -> Tensor:
    """The numbers, float64 [values, 1], whose indices are `present`."""
    return (present - PATTERNS // 2).to(torch.int16).view(levels).double().unsqueeze(1)


def _spread(present: Tensor, found: Tensor, dtype: torch.dtype) -> Tensor:
    """A table [PATTERNS] that holds `found`, [values, 1], at the indices `present`."""
    return found.new_zeros(PATTERNS, dtype=dtype).index_copy_(0, present, found.squeeze(1).to(dtype))


class _SoftClusterTable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, centroids: Tensor, levels: torch.dtype, like: SoftKMeans, *path: Any
    ) -> tuple[Tensor, Tensor]:
        values = Values(weights.reshape(-1), levels)
        counts = values.counts()
        present = counts.nonzero().squeeze(1)
        problem = replace(like, points=_values_at(present, levels), counts=counts[present].double())
        sets, masses = problem.path(centroids, *path)
        table = _spread(present, problem.soften(sets[-2], sets[-1], torch.empty_like(problem.points)), weights.dtype)
        soft = torch.empty_like(weights, memory_format=torch.contiguous_format)
        for part, index in values.indices():
            torch.index_select(table, 0, index, out=soft.view(-1)[part])
        ctx.save_for_backward(weights, present, problem.counts, sets, masses)
        ctx.levels, ctx.centroid_dtype = levels, centroids.dtype
        ctx.like = (like.temperature, like.metric)
        ctx.set_materialize_grads(False)
        return soft, sets[-1].to(centroids.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, centroid_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, present, counts, sets, masses = ctx.saved_tensors
        values = Values(weights.reshape(-1), ctx.levels)
        problem = SoftKMeans(_values_at(present, ctx.levels), counts, *ctx.like)
        gradient = torch.zeros_like(sets[-1]) if centroid_gradient is None else centroid_gradient.double()
        t, v = torch.zeros_like(problem.points), torch.zeros_like(problem.points)
        direct = torch.zeros_like(gradient)
        if upstream is not None:
            by_output = replace(problem, counts=values.sums(upstream.reshape(-1))[present])
            gradient = gradient + by_output.totals(sets[-2], problem.points)[0].unsqueeze(1)
            nothing = torch.zeros_like(gradient)
            direct = by_output.pull(sets[-2], sets[-1], nothing, torch.ones_like(t), into=t)
        gradient = problem.pull_back(sets[-2:], masses[-1:], v, gradient) + direct
        gradient = problem.pull_back(sets[:-1], masses[:-1], v, gradient)
        slope, rest = (_spread(present, one, weights.dtype) for one in (t, v))
        into = torch.empty_like(weights, memory_format=torch.contiguous_format)
        for part, index in values.indices():
            found = torch.index_select(rest, 0, index, out=into.view(-1)[part])
            if upstream is not None:
                found.addcmul_(upstream.reshape(-1)[part], slope.index_select(0, index))
        return into, gradient.to(ctx.centroid_dtype), None, None, None, None


def soft_cluster_table(
    weights: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int,
    metric: Metric = "squared",
    *,
    levels: torch.dtype = torch.bfloat16,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What `soft_cluster` gives for the weights rounded to 16 bits, and the gradient there as that of the weights.

    weights    [n, 1]; those of 16 bits are taken as they are
    centroids  [k, 1]
    levels     bfloat16 or float16, to which wider weights are rounded: the gradient is taken straight through that

    The table is worked on in float64, whatever the dtype of weights and centroids, and takes well under 1 MB; what is
    kept for backward is the weights. The same terms otherwise as `soft_cluster`. On CUDA the sums of upstream gradients
    are in no fixed order.
    """
    check(weights, centroids, temperature, iterations)
    levels = weights.dtype if weights.dtype in LEVELS else levels
    if weights.shape[1] != 1 or levels not in LEVELS:
        raise ValueError(f"points {tuple(weights.shape)} rounded to {levels}; one number each, of bfloat16 or float16")
    like = SoftKMeans(weights.detach(), None, temperature, metric)
    path = (iterations, tolerance)
    soft, moved = _SoftClusterTable.apply(weights, centroids, levels, like, *path)  # type: ignore[no-untyped-call]
    return soft, moved
