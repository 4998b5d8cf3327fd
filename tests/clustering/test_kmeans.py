"""Clustering of numbers: the least error there is, by a slow dynamic programme, and what is true of any clustering."""

from __future__ import annotations

from typing import get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from qcompress.clustering import kmeans
from qcompress.clustering import lines as kmeans_lines
from qcompress.clustering import optimal as kmeans_optimal
from qcompress.clustering.kmeans import (
    Clustering,
    Start,
    assign_scalars,
    cluster_rows,
    cluster_scalars,
    other_start,
    recentre,
)
from qcompress.clustering.lines import lines_from_rows, lloyd
from qcompress.clustering.optimal import optimal_start

Floats = NDArray[np.float64]

STARTS = get_args(Start)

wholes = st.integers(-6, 6).map(float)
reals = st.floats(-1, 1, width=32)
wild = st.floats(-1e6, 1e6, width=32)
numbers = st.one_of(*(st.lists(each, min_size=1, max_size=24) for each in (wholes, reals, wild)))


def brute_force(values: Floats, clusters: int, weights: Floats | None = None, zero: bool = False) -> float:
    """The least error of at most `clusters` cells, by trying every last cell of every prefix; O(n**2 clusters)."""
    order = np.argsort(values, kind="stable")
    x = values[order]
    w = np.ones(len(x)) if weights is None else weights[order]
    n = len(x)
    cost, at_zero = np.full((n + 1, n + 1), np.inf), np.full((n + 1, n + 1), np.inf)
    for i in range(n + 1):
        at_zero[i, i:] = np.concatenate([[0], (w[i:] * x[i:] ** 2).cumsum()])
        if i < n:
            # From the cell's first point, where nothing cancels that does not lie in the cell.
            d, m = x[i:] - x[i], w[i:].cumsum()
            sums = (w[i:] * d).cumsum()
            spread = (w[i:] * d * d).cumsum() - np.divide(sums**2, m, out=np.zeros(n - i), where=m > 0)
            cost[i, i + 1 :] = spread.clip(0)
    plain, pinned = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
    plain[0] = 0.0
    for _ in range(clusters):
        pinned = np.minimum((pinned[:, None] + cost).min(0), (plain[:, None] + at_zero).min(0))
        plain = np.minimum(plain, (plain[:, None] + cost).min(0))
    return float(pinned[n] if zero else plain[n])


def squares(values: Tensor, found: Clustering, weights: Tensor | None = None) -> Tensor:
    """The error by its definition, row by row for rows."""
    chosen = found.centroids.double()
    codes = found.codes.long()
    decoded = chosen[codes] if chosen.ndim == 1 else chosen.gather(1, codes)
    each = (values.double() - decoded).square() * (1 if weights is None else weights.double())
    return each.sum() if chosen.ndim == 1 else each.sum(1)


def slack(values: Tensor) -> float:
    """What float64 may lose of sums of squares of these values."""
    return 1e-12 * float(values.double().square().sum()) + 1e-300


def assert_a_clustering(values: Tensor, clusters: int, found: Clustering, weights: Tensor | None = None) -> None:
    """Nearest centroids that are means, ascending and all used, and the error that is claimed."""
    centroids, codes = found.centroids, found.codes
    assert codes.shape == values.shape
    assert codes.dtype == (torch.uint8 if len(centroids) <= 256 else torch.int16)
    assert centroids.dtype == (torch.float64 if values.dtype == torch.float64 else torch.float32)
    assert 1 <= len(centroids) <= clusters
    assert bool((centroids.diff() > 0).all())
    flat, index = values.double().reshape(-1), codes.long().reshape(-1)
    distances = (flat.unsqueeze(1) - centroids.double()).abs()
    assert bool((distances.gather(1, index.unsqueeze(1)).squeeze(1) <= distances.amin(1) * (1 + 1e-15)).all())
    assert float(found.error) == pytest.approx(float(squares(values, found, weights)), rel=1e-9, abs=0)
    assert 0 <= float(found.bound) <= float(found.error)


