"""One codebook of several tensors: the one that all their values together would have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompress.clustering.kmeans import ScalarCounts, assign_scalars, cluster_scalars
from qcompress.clustering.kmeans_vectors import MOST_VECTORS, VectorSample, cluster_vectors


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(*dtypes: torch.dtype) -> list[Tensor]:
    random = generator()
    return [
        ((torch.randn(30 + index, 40, generator=random) * 10**-index).to(dtype)) for index, dtype in enumerate(dtypes)
    ]


def error(values: Tensor, centroids: Tensor, weights: Tensor | None = None) -> float:
    nearest = centroids.double()[assign_scalars(values, centroids).long()]
    squares = (values.double() - nearest).square()
    return float(squares.sum() if weights is None else (squares * weights).sum())


def counted(tensors: list[Tensor], clusters: int, weights: list[Tensor] | None = None, *, zero: bool = False) -> Tensor:
    counts = ScalarCounts()
    for index, tensor in enumerate(tensors):
        counts.add(tensor, None if weights is None else weights[index])
    return counts.cluster(clusters, "optimal", zero, generator()).centroids


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("clusters", [1, 2, 16, 100])
def test_of_16_bit_values_it_is_the_optimum(dtypes: tuple[torch.dtype, ...], clusters: int) -> None:
    tensors = parts(*dtypes)
    whole = torch.cat([tensor.flatten().float() for tensor in tensors])
    best = cluster_scalars(whole, clusters)
    assert float(best.bound) <= 1e-9 * float(best.error) + 1e-12
    assert error(whole, counted(tensors, clusters)) == pytest.approx(float(best.error), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("clusters", [2, 16, 64])
def test_of_wider_values_it_is_within_its_bins_of_the_optimum(clusters: int) -> None:
    """A value moves by one part in 2**11 at most, so errors grow by no more than that of all values together."""
    tensors = parts(torch.float32, torch.float64, torch.float32)
    whole = torch.cat([tensor.flatten().double() for tensor in tensors])
    best, moved = float(cluster_scalars(whole, clusters).error), float((whole * 2.0**-11).square().sum())
    found = error(whole, counted(tensors, clusters).double())
    assert best * (1 - 1e-6) <= found <= (best**0.5 + 2 * moved**0.5) ** 2


def test_weights_count_like_copies() -> None:
    tensors = parts(torch.bfloat16, torch.float32)
    times = [torch.randint(0, 4, tensor.shape, generator=generator(index)) for index, tensor in enumerate(tensors)]
    copies = [tensor.flatten().repeat_interleave(one.flatten()) for tensor, one in zip(tensors, times, strict=True)]
    weighed = counted(tensors, 8, [one.double() for one in times])
    torch.testing.assert_close(weighed, counted(copies, 8))


def test_no_weights_at_all_count_as_one() -> None:
    tensors = parts(torch.bfloat16, torch.float32)
    none = [torch.zeros(tensor.shape, dtype=torch.float64) for tensor in tensors]
    assert torch.equal(counted(tensors, 8, none), counted(tensors, 8))


def test_few_values_and_an_exact_zero() -> None:
    tensors = [torch.tensor([0.5, -0.25]), torch.tensor([0.5, 2.0, 2.0])]
    assert counted(tensors, 16).tolist() == [-0.25, 0.5, 2.0]
    assert 0.0 in counted(parts(torch.float32), 4, zero=True).tolist()
    assert counted([torch.tensor([0.0, -0.0]), torch.tensor([1.0])], 4).tolist() == [0.0, 1.0]


def test_few_vectors_are_all_seen() -> None:
    points = [torch.randn(300, 3, generator=generator(seed)) for seed in range(2)]
    weights = [torch.rand(300, generator=generator(seed), dtype=torch.float64) for seed in (5, 6)]
    sample = VectorSample(600, generator())
    for one, each in zip(points, weights, strict=True):
        sample.add(one, each)
    found = sample.cluster(8, "optimal", generator(1)).centroids
    whole = cluster_vectors(torch.cat(points), 8, torch.cat(weights), generator=generator(1)).centroids
    assert torch.equal(found, whole)


def test_of_many_vectors_each_tensor_gives_by_its_size() -> None:
    """Two tensors of one value each, three to one: so is the sample, and the one entry lies at their mean."""
    total = 4 * MOST_VECTORS
    sample = VectorSample(total, generator())
    sample.add(torch.zeros(1, 2).expand(total // 4, 2))
    sample.add(torch.ones(1, 2).expand(3 * total // 4, 2))
    found = sample.cluster(1, "optimal", generator()).centroids
    torch.testing.assert_close(found, torch.full((1, 2), 0.75))
