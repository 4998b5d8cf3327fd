"""RD without data takes a guess for the inputs, and does the rest as with data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcompress.coding.rows import measure_whole
from qcompress.coding.trellis import STATES
from qcompress.coding.unbounded.lengths import sample_costs
from qcompress.coding.unbounded.tokens import Levels, classes_of_rows
from qcompress.registry import RdConfig
from qcompress.solvers.channels import ChannelInputs, descend_channels, feedback_channels
from qcompress.solvers.trellis import trellis_codes
from qcompress.solvers.unbounded import (
    BitCosts,
    descend_unbounded,
    feedback_unbounded,
    grid_steps,
    scalar_unbounded,
    unbounded_grid,
    with_codes,
    with_step,
)
from qcompress.types.config import Shape
from qcompress.types.encoded import Unbounded
from qcompress.types.run import InputMoments, Whole

MEAN, VARIANCE = 0.4, 0.34
"""Of a standard normal variable behind a ReLU: 1 / sqrt(2 pi) and 1/2 - 1 / (2 pi)."""
NEIGHBOURS = 0.5
"""The correlation of places that touch."""
COLOURS = 0.9
"""The correlation of an image's channels, whose mean was taken away."""
MOST_COLOURS = 4
MOST_COLUMNS = 1152
"""Wider weights are taken for several layers side by side: little is left to win, and columns wait for one another."""


def guess_inputs(shape: Shape) -> ChannelInputs | Tensor | None:
    """What a convolution's inputs are taken to be; None for a weight of two dimensions.

    Channels are alike and have a mean; of an image, whose mean is zero, they go together: their second moments are
    float64 [columns, columns]. Without a kernel nothing says what the inputs are, and a layer may stand behind a
    normalization to mean zero.

    shape  of the weight, rows first: [rows, channels of a group, *kernel]
    """
    if len(shape) < 3:
        return None
    channels, kernel = shape[1], shape[2:]
    taps = _alike_taps(kernel)
    if channels <= MOST_COLOURS and math.prod(kernel) > 1 and channels > 1:
        colours = COLOURS + (1 - COLOURS) * torch.eye(channels, dtype=torch.float64)
        return torch.kron(colours, taps)
    return ChannelInputs(VARIANCE * taps.unsqueeze(0), torch.full((channels,), MEAN, dtype=torch.float64))


def inputs_of_moments(shape: Shape, moments: InputMoments) -> ChannelInputs:
    """What a convolution's inputs are taken to be whose channels have these moments, [groups, channels of a group].

    All groups of a convolution share the mean of theirs, each group of energy 1: what rows see differently is left out.

    shape  as `guess_inputs` has it
    """
    energy = (moments.variance + moments.mean.square()).sum(1, keepdim=True)
    share = torch.where(energy > 0, energy, torch.inf).reciprocal()
    sign = moments.mean.sum(0).sign()
    means = sign * (moments.mean.square() * share).mean(0).sqrt()
    return ChannelInputs((moments.variance * share).mean(0).reshape(-1, 1, 1) * _alike_taps(shape[2:]), means)


def _alike_taps(kernel: Shape) -> Tensor:
    """The correlations of a kernel's places, float64 [taps, taps]."""
    places = torch.tensor(list(itertools.product(*map(range, kernel))), dtype=torch.float64)
    distances = (places.unsqueeze(1) - places.unsqueeze(0)).abs().sum(2)
    return NEIGHBOURS**distances


def split_channels(shape: Shape) -> int:
    """Into how many equal parts the input channels go, each at most MOST_COLUMNS columns or one channel wide."""
    channels, taps = shape[1], math.prod(shape[2:])
    parts = max(1, min(channels, math.ceil(channels * taps / MOST_COLUMNS)))
    while channels % parts:
        parts += 1
    return parts


def flipped(target: Tensor, codes: Tensor) -> Tensor:
    """The codes with each row's sum of errors brought within half a step by the cheapest changes of one.

    target   weights in steps [rows, columns]
    codes  integers of the same dtype, each the nearest to its target or one beside it
    """
    error = codes - target
    total = error.sum(1, keepdim=True)
    count = total.abs().round()
    # The larger an error of the sum's sign, the less it costs to turn it over.
    towards = error * total.sign()
    order = towards.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return codes - torch.where(rank < count, total.sign(), torch.zeros_like(total))


