"""Clustering of vectors: nearest centroids, means, an error that never grows, and the scalar optimum below it all."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from qcompress.clustering.kmeans import Clustering, assign_scalars, cluster_scalars, plus_plus
from qcompress.clustering.kmeans_vectors import (
    DISTANCES,
    VectorStart,
    assign_vectors,
    cluster_vectors,
    recentre_vectors,
)

STARTS = get_args(VectorStart)


def bell(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def clumps(n: int, dim: int, centres: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points close to centres that are far from one another, and the centres."""
    middle = 100 * torch.stack(torch.meshgrid(*[torch.arange(4.0)] * dim, indexing="ij"), -1).reshape(-1, dim)[:centres]
    # In the order of their first coordinate, which all differ.
    middle[:, 0] += torch.arange(len(middle))
    middle = middle[middle[:, 0].argsort()]
    each = torch.arange(n) % centres
    return middle[each] + 0.01 * bell(n, dim, seed), middle


def assert_a_clustering(points: Tensor, clusters: int, found: Clustering, weights: Tensor | None = None) -> None:
    """Ascending centroids, all used, each point with its nearest but for rounding, and the error that is claimed."""
    centroids, codes = found.centroids.double(), found.codes.long()
    assert found.codes.shape == points.shape[:1]
    assert found.codes.dtype == (torch.uint8 if len(centroids) <= 256 else torch.int16)
    assert found.centroids.dtype == (torch.float64 if points.dtype == torch.float64 else torch.float32)
    assert 1 <= len(centroids) <= clusters
    assert codes.unique().tolist() == list(range(len(centroids)))
    rows = centroids.tolist()
    assert rows == sorted(rows)
    distances = (points.double().unsqueeze(1) - centroids).square().sum(2)
    own = distances.gather(1, codes.unsqueeze(1)).squeeze(1)
    size = float((points.double() - points.double().mean(0)).square().sum(1).max())
    assert bool((own <= distances.amin(1) + 1e-5 * size).all())
    each = own if weights is None else own * weights.double()
    assert float(found.error) == pytest.approx(float(each.sum()), rel=1e-9, abs=1e-12 * size)
    assert 0 <= float(found.bound) <= float(found.error)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dim", [1, 2, 4, 8])
