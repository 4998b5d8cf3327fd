"""Rate-distortion: budgets kept, outputs that stay, layers of every kind, and weights without data."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contexts import context_at
from model.networks import Untraceable, decisions
from model.networks import live as other_live
from torch import Tensor, nn

from qcompress.budget.search import LEAST_RATE, MOST_RATE, Search
from qcompress.coding.grids import decode, step_value
from qcompress.coding.rows import measure_whole
from qcompress.coding.unbounded.lengths import coded_bits
from qcompress.data.batches import Batch
from qcompress.methods.rd import encode, fit, free
from qcompress.methods.rd.free import MOST_COLUMNS, free_step, guess_inputs
from qcompress.model.live import LiveModel, fresh_copy, make_live_model
from qcompress.registry import RdConfig
from qcompress.solvers.channels import ChannelInputs
from qcompress.solvers.hessian import output_error
from qcompress.solvers.unbounded import root_mean_square
from qcompress.types.encoded import Fitted, Kept, Unbounded
from qcompress.types.run import FitContext

CPU = torch.device("cpu")
EFFORTS = ["normal", pytest.param("high", marks=pytest.mark.slow)]
CONTEXT = context_at(0)
"""Of every weight: the exponent of an unbounded quantizer is its own."""


class Mixed(nn.Module):
    """A plain, a depthwise and a grouped convolution behind batch norms, one with a bias, and a linear layer."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False)
        self.grouped_bn = nn.BatchNorm2d(32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(self.depthwise_bn(self.depthwise(x)))
        x = x + F.relu(self.grouped_bn(self.grouped(x)))
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


class Words(nn.Module):
    """A table that is looked up, two linear layers and a head over words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 48)
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)
        self.head = nn.Linear(48, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.head(x + self.down(F.gelu(self.up(x))))


def mixed(change: Any = None) -> nn.Module:
    torch.manual_seed(0)
    module = Mixed()
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d):
            nn.init.uniform_(one.weight, 0.5, 1.5)
            nn.init.normal_(one.bias, std=0.3)
    with torch.no_grad():
        for _ in range(20):
            module(torch.randn(16, *Mixed.shape))
        # So that classes differ by more than what all have in common.
        module.fc.weight.mul_(10)
        if change is not None:
            change(module)
    return module.eval()


def images(count: int = 2, samples: int = 16) -> list[Batch]:
    torch.manual_seed(1)
    return [Batch((torch.randn(samples, *Mixed.shape),)) for _ in range(count)]


def words() -> list[Batch]:
    torch.manual_seed(1)
    # Most words are rare, as in any language.
    return [Batch(((64 * torch.rand(8, 24) ** 2).long(),)) for _ in range(2)]


def live(module: nn.Module, data: Sequence[Batch], **options: object) -> LiveModel:
    return make_live_model(module, decisions(module, "rd", **options), data, data[0].first(2), device=CPU)


def fitted(module: nn.Module, data: Sequence[Batch], bpw: float, **options: object) -> tuple[LiveModel, Fitted]:
    """The network coded with at most so many bits a weight, as a budget's search has it."""
    options = options or {"effort": "normal"}
    first = live(module, data, **options)
    wanted = decisions(first.module, "rd", **options)
    kept: dict[str, object] = {}
    done: list[tuple[float, LiveModel, Fitted]] = []

    def look(knob: float) -> float:
        again = fresh_copy(first)
        result = fit(again, wanted, FitContext(math.exp(knob), kept=kept))
        done.append((bits_per_weight(result), again, result))
        return math.log(done[-1][0] / bpw)

    enough = math.log(0.95)
    Search(math.log(bpw), math.log(LEAST_RATE), math.log(MOST_RATE), aim=enough / 3, enough=enough).run(look)
    within = [one for one in done if one[0] <= bpw]
    _, found, result = max(within, key=lambda one: one[0]) if within else done[-1]
    return found, result


@functools.cache
def plain(bpw: float, effort: str = "normal") -> tuple[LiveModel, Fitted]:
    """The network without a change, coded once for all tests that only look at it."""
    return fitted(mixed(), images(), bpw, effort=effort)


def unbounded_tensors(found: Fitted) -> dict[str, Unbounded]:
    return {name: value for name, value in found.encoded.items() if isinstance(value, Unbounded)}


def bits_per_weight(found: Fitted) -> float:
    every = [*unbounded_tensors(found).values()]
    return coded_bits(every) / sum(unbounded.codes.numel() for unbounded in every)


def harm(live: LiveModel) -> float:
    """The relative squared error of the outputs on the calibration data."""
    plain, quantized = (
        torch.cat([module(*batch.args) for batch in live.calibration]).double()
        for module in (live.module, live.quantized)
    )
    return float((plain - quantized).square().sum() / (plain - plain.mean(0)).square().sum())


@pytest.mark.parametrize(
    ("bpw", "effort"),
    [
        *((1.0, "fast"), (1.0, "normal"), (2.5, "fast"), (2.5, "normal"), (2.5, "high")),
        pytest.param(1.0, "high", marks=pytest.mark.slow),
    ],
)
def test_the_budget_is_kept_and_nearly_used(bpw: float, effort: str) -> None:
    live, found = plain(bpw, effort)
    assert 0.95 * bpw < bits_per_weight(found) <= bpw
    for decision in decisions(live.module, "rd", effort=effort):
        unbounded = found.encoded[decision.tensor.name]
        assert isinstance(unbounded, Unbounded)
        assert (unbounded.shape, unbounded.axis, unbounded.dtype) == (decision.tensor.shape, decision.axis, "F32")
        assert unbounded.trellis == (effort == "high")
        assert unbounded.codes.shape == (unbounded.shape[0], math.prod(unbounded.shape[1:]))


@pytest.mark.parametrize("effort", EFFORTS)
def test_what_is_given_stands_in_the_quantized_network_and_the_other_stays(effort: str) -> None:
    module = mixed()
    before = copy.deepcopy(module.state_dict())
    live, found = fitted(module, images(), 2.0, effort=effort)
    for name, value in live.quantized.state_dict().items():
        expected = decode(found.encoded[name]) if name in found.encoded else before[name]
        assert torch.equal(value, expected), name
    assert all(torch.equal(value, before[name]) for name, value in live.module.state_dict().items())
    norms = {f"{norm}.{part}" for norm in ("stem_bn", "depthwise_bn", "grouped_bn") for part in STATISTICS}
    assert {name for name, value in found.encoded.items() if isinstance(value, Kept)} == {
        *norms,
        "conv.bias",
        "fc.bias",
    }
    hooks = [hook for one in module.modules() for hook in (*one._forward_hooks, *one._forward_pre_hooks)]
    assert hooks == []


STATISTICS = ("running_mean", "running_var")


def test_without_matching_nothing_but_weights_is_given() -> None:
    _, found = fitted(mixed(), images(), 2.0, match=False)
    assert all(isinstance(value, Unbounded) for value in found.encoded.values())


def test_the_same_again() -> None:
    (_, one), (_, other) = plain(2.0), fitted(mixed(), images(), 2.0)
    assert one.encoded.keys() == other.encoded.keys()
    for name, value in one.encoded.items():
        assert torch.equal(decode(value), decode(other.encoded[name])), name


def test_more_bits_leave_less_harm() -> None:
    harms = []
    for bpw in (1.0, 2.0, 3.0, 4.0):
        live, found = plain(bpw)
        assert bits_per_weight(found) <= bpw
        harms.append(harm(live))
    assert all(fine < 0.5 * coarse for coarse, fine in itertools.pairwise(harms))
    assert harms[-1] < 0.01


def test_statistics_and_biases_hardly_change_where_weights_hardly_do() -> None:
    """Batch norms are matched to the full-precision network, not measured again: at tiny steps nothing happens."""
    live, found = fitted(mixed(), images(), 12.0)
    original = live.module.state_dict()
    for name, value in found.encoded.items():
        if isinstance(value, Kept):
            torch.testing.assert_close(value.value, original[name], rtol=2e-3, atol=2e-3)
    x = live.calibration[0].args[0]
    assert float((live.module(x) - live.quantized(x)).abs().max()) < 0.01 * float(live.module(x).abs().max())


def test_means_and_variances_behind_batch_norms_are_those_of_the_full_network() -> None:
    live, _ = fitted(mixed(), images(), 1.5)
    x = live.calibration[0].args[0]
    x = torch.cat([batch.args[0] for batch in live.calibration])
    plain, coarse = (one.stem_bn(one.stem(x)) for one in (live.module, live.quantized))
    torch.testing.assert_close(coarse.mean((0, 2, 3)), plain.mean((0, 2, 3)), rtol=0, atol=1e-3)
    torch.testing.assert_close(coarse.var((0, 2, 3)), plain.var((0, 2, 3)), rtol=1e-2, atol=1e-4)
    assert not torch.equal(live.quantized.stem_bn.running_var, live.module.stem_bn.running_var)


@pytest.mark.parametrize("bits", [0.0, 1e-6])
def test_a_budget_below_all_side_information_leaves_zeros_and_finite_outputs(bits: float) -> None:
    found_live = live(mixed(), images(1), effort="fast")
    found = fit(found_live, decisions(found_live.module, "rd", effort="fast"), FitContext(bits))
    assert not any(bool(unbounded.codes.any()) for unbounded in unbounded_tensors(found).values())
    x = found_live.calibration[0].args[0]
    assert bool(found_live.quantized(x).isfinite().all())
    assert all(bool(decode(value).isfinite().all()) for value in found.encoded.values())


def kill_input(module: nn.Module) -> None:
    """The fourth channels of the stem and of the depthwise layer give zero, for ever."""
    for norm in (module.stem_bn, module.depthwise_bn):
        norm.weight[3] = 0
        norm.bias[3] = -1


def kill_output(module: nn.Module) -> None:
    """Rows of zero, a channel that its batch norm drops, and statistics of no variance."""
    module.grouped.weight[5] = 0
    module.grouped_bn.weight[6] = 0
    module.stem.weight[7] = 0
    module.stem_bn.running_var[7] = 0
    module.stem_bn.running_mean[7] = 0


def kill_layer(module: nn.Module) -> None:
    module.conv.weight.zero_()


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("change", [kill_input, kill_output, kill_layer])
def test_dead_inputs_and_outputs_take_no_bits_and_do_no_harm(change: Any, effort: str) -> None:
    live, found = fitted(mixed(change), images(), 3.0, effort=effort)
    assert bits_per_weight(found) <= 3.0
    assert all(bool(decode(value).isfinite().all()) for value in found.encoded.values())
    codes = {name: unbounded.codes for name, unbounded in unbounded_tensors(found).items()}
    if change is kill_output:
        assert not codes["grouped.weight"][5].any() and not codes["stem.weight"][7].any()
    if change is kill_input:
        assert not codes["depthwise.weight"][3].any() and codes["depthwise.weight"][2].any()
        grouped = codes["grouped.weight"].reshape(32, 8, 9)
        assert not grouped[:8, 3].any() and grouped[:8, 2].any() and grouped[8:, 3].any()
    if change is kill_layer:
        assert not codes["conv.weight"].any()
    else:
        assert harm(live) < 0.1
    assert bool(torch.cat([live.quantized(*batch.args) for batch in live.calibration]).isfinite().all())


@pytest.mark.parametrize("effort", EFFORTS)
def test_one_sample_is_too_few_and_still_does_no_harm(effort: str) -> None:
    """A linear layer of 32 columns behind a mean over places sees a single vector: its Hessian has rank one."""
    live, found = fitted(mixed(), images(1, 1), 4.0, effort=effort)
    assert bits_per_weight(found) <= 4.0
    x = images(1, 16)[0].args[0]
    plain, quantized = live.module(x), live.quantized(x)
    assert float((plain - quantized).square().mean() / plain.square().mean()) < 0.2


@pytest.mark.parametrize("allocation", ["measured", "relative"])
def test_either_allocation_gives_depthwise_layers_what_they_need(allocation: str) -> None:
    live, found = fitted(mixed(), images(), 3.0, allocation=allocation)
    assert harm(live) < (0.05 if allocation == "measured" else 0.4)
    scaled = {name for name, unbounded in unbounded_tensors(found).items() if unbounded.rows is not None}
    behind_norms = {"stem.weight", "depthwise.weight", "grouped.weight"}
    assert scaled == (behind_norms if allocation == "relative" else set())


def test_codes_are_not_bounded() -> None:
    def spread(module: nn.Module) -> None:
        module.conv.weight[0, 0, 0, 0] = 400 * module.conv.weight.std()

    _, found = fitted(mixed(spread), images(), 3.0)
    unbounded = unbounded_tensors(found)["conv.weight"]
    assert int(unbounded.codes.abs().max()) > 128
    assert float(decode(unbounded)[0, 0, 0, 0]) == pytest.approx(400 * float(mixed().conv.weight.std()), rel=0.05)


@pytest.mark.slow
def test_columns_have_steps_of_their_own_only_where_asked() -> None:
    _, found = fitted(mixed(), images(), 3.0, columns=False)
    assert all(unbounded.channels is None and unbounded.taps is None for unbounded in unbounded_tensors(found).values())

    def uneven(module: nn.Module) -> None:
        module.stem_bn.weight.mul_(torch.logspace(-1, 1, 32))
        module.stem_bn.bias.mul_(torch.logspace(-1, 1, 32))
        module.depthwise_bn.weight.mul_(torch.logspace(-1.5, 1.5, 32))
        module.depthwise_bn.bias.mul_(torch.logspace(-1.5, 1.5, 32))

    _, found = fitted(mixed(uneven), images(), 3.0)
    assert unbounded_tensors(found)["conv.weight"].channels is not None


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_table_is_coded_by_how_often_its_rows_are_looked_up(effort: str) -> None:
    torch.manual_seed(0)
    live, found = fitted(Words().eval(), words(), 3.0, effort=effort)
    assert bits_per_weight(found) <= 3.0
    assert harm(live) < 0.05
    table = unbounded_tensors(found)["table.weight"]
    assert table.rows is not None and not table.trellis
    counts = torch.bincount(torch.cat([batch.args[0].reshape(-1) for batch in live.calibration]), minlength=64)
    common, rare = counts.argsort(descending=True)[[0, -1]]
    assert int(table.rows[common]) < int(table.rows[rare])
    # Within an octave either way.
    assert int(table.rows.max() - table.rows.min()) <= 16


def test_networks_that_cannot_be_traced_run_by_their_blocks() -> None:
    found = other_live(Untraceable, "rd", blocks=("blocks.*",), effort="normal")
    wanted = decisions(found.module, "rd", effort="normal")
    result = fit(found, wanted, FitContext(6.0))
    assert len(unbounded_tensors(result)) == len(found.layers)
    assert harm(found) < 0.1


# Without data: weights alone.

SHAPES = ((5, 4, 3, 3), (5, 12), (3, 2, 6), (1, 6), (6, 3, 5, 5), (7, 130, 3, 3))
OPTIONS = [
    {"effort": effort, "prior": prior}
    for effort in ("fast", "normal", "high")
    for prior in ("correlated", "flips", "none")
]


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.slow
def test_what_comes_back_is_well_formed_and_always_the_same(options: dict[str, Any]) -> None:
    for shape, step in itertools.product(SHAPES, (1e-4, 0.5, 30.0)):
        weight, config = gaussian(*shape), RdConfig(step=step, **options)
        before = weight.clone()
        unbounded = encode(weight, config, CONTEXT)
        assert torch.equal(weight, before)
        assert unbounded.codes.dtype == torch.int32 and unbounded.codes.shape == (shape[0], math.prod(shape[1:]))
        assert (unbounded.shape, unbounded.axis) == (shape, (0,))
        decoded = decode(unbounded)
        # No correction moves a weight by more than a few steps.
        held = float(unbounded.step) * 2.0**unbounded.exponent
        assert float((decoded - weight).abs().max()) <= 4 * held
        assert torch.equal(decoded, decode(encode(weight, config, CONTEXT)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 2, 3, 3), (4, 0, 3, 3), (4, 2, 0, 3)])