def flip_unbounded(target: Tensor, kernels: int) -> Tensor:
    """The codes of weights in steps [rows, columns], flipped within kernels of `columns / kernels` and within rows.

    Rounds as they come to the nearest, so that sums of rows are mended by whole kernels' cheapest values.
    """
    codes = target.round()
    columns = target.shape[1]
    if 1 < kernels < columns:
        shape = (-1, columns // kernels)
        codes = flipped(target.reshape(shape), codes.reshape(shape)).reshape(target.shape)
    return flipped(target, codes)


FARTHEST_OCTAVE = 40
"""Of the largest weight: beyond, weights are coded in units of a power of two."""
PRICED_CODES = 64
ROWS_AT_ONCE = 1 << 22
"""Weights that are coded at a time: rows do not depend on one another."""
FINEST_STEP = 2.0**-26
"""Of the largest weight: float32 knows nothing finer, and codes have 32 bits."""
TRELLIS_PRICE = 0.06
"""Half of what it is with data: nothing makes up for weights that shrink."""
MOST_TRELLIS_COLUMNS = 1 << 12
"""Wider rows take scalar codes: the time and memory of a trellis go with the square of a row."""


def free_step(deviation: float, factor: float) -> float:
    """The step of a weight of this deviation: `factor` times its square root.

    Between equal steps for all tensors and steps in proportion to the weights: a tensor of large weights stands in
    front of more of the same, but its errors also weigh more (measured, docs/methods.md).
    """
    return factor * deviation**0.5 if deviation > 0 else 1.0


def encode_free(
    weight: Tensor, config: RdConfig, whole: Whole | None, moments: InputMoments | None = None
) -> Unbounded:
    """The codes of one weight, float32 [rows, ...], on the grid that `config.step` says.

    On a trellis where the effort is high and rows are not too wide for it; else as with normal effort. Steps are no
    finer than FINEST_STEP of the largest weight; their exponent is their own.

    whole    all rows, where `weight` is some of them; the codes of a row are the same
    moments  of a convolution's inputs, where they are known
    """
    if whole is None:
        whole = measure_whole(weight, weight.device, ROWS_AT_ONCE)
    coder = whole.kept.get("rd")
    if not isinstance(coder, _Coder):
        coder = whole.kept["rd"] = _Coder(whole, tuple(weight.shape), config, moments)
    return coder.code(weight)


class _Coder:
    """Codes the rows of one weight on one grid, at prices that a sample of them tells."""

    def __init__(self, whole: Whole, shape: Shape, config: RdConfig, moments: InputMoments | None) -> None:
        """`shape` is that of any rows of the weight."""
        self.shape = shape
        if not whole.sample.numel():
            config = replace(config, prior="none", effort="fast", price=0.0)
        assert config.step is not None
        # Squares of steps would leave float32 at its ends: codes do not depend on the unit.
        octaves = math.frexp(whole.largest)[1]
        self.octaves = octaves if abs(octaves) > FARTHEST_OCTAVE else 0
        size = (1, math.prod(shape[1:]))
        grid = unbounded_grid(shape, (0,), "F32", rows=None, columns=None, size=size)
        grid = with_step(grid, max(free_step(whole.deviation, config.step), FINEST_STEP * whole.largest))
        grid = replace(grid, exponent=grid.exponent - self.octaves)
        device = whole.sample.device
        self.steps = grid_steps(grid, device)
        self.inputs = _inputs_of(shape, config, moments)
        parts = split_channels(shape) if self.inputs else size[1]
        if config.trellis and not _is_trellis(size[1] // max(parts, 1), size[1]):
            config = replace(config, effort="normal")
        if config.trellis and config.price is None:
            config = replace(config, price=TRELLIS_PRICE)
        if config.trellis and not self.inputs:
            self.inputs = [torch.eye(size[1], dtype=torch.float64)]
        self.flips = config.prior == "flips" and len(shape) > 2
        self.config, self.grid = config, replace(grid, trellis=config.trellis and not self.flips)
        self.levels, self.bits = Levels(0), whole.sample.new_zeros(0)
        if config.lam > 0 and not self.flips:
            sample = with_codes(self.grid, self._scaled(whole.sample) / self.steps)
            self.levels, bits = sample_costs(replace(sample, shape=(len(whole.sample), *shape[1:])), PRICED_CODES)
            self.bits = bits.to(device)

    def _scaled(self, rows: Tensor) -> Tensor:
        return _times_power(rows, -self.octaves) if self.octaves else rows

    def code(self, weight: Tensor) -> Unbounded:
        """The codes of some rows [rows, ...]."""
        rows = self._scaled(weight.reshape(len(weight), math.prod(self.shape[1:])))
        grid = replace(self.grid, shape=tuple(weight.shape), exponent=self.grid.exponent + self.octaves)
        return with_codes(grid, self._codes(rows) if rows.numel() else rows)

    def _codes(self, rows: Tensor) -> Tensor:
        if self.flips:
            return flip_unbounded(rows / self.steps, math.prod(self.shape[1:2]))
        bit_costs = None
        if self.config.lam > 0:
            classes = classes_of_rows(self.levels, (rows / self.steps).round().cpu().numpy())
            bit_costs = BitCosts(torch.from_numpy(classes.copy()).to(rows.device), self.bits, self.config.lam)
        if not self.inputs:
            return scalar_unbounded(rows / self.steps, bit_costs)
        if len(self.inputs) == 1:
            return _codes(rows, self.steps, self.inputs[0], bit_costs, self.config)
        width, found = rows.shape[1] // len(self.inputs), []
        for start, inputs in zip(range(0, rows.shape[1], width), self.inputs, strict=True):
            part, own = slice(start, start + width), None
            if bit_costs is not None:
                own = BitCosts(bit_costs.classes[:, part], bit_costs.bits, bit_costs.lam)
            found.append(_codes(rows[:, part], self.steps, inputs, own, self.config))
        return torch.cat(found, 1)


def _inputs_of(shape: Shape, config: RdConfig, moments: InputMoments | None) -> Sequence[ChannelInputs | Tensor]:
    """What the inputs of each part of the rows are taken to be, one for all that are alike; none without a guess."""
    if len(shape) < 3 or config.prior in ("flips", "none"):
        return []
    if config.prior == "correlated" and moments is not None:
        inputs = inputs_of_moments(shape, moments)
        width = max(1, shape[1] // split_channels(shape))
        return [inputs.part(slice(start, start + width)) for start in range(0, shape[1], width)]
    guess = guess_inputs(_part_of(shape))
    return [] if guess is None else [guess]


def _times_power(rows: Tensor, power: int) -> Tensor:
    """rows * 2**power, where 2**power may be beyond float32."""
    return rows * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)


def _part_of(shape: Shape) -> Shape:
    """The shape of one of the parts of a row that are taken for layers side by side."""
    return (shape[0], shape[1] // split_channels(shape), *shape[2:])


def _is_trellis(width: int, columns: int) -> bool:
    """Whether a path can run along whole rows: it cannot from part to part, and each survivor holds the rest of one."""
    return width in (1, columns) and columns <= MOST_TRELLIS_COLUMNS


def _codes(
    rows: Tensor, steps: Tensor, inputs: ChannelInputs | Tensor, bit_costs: BitCosts | None, config: RdConfig
) -> Tensor:
    """Codes of rows that are cut into parts as wide as the inputs, each a layer for itself."""
    width = inputs.columns if isinstance(inputs, ChannelInputs) else inputs.shape[-1]
    target = rows.reshape(-1, width)
    count = max(1, ROWS_AT_ONCE // (STATES * width if config.trellis else width))
    parts = []
    for start in range(0, len(target), count):
        part, own = target[start : start + count], None
        if bit_costs is not None:
            classes = bit_costs.classes.reshape(-1, width)[start : start + count]
            own = BitCosts(classes, bit_costs.bits, bit_costs.lam)
        parts.append(_part_codes(part, steps, inputs, own, config))
    return torch.cat(parts).reshape(rows.shape)


def _part_codes(
    target: Tensor, steps: Tensor, inputs: ChannelInputs | Tensor, bit_costs: BitCosts | None, config: RdConfig
) -> Tensor:
    damping, sweeps = config.damping, config.sweeps
    if isinstance(inputs, ChannelInputs) and not config.trellis:
        step = float(steps)
        codes = feedback_channels(target, step, inputs, bit_costs, damping=damping)
        return descend_channels(codes, target, step, inputs, bit_costs, sweeps=sweeps) if sweeps else codes
    hessian = (inputs.dense() if isinstance(inputs, ChannelInputs) else inputs).to(target.device).unsqueeze(0)
    if config.trellis:
        return trellis_codes(target, steps, hessian, bit_costs, damping=damping)
    codes = feedback_unbounded(target, steps, hessian, bit_costs, damping=damping)
    return descend_unbounded(codes, target, steps, hessian, bit_costs, sweeps=sweeps) if sweeps else codes
