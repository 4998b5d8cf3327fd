"""Quantizers at the inputs of layers take their ranges from what flows there; hooks apply them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from qcompress.checkpoint.side_files import HESSIAN, MEAN
from qcompress.model.live import LiveModel
from qcompress.model.moments import input_moments
from qcompress.model.products import product_of
from qcompress.model.runs import refuse_unusable, run_through
from qcompress.model.sweep import sweep
from qcompress.types.encoded import ActivationGrid
from qcompress.types.ranks import ALONE, World
from qcompress.types.settings import ActivationSettings

INPUT_BITS = 8
"""The network's own input has 8 bits, whatever the others have."""
LEAST_SCALE = 2.0**-100
"""A range below it is nothing; the reciprocal of a smaller scale might not fit float32."""
BINS = 2048
COUNTED_VALUES = 1 << 16
"""Values that are counted at a time."""
SHRINK_STEPS = 40
NOISE_SAMPLES = 64
NOISE_SIGMAS = {2: 12.0, 3: 12.0, 4: 12.0, 5: 13.0, 6: 14.0, 7: 19.5, 8: 25.0}
"""SQuant's code: the range in standard deviations of the positive part, given at 4, 6 and 8 bits."""


def activation_grid(low: float, high: float, bits: int) -> ActivationGrid:
    """The grid that spans [min(low, 0), max(high, 0)], its scale a float32 number."""
    low, high = min(low, 0.0), max(high, 0.0)
    steps = 2**bits - 1
    scale = float(torch.tensor((high - low) / steps, dtype=torch.float32))
    if scale < LEAST_SCALE:
        return ActivationGrid(bits, 1.0, 0)
    return ActivationGrid(bits, scale, min(max(round(-low / scale), 0), steps))


def quantize_activation(x: Tensor, grid: ActivationGrid) -> Tensor:
    """x on its grid, shaped like x; the gradient passes straight through within the range."""
    return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, 0, 2**grid.bits - 1)


def attach_activations(module: nn.Module, grids: Mapping[str, ActivationGrid]) -> list[RemovableHandle]:
    """Quantize the first input of each named module of `module` from now on, until the handles are removed; of
    attention all three."""
    return [
        attach_quantizer(module.get_submodule(name), partial(quantize_activation, grid=grid))
        for name, grid in grids.items()
    ]