def assert_means(values: Tensor, found: Clustering, weights: Tensor | None = None, zero: bool = False) -> None:
    flat, index = values.double().reshape(-1), found.codes.long().reshape(-1)
    each = torch.ones_like(flat) if weights is None else weights.double().reshape(-1)
    for code, centroid in enumerate(found.centroids.tolist()):
        own = index == code
        if float(each[own].sum()) > 0 and not (zero and centroid == 0):
            mean = float((flat[own] * each[own]).sum() / each[own].sum())
            assert centroid == pytest.approx(mean, rel=2e-7, abs=1e-9 * float(flat.abs().max()))


@given(numbers, st.integers(1, 9), st.booleans(), st.data())
def test_the_error_is_the_least_there_is(values, clusters, zero, data):
    x = torch.tensor(values, dtype=torch.float64)
    given_weights = st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0, 50.0]), min_size=len(values), max_size=len(values))
    weights = data.draw(st.none() | given_weights)
    w = None if weights is None or not any(weights) else torch.tensor(weights, dtype=torch.float64)
    found = cluster_scalars(x, clusters, w, zero=zero)
    least = brute_force(x.numpy(), clusters, None if w is None else w.numpy(), zero)
    assert float(found.error) == pytest.approx(least, rel=1e-9, abs=50 * slack(x))
    # The reference rounds too.
    assert float(found.error - found.bound) <= least * (1 + 1e-12) + 1e-30
    assert_a_clustering(x, clusters, found, w)
    assert_means(x, found, w, zero)


@given(numbers, st.integers(1, 9), st.booleans())
def test_a_lambda_for_each_cell_finds_the_same(values, clusters, zero):
    x = torch.tensor(values, dtype=torch.float64)
    with patch.object(kmeans_optimal, "LAYERS_UP_TO", 0):
        found = cluster_scalars(x, clusters, zero=zero)
    assert float(found.error) == pytest.approx(
        brute_force(x.numpy(), clusters, None, zero), rel=1e-9, abs=50 * slack(x)
    )


@given(numbers, st.integers(1, 9), st.booleans(), st.booleans())
def test_the_dynamic_programme_needs_no_iterations_after_it(values, clusters, zero, by_lambda):
    x = np.array(values)
    lines = lines_from_rows(np.stack([x, x[::-1] * 3]), None)
    with patch.object(kmeans_optimal, "LAYERS_UP_TO", 0 if by_lambda else 128):
        centroids, least = optimal_start(lines, clusters, zero, len(x))
    found = lines.error(lines.cuts(np.sort(centroids, 1)), np.sort(centroids, 1))
    expected = brute_force(x, clusters, None, zero)
    rounding = 1e-11 * float(x @ x) + 1e-300
    assert found[0] == pytest.approx(expected, rel=1e-9, abs=rounding)
    assert found[1] == pytest.approx(9 * expected, rel=1e-9, abs=9 * rounding)
    assert (least <= np.array([1, 9]) * expected * (1 + 1e-12) + 1e-300).all()


