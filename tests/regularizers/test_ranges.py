"""What is true of the regularizers of range, tail and shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompress.registry.regularizers import DsmmConfig, KurtosisConfig, L2Config, LinfConfig, MarginConfig
from qcompress.regularizers.dsmm import Dsmm
from qcompress.regularizers.kurtosis import Kurtosis
from qcompress.regularizers.l2 import L2
from qcompress.regularizers.linf import Linf
from qcompress.regularizers.margin import Margin


def gaussian(count: int = 4608, deviation: float = 0.05, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * deviation


def soft(weight: Tensor, alpha: float) -> tuple[float, Tensor]:
    """The soft range, without exp(-alpha), and its gradient."""
    penalty = Dsmm(DsmmConfig(alpha=alpha), weight)
    gradient = torch.zeros_like(weight)
    found = penalty.accumulate(weight, gradient, 1.0)
    return float(found.value) - math.exp(-alpha), gradient


@given(st.floats(0.01, 300), st.integers(2, 60), st.integers(0, 1000))
def test_soft_range_moves_turns_and_scales_with_the_weights(alpha: float, count: int, seed: int) -> None:
    weight = gaussian(count, 1.0, seed)
    value, gradient = soft(weight, alpha)
    spread = float(weight.max() - weight.min())
    assert -1e-12 <= value <= spread + 1e-12
    assert abs(float(gradient.sum())) < 1e-10 * max(1, alpha)
    assert soft(weight + 3.7, alpha)[0] == pytest.approx(value, abs=1e-9)
    assert soft(-weight, alpha)[0] == pytest.approx(value, abs=1e-11)
    assert soft(weight.flip(0), alpha)[0] == pytest.approx(value, abs=1e-11)
    assert soft(torch.cat((weight, weight)), alpha)[0] == pytest.approx(value, abs=1e-11)
    assert 2.5 * soft(weight, 2.5 * alpha)[0] == pytest.approx(soft(2.5 * weight, alpha)[0], rel=1e-9, abs=1e-11)


@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_gradient_always_shrinks_the_norm(alpha: float, seed: int) -> None:
    """Euler: sum w dL/dw = range + alpha (Var_p + Var_q)."""
    weight = gaussian(40, 1.0, seed)
    value, gradient = soft(weight, alpha)
    p, q = torch.softmax(alpha * weight, 0), torch.softmax(-alpha * weight, 0)
    variances = sum(float((r * weight.square()).sum() - (r * weight).sum().square()) for r in (p, q))
    assert float((weight * gradient).sum()) == pytest.approx(value + alpha * variances, rel=1e-9)


def test_limits_of_the_temperature() -> None:
    weight = gaussian(200, 0.7)
    true = float(weight.max() - weight.min())
    values = [soft(weight, alpha)[0] for alpha in (1e-6, 0.1, 1.0, 3.0, 10.0, 100.0, 1e4)]
    assert values == sorted(values) and values[0] < 1e-5
    sharp, gradient = soft(weight, 1e4)
    assert sharp == pytest.approx(true, abs=1e-9)
    wanted = torch.zeros_like(weight)
    wanted[weight.argmax()], wanted[weight.argmin()] = 1.0, -1.0
    torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=0)


def test_gap_to_the_maximum_is_bounded_by_lambert_w_and_attained() -> None:
    special = pytest.importorskip("scipy.special")
    count, alpha = 1000, 7.0
    bound = float(special.lambertw((count - 1) / math.e).real) / alpha
    for seed in range(5):
        weight = gaussian(count, 1.0, seed)
        p = torch.softmax(alpha * weight, 0)
        assert float(weight.max() - (p * weight).sum()) <= bound
    # The worst case: all equal but one, which stands (W + 1) / alpha above them.
    low = (float(special.lambertw((count - 1) / math.e).real) + 1) / alpha
    worst = torch.zeros(count, dtype=torch.float64)
    worst[0] = low
    value, _ = soft(worst, alpha)
    q = torch.softmax(-alpha * worst, 0)
    assert low - (value + float((q * worst).sum())) == pytest.approx(bound, rel=1e-9)


def test_small_alpha_is_a_variance_penalty() -> None:
    weight = gaussian(100_000)
    assert soft(weight, 1.0)[0] == pytest.approx(2 * float(weight.var(correction=0)), rel=1e-3)


@pytest.mark.parametrize(("deviation", "decay"), [(0.05, 0.0), (0.2, 0.0), (0.005, 1e-2)])
def test_alpha_comes_to_rest_where_theory_puts_it(deviation: float, decay: float) -> None:
    """exp(-alpha) = Var_p + Var_q: -ln(2 s^2) for Gaussian weights, and W(1 / decay) where decay would cap it."""
    special = pytest.importorskip("scipy.special")
    weight = gaussian(20_000, deviation)
    free = -math.log(2 * deviation**2)
    capped = float(special.lambertw(1 / decay).real) if decay else free

    def slope(alpha: float) -> float:
        penalty = Dsmm(DsmmConfig(alpha=alpha), weight)
        return float(penalty.accumulate(weight, None, 1.0).terms["alpha"]) + decay * alpha

    fixed = min(free, capped)
    assert slope(0.97 * fixed) < 0 < slope(1.03 * fixed)


def test_alpha_stays_in_its_bounds() -> None:
    wide = gaussian(5000, 1.0)
    penalty = Dsmm(DsmmConfig(alpha=0.1, alpha_min=0.01), wide)
    for _ in range(200):
        found = penalty.accumulate(wide, None, 1.0)
        with torch.no_grad():
            penalty.alpha -= 0.05 * found.terms["alpha"]
        penalty.settle(wide, found)
    assert float(penalty.alpha) == pytest.approx(0.01)
    with torch.no_grad():
        penalty.alpha.fill_(1e12)
    penalty.settle(wide, found)
    assert float(penalty.alpha) * float(wide.max() - wide.min()) == pytest.approx(1e4, rel=1e-6)


@pytest.mark.parametrize("alpha", [1e2, 1e4, 1e8, 1e30])
def test_any_temperature_is_finite_in_single_precision(alpha: float) -> None:
    weight = gaussian(5000, 1.0)
    wanted = soft(weight, alpha)[1]
    found = soft(weight.float(), alpha)[1]
    assert bool(torch.isfinite(found).all())
    assert float((found.double() - wanted).abs().max()) < 1e-3 * max(1.0, float(wanted.abs().max()))


def test_vector_form_is_the_mean_over_places() -> None:
    weight = gaussian(8 * 12, 1.0).view(8, 12)
    whole = Dsmm(DsmmConfig(alpha=2.0, dim=4), weight).accumulate(weight, None, 1.0).value
    each = [soft(weight[place::4].flatten(), 2.0)[0] for place in range(4)]
    assert float(whole) == pytest.approx(sum(each) / 4 + math.exp(-2.0), rel=1e-12)


def test_vectors_that_are_not_whole_are_left_alone() -> None:
    weight = gaussian(7 * 5, 1.0).view(7, 5)
    gradient = torch.zeros_like(weight)
    Dsmm(DsmmConfig(alpha=2.0, dim=3), weight).accumulate(weight, gradient, 1.0)
    assert not gradient[6].any() and gradient[:6].all()


def test_auto_temperature_follows_the_weight() -> None:
    weight = gaussian(5000, 0.02)
    penalty = Dsmm(DsmmConfig(), weight)
    assert not penalty.terms
    for scale in (1.0, 3.0):
        saved = penalty.saved(scale * weight)["alpha"]
        assert float(saved) == pytest.approx(2 / (scale * float(weight.std(correction=0))), rel=1e-6)


def test_largest_magnitude_has_a_gradient_of_unit_norm_also_where_it_is_shared() -> None:
    weight = torch.tensor([0.5, -2.0, 2.0, 1.0, -2.0])
    gradient = torch.zeros_like(weight)
    found = Linf(LinfConfig(), weight).accumulate(weight, gradient, 1.0)
    assert float(found.value) == 2.0
    torch.testing.assert_close(gradient, torch.tensor([0.0, -1 / 3, 1 / 3, 0.0, -1 / 3]))
    rows = gaussian(60, 1.0).view(6, 10)
    each = torch.zeros_like(rows)
    Linf(LinfConfig(granularity="channel", reduction="sum"), rows).accumulate(rows, each, 1.0)
    torch.testing.assert_close(each.abs().sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("tail", [None, 0.05, 0.3])
def test_the_best_margin_is_the_largest_magnitude_or_the_mean_of_the_tail(tail: float | None) -> None:
    weight = gaussian(200, 1.0)
    penalty = Margin(MarginConfig(tail_fraction=tail), weight)
    values = []
    for limit in torch.linspace(0, 4, 4001, dtype=torch.float64):
        with torch.no_grad():
            penalty.margin.fill_(float(limit))
        values.append(float(penalty.accumulate(weight, None, 1.0).value))
    magnitudes = weight.abs().sort(descending=True).values
    wanted = magnitudes[0] if tail is None else magnitudes[: round(tail * 200)].mean()
    assert min(values) == pytest.approx(float(wanted), abs=2e-3)


def test_margin_starts_at_the_asked_deviations() -> None:
    weight = gaussian(5000, 0.3)
    assert float(Margin(MarginConfig(margin=2.0), weight).margin) == pytest.approx(0.6, rel=0.05)


def test_kurtosis_of_known_distributions() -> None:
    uniform = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    two = torch.tensor([-1.0, 1.0] * 50, dtype=torch.float64)
    cases = ((uniform, 1.8), (gaussian(400_000), 3.0), (two, 1.0))
    for weight, wanted in cases:
        value = float(Kurtosis(KurtosisConfig(target=0.0), weight).accumulate(weight, None, 1.0).value)
        assert math.sqrt(value) == pytest.approx(wanted, rel=0.02)


@given(st.floats(0.01, 50), st.integers(0, 1000))
def test_kurtosis_does_not_know_scale_or_place(scale: float, seed: int) -> None:
    weight = gaussian(50, 1.0, seed)
    penalty = Kurtosis(KurtosisConfig(), weight)
    gradient = torch.zeros_like(weight)
    value = float(penalty.accumulate(weight, gradient, 1.0).value)
    assert float(penalty.accumulate(scale * weight + 0.3, None, 1.0).value) == pytest.approx(value, rel=1e-6, abs=1e-9)
    bound = 1e-9 * float(gradient.abs().max()) * 50
    assert abs(float(gradient.sum())) < bound and abs(float((weight * gradient).sum())) < bound


def test_l2_is_weight_decay_and_its_proximal_step_the_minimum() -> None:
    weight = gaussian(50, 1.0)
    gradient = torch.zeros_like(weight)
    penalty = L2(L2Config(), weight)
    penalty.accumulate(weight, gradient, 0.3)
    torch.testing.assert_close(gradient, 0.3 * weight)
    moved = weight.clone()
    penalty.shrink(moved, 0.7)
    # The minimum of |x - w|^2 / 2 + rate * |x|^2 / 2.
    torch.testing.assert_close(moved - weight + 0.7 * moved, torch.zeros_like(weight))
