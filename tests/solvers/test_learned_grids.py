"""Trained grids: what goes forward, and the gradients of the papers, against slow ones in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompress.calibration.activations import quantize_activation
from qcompress.coding.grids import exponent_for, from_half, round_scale
from qcompress.solvers.learned_grids import (
    gradient_share,
    inputs_below_clip,
    inputs_on_steps,
    least_error_step,
    least_scale,
    nearest_middle,
    span_scale,
    squash,
    step_start,
    weights_on_steps,
)
from qcompress.types.encoded import ActivationGrid


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def straight(value: Tensor) -> Tensor:
    """Rounded forward, the identity backward."""
    return value + (value.round() - value).detach()


def clip_then_round(v: Tensor, s: Tensor, low: int, high: int) -> Tensor:
    """LSQ's forward pass by autograd: the gradients of this graph are equations 2 and 3."""
    return straight(torch.clamp(v / s, low, high)) * s


def round_then_clip(v: Tensor, s: Tensor, low: int, high: int) -> Tensor:
    """The other order, whose step gradient differs within half a step beyond the last level."""
    return torch.clamp(straight(v / s), low, high) * s


def stored(step: Tensor, exponent: int) -> Tensor:
    return from_half(round_scale(step, exponent), exponent)


def weight_gradients(bits: int, form: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """Ours in float32 and those of a graph in float64: (values, of weights, of steps) each."""
    v, s, slope = random(3, 40), torch.tensor([0.4, 0.9, 0.15]), random(3, 40, seed=1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    s = stored(s, 0)
    ours_v, ours_s = v.clone().requires_grad_(), s.clone().requires_grad_()
    ours = weights_on_steps(ours_v, ours_s, bits, 0)
    ours.backward(slope)
    graph_v, graph_s = v.double().requires_grad_(), s.double().requires_grad_()
    graph = form(graph_v, graph_s.unsqueeze(1), low, high)
    graph.backward(slope.double())
    assert ours_v.grad is not None and ours_s.grad is not None
    assert graph_v.grad is not None and graph_s.grad is not None
    share = 1 / math.sqrt(40 * high)
    return ours, ours_v.grad, ours_s.grad, graph, graph_v.grad, graph_s.grad * share


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_follow_the_formulas_of_lsq(bits: int) -> None:
    ours, of_v, of_s, graph, graph_of_v, graph_of_s = weight_gradients(bits, clip_then_round)
    torch.testing.assert_close(ours.double(), graph)
    torch.testing.assert_close(of_v.double(), graph_of_v)
    torch.testing.assert_close(of_s.double(), graph_of_s, rtol=1e-4, atol=1e-5)


def test_rounding_before_clipping_is_something_else() -> None:
    _, _, of_s, _, _, other = weight_gradients(2, round_then_clip)
    assert float((of_s - other).abs().max()) > 0.01 * float(of_s.abs().max())


@pytest.mark.parametrize(
    ("value", "of_value", "of_step"),
    [(0.3, 1.0, -0.3), (0.7, 1.0, 0.3), (1.0, 0.0, 1.0), (1.2, 0.0, 1.0), (-2.0, 0.0, -2.0), (-1.9, 1.0, -0.1)],
)
def test_one_weight_by_hand(value: float, of_value: float, of_step: float) -> None:
    """Step 1, levels -2, -1, 0, 1: rounded - v within, the last level at the ends and beyond."""
    v, s = torch.tensor([[value]], requires_grad=True), torch.ones(1, requires_grad=True)
    weights_on_steps(v, s, 2, 0).sum().backward()
    assert v.grad is not None and s.grad is not None
    assert v.grad.item() == of_value
    assert s.grad.item() == pytest.approx(of_step, abs=1e-6)


@given(st.integers(2, 8), st.floats(1e-3, 10.0), st.integers(0, 100))
def test_values_lie_on_the_grid_and_stay_there(bits: int, step: float, seed: int) -> None:
    v = random(2, 30, seed=seed)
    exponent = exponent_for(float(v.abs().max()))
    s = torch.tensor([step, step / 3])
    once = weights_on_steps(v, s, bits, exponent)
    levels = once / stored(s, exponent).unsqueeze(1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert float(levels.min()) >= -(2 ** (bits - 1)) - 1e-4 and float(levels.max()) <= 2 ** (bits - 1) - 1 + 1e-4
    assert torch.equal(weights_on_steps(once, s, bits, exponent), once)


@given(st.integers(2, 8), st.sampled_from([0.25, 4.0]), st.integers(0, 100))
def test_gradients_of_scaled_weights_and_steps(bits: int, factor: float, seed: int) -> None:
    """(c v, c s) -> c times the values, and equal gradients of both; a step's are bounded by the ends."""
    v, s = random(1, 64, seed=seed), torch.tensor([0.5])
    found = []
    for c in (1.0, factor):
        one, step = (c * v).requires_grad_(), (c * s).requires_grad_()
        values = weights_on_steps(one, step, bits, 0)
        values.sum().backward()
        assert one.grad is not None and step.grad is not None
        found.append((values.detach() / c, one.grad, step.grad))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    most = 2 ** (bits - 1)
    assert abs(float(found[0][2])) <= 64 * max(most, 0.5) * gradient_share(64, most - 1) * 1.001


@pytest.mark.parametrize(("bits", "zero"), [(1, 0), (2, 0), (2, 2), (4, 0), (4, 5), (8, 128)])
def test_inputs_follow_the_formulas_of_lsq(bits: int, zero: int) -> None:
    x, s, slope = random(4, 5, 6), torch.tensor([0.3]), random(4, 5, 6, seed=1)
    ours_x, ours_s = x.clone().requires_grad_(), s.clone().requires_grad_()
    inputs_on_steps(ours_x, ours_s, zero, bits, 0.125).backward(slope)
    graph_x, graph_s = x.double().requires_grad_(), s.double().requires_grad_()
    clip_then_round(graph_x, graph_s, -zero, 2**bits - 1 - zero).backward(slope.double())
    assert ours_x.grad is not None and ours_s.grad is not None
    assert graph_x.grad is not None and graph_s.grad is not None
    # At the lowest level itself autograd lets the gradient pass: none of these values lies there.
    torch.testing.assert_close(ours_x.grad.double(), graph_x.grad)
    torch.testing.assert_close(ours_s.grad.double(), graph_s.grad * 0.125, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [0, 5])
def test_training_and_the_artifact_quantize_inputs_alike(zero: int) -> None:
    x = random(50, 40)
    for step in (0.1, 0.0123, 0.3333333):
        held = torch.tensor([step])
        grid = ActivationGrid(4, float(held), zero)
        assert torch.equal(inputs_on_steps(x, held, zero, 4, 1.0), quantize_activation(x, grid))
        clip = held * (15 - zero)
        grid = ActivationGrid(4, float(clip / (15 - zero)), zero)
        assert torch.equal(inputs_below_clip(x, clip, zero, 4), quantize_activation(x, grid))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("slope_layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_do_not_depend_on_the_order_in_memory(
    layout: torch.memory_format, slope_layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 3, 5, 7, generator=generator)
    slope = torch.randn(4, 3, 5, 7, generator=generator)
    for function in (lambda x, s: inputs_on_steps(x, s, 2, 2, 0.1), lambda x, s: inputs_below_clip(x, s, 1, 2)):
        found = []
        for values, of_values in ((x, slope), (x.to(memory_format=layout), slope.to(memory_format=slope_layout))):
            values, step = values.detach().requires_grad_(), torch.tensor([0.5], requires_grad=True)
            found.append(torch.autograd.grad(function(values, step), (values, step), of_values))
        torch.testing.assert_close(found[1], found[0])


def test_a_large_sum_keeps_its_digits() -> None:
    """The step's gradient is a difference of two sums: of a million numbers at 8 bits it is right to a thousandth."""
    x, slope = random(1 << 20).abs(), random(1 << 20, seed=1)
    step = torch.tensor([0.02], requires_grad=True)
    values = inputs_on_steps(x, step, 0, 8, 1.0)
    values.backward(slope)
    size = step.detach().double()
    wanted = (slope.double() * torch.where(x < 255 * size, (values.detach() - x.double()) / size, 255.0)).sum()
    assert step.grad is not None
    assert abs(float(step.grad) - float(wanted)) < 1e-3 * float((slope.double().square() / 12).sum().sqrt())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pact_clips_and_gives_the_clip_what_lies_beyond(bits: int) -> None:
    x, slope = 2 * random(6, 50), random(6, 50, seed=1)
    x[0, 0] = 1.5
    inputs, clip = x.clone().requires_grad_(), torch.tensor([1.5], requires_grad=True)
    values = inputs_below_clip(inputs, clip, 0, bits)
    steps = 2**bits - 1
    wanted = (x.clamp(0, 1.5) * steps / 1.5).round() * 1.5 / steps
    torch.testing.assert_close(values.detach(), wanted)
    values.backward(slope)
    assert inputs.grad is not None and clip.grad is not None
    # At the clip itself the gradient is the clip's.
    assert clip.grad.item() == pytest.approx(float(slope[x >= 1.5].sum()), abs=1e-4)
    assert torch.equal(inputs.grad, torch.where((x > 0) & (x < 1.5), slope, 0.0))


def test_a_clip_with_levels_below_zero_moves_both_ends() -> None:
    """Levels -4 to 3 thirds of the clip: numerically, away from every rounding."""
    x, zero = torch.tensor([-9.0, 9.0, 0.4]), 4
    clip = torch.tensor([3.0], requires_grad=True)
    values = inputs_below_clip(x, clip, zero, 3)
    assert values.tolist() == [-4.0, 3.0, 0.0]
    values.backward(torch.tensor([10.0, 1.0, 5.0]))
    assert clip.grad is not None
    assert clip.grad.item() == pytest.approx(1.0 - 10.0 * 4 / 3)


def test_an_unused_clip_has_no_gradient() -> None:
    clip = torch.tensor([100.0], requires_grad=True)
    inputs_below_clip(random(50), clip, 0, 4).sum().backward()
    assert clip.grad is not None and clip.grad.item() == 0.0


def dorefa(blocks: Tensor, bits: int, *, unit: bool) -> Tensor:
    squashed = squash(blocks, bits, unit=unit)
    scale = span_scale(squashed, bits)
    return (nearest_middle(squashed, scale, bits) - (2**bits - 1) / 2) * scale.unsqueeze(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_follow_the_formula_of_dorefa(bits: int) -> None:
    w = random(1, 500)
    bent, steps = w.tanh().double(), 2**bits - 1
    wanted = 2 * (((bent / (2 * bent.abs().max()) + 0.5) * steps).round() / steps) - 1
    found = dorefa(w, bits, unit=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert len(found.unique()) == 2**bits
    # The other scale is the same grid, folded back to the weights.
    torch.testing.assert_close(dorefa(w, bits, unit=False), found * w.tanh().abs().max())


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_signs_and_order_are_kept(bits: int) -> None:
    w = random(2, 200)
    torch.testing.assert_close(dorefa(-w, bits, unit=True), -dorefa(w, bits, unit=True))
    ordered = w.sort(1).values
    assert bool((dorefa(ordered, bits, unit=True).diff(dim=1) >= 0).all())


def test_one_bit_is_the_sign_at_the_mean_magnitude() -> None:
    w = torch.tensor([[0.5, -1.5, 0.0, 2.0]])
    assert dorefa(w, 1, unit=True).tolist() == [[1.0, -1.0, 1.0, 1.0]]


def test_one_huge_weight_leaves_the_others_few_levels() -> None:
    """Why a penalty on the range helps: at 2 bits all others fall on the two middle levels."""
    w = 0.05 * random(1, 200)
    assert len(dorefa(w, 2, unit=True).unique()) == 4
    w[0, 0] = 3.0
    assert len(dorefa(w, 2, unit=True)[:, 1:].unique()) == 2


def test_the_gradient_of_the_tangent_takes_the_largest_for_a_constant() -> None:
    w = random(1, 20).requires_grad_()
    squash(w, 2, unit=True).sum().backward()
    bent = w.detach().tanh()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, (1 - bent.square()) / bent.abs().max())


def test_starts() -> None:
    assert float(step_start(torch.tensor(0.5), 3)) == pytest.approx(1 / math.sqrt(3))
    assert gradient_share(100, 4) == pytest.approx(0.05)
    blocks = random(4, 300)
    exponent = exponent_for(float(blocks.abs().max()))
    for bits in (2, 4, 8):
        step = least_error_step(blocks, bits)
        errors = []
        for factor in (0.5, 1.0, 2.0):
            values = weights_on_steps(blocks, step * factor, bits, exponent)
            errors.append(float((values - blocks).square().sum()))
        assert errors[1] < min(errors[0], errors[2])
    # Whole numbers of steps are met, also beside one huge weight.
    for steps in ([-2.0, -1.0, 0.0, 1.0], [-1.0, 1.0] * 5000 + [40.0]):
        whole = torch.tensor([steps])
        assert float(least_error_step(whole, 2)) == pytest.approx(1.0, rel=0.02)
    for exponent in (-126, -11, 112):
        least = torch.tensor([least_scale(exponent)])
        assert 0 < float(stored(least, exponent)) == float(least)
        assert bool(weights_on_steps(torch.zeros(1, 3), least, 2, exponent).eq(0).all())