@pytest.mark.parametrize("clusters", [65, 100, 299])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("law", ["bell", "even", "clumps"])
def test_many_clusters_are_optimal_too(clusters, zero, law):
    random = np.random.default_rng(clusters)
    x = {
        "bell": random.standard_normal(400),
        # All gaps alike: the optima of every number of cells up to n / 2 are tied in pairs.
        "even": np.arange(400) - 131.0,
        "clumps": (random.integers(0, 40, 400) * 100 + random.integers(0, 8, 400)).astype(float) - 2000,
    }[law]
    found = cluster_scalars(torch.from_numpy(x), clusters, zero=zero)
    least = brute_force(x, clusters, None, zero)
    assert float(found.error) == pytest.approx(least, rel=1e-9, abs=1e-12 * float((x**2).sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clusters", [1, 2, 7, 16, 70])
@pytest.mark.parametrize("zero", [False, True])
def test_sixteen_bits_are_clustered_by_their_distinct_values(dtype, clusters, zero):
    x = (0.05 * torch.randn(1200, generator=torch.Generator().manual_seed(clusters))).to(dtype)
    x[:20] = 0.0
    x[20:30] = -0.0
    distinct, counts = x.double().unique(return_counts=True)
    found = cluster_scalars(x, clusters, zero=zero)
    least = brute_force(distinct.numpy(), clusters, counts.double().numpy(), zero)
    assert float(found.error) == pytest.approx(least, rel=1e-6)
    assert float(found.error - found.bound) <= least <= float(found.error) * (1 + 1e-9)
    assert_a_clustering(x, clusters, found)
    assert_means(x, found, zero=zero)


def test_many_sixteen_bit_values_equal_the_same_as_float32():
    x = torch.randn(70_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    w = torch.rand(70_000, generator=torch.Generator().manual_seed(1))
    for weights in (None, w):
        short, long = cluster_scalars(x, 16, weights), cluster_scalars(x.float(), 16, weights)
        assert torch.allclose(short.centroids, long.centroids, rtol=1e-6)
        assert torch.equal(short.codes, long.codes)


@given(numbers, st.integers(1, 6), st.booleans(), st.booleans())
def test_the_bound_holds_where_bins_are_too_few(values, clusters, zero, weighted):
    x = torch.tensor(values, dtype=torch.float64)
    w = torch.arange(1.0, len(x) + 1, dtype=torch.float64) if weighted else None
    with patch.object(kmeans, "MOST_BINS", 8):
        found = cluster_scalars(x, clusters, w, zero=zero)
    least = brute_force(x.numpy(), clusters, None if w is None else w.numpy(), zero)
    assert float(found.error) >= least * (1 - 1e-9) - slack(x)
    assert float(found.error - found.bound) <= least * (1 + 1e-12) + 1e-30
    assert_a_clustering(x, clusters, found, w)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.slow
def test_many_float32_are_close_to_the_least_and_say_how_close(zero):
    x = torch.randn(90_000, generator=torch.Generator().manual_seed(0))
    x[:50] *= 20
    for weights in (None, torch.rand(90_000, generator=torch.Generator().manual_seed(1))):
        found = cluster_scalars(x, 16, weights, zero=zero)
        assert 0 < float(found.bound) < 1e-4 * float(found.error)
        assert_a_clustering(x, 16, found, weights)
        assert_means(x, found, weights, zero)
        with patch.object(kmeans, "MOST_BINS", 2**17):
            least = cluster_scalars(x, 16, weights, zero=zero)
        assert float(found.error - found.bound) <= float(least.error) <= float(found.error) * (1 + 1e-9)


@pytest.mark.parametrize("clusters", [2, 8, 16])
def test_never_worse_than_scikit_learn(clusters):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(clusters)) ** 3
    peer = KMeans(clusters, n_init=3, random_state=0).fit(x.numpy().reshape(-1, 1))
    assert float(cluster_scalars(x, clusters).error) <= peer.inertia_ * (1 + 1e-6)


@given(numbers, st.integers(1, 6), st.randoms())
def test_the_order_of_values_does_not_matter(values, clusters, random):
    x = torch.tensor(values)
    order = list(range(len(x)))
    random.shuffle(order)
    straight, shuffled = cluster_scalars(x, clusters), cluster_scalars(x[order], clusters)
    assert torch.equal(straight.centroids, shuffled.centroids)
    assert torch.equal(straight.codes[order], shuffled.codes)


@given(numbers, st.integers(1, 6), st.integers(-20, 20))
def test_a_power_of_two_scales_all(values, clusters, exponent):
    x = torch.tensor(values, dtype=torch.float64)
    plain, scaled = cluster_scalars(x, clusters), cluster_scalars(x * 2.0**exponent, clusters)
    assert torch.equal(plain.centroids * 2.0**exponent, scaled.centroids)
    assert torch.equal(plain.codes, scaled.codes)


@pytest.mark.parametrize("start", ["optimal", "linear", "density"])
def test_shifted_and_mirrored_values_cluster_alike(start):
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain = cluster_scalars(x, 9, start=start)
    far = cluster_scalars(x + 1000, 9, start=start)
    assert torch.allclose(far.centroids - 1000, plain.centroids, atol=1e-9)
    assert float(far.error) == pytest.approx(float(plain.error), rel=1e-9)
    assert float(cluster_scalars(-x, 9).error) == pytest.approx(float(cluster_scalars(x, 9).error), rel=1e-12)


@given(st.lists(st.tuples(reals, st.integers(0, 4)), min_size=1, max_size=20), st.integers(1, 6), st.booleans())
def test_whole_weights_are_repetitions(pairs, clusters, zero):
    x, times = (torch.tensor(each, dtype=torch.float64) for each in zip(*pairs, strict=True))
    if not times.any():
        return
    weighted = cluster_scalars(x, clusters, times, zero=zero)
    repeated = cluster_scalars(x.repeat_interleave(times.long()), clusters, zero=zero)
    assert float(weighted.error) == pytest.approx(float(repeated.error), rel=1e-9, abs=slack(x))


def test_weights_that_are_all_zero_count_as_one():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for cluster in (cluster_scalars, cluster_rows):
        plain, none = cluster(x, 4), cluster(x, 4, torch.zeros_like(x))
        assert torch.allclose(plain.centroids, none.centroids)
        assert torch.equal(plain.codes, none.codes)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_few_distinct_values_are_all_kept(start, dtype):
    x = torch.tensor([[3.0, -1.0, 3.0], [0.25, 0.25, -1.0]], dtype=dtype)
    for clusters in (3, 4, 300):
        found = cluster_scalars(x, clusters, start=start)
        assert found.centroids.tolist() == [-1.0, 0.25, 3.0]
        assert found.codes.tolist() == [[2, 0, 2], [1, 1, 0]]
        assert float(found.error) == float(found.bound) == 0.0
    zero = cluster_scalars(x, 4, start=start, zero=True)
    assert zero.centroids.tolist() == [-1.0, 0.0, 0.25, 3.0]
    constant = cluster_scalars(torch.full((5,), 0.1, dtype=dtype), 16, start=start)
    assert constant.centroids.double().tolist() == [float(torch.tensor(0.1, dtype=dtype))]
    assert constant.codes.tolist() == [0] * 5


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("clusters", [1, 2, 5, 16])
@pytest.mark.parametrize("shift", [0.0, 1.0, -10.0])
def test_one_centroid_is_exactly_zero(start, clusters, shift):
    x = torch.randn(300, generator=torch.Generator().manual_seed(clusters)) + shift
    for values in (x, x.bfloat16()):
        found = cluster_scalars(values, clusters, start=start, zero=True)
        assert int((found.centroids == 0).sum()) == 1
        assert_a_clustering(values, clusters, found)
        assert_means(values, found, zero=True)
    rows = cluster_rows(x.reshape(3, 100), clusters, start=start, zero=True)
    assert bool((rows.centroids == 0).any(1).all())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("clusters", [1, 4, 33, 300])
def test_every_start_ends_in_cells_and_their_means(start, clusters):
    x = torch.randn(2000, generator=torch.Generator().manual_seed(5)) ** 3
    w = torch.rand(2000, generator=torch.Generator().manual_seed(6))
    for weights in (None, w):
        found = cluster_scalars(x, clusters, weights, start=start)
        assert len(found.centroids) == clusters
        assert_a_clustering(x, clusters, found, weights)
        assert_means(x, found, weights)
        best = cluster_scalars(x, clusters, weights)
        assert float(found.error) >= float(best.error) * (1 - 1e-6)


@given(st.sampled_from(["linear", "density", "random", "k-means++"]), st.integers(1, 12), st.booleans(), st.booleans())
def test_lloyd_never_adds_error(start, clusters, zero, weighted):
    random = np.random.default_rng(clusters)
    # A few far values leave most cells of a linear start empty.
    x = np.concatenate([random.standard_normal((2, 60)), 100 * random.standard_normal((2, 2))], 1)
    lines = lines_from_rows(x, random.random(x.shape) if weighted else None)
    centroids = other_start(lines, clusters, start, torch.Generator().manual_seed(0))
    if zero:
        centroids[:, np.abs(centroids).argmin(1)] = 0.0
        centroids.sort(axis=1)
    error = lines.error(lines.cuts(centroids), centroids)
    for _ in range(12):
        centroids = lloyd(lines, centroids, zero, iterations=1)
        follow = lines.error(lines.cuts(centroids), centroids)
        assert (follow <= error * (1 + 1e-9)).all()
        error = follow


def test_starts_are_what_they_are_called():
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 1000))
    lines = lines_from_rows(x, None)
    generator = torch.Generator().manual_seed(0)
    linear = other_start(lines, 7, "linear", generator)
    assert np.array_equal(linear[:, 0], x.min(1))
    assert np.array_equal(linear[:, -1], x.max(1))
    assert np.allclose(np.diff(linear, 2), 0)
    density = other_start(lines, 10, "density", generator)
    assert (np.abs((x[:, None] <= density[:, :, None]).mean(2) - (np.arange(10) + 0.5) / 10) <= 2e-3).all()
    for start in ("random", "k-means++"):
        drawn = other_start(lines, 10, start, generator)
        assert all(np.isin(drawn[row], x[row]).all() and len(set(drawn[row])) == 10 for row in range(3))
        again = other_start(lines, 10, start, generator)
        assert not np.array_equal(drawn, again)