def test_a_weight_without_elements(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    unbounded = encode(torch.zeros(shape), RdConfig(step=0.5, **options), CONTEXT)
    assert decode(unbounded).shape == shape


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_awkward_weights_decode_to_finite_numbers_within_the_range(options: dict[str, Any]) -> None:
    huge, dead = gaussian(4, 3, 2, 2), gaussian(4, 3, 2, 2)
    huge[1, 2, 0, 1] = 1e8
    dead[2] = 0
    constant = torch.full((4, 3, 2, 2), 3e38)
    for weight in (huge, dead, constant, 1e-40 * gaussian(4, 3, 2, 2), 2e37 * gaussian(4, 3, 2, 2), 0 * dead):
        for step in (1e-3, 0.5, 10.0):
            decoded = decode(encode(weight, RdConfig(step=step, **options), CONTEXT))
            assert bool(decoded.isfinite().all())
            assert float(decoded.abs().max()) <= 3 * float(weight.abs().max())


def test_without_a_prior_and_a_price_weights_are_rounded_to_nearest() -> None:
    for shape in SHAPES:
        weight = gaussian(*shape)
        unbounded = encode(weight, RdConfig(effort="fast", prior="none", step=0.3), CONTEXT)
        held = float(unbounded.step) * 2.0**unbounded.exponent
        assert torch.equal(unbounded.codes, (weight.flatten(1) / held).round().int())


def test_a_step_goes_with_the_root_of_the_deviation() -> None:
    weight = gaussian(8, 40)
    held = step_value(encode(weight, RdConfig(step=0.5), CONTEXT))
    assert held == pytest.approx(0.5 * float(weight.square().mean()) ** 0.25, rel=1e-3)
    for times, root in ((16.0, 4.0), (2.0**100, 2.0**50), (2.0**-100, 2.0**-50)):
        step = free_step(root_mean_square(times * weight), 0.5)
        assert step == pytest.approx(root * free_step(root_mean_square(weight), 0.5), rel=1e-6)
    assert free_step(0.0, 0.5) > 0


@pytest.mark.parametrize("prior", ["flips", "correlated"])
def test_errors_of_output_channels_sum_to_little(prior: str) -> None:
    weight = gaussian(32, 8, 3, 3)
    sums = {}
    for name in (prior, "none"):
        unbounded = encode(weight, RdConfig(effort="fast", prior=name, step=0.7), CONTEXT)
        held = float(unbounded.step) * 2.0**unbounded.exponent
        sums[name] = ((decode(unbounded) - weight).flatten(1).sum(1) / held).abs()
    assert float(sums[prior].mean()) < 0.25 * float(sums["none"].mean())
    assert prior != "flips" or float(sums[prior].max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("effort", ["fast", "normal", "high"])
def test_the_prior_lowers_the_error_that_it_foresees(effort: str) -> None:
    weight = gaussian(32, 8, 3, 3)
    inputs = guess_inputs((32, 8, 3, 3))
    assert isinstance(inputs, ChannelInputs)
    hessian = inputs.dense()
    errors = [
        float(output_error((decode(unbounded) - weight).flatten(1), hessian.unsqueeze(0)).sum())
        for unbounded in (
            encode(weight, RdConfig(effort=effort, prior=p, step=0.7), CONTEXT) for p in ("correlated", "none")
        )
    ]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_wide_weights_are_layers_side_by_side(effort: str) -> None:
    channels = 2 * (MOST_COLUMNS // 9)
    weight = gaussian(3, channels, 3, 3)
    config = RdConfig(effort=effort, step=0.6, price=0.0)
    unbounded = encode(weight, config, CONTEXT)
    step = float(unbounded.step) * 2.0**unbounded.exponent
    for part in range(2):
        own = weight[:, part * channels // 2 : (part + 1) * channels // 2]
        # The step that the whole has: free_step of a part differs.
        factor = 0.6 * step / free_step(root_mean_square(own), 0.6)
        alone = encode(own.contiguous(), RdConfig(effort=effort, step=factor, price=0.0), CONTEXT)
        assert float(alone.step) * 2.0**alone.exponent == step
        assert torch.equal(alone.codes, unbounded.codes[:, part * 9 * channels // 2 : (part + 1) * 9 * channels // 2])


@pytest.mark.parametrize("effort", ["normal", "high"])
def test_how_many_rows_are_coded_at_once_changes_nothing(effort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, config = gaussian(20, 6, 3, 3), RdConfig(effort=effort, step=0.6)
    whole = encode(weight, config, CONTEXT)
    monkeypatch.setattr(free, "ROWS_AT_ONCE", 200)
    assert torch.equal(encode(weight, config, CONTEXT).codes, whole.codes)


@pytest.mark.parametrize("shape", [(700, 420), (620, 48, 3, 3), (190, 4)])
@pytest.mark.parametrize("effort", EFFORTS)
def test_rows_have_the_codes_that_they_have_among_all(shape: tuple[int, ...], effort: str) -> None:
    """Also of weights whose sample is some of their rows: what is measured once serves every block."""
    sizes = torch.linspace(-1, 1, shape[0]).exp().reshape(-1, *[1] * (len(shape) - 1))
    weight, config = sizes * gaussian(*shape), RdConfig(effort=effort, step=0.6)
    alone = encode(weight, config, CONTEXT)
    whole = measure_whole(weight, "cpu", 10_000)
    assert (len(whole.sample) < len(weight)) == (weight.numel() > 2**18)
    context = replace(CONTEXT, whole=whole)
    parts = [encode(weight[start : start + 150], config, context) for start in range(0, len(weight), 150)]
    assert torch.equal(torch.cat([part.codes for part in parts]), alone.codes)
    assert {step_value(part) for part in parts} == {step_value(alone)}
    assert {part.trellis for part in parts} == {alone.trellis}


def test_high_effort_is_a_trellis_where_rows_are_one_part_and_not_too_wide() -> None:
    wide = gaussian(2, 130, 3, 3)
    config = RdConfig(effort="high", step=0.5)
    assert wide[0].numel() > MOST_COLUMNS
    assert not encode(wide, config, CONTEXT).trellis
    assert torch.equal(encode(wide, config, CONTEXT).codes, encode(wide, RdConfig(step=0.5), CONTEXT).codes)
    assert encode(gaussian(5, 4, 3, 3), config, CONTEXT).trellis
    assert encode(gaussian(5, 1300), config, CONTEXT).trellis
    assert not encode(gaussian(1, free.MOST_TRELLIS_COLUMNS + 1), config, CONTEXT).trellis


def test_the_trellis_leaves_less_error_for_the_same_bits() -> None:
    weight = gaussian(64, 512)
    points = {}
    for effort, steps in (("fast", (0.6, 0.8, 1.0, 1.2)), ("high", (0.9,))):
        for step in steps:
            unbounded = encode(weight, RdConfig(effort=effort, step=step), CONTEXT)
            error = float((decode(unbounded) - weight).square().mean())
            points[effort, step] = (coded_bits([unbounded]) / weight.numel(), error)
    ((rate, error),) = (point for (effort, _), point in points.items() if effort == "high")
    scalar = sorted(point for (effort, _), point in points.items() if effort == "fast")
    (lower, worse), (upper, better) = next(pair for pair in itertools.pairwise(scalar) if pair[1][0] > rate)
    assert lower < rate
    share = (rate - lower) / (upper - lower)
    assert error < 0.9 * worse ** (1 - share) * better**share


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_finer_than_float32_change_nothing(options: dict[str, Any]) -> None:
    weight = gaussian(5, 4, 3, 3)
    found = decode(encode(weight, RdConfig(step=1e-30, **options), CONTEXT))
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_budget_that_no_weights_need_is_not_spent() -> None:
    """Bits beyond those of float32 would make codes that no file can hold."""
    live, found = fitted(mixed(kill_layer), images(1), 30.0, effort="high")
    assert bits_per_weight(found) < 25
    assert max(int(unbounded.codes.abs().max()) for unbounded in unbounded_tensors(found).values()) < 2**31 - 1
    assert bool(live.quantized(live.calibration[0].args[0]).isfinite().all())


def test_finer_steps_leave_less_error() -> None:
    weight = gaussian(8, 8, 3, 3)
    for options in OPTIONS:
        errors, rates = [], []
        for step in (1.6, 0.8, 0.4, 0.2):
            unbounded = encode(weight, RdConfig(step=step, **options), CONTEXT)
            errors.append(float((decode(unbounded) - weight).square().mean()))
            rates.append(coded_bits([unbounded]))
        assert all(fine < coarse / 2 for coarse, fine in itertools.pairwise(errors))
        assert rates == sorted(rates)
