"""Differentiable k-means: the true gradient, its table form, its limits, and how little it keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers.second_order import seeded
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from qcompress.clustering.dkm import (
    SoftKMeans,
    critical_temperature,
    hard_codes,
    relative_temperature,
    share_at,
    soft_cluster,
)
from qcompress.clustering.dkm_table import soft_cluster_table

METRICS = ("squared", "plain")
EXACT = {"rtol": 1e-9, "atol": 1e-11}

Cluster = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def reference(
    weights: Tensor, centroids: Tensor, temperature: float, iterations: int, metric: str = "squared"
) -> tuple[Tensor, Tensor]:
    """All scores at once, left to autograd."""
    for _ in range(iterations):
        gaps = weights.unsqueeze(1) - centroids
        distance = gaps.square().sum(-1) if metric == "squared" else gaps.norm(dim=-1)
        attention = torch.softmax(-distance / temperature, 1)
        centroids = (attention.T @ weights) / attention.sum(0).unsqueeze(1)
    return attention @ centroids, centroids


def all_of(cluster: Cluster, weights: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    """Soft weights, centroids, and the gradients in weights and centroids of a random sum of both."""
    weights, centroids = weights.clone().requires_grad_(), centroids.clone().requires_grad_()
    soft, moved = cluster(weights, centroids)
    upstream = (normal(*soft.shape, seed=8).to(soft.dtype), normal(*moved.shape, seed=9).to(moved.dtype))
    return (soft.detach(), moved.detach(), *torch.autograd.grad([soft, moved], [weights, centroids], upstream))


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or EXACT))


def lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> np.ndarray:
    """Hard k-means, point by point; a centroid without points stays."""
    for _ in range(iterations):
        members: list[list[np.ndarray]] = [[] for _ in centroids]
        for point in points:
            members[int(np.argmin([np.sum((point - one) ** 2) for one in centroids]))].append(point)
        pairs = zip(members, centroids, strict=True)
        centroids = np.array([np.mean(own, axis=0) if own else one for own, one in pairs])
    return centroids


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_the_gradient_is_the_true_one(dim: int, metric: Any, iterations: int) -> None:
    weights, centroids = normal(9, dim).requires_grad_(), normal(3, dim, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, c: soft_cluster(w, c, 0.6, iterations, metric, rows=4), (weights, centroids)
    )


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.02, 0.5, 50.0])
def test_it_equals_plain_autograd(dim: int, metric: Any, iterations: int, temperature: float) -> None:
    weights, centroids = normal(500, dim), normal(8, dim, seed=1)
    setting = (temperature, iterations, metric)
    expected = all_of(lambda w, c: reference(w, c, *setting), weights, centroids)
    assert_same(all_of(lambda w, c: soft_cluster(w, c, *setting), weights, centroids), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_change_nothing(metric: Any) -> None:
    weights, centroids = normal(100, 2), normal(5, 2, seed=1)
    whole = all_of(lambda w, c: soft_cluster(w, c, 0.3, 3, metric), weights, centroids)
    for rows in (1, 7, 99, 100, 1000):
        assert_same(
            all_of(lambda w, c, rows=rows: soft_cluster(w, c, 0.3, 3, metric, rows=rows), weights, centroids), whole
        )


@pytest.mark.parametrize("levels", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_table_form_equals_plain_autograd(levels: torch.dtype, metric: Any, iterations: int) -> None:
    weights = (normal(3000, 1) * 0.1).to(levels).double()
    weights[:2] = torch.tensor([[0.0], [-0.0]])
    weights[2:400] = weights[400:798].flip(0)
    centroids = torch.linspace(-0.2, 0.25, 8, dtype=torch.float64).unsqueeze(1)
    setting = (0.004 if metric == "squared" else 0.05, iterations, metric)
    expected = all_of(lambda w, c: reference(w, c, *setting), weights, centroids)
    assert_same(all_of(lambda w, c: soft_cluster_table(w, c, *setting, levels=levels), weights, centroids), expected)
    assert_same(all_of(lambda w, c: soft_cluster(w, c, *setting), weights, centroids), expected)


def test_the_table_form_spans_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, centroids = normal(1000, 1).bfloat16().double(), normal(4, 1, seed=1)
    whole = all_of(lambda w, c: soft_cluster_table(w, c, 0.2, 2), weights, centroids)
    monkeypatch.setattr("qcompress.clustering.dkm_table.CHUNK_WEIGHTS", 37)
    monkeypatch.setattr("qcompress.clustering.dkm.CHUNK_SCORES", 4)
    monkeypatch.setattr("qcompress.clustering.dkm.FEWEST_ROWS", 11)
    assert_same(all_of(lambda w, c: soft_cluster_table(w, c, 0.2, 2), weights, centroids), whole)


@pytest.mark.parametrize("levels", [torch.bfloat16, torch.float16])
def test_the_table_form_takes_the_gradient_straight_through_the_rounding(levels: torch.dtype) -> None:
    weights, centroids = normal(800, 1), normal(6, 1, seed=1)
    found = all_of(lambda w, c: soft_cluster_table(w, c, 0.1, 2, levels=levels), weights, centroids)
    assert_same(found, all_of(lambda w, c: reference(w, c, 0.1, 2), weights.to(levels).double(), centroids))
    single = all_of(lambda w, c: soft_cluster_table(w, c, 0.1, 2, levels=levels), weights.float(), centroids.float())
    assert [one.dtype for one in single] == [torch.float32] * 4
    assert_same(tuple(one.double() for one in single), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_keep_their_dtype(dtype: torch.dtype) -> None:
    """Their own values are the table, whatever `levels` says; results are the exact ones, rounded."""
    weights, centroids = normal(200, 1).to(dtype), normal(4, 1, seed=1).float()
    expected = reference(weights.double(), centroids.double(), 0.3, 2)
    for cluster in (soft_cluster, soft_cluster_table):
        found = all_of(lambda w, c, cluster=cluster: cluster(w, c, 0.3, 2), weights, centroids)
        assert [one.dtype for one in found] == [dtype, torch.float32, dtype, torch.float32]
        torch.testing.assert_close(found[0].double(), expected[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 4])
def test_single_precision_loses_little_over_many_points(dim: int) -> None:
    """Sums over all points are as good as those over a few."""
    weights, centroids = normal(1 << 16, dim, dtype=torch.float32), normal(8, dim, seed=1, dtype=torch.float32)
    exact = all_of(lambda w, c: soft_cluster(w, c, 0.1, 3), weights.double(), centroids.double())
    found = all_of(lambda w, c: soft_cluster(w, c, 0.1, 3, rows=512), weights, centroids)
    for one, other in zip(found, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 5e-6


@pytest.mark.parametrize("dim", [1, 2])
def test_at_no_temperature_it_is_hard_k_means(dim: int) -> None:
    weights, centroids = normal(300, dim), normal(8, dim, seed=1)
    for iterations in (1, 3):
        expected = lloyd(weights.numpy(), centroids.numpy(), iterations)
        gaps = []
        for temperature in (1e-1, 1e-3, 1e-9):
            soft, moved = soft_cluster(weights, centroids, temperature, iterations)
            gaps.append(float((moved - torch.from_numpy(expected)).abs().max()))
        assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-12
        before = torch.from_numpy(lloyd(weights.numpy(), centroids.numpy(), iterations - 1))
        torch.testing.assert_close(soft, moved[hard_codes(weights, before)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
def test_as_many_centroids_as_values_reproduce_the_weights(cluster: Any) -> None:
    values = torch.cat([normal(30, 1).bfloat16().double(), torch.tensor([[0.0], [1e-30], [-3e4], [7e4]]).bfloat16()])
    weights = values[torch.randint(len(values), (500,), generator=seeded(3))]
    soft, moved = cluster(weights, torch.unique(weights).unsqueeze(1), 1e-12, 2)
    torch.testing.assert_close(soft, weights, rtol=1e-14, atol=1e-25)
    torch.testing.assert_close(moved.squeeze(1), torch.unique(weights), rtol=1e-14, atol=1e-25)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_centroids_meet_above_the_critical_temperature_and_part_below(dim: int, metric: Any) -> None:
    points = normal(1000, dim) * torch.tensor([1.0, 0.6, 0.3])[:dim] + 3
    critical = critical_temperature(points, metric)
    start = points.mean(0) + 1e-3 * normal(4, dim, seed=1)
    for factor, meets in ((1.1, True), (0.9, False)):
        _, moved = soft_cluster(points, start, factor * critical, 150, metric)
        spread = float((moved - moved.mean(0)).norm())
        assert spread < 1e-8 if meets else spread > 0.1
        _, table = soft_cluster(points, normal(4, dim, seed=2) + 3, factor * critical, 300, metric)
        assert (float((table - points.mean(0)).norm()) < 1e-6) is meets


def test_critical_temperatures_in_one_dimension() -> None:
    points = normal(100_000, 1) * 0.3 + 5
    assert critical_temperature(points) == pytest.approx(2 * float(points.var(correction=0)), rel=1e-12)
    expected = float((points - points.mean()).abs().mean())
    assert critical_temperature(points, "plain") == pytest.approx(expected, rel=1e-12)
    assert critical_temperature(torch.full((7, 1), 2.5)) == critical_temperature(torch.full((7, 2), 2.5), "plain") == 0


def test_two_centroids_make_a_hyperbolic_tangent() -> None:
    half = normal(500, 1).abs()
    step = 1e-5
    weights = torch.cat([half, -half, torch.tensor([[step], [-step]])])
    temperature = 0.8
    _, centroids = soft_cluster(weights, torch.tensor([[-1.0], [1.0]], dtype=torch.float64), temperature, 200)
    gap = float(centroids[1] - centroids[0])
    soft, _ = soft_cluster(weights, centroids, temperature, 1)
    torch.testing.assert_close(soft, gap / 2 * torch.tanh(gap * weights / temperature), rtol=1e-9, atol=1e-9)
    slope = float(soft[-2] - soft[-1]) / (2 * step)
    assert slope == pytest.approx(gap**2 / (2 * temperature), rel=1e-6)
    assert slope == pytest.approx(0.5 * temperature**-1 * relative_temperature(centroids, 1.0), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    dim=st.integers(1, 3),
    shift=st.floats(-10, 10),
    log_scale=st.integers(-12, 12),
    metric=st.sampled_from(METRICS),
)
def test_it_moves_with_its_points(seed: int, dim: int, shift: float, log_scale: int, metric: Any) -> None:
    weights, centroids, scale = normal(40, dim, seed=seed), normal(5, dim, seed=seed + 1), 2.0**log_scale
    soft, moved = soft_cluster(weights, centroids, 0.4, 2, metric)
    order = torch.randperm(40, generator=seeded(seed))
    relabelled = torch.randperm(5, generator=seeded(seed))
    temperature = 0.4 * (scale**2 if metric == "squared" else scale)
    other, others = soft_cluster(
        scale * (weights[order] + shift), scale * (centroids[relabelled] + shift), temperature, 2, metric
    )
    torch.testing.assert_close(other / scale - shift, soft[order], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(others / scale - shift, moved[relabelled], rtol=1e-7, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    log_temperature=st.floats(-300, 30),
    metric=st.sampled_from(METRICS),
    dim=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_attention_is_a_mean_at_any_temperature(log_temperature: float, metric: Any, dim: int, dtype: Any) -> None:
    weights, centroids = normal(30, dim, dtype=dtype), 1e3 * normal(6, dim, seed=1, dtype=dtype)
    problem = SoftKMeans(weights, None, 10.0**log_temperature, metric)
    attention, _ = problem.attend(weights.T, centroids)
    eps = torch.finfo(dtype).eps
    assert bool((attention >= 0).all())
    torch.testing.assert_close(attention.sum(0), torch.ones(30, dtype=dtype), rtol=8 * eps, atol=0)
    found = all_of(lambda w, c: soft_cluster(w, c, 10.0**log_temperature, 2, metric), weights, centroids)
    assert all(bool(one.isfinite().all()) for one in found[:2])
    soft, moved = found[:2]
    room = 8 * eps * moved.abs().max()
    assert bool((soft <= moved.amax(0) + room).all() and (soft >= moved.amin(0) - room).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
def test_a_centroid_that_no_point_attends_to_stays(cluster: Any, dtype: torch.dtype) -> None:
    weights = (normal(50, 1) * 0.1).to(dtype)
    centroids = torch.tensor([[-0.1], [0.1], [1e3]], dtype=dtype)
    soft, moved, in_weights, in_centroids = all_of(lambda w, c: cluster(w, c, 1e-3, 3), weights, centroids)
    assert float(moved[2]) == 1e3
    assert float(in_centroids[2]) == float(normal(3, 1, seed=9)[2].to(dtype)), "its gradient passes as it came"
    alone = cluster(weights, centroids[:2], 1e-3, 3)
    torch.testing.assert_close(soft, alone[0])
    torch.testing.assert_close(moved[:2], alone[1])
    assert bool(in_weights.isfinite().all() and in_centroids.isfinite().all())


def test_a_point_on_a_centroid_has_a_finite_gradient() -> None:
    weights, centroids = torch.tensor([[0.0], [1.0], [0.3]]), torch.tensor([[0.0], [1.0]])
    expected = all_of(lambda w, c: reference(w, c, 0.5, 1, "plain"), weights, centroids)
    assert_same(
        all_of(lambda w, c: soft_cluster(w, c, 0.5, 1, "plain"), weights, centroids), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
def test_it_stops_where_the_centroids_do(cluster: Any) -> None:
    weights, centroids = normal(200, 1).bfloat16().double(), normal(4, 1, seed=1)
    steps = [cluster(weights, centroids, 0.2, count)[1] for count in range(1, 31)]
    moves = [float((one - other).abs().max()) for one, other in zip(steps, [centroids, *steps], strict=False)]
    tolerance = moves[7] * (1 + 1e-6)
    stop = next(index for index, move in enumerate(moves) if move < tolerance)
    found = all_of(lambda w, c: cluster(w, c, 0.2, 30, tolerance=tolerance), weights, centroids)
    assert_same(found, all_of(lambda w, c: cluster(w, c, 0.2, stop + 1), weights, centroids))


@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
def test_centroids_at_rest_still_have_all_their_iterations(cluster: Any) -> None:
    """Merged centroids do not move, but a push on one of them grows by 2 Var / temperature in each iteration."""
    weights, merged = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    assert torch.equal(cluster(weights, merged, 1.5, 1)[1], merged)
    found = all_of(lambda w, c: cluster(w, c, 1.5, 3), weights, merged)
    assert_same(found, all_of(lambda w, c: reference(w, c, 1.5, 3), weights, merged))


@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
def test_either_result_may_go_unused(cluster: Any) -> None:
    weights, centroids = normal(60, 1).bfloat16().double(), normal(4, 1, seed=1)
    for used in (0, 1):
        grads = []
        for one in (cluster, reference):
            w, c = weights.clone().requires_grad_(), centroids.clone().requires_grad_()
            grads.append(torch.autograd.grad(one(w, c, 0.2, 2)[used].square().sum(), [w, c]))
        torch.testing.assert_close(grads[0], grads[1], **EXACT)
    w = weights.clone().requires_grad_()
    cluster(w, centroids, 0.2, 2)[0].square().sum().backward()
    expected = torch.autograd.grad(reference(w, centroids, 0.2, 2)[0].square().sum(), w)[0]
    torch.testing.assert_close(w.grad, expected, **EXACT)


@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
def test_inputs_are_left_alone_and_may_be_views(cluster: Any) -> None:
    wide, centroids = normal(60, 3).bfloat16().double(), normal(4, 1, seed=1)
    copies = wide.clone(), centroids.clone()
    found = all_of(lambda w, c: cluster(w[:, 1:2], c, 0.2, 2), wide, centroids)
    assert torch.equal(wide, copies[0]) and torch.equal(centroids, copies[1])
    assert_same(found, all_of(lambda w, c: reference(w[:, 1:2], c, 0.2, 2), wide, centroids))


@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
def test_autocast_changes_nothing(cluster: Any) -> None:
    weights, centroids = normal(300, 1, dtype=torch.float32), normal(4, 1, seed=1, dtype=torch.float32)
    expected = all_of(lambda w, c: cluster(w, c, 0.2, 2), weights, centroids)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(all_of(lambda w, c: cluster(w, c, 0.2, 2), weights, centroids), expected, rtol=0, atol=0)


class LargeStorages(TorchDispatchMode):
    """Where storages above a size have been seen; what is freed and taken again counts once."""

    def __init__(self, least_bytes: int) -> None:
        super().__init__()
        self.least_bytes = least_bytes
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else [result]:
            if isinstance(one, Tensor) and one.untyped_storage().nbytes() >= self.least_bytes:
                self.seen.add(one.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
@pytest.mark.slow
def test_it_keeps_the_weights_only_and_never_all_scores(cluster: Any) -> None:
    count, clusters = 1 << 21, 16
    half = count * 4 // 2
    weights = normal(count, 1, dtype=torch.float32).requires_grad_()
    centroids = torch.linspace(-3, 3, clusters).unsqueeze(1).requires_grad_()
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        with LargeStorages(half) as forward:
            soft, _ = cluster(weights, centroids, 0.1, 3)
        assert sum(one.data_ptr() == weights.data_ptr() for one in saved) == 1
        others = [one for one in saved if one.data_ptr() != weights.data_ptr()]
        assert sum(one.numel() * one.element_size() for one in others) < 0.02 * count * 4
    upstream = torch.ones_like(soft)
    with LargeStorages(half) as backward:
        soft.backward(upstream)
    assert weights.grad is not None
    known = {one.untyped_storage().data_ptr() for one in (weights, soft, upstream)}
    assert forward.seen - known == set(), "beyond its result"
    assert backward.seen - known == {weights.grad.untyped_storage().data_ptr()}, "beyond the gradient"


def test_relative_temperatures_follow_the_gaps() -> None:
    even = torch.tensor([[3.0], [1.0], [-1.0], [-3.0]])
    assert relative_temperature(even, 0.5) == pytest.approx(2.0)
    assert relative_temperature(even, 0.5, "plain") == pytest.approx(1.0)
    assert relative_temperature(10 * even, 0.02) == pytest.approx(100 * relative_temperature(even, 0.02))
    square = torch.tensor([[0.0, 0.0], [0.0, 3.0], [3.0, 0.0], [3.0, 3.0]])
    assert relative_temperature(square, 1.0) == pytest.approx(9.0)
    for degenerate in (torch.zeros(1, 1), torch.ones(4, 1), torch.ones(4, 2)):
        temperature = relative_temperature(degenerate, 0.5)
        assert temperature > 0
        soft, moved = soft_cluster(torch.ones(5, degenerate.shape[1]), degenerate, temperature, 2)
        assert bool((soft == 1).all() and (moved == 1).all())


def test_the_temperature_falls_by_equal_factors() -> None:
    shares = [share_at(step / 10) for step in range(11)]
    assert shares[0] == 0.5 and shares[-1] == pytest.approx(0.02)
    factors = [after / before for before, after in itertools.pairwise(shares)]
    assert factors == pytest.approx([math.prod(factors) ** 0.1] * 10) and factors[0] < 1
    assert share_at(-1) == 0.5 and share_at(2) == pytest.approx(0.02)


@pytest.mark.parametrize("dim", [1, 3])
def test_hard_codes_are_nearest(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompress.clustering.dkm.CHUNK_POINTS", 64)
    points, centroids = normal(200, dim, dtype=torch.float32), normal(9, dim, seed=1, dtype=torch.float32)
    codes = hard_codes(points, centroids)
    assert codes.dtype == torch.int64
    for point, code in zip(points.double().numpy(), codes.tolist(), strict=True):
        assert code == int(np.argmin(((point - centroids.double().numpy()) ** 2).sum(1)))


def test_hard_codes_break_ties_to_the_lower_and_use_one_of_equal_centroids() -> None:
    centroids = torch.tensor([[2.0], [0.0], [2.0], [1.0]])
    points = torch.tensor([[0.5], [1.5], [1.75], [2.0], [9.0], [-9.0]])
    assert hard_codes(points, centroids).tolist() == [1, 3, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("points", "centroids", "temperature", "iterations"),
    [
        ((4,), (2, 1), 1.0, 1),
        ((4, 2), (2, 1), 1.0, 1),
        ((4, 1), (0, 1), 1.0, 1),
        ((4, 1), (2, 1), 0.0, 1),
        ((4, 1), (2, 1), math.nan, 1),
        ((4, 1), (2, 1), math.inf, 1),
        ((4, 1), (2, 1), 1.0, 0),
    ],
)
@pytest.mark.parametrize("cluster", [soft_cluster, soft_cluster_table])
def test_what_cannot_be_clustered(
    cluster: Any, points: tuple[int, ...], centroids: tuple[int, ...], temperature: float, iterations: int
) -> None:
    with pytest.raises(ValueError, match=r"points|temperature|iterations"):
        cluster(torch.zeros(points), torch.zeros(centroids), temperature, iterations)


def test_the_table_form_takes_single_numbers_on_16_bits() -> None:
    with pytest.raises(ValueError, match="one number each"):
        soft_cluster_table(torch.zeros(4, 2), torch.zeros(2, 2), 1.0, 1)
    with pytest.raises(ValueError, match="one number each"):
        soft_cluster_table(torch.zeros(4, 1), torch.zeros(2, 1), 1.0, 1, levels=torch.float32)