def test_draws_follow_weights_and_distances():
    # All weight on two far points: nothing else can be drawn.
    x, weight = np.arange(50.0)[None], np.zeros((1, 50))
    weight[0, [3, 40]] = 1.0
    lines = lines_from_rows(x, weight)
    for seed in range(5):
        for start in ("random", "k-means++"):
            assert other_start(lines, 2, start, torch.Generator().manual_seed(seed)).tolist() == [[3.0, 40.0]]


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_the_same_generator_gives_the_same_and_the_global_one_is_left_alone(start):
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    first, second, other = (
        cluster_scalars(x, 40, start=start, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.centroids, second.centroids)
    assert not torch.equal(first.centroids, other.centroids)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("start", ["optimal", "linear", "density"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clusters", [1, 6, 70])
def test_rows_are_clustered_as_if_alone(start, zero, weighted, clusters):
    generator = torch.Generator().manual_seed(clusters)
    rows = torch.randn(7, 120, generator=generator)
    rows[1] = rows[1].round()
    rows[2] = 0.3
    rows[3] = rows[3].abs()
    rows[4, :60] = rows[4, 60:]
    weights = torch.rand(7, 120, generator=generator) if weighted else None
    together = cluster_rows(rows, clusters, weights, start=start, zero=zero)
    assert together.centroids.shape == (7, clusters)
    assert torch.allclose(squares(rows, together, weights), together.error, rtol=1e-9, atol=0)
    for row in range(7):
        alone = cluster_scalars(rows[row], clusters, None if weights is None else weights[row], start=start, zero=zero)
        found = len(alone.centroids)
        assert torch.allclose(together.centroids[row, :found], alone.centroids, rtol=1e-5, atol=1e-6)
        assert bool((together.centroids[row, found:] == together.centroids[row, found - 1]).all())
        assert int(together.codes[row].max()) < found
        assert float(together.error[row]) == pytest.approx(float(alone.error), rel=1e-5, abs=1e-12)


def test_rows_do_not_depend_on_how_many_are_done_at_once():
    rows = torch.randn(9, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = cluster_rows(rows, 5)
    with patch.object(kmeans, "ROW_ATOMS", 400):
        parts = cluster_rows(rows, 5)
    assert torch.equal(whole.centroids, parts.centroids)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.error, parts.error)


@pytest.mark.parametrize("zero", [False, True])
def test_the_bound_of_long_rows_holds(zero):
    rows = torch.randn(4, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    exact = cluster_rows(rows, 6, zero=zero)
    with patch.object(kmeans, "ROW_BINS", 64):
        binned = cluster_rows(rows, 6, zero=zero)
    assert bool((binned.bound > exact.bound).all())
    assert bool((binned.error >= exact.error * (1 - 1e-12)).all())
    assert bool((binned.error - binned.bound <= exact.error).all())


# Sixteenths: their midpoints and distances are exact, so that a tie is one.
@given(st.lists(st.integers(-40, 40).map(lambda i: i / 16), min_size=1, max_size=12, unique=True), numbers)
def test_codes_name_the_nearest_centroid_and_the_lower_of_two(centroids, values):
    c = torch.tensor(sorted(centroids), dtype=torch.float64)
    x = torch.cat([torch.tensor(values, dtype=torch.float64), (c[1:] + c[:-1]) / 2, c])
    distances = (x.unsqueeze(1) - c).abs()
    codes = assign_scalars(x, c)
    chosen = distances.gather(1, codes.long().unsqueeze(1)).squeeze(1)
    assert bool((chosen <= distances.amin(1) * (1 + 1e-15)).all())
    middle = codes[len(values) : len(values) + len(c) - 1]
    assert middle.tolist() == list(range(len(c) - 1))


@pytest.mark.parametrize("clusters", [16, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ways_to_assign_agree(clusters, dtype):
    generator = torch.Generator().manual_seed(clusters)
    x = torch.randn(2, 45_000, generator=generator).to(dtype)
    c = torch.randn(clusters, generator=generator).sort().values
    codes = assign_scalars(x, c)
    expected = torch.bucketize(x.double(), (c.double()[1:] + c.double()[:-1]) / 2)
    assert codes.dtype == (torch.uint8 if clusters <= 256 else torch.int16)
    assert torch.equal(codes.long(), expected)
    each = torch.stack([c, c * 2])
    both = assign_scalars(x, each)
    assert torch.equal(both[0].long(), expected[0])
    assert torch.equal(both[1], assign_scalars(x[1], each[1]))


def test_float32_values_are_held_against_the_true_midpoint():
    # The midpoint of neighbours in float32 is no float32 number: rounded to nearest it would be the upper one.
    low = torch.tensor(1 + 2**-23)
    c = torch.stack([low, torch.nextafter(low, torch.tensor(2.0))])
    assert assign_scalars(c, c).tolist() == [0, 1]


def test_cells_part_at_midpoints_which_belong_to_the_lower():
    lines = lines_from_rows(np.array([[3.0, 0.0, 2.0, 1.0, 1.0]]), None)
    assert lines.cuts(np.array([[0.0, 2.0, 4.0]])).tolist() == [[0, 3, 5, 5]]
    assert lines.cuts(np.array([[0.0, 2.0, 2.0]])).tolist() == [[0, 3, 5, 5]]


def test_copies_of_the_last_centroid_are_never_chosen():
    x = torch.tensor([[-1.0, 2.0, 5.0]])
    assert assign_scalars(x, torch.tensor([[0.0, 2.0, 2.0, 2.0]])).tolist() == [[0, 1, 1]]


def test_recentred_centroids_are_weighted_means():
    x = torch.tensor([[1.0, 2.0, 6.0], [4.0, 5.0, 9.0]])
    w = torch.tensor([[1.0, 3.0, 1.0], [0.0, 0.0, 4.0]])
    codes = torch.tensor([[0, 0, 2], [1, 1, 0]], dtype=torch.uint8)
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    assert recentre(x, codes, old).tolist() == [4.0, 4.5, 6.0, -4.0]
    assert recentre(x, codes, old, w).tolist() == [5.375, -2.0, 6.0, -4.0]
    rows = recentre(x, codes, torch.stack([old, 10 * old]), w)
    assert rows.tolist() == [[1.75, -2.0, 6.0, -4.0], [9.0, -20.0, -30.0, -40.0]]


def test_a_clustering_is_a_fixed_point():
    x = torch.randn(3, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = cluster_rows(x, 8)
    assert torch.equal(assign_scalars(x, found.centroids), found.codes)
    assert torch.allclose(recentre(x, found.codes, found.centroids), found.centroids, rtol=1e-12)


def test_values_and_weights_are_left_as_they_are():
    x, w = torch.randn(4, 60), torch.rand(4, 60)
    before = x.clone(), w.clone()
    for start in STARTS:
        cluster_scalars(x, 5, w, start=start, zero=True)
        cluster_rows(x, 5, w, start=start, zero=True)
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.parametrize("cluster", [cluster_scalars, cluster_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_clustered_is_refused(cluster, dtype):
    x = torch.ones(2, 3, dtype=dtype)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[1, 1] = bad
        with pytest.raises(ValueError, match="finite"):
            cluster(broken, 2)
    with pytest.raises(ValueError, match="no values"):
        cluster(torch.empty(0, 3, dtype=dtype), 2)
    with pytest.raises(ValueError, match="clusters"):
        cluster(x, 0)
    for weights in (-torch.ones(2, 3), torch.full((2, 3), torch.nan), torch.ones(3)):
        with pytest.raises(ValueError, match="weights"):
            cluster(x, 2, weights)


def test_bins_share_weight_and_width():
    points = np.random.default_rng(0).standard_normal((2, 20_000)) ** 3
    lines = lines_from_rows(points, None)
    cuts = kmeans_lines.edges(lines, 1024)
    assert cuts.shape[1] <= 1025
    assert (cuts[:, 0] == 0).all()
    assert (cuts[:, -1] == 20_000).all()
    assert (np.diff(cuts, axis=1) >= 0).all()
    even = np.broadcast_to(np.linspace(0, 20_000, 1025).astype(np.intp), (2, 1025))
    assert (kmeans_lines.bin_slack(lines, cuts, False) < 0.05 * kmeans_lines.bin_slack(lines, even, False)).all()