@pytest.mark.parametrize("clusters", [1, 7, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cells_are_of_nearest_points_and_centroids_their_means(start, dim, clusters, dtype):
    points = bell(1500, dim).to(dtype)
    found = cluster_vectors(points, clusters, start=start, iterations=100)
    assert_a_clustering(points, clusters, found)
    if dtype != torch.bfloat16 or dim > 2:
        assert len(found.centroids) == clusters
    # The last iterations may move a few points yet, by little error; bfloat16 points that share a value move at once.
    means = recentre_vectors(points, found.codes, found.centroids)
    moved = float((means.double() - found.centroids.double())[found.codes.long()].square().sum())
    assert moved <= (5e-2 if dtype == torch.bfloat16 else 1e-3) * float(found.error) + 1e-9


@pytest.mark.parametrize("start", ["k-means++", "split"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("centres", [5, 16])
def test_clumps_are_found(start, dim, centres):
    points, middle = clumps(2000, dim, centres)
    found = cluster_vectors(points, centres, start=start)
    assert torch.allclose(found.centroids, middle, atol=0.01)
    assert torch.equal(found.codes.long(), torch.arange(2000) % centres)


def test_splits_go_across_the_principal_axis():
    long, across = torch.tensor([3.0, 4.0]) / 5, torch.tensor([-4.0, 3.0]) / 5
    points = bell(4000, 1) * 5 * long + bell(4000, 1, seed=1) * across
    found = cluster_vectors(points, 2, start="split", iterations=0)
    apart = found.centroids[1] - found.centroids[0]
    # The means of the halves of a Gaussian lie 2 * sqrt(2 / pi) deviations apart.
    assert float(apart @ long) == pytest.approx(5 * 2 * (2 / torch.pi) ** 0.5, rel=0.05)
    assert abs(float(apart @ across)) < 0.2


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_more_iterations_never_add_error(start, weighted):
    points = bell(800, 3) ** 3
    weights = torch.rand(800, generator=torch.Generator().manual_seed(1)) if weighted else None
    errors = [float(cluster_vectors(points, 40, weights, start=start, iterations=i).error) for i in range(12)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("clusters", [1, 3, 16])
def test_one_dimension_is_never_better_than_the_optimum_and_assigned_alike(start, clusters):
    values = bell(2000, 1).double()
    found = cluster_vectors(values, clusters, start=start, iterations=300)
    best = cluster_scalars(values[:, 0], clusters)
    assert float(best.error) * (1 - 1e-9) <= float(found.error) <= 1.3 * float(best.error)
    assert torch.equal(found.codes, assign_scalars(values[:, 0], found.centroids[:, 0]))
    assert torch.equal(assign_vectors(values, best.centroids.unsqueeze(1)), best.codes)


@pytest.mark.parametrize("clusters", [4, 32])
def test_the_error_is_close_to_scikit_learns(clusters):
    points = bell(3000, 4)
    peer = KMeans(clusters, n_init=1, random_state=0).fit(points.numpy())
    assert float(cluster_vectors(points, clusters, iterations=100).error) <= 1.03 * peer.inertia_


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.sampled_from(STARTS))
def test_whole_weights_are_repetitions(times, start):
    points, _ = clumps(12, 2, 3)
    weights = torch.tensor(times)
    if not all(sum(times[each::3]) for each in range(3)):
        return
    weighted = cluster_vectors(points, 3, weights.float(), start=start, iterations=100)
    repeated = cluster_vectors(points.repeat_interleave(weights, 0), 3, start=start, iterations=100)
    if start == "random":
        # Draws differ. What is left to gain by the means of the same cells is below what ends the iterations.
        again = recentre_vectors(points, weighted.codes, weighted.centroids, weights.float())
        error = ((points - again[weighted.codes.long()]).square().sum(1) * weights).sum()
        assert float(error) == pytest.approx(float(weighted.error), rel=1e-4, abs=1e-6)
    else:
        assert torch.allclose(weighted.centroids, repeated.centroids, atol=1e-5)
        assert float(weighted.error) == pytest.approx(float(repeated.error), abs=1e-6)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_few_distinct_points_are_all_kept(start, dtype):
    distinct = torch.tensor([[-1.0, 2.0], [0.5, -3.0], [0.5, 1.0]], dtype=dtype)
    for clusters in (3, 5, 300):
        found = cluster_vectors(distinct[[2, 0, 0, 1, 2, 0]], clusters, start=start)
        assert found.centroids.tolist() == distinct.tolist()
        assert found.codes.tolist() == [2, 0, 0, 1, 2, 0]
        assert float(found.error) == 0.0
    constant = cluster_vectors(torch.full((5, 2), 0.1, dtype=dtype), 16, start=start)
    assert constant.centroids.double().tolist() == [[float(torch.tensor(0.1, dtype=dtype))] * 2]


def test_dead_centroids_take_half_of_the_heaviest_cells():
    # Most drawn starts coincide on the one value that nearly all points have.
    points = torch.cat([torch.zeros(900, 2), clumps(90, 2, 9)[0] + 50])
    found = cluster_vectors(points, 10, start="random", iterations=50)
    assert len(found.centroids) == 10
    assert_a_clustering(points, 10, found)


@pytest.mark.parametrize("start", STARTS)
def test_a_sample_starts_what_all_points_finish(start):
    points = bell(70_000, 2) * torch.tensor([1.0, 0.2])
    found = cluster_vectors(points, 16, start=start, iterations=50)
    assert_a_clustering(points, 16, found)
    means = recentre_vectors(points, found.codes, found.centroids)
    assert torch.allclose(means, found.centroids, atol=5e-3)
    part = cluster_vectors(points[:60_000], 16, start=start, iterations=50)
    assert float(found.error) / 70_000 == pytest.approx(float(part.error) / 60_000, rel=0.05)


@pytest.mark.parametrize("dim", [1, 2, 8])
@pytest.mark.parametrize("clusters", [1, 7, 32, 33, 256, 257])
def test_codes_name_the_nearest_centroid(dim, clusters):
    points, centroids = bell(500, dim).double() + 1000, bell(clusters, dim, seed=1).double() + 1000
    distances = (points.unsqueeze(1) - centroids).square().sum(2)
    codes = assign_vectors(points, centroids)
    assert codes.dtype == (torch.uint8 if clusters <= 256 else torch.int16)
    assert torch.equal(codes.long(), distances.argmin(1))
    # In float32 the far origin must not cost more than the points' own rounding.
    short = assign_vectors(points.float(), centroids.float()).long()
    chosen = distances.gather(1, short.unsqueeze(1)).squeeze(1)
    assert bool((chosen.sqrt() <= distances.amin(1).sqrt() + 1e-3).all())


@pytest.mark.parametrize("clusters", [6, 32, 40, 300])
def test_of_equally_near_centroids_the_first_is_named(clusters):
    # Every centroid stands there several times, and there are more points than distances are computed for at once.
    own = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    centroids = own.repeat(-(-clusters // 3), 1)[:clusters]
    points = own[torch.arange(DISTANCES // clusters * 2 + 5) % 3]
    assert torch.equal(assign_vectors(points, centroids).long(), torch.arange(len(points)) % 3)


@pytest.mark.parametrize("dim", [1, 2, 4, 5])
def test_starts_are_drawn_by_the_distance_to_the_nearest_drawn_before(dim):
    points = bell(2 * 300, dim).double().reshape(2, 300, dim)
    mass = bell(2, 300, seed=1).double().abs()
    drawn = plus_plus(points, mass, 9, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for k in range(9):
        shares = torch.rand(2, 1, dtype=torch.float64, generator=generator)
        for one in range(2):
            before = drawn[one, :k]
            least = [min((sum((p - c) ** 2) for c in before.numpy()), default=1.0) for p in points[one].numpy()]
            sums = np.cumsum(mass[one].numpy() * np.array([float(d) for d in least]))
            place = int(np.searchsorted(sums, sums[-1] * float(shares[one]), "right"))
            assert torch.equal(drawn[one, k], points[one, place])


def test_recentred_centroids_are_weighted_means():
    points = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 8.0], [9.0, 9.0]])
    codes = torch.tensor([2, 2, 0, 2], dtype=torch.uint8)
    old = torch.tensor([[0.0, 0.0], [-7.0, 7.0], [0.0, 0.0]])
    weights = torch.tensor([1.0, 3.0, 2.0, 0.0])
    assert recentre_vectors(points, codes, old, weights).tolist() == [[5.0, 8.0], [-7.0, 7.0], [2.5, 3.0]]
    plain = recentre_vectors(points, codes, old)
    assert torch.allclose(plain[2], points[[0, 1, 3]].mean(0))


@pytest.mark.parametrize("start", STARTS)
def test_the_same_generator_gives_the_same_and_the_global_one_is_left_alone(start):
    points = bell(600, 3)
    before, state = points.clone(), torch.random.get_rng_state()
    first, second, other = (
        cluster_vectors(points, 30, start=start, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.centroids, other.centroids) == (start == "split")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(points, before)


@pytest.mark.parametrize("start", STARTS)
def test_a_power_of_two_and_a_shift_change_nothing_else(start):
    points = bell(700, 3).double()
    plain = cluster_vectors(points, 20, start=start)
    scaled = cluster_vectors(points * 2.0**-12, 20, start=start)
    shifted = cluster_vectors(points + 64, 20, start=start)
    assert torch.equal(scaled.centroids, plain.centroids * 2.0**-12)
    assert torch.allclose(shifted.centroids - 64, plain.centroids, atol=1e-9)


def test_what_cannot_be_clustered_is_refused():
    points = bell(10, 2)
    for bad in (torch.nan, torch.inf):
        broken = points.clone()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match="finite"):
            cluster_vectors(broken, 2)
    for shape in ((0, 2), (4, 0), (4,)):
        with pytest.raises(ValueError, match="no points"):
            cluster_vectors(torch.zeros(shape), 2)
    with pytest.raises(ValueError, match="clusters"):
        cluster_vectors(points, 0)
    for weights in (-torch.ones(10), torch.full((10,), torch.nan), torch.ones(9)):
        with pytest.raises(ValueError, match="weights"):
            cluster_vectors(points, 2, weights)


def test_all_zero_weights_count_as_one():
    points = bell(200, 2)
    plain, none = cluster_vectors(points, 6), cluster_vectors(points, 6, torch.zeros(200))
    assert np.array_equal(plain.centroids.numpy(), none.centroids.numpy())
