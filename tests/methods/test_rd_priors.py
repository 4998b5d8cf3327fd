"""Hessians of inputs that nobody has seen: the moments that they claim, and matrices that can be one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contexts import context_at
from model.graph_networks import decisions, live_model
from solvers.second_order import seeded
from torch import Tensor, nn

from qcompress.coding.grids import decode
from qcompress.compress.apply_plan import fit
from qcompress.encode.encode_weight import ContextSources
from qcompress.methods.rd import encode
from qcompress.methods.rd.free import (
    MOST_COLOURS,
    MOST_COLUMNS,
    free_step,
    guess_inputs,
    inputs_of_moments,
    split_channels,
)
from qcompress.registry import RdConfig
from qcompress.solvers.channels import ChannelInputs
from qcompress.types.config import Shape
from qcompress.types.encoded import Unbounded
from qcompress.types.plan import Plan, Recipe
from qcompress.types.run import InputMoments


def guess(shape: Shape) -> Tensor:
    """The second moments of the guess."""
    inputs = guess_inputs(shape)
    assert inputs is not None
    return inputs.dense() if isinstance(inputs, ChannelInputs) else inputs


@pytest.mark.parametrize("shape", [(4, 8), (4, 0), (7, 1)])
def test_nothing_is_said_of_a_weight_without_a_kernel(shape: Shape) -> None:
    assert guess_inputs(shape) is None


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (4, 3, 3, 3), (4, 1, 5, 5), (4, 6, 1, 1), (4, 6, 4), (2, 5, 2, 3, 2)])
def test_it_is_a_matrix_of_second_moments(shape: Shape) -> None:
    hessian = guess(shape)
    columns = math.prod(shape[1:])
    assert (hessian.dtype, hessian.shape) == (torch.float64, (columns, columns))
    assert torch.equal(hessian, hessian.T)
    assert float(torch.linalg.eigvalsh(hessian).min()) > 0
    diagonal = hessian.diagonal()
    assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal))


def test_behind_a_relu_inputs_have_its_mean_and_places_near_one_another_are_alike() -> None:
    """Entry by entry: mean**2, plus the variance times 1/2 for each place between two of a channel."""
    rectified = torch.randn(1_000_000, generator=seeded(0)).clamp(min=0)
    mean, variance = float(rectified.mean()), float(rectified.var())
    hessian = guess((4, 5, 2, 3))
    places = list(itertools.product(range(5), range(2), range(3)))
    for (i, (c, y, x)), (j, (d, v, u)) in itertools.product(enumerate(places), repeat=2):
        alike = 0.5 ** (abs(y - v) + abs(x - u)) if c == d else 0.0
        assert float(hessian[i, j]) == pytest.approx(mean**2 + variance * alike, rel=0.01)


def test_colours_are_alike_and_have_no_mean() -> None:
    hessian = guess((4, 3, 3, 3))
    parts = hessian.reshape(3, 9, 3, 9)
    assert torch.allclose(parts[0, :, 1], 0.9 * parts[0, :, 0])
    assert float(parts[0, 0, 0, 8]) == pytest.approx(0.5**4)
    wider = guess((4, MOST_COLOURS + 1, 3, 3))
    assert float(wider[0, 9]) == pytest.approx(0.16)


def test_sums_of_errors_weigh_more_than_errors() -> None:
    hessian = guess((4, 8, 3, 3))
    alike = torch.full((72,), 1.0, dtype=torch.float64)
    turned = alike.clone()
    turned[1::2] = -1
    assert float(alike @ hessian @ alike) > 50 * float(turned @ hessian @ turned)


@pytest.mark.parametrize("channels", [1, 3, 64, 97, 512, 2048])
@pytest.mark.parametrize("kernel", [(1,), (3, 3), (7, 7), (16, 16), (2000,)])
def test_wide_weights_are_cut_into_equal_parts_of_whole_channels(channels: int, kernel: tuple[int, ...]) -> None:
    shape = (4, channels, *kernel)
    parts = split_channels(shape)
    assert 1 <= parts <= channels and channels % parts == 0
    columns = channels // parts * math.prod(kernel)
    assert columns <= MOST_COLUMNS or parts == channels
    assert parts == 1 or channels * math.prod(kernel) > MOST_COLUMNS


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 0, 3, 3), (4, 2, 0, 3)])
def test_a_weight_without_elements_is_one_part(shape: Shape) -> None:
    assert split_channels(shape) == 1


def drawn_moments(groups: int, channels: int) -> InputMoments:
    mean, variance = torch.rand(2, groups, channels, generator=seeded(1), dtype=torch.float64)
    return InputMoments(2 * mean - 1, variance + 0.1)


def test_inputs_have_the_moments_that_are_known_of_each_channel() -> None:
    """Entry by entry, up to one factor, which moves no code: means in twos, variances times 1/2 a place between."""
    moments = drawn_moments(1, 3)
    hessian = inputs_of_moments((4, 3, 2, 2), moments).dense()
    mean, variance = moments.mean[0].tolist(), moments.variance[0].tolist()
    unit = float(hessian[0, 0]) / (mean[0] ** 2 + variance[0])
    places = list(itertools.product(range(3), range(2), range(2)))
    for (i, (c, y, x)), (j, (d, v, u)) in itertools.product(enumerate(places), repeat=2):
        alike = variance[c] * 0.5 ** (abs(y - v) + abs(x - u)) if c == d else 0.0
        assert float(hessian[i, j]) == pytest.approx(unit * (abs(mean[c] * mean[d]) + alike))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_groups_share_the_mean_of_their_moments_however_large_those_of_one_are(scale: float) -> None:
    one = drawn_moments(1, 3)
    mean, variance = (torch.cat([part, scale * part]) for part in (one.mean, one.variance.sqrt()))
    both = inputs_of_moments((4, 3, 3, 3), InputMoments(mean, variance.square())).dense()
    torch.testing.assert_close(both, inputs_of_moments((4, 3, 3, 3), one).dense())


def test_a_silent_group_says_nothing() -> None:
    one = drawn_moments(1, 3)
    silent = [torch.cat([part, 0 * part]) for part in (one.mean, one.variance)]
    both, alone = (inputs_of_moments((4, 3, 3, 3), known).dense() for known in (InputMoments(*silent), one))
    torch.testing.assert_close(both, alone / 2)


@pytest.mark.parametrize("effort", ["fast", "normal", "high"])
def test_only_known_moments_change_codes_and_only_those_of_norms(effort: str) -> None:
    weight = torch.randn(8, 6, 3, 3, generator=seeded(0))
    correlated, alike = (RdConfig(effort=effort, prior=prior, step=0.7) for prior in ("correlated", "alike"))
    known = context_at(0, moments=drawn_moments(1, 6))
    usual = context_at(0, moments=InputMoments(*(torch.full((1, 6), x, dtype=torch.float64) for x in (0.4, 0.34))))
    codes = [encode(weight, config, context) for config in (correlated, alike) for context in (known, usual)]
    assert all(isinstance(one, Unbounded) for one in codes)
    told, same, *guessed = [decode(one) for one in codes]
    assert torch.equal(same, guessed[0]) and torch.equal(guessed[0], guessed[1])
    assert not torch.equal(told, same)
    assert torch.equal(decode(encode(weight, correlated, context_at(0))), same)


def test_each_part_of_a_wide_weight_has_its_own_moments() -> None:
    channels = 2 * (MOST_COLUMNS // 9)
    weight, moments = torch.randn(3, channels, 3, 3, generator=seeded(0)), drawn_moments(1, channels)
    config = RdConfig(step=0.6, price=0.0)
    whole = encode(weight, config, context_at(0, moments=moments))
    deviation = float(weight.square().mean().sqrt())
    for start in (0, channels // 2):
        part = slice(start, start + channels // 2)
        own = weight[:, part].contiguous()
        factor = 0.6 * free_step(deviation, 1.0) / free_step(float(own.square().mean().sqrt()), 1.0)
        known = InputMoments(moments.mean[:, part], moments.variance[:, part])
        alone = encode(own, RdConfig(step=factor, price=0.0), context_at(0, moments=known))
        assert torch.equal(decode(alone), decode(whole)[:, part])


class Rectified(nn.Module):
    """A convolution behind a batch norm and a ReLU whose channels are of unlike means and sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16, momentum=1.0)
        self.second = nn.Conv2d(16, 64, 3)
        nn.init.uniform_(self.norm.weight, 0.1, 2.0)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


@torch.no_grad()
def output_error(prior: str) -> tuple[float, tuple[str, ...]]:
    """E (y - y^)**2 of the second convolution on data that rd does not see, and what rd said."""
    module, x = Rectified().double(), torch.randn(20, 3, 12, 12, generator=seeded(2), dtype=torch.float64)
    module.train()(x)
    live = live_model(module.eval(), x[:2])
    config = RdConfig(prior=prior, step=0.3, price=0.0)
    found = fit(
        live,
        Plan(Recipe("quantize", ()), tuple(replace(one, method="rd", config=config) for one in decisions(module))),
        ContextSources(),
    )
    wrong = decode(found.encoded["second.weight"]).double() - module.second.weight
    seen = module.norm(module.first(x)).relu()
    return float(F.conv2d(seen, wrong).square().mean()), found.notes


def test_what_norms_tell_lowers_the_error_of_outputs() -> None:
    (told, notes), (guessed, others), (plain, _) = map(output_error, ("correlated", "alike", "none"))
    assert told < 0.9 * guessed < 0.9 * plain
    known = "rd without data takes the inputs of 1 of 2 convolutions from batch norms, and guesses those of others"
    assert notes == (known,) and not others