def attach_quantizer(module: nn.Module, quantize: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Pass the first input of a module, of attention all three, through `quantize` until the handle is removed."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        count = len(_inputs_of(module, args, kwargs))
        done: dict[int, Any] = {}

        def quantized(x: Any) -> Any:
            if id(x) not in done:
                done[id(x)] = x._replace(data=quantize(x.data)) if isinstance(x, PackedSequence) else quantize(x)
            return done[id(x)]

        positional = tuple(quantized(x) if place < count else x for place, x in enumerate(args))
        rest = max(count - len(args), 0)
        named = {key: quantized(x) if place < rest else x for place, (key, x) in enumerate(kwargs.items())}
        return positional, named

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The inputs of a call that a quantizer is for: the first one; of attention its queries, keys and values."""
    given = [*args, *kwargs.values()]
    return given[: 3 if isinstance(module, nn.MultiheadAttention) else 1]


def attach_caps(module: nn.Module, caps: Mapping[str, Sequence[float] | Tensor]) -> list[RemovableHandle]:
    """Bound each channel (dimension 1) of the named modules' outputs from above, until the handles are removed."""

    def make_hook(limits: Tensor) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
            bound = limits.to(output).reshape(1, -1, *[1] * (output.ndim - 2))
            return torch.minimum(output, bound)

        return hook

    return [
        module.get_submodule(name).register_forward_hook(make_hook(torch.as_tensor(one))) for name, one in caps.items()
    ]


def measure_activations(
    live: LiveModel, settings: ActivationSettings, inputs: Collection[str], names: Sequence[str]
) -> dict[str, ActivationGrid]:
    """The quantizers of the named layers from calibration data on the quantized network, or from noise.

    inputs  those that see the network's own input
    names   the layers; those whose inputs are no floats get none
    raises  DataError where an input holds NaN or Inf
    """
    bits = {name: INPUT_BITS if name in inputs else settings.bits for name in names}
    if settings.range == "noise":
        return _noise_grids(live, bits, inputs)

    def run() -> None:
        if live.at is not None:
            run_through(live.stages[0], live.quantized, live.at.alone)
            return
        for batch in live.own_batches:
            live.world.check()
            live.quantized(*batch.args, **batch.kwargs)

    return grids_of_inputs(live.quantized, run, settings, bits, live.world)


def grids_of_inputs(
    module: nn.Module,
    run: Callable[[], object],
    settings: ActivationSettings,
    bits: Mapping[str, int],
    world: World = ALONE,
) -> dict[str, ActivationGrid]:
    """The quantizers of the layers that `bits` names, from their inputs while `run` runs parts of `module`, twice.

    world   the ranks whose inputs count together
    raises  DataError where an input holds NaN or Inf
    """
    ranges = _of_all_ranks(_measure_ranges(module, run, [*bits]), [*bits], world)
    if settings.range == "minmax":
        return {name: activation_grid(*one, bits[name]) for name, one in ranges.items()}
    counts = _measure_histograms(module, run, ranges)
    for name in ranges:
        world.sum(counts[name])
    choose: Callable[[Tensor, float, float, int], tuple[float, float]]
    if settings.range == "percentile":
        share = (settings.percentile or 100.0) / 100.0
        choose = lambda count, low, high, _: percentile_range(count, low, high, share)  # noqa: E731
    else:
        choose = least_error_range
    return {name: activation_grid(*choose(counts[name], *ranges[name], bits[name]), bits[name]) for name in ranges}


@torch.no_grad()
def batch_norm_grids(
    live: LiveModel, bits: int, inputs: Collection[str], names: Sequence[str]
) -> dict[str, ActivationGrid]:
    """The quantizers of the named layers from the statistics of the quantized network's batch norms.

    A range holds six deviations of every channel, and no more than the activation lets through. Where no statistics
    reach, as at the network's own input, it is what the live model's example shows.

    inputs  those that see the network's own input
    """
    models = input_moments(live, live.quantized)
    ranges = {name: models[name].range for name in names if name in models}
    ranges |= _example_ranges(live, [name for name in names if name not in models])
    return {
        name: activation_grid(*ranges[name], INPUT_BITS if name in inputs else bits) for name in names if name in ranges
    }


def _example_ranges(live: LiveModel, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """What the live model's example gives the named layers in the quantized network."""
    ranges: dict[str, tuple[float, float]] = {}
    if names:
        with watched_inputs(live.quantized, names, lambda name, x: _widen(ranges, name, x)):
            live.quantized(*live.example.args, **live.example.kwargs)
    return ranges


@contextmanager
def watched_inputs(module: nn.Module, names: Sequence[str], watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `watch` with the float inputs of every call of the named modules that quantizers are for."""

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for x in {id(one): one for one in _inputs_of(owners[name], args, kwargs)}.values():
                values = x.data if isinstance(x, PackedSequence) else x
                if values.is_floating_point() and values.numel():
                    watch(name, values)

        return hook

    owners = {name: module.get_submodule(name) for name in names}
    handles = [one.register_forward_pre_hook(make_hook(name), with_kwargs=True) for name, one in owners.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _measure_ranges(
    module: nn.Module, run: Callable[[], object], names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str, x: Tensor) -> None:
        refuse_unusable(name, x)
        _widen(ranges, name, x)

    with watched_inputs(module, names, watch):
        run()
    return ranges


def _of_all_ranks(
    ranges: Mapping[str, tuple[float, float]], names: Sequence[str], world: World
) -> dict[str, tuple[float, float]]:
    """The ranges that hold those of every rank, of the layers that some rank has one of, in the order of `names`."""
    told = world.tell(ranges)
    found = {name: [part[name] for part in told if name in part] for name in names}
    return {name: (min(low for low, _ in ends), max(high for _, high in ends)) for name, ends in found.items() if ends}


def _widen(ranges: dict[str, tuple[float, float]], name: str, x: Tensor) -> None:
    """Make a layer's range hold x too."""
    low, high = (float(end) for end in torch.aminmax(x))
    before = ranges.get(name, (low, high))
    ranges[name] = (min(low, before[0]), max(high, before[1]))


@torch.no_grad()
def _measure_histograms(
    module: nn.Module, run: Callable[[], object], ranges: Mapping[str, tuple[float, float]]
) -> dict[str, Tensor]:
    """Counts float64 [BINS] over each layer's range."""
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ranges}

    def watch(name: str, x: Tensor) -> None:
        low, high = ranges[name]
        if high > low:
            # A part at a time, so that its bins stay in the cache: they take three times the memory of x.
            size = COUNTED_VALUES if x.device.type == "cpu" else x.numel()
            for part in torch.split(x.reshape(-1), size):
                bins = (part - low).mul_(BINS / (high - low)).long().clamp_(0, BINS - 1)
                counts[name] += torch.bincount(bins, minlength=BINS).cpu()

    with watched_inputs(module, list(ranges), watch):
        run()
    return counts


def percentile_range(counts: Tensor, low: float, high: float, share: float) -> tuple[float, float]:
    """The ends that leave (1 - share) of the values beyond, half of it on each side; all of it above where none is
    below zero.

    counts  float64 [BINS] over [low, high]
    """
    beyond = float(counts.sum()) * (1.0 - share) / (1 if low >= 0 else 2)
    total = counts.cumsum(0)
    width = (high - low) / len(counts)
    top = high - width * float((total >= total[-1] - beyond).sum() - 1)
    bottom = low + width * float((total <= beyond).sum())
    return (low if low >= 0 else bottom, top)


def least_error_range(counts: Tensor, low: float, high: float, bits: int) -> tuple[float, float]:
    """The ends within [low, high] whose grid has the least squared error on the histogram, from coarse to fine.

    counts  float64 [BINS] over [low, high]
    """
    low, span = min(low, 0.0) if low < 0 else low, high - low
    if span <= 0:
        return low, high
    centres = low + (torch.arange(len(counts), dtype=torch.float64) + 0.5) * (span / len(counts))
    kept = counts > 0
    centres, counts = centres[kept], counts[kept]
    best = (min(low, 0.0), max(high, 0.0))
    ends = best
    radius = 1.0
    for _ in range(3):
        lows = _shrunken(best[0], ends[0], radius)
        highs = _shrunken(best[1], ends[1], radius)
        candidates = torch.cartesian_prod(lows, highs)
        errors = _grid_errors(candidates, centres, counts, bits)
        chosen = candidates[errors.argmin()]
        best = (float(chosen[0]), float(chosen[1]))
        radius /= SHRINK_STEPS / 4
    return best


def _shrunken(centre: float, end: float, radius: float) -> Tensor:
    """Candidates for an end of the range around `centre`, between 0 and `end`."""
    if end == 0.0:
        return torch.zeros(1, dtype=torch.float64)
    share = centre / end
    shares = torch.linspace(max(share - radius, 0.02), min(share + radius, 1.0), SHRINK_STEPS, dtype=torch.float64)
    return shares * end


def _grid_errors(candidates: Tensor, centres: Tensor, counts: Tensor, bits: int) -> Tensor:
    """The squared error of each candidate range, float64 [candidates]; in pieces."""
    steps = 2**bits - 1
    errors = []
    for low, high in (part.unbind(1) for part in torch.split(candidates, 256)):
        scale = ((high - low) / steps).clamp_min(1e-300).unsqueeze(1)
        zero = (-low.unsqueeze(1) / scale).round().clamp(0, steps)
        codes = (centres / scale).round_().add_(zero).clamp_(0, steps)
        errors.append((codes.sub_(zero).mul_(scale).sub_(centres)).square_().mul_(counts).sum(1))
    return torch.cat(errors)


@torch.no_grad()
def _noise_grids(live: LiveModel, bits: Mapping[str, int], inputs: Collection[str]) -> dict[str, ActivationGrid]:
    """As SQuant's code: uniform noise through the network, and some standard deviations of the positive part.

    That code leaves the network's own input as it is. Here its range is what the live model's example shows: noise in
    [0, 1] tells nothing of it, not even that it has a sign.
    """
    generator = live.generator("noise")
    noise = [
        torch.rand(NOISE_SAMPLES, *x.shape[1:], generator=generator, device=live.device) for x in live.example.args
    ]
    seen: dict[str, _Noise] = {}

    def watch(name: str, x: Tensor) -> None:
        positive = x[x > 0]
        sigma = float(positive.std()) if positive.numel() > 1 else 0.0
        seen[name] = _Noise(sigma, bool((x < 0).any()), float(x.abs().max()))

    with watched_inputs(live.quantized, [name for name in bits if name not in inputs], watch):
        live.quantized(*noise, **live.example.kwargs)
    shown = _example_ranges(live, [name for name in bits if name in inputs])
    grids = {name: activation_grid(*one, bits[name]) for name, one in shown.items()}
    return grids | {name: one.grid(bits[name]) for name, one in seen.items()}


@dataclass(frozen=True)
class _Noise:
    sigma: float
    signed: bool
    largest: float

    def grid(self, bits: int) -> ActivationGrid:
        reach = NOISE_SIGMAS[bits] * self.sigma / (1.25 if self.signed else 1.0)
        reach = min(reach, self.largest) if bits < 6 else reach
        return activation_grid(-reach if self.signed else 0.0, reach, bits)


def measure_statistics(live: LiveModel) -> dict[str, Tensor]:
    """For each weight T of a matrix product `T.hessian` float32 [groups, columns, columns], `T.mean` [groups, columns].

    They are the means over positions of x x^T and of x, the layer's inputs in the full-precision network.
    """
    products = [name for name in live.weights if product_of(live.module, name) is not None]
    statistics: dict[str, Tensor] = {}
    for step in sweep(live, products, sequential=False):
        gram = step.gram()
        if gram.count:
            statistics[f"{step.tensor}{HESSIAN}"] = gram.hessian.float().cpu()
            statistics[f"{step.tensor}{MEAN}"] = gram.mean.float().cpu()
    return statistics
