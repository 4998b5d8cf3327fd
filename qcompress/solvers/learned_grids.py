"""Values go forward on grids that are trained, and gradients come back as the papers give them.

LSQ: Esser et al. 2020, arXiv 1902.08153, equations 1 to 3 and section 2.2: values are clipped, then rounded. PACT: Choi
et al. 2018, arXiv 1805.06085, equations 1 to 3. DoReFa: Zhou et al. 2016, arXiv 1606.06160, equations 7 to 9.
A grid's scale is what the disk will hold, so that training sees what will be stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.coding.grids import TORCH_DTYPES, from_half, round_scale
from qcompress.coding.rows import blocks_from_rows, grid_shape, rows_from_weight, weight_from_rows
from qcompress.types.encoded import Affine
from qcompress.types.plan import Decision, row_shape

COARSE = tuple(-eighths / 8 for eighths in range(48))
FINE = tuple(places / 40 for places in (-4, -3, -2, -1, 1, 2, 3, 4))
"""Powers of two that multiply a step that is tried."""


def blocks_of(weight: Tensor, decision: Decision) -> Tensor:
    """The weight as float32 [blocks, length], one block a grid.

    A last group that is shorter repeats its values until it is as long as the others, which leaves its range as it is,
    and its mean nearly so.
    """
    config = decision.config
    rows = rows_from_weight(weight, decision.axis).flatten(1)
    columns, size = rows.shape[1], config.group_size
    if size is not None and columns % size:
        whole = columns - columns % size
        missing = torch.arange(size - columns % size, device=rows.device)
        rows = torch.cat((rows, rows[:, whole + missing % (columns - whole)]), 1)
    return blocks_from_rows(rows, config.unit, config.group_size)


def weight_of_blocks(blocks: Tensor, decision: Decision) -> Tensor:
    """The inverse of `blocks_of`, each value as the checkpoint's dtype holds it; the gradient passes straight through.

    returns  float32, the weight's shape
    """
    tensor, dtype = decision.tensor, TORCH_DTYPES[decision.tensor.dtype]
    weight = weight_from_rows(_without_repeats(blocks, decision), tensor.shape, decision.axis)
    if dtype in (torch.float32, torch.float64):
        return weight
    # Both numbers are near each other, so that neither difference nor sum rounds.
    return weight + (weight.detach().to(dtype).float() - weight.detach())


def _without_repeats(blocks: Tensor, decision: Decision) -> Tensor:
    """Blocks [blocks, length] as rows [rows, columns], what `blocks_of` added left out."""
    rows = row_shape(decision.tensor.shape, decision.axis)
    return blocks.reshape(rows[0], -1)[:, : math.prod(rows[1:])]


def affine_of_blocks(codes: Tensor, scale: Tensor, exponent: int, decision: Decision) -> Affine:
    """Codes [blocks, length] of a symmetric grid, of any dtype, with their scales float16 [blocks], on the CPU."""
    config, tensor = decision.config, decision.tensor
    rows = row_shape(tensor.shape, decision.axis)
    return Affine(
        codes=_without_repeats(codes.to(torch.uint8), decision).cpu().contiguous(),
        bits=config.code_bits,
        scale=scale.cpu().view(grid_shape(rows, config.unit, config.group_size)),
        exponent=exponent,
        shape=tensor.shape,
        convention=config.stored_convention,
        axis=decision.axis,
        dtype=tensor.dtype,
        group_size=config.group_size,
    )


def expected_size(decision: Decision) -> float:
    """Of what size a layer's weights are expected to become that is zero: the bound that layers are initialized in,
    1 / sqrt(fan-in)."""
    rows = row_shape(decision.tensor.shape, decision.axis)
    return 1 / math.sqrt(max(math.prod(rows[1:]), 1))


def step_start(mean: Tensor, most: int) -> Tensor:
    """Where a step starts: 2 mean|v| / sqrt(Qp).

    mean  of the magnitudes on each grid; most  the largest level, Qp
    """
    return 2 * mean / math.sqrt(most)


def least_error_step(blocks: Tensor, bits: int) -> Tensor:
    """The step of least squared error for each block's levels -2**(bits-1) to 2**(bits-1) - 1, float32 [blocks].

    Of steps an eighth of an octave apart, down from the one that just holds the largest magnitude, then of finer ones
    about the best.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best: Tensor = blocks.abs().amax(1) / high
    least = torch.full_like(best, torch.inf)
    for exponents in (COARSE, FINE):
        centre = best
        for exponent in exponents:
            step = centre * 2.0**exponent
            column = step.unsqueeze(1).clamp_min(2.0**-126)
            errors = ((blocks / column).clamp_(low, high).round_().mul_(column) - blocks).square_().sum(1)
            best = torch.where(errors < least, step, best)
            least = torch.minimum(errors, least)
    return best


def gradient_share(numbers: int, most: int) -> float:
    """What a step's gradient is multiplied by: 1 / sqrt(N Qp), for N numbers on the grid."""
    return 1 / math.sqrt(numbers * most)


def least_scale(exponent: int) -> float:
    """The least scale that float16 times 2**exponent holds with all its bits, and whose reciprocal float32 holds."""
    return 2.0 ** max(exponent - 12, -126)


def weights_on_steps(blocks: Tensor, step: Tensor, bits: int, exponent: int) -> Tensor:
    """Weights on the levels -2**(bits-1) to 2**(bits-1) - 1 of their steps, with LSQ's gradients.

    blocks   float32 [blocks, length]
    step     float32 [blocks], at least `least_scale`; stored as float16 times 2**exponent
    returns  float32 [blocks, length]
    """
    found: Tensor = _WeightsOnSteps.apply(blocks, step, bits, exponent)  # type: ignore[no-untyped-call]
    return found


class _WeightsOnSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, step: Tensor, bits: int, exponent: int) -> Tensor:
        scale = from_half(round_scale(step, exponent), exponent)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        zero = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        values = torch.fake_quantize_per_channel_affine(blocks, scale, zero, 0, low, high)
        ctx.save_for_backward(blocks, values, scale)
        ctx.ends = low, high
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        blocks, values, scale = ctx.saved_tensors
        low, high = ctx.ends
        column = scale.unsqueeze(1)
        inside = slope * ((blocks > low * column) & (blocks < high * column))
        # Within, (rounded - v) / step; beyond, the level at the end, which is value / step.
        of_step = ((slope * values).sum(1) - (inside * blocks).sum(1)) / scale
        return inside, of_step * gradient_share(blocks.shape[1], high), None, None


def inputs_on_steps(x: Tensor, step: Tensor, zero_point: int, bits: int, share: float) -> Tensor:
    """Inputs on a grid of codes 0 to 2**bits - 1, with LSQ's gradients.

    x           float32, any shape
    step        float32 [1], above 0
    zero_point  the code of zero
    share       what the step's gradient is multiplied by
    """
    found: Tensor = _InputsOnSteps.apply(x, step, zero_point, bits, share)  # type: ignore[no-untyped-call]
    return found


class _InputsOnSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: int, bits: int, share: float) -> Tensor:
        values = _on_grid(x, step, zero_point, bits)
        ctx.save_for_backward(x, values, step)
        ctx.grid, ctx.share = (zero_point, bits), share
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, values, step = ctx.saved_tensors
        low, high = _ends(step, *ctx.grid)
        inside = _between(slope, x, low, high)
        of_step = (_dot(slope, values) - _dot(inside, x)) / step
        return inside, of_step * ctx.share, None, None, None


def inputs_below_clip(x: Tensor, clip: Tensor, zero_point: int, bits: int) -> Tensor:
    """Inputs on a grid of codes 0 to 2**bits - 1 whose last level is the clip, with PACT's gradients.

    x           float32, any shape
    clip        float32 [1], above 0: values at the clip and beyond give it their gradient
    zero_point  the code of zero, below the last; where it is not 0 the lower end moves with the clip, and
                its values count too, which the paper has no need of
    """
    found: Tensor = _InputsBelowClip.apply(x, clip, zero_point, bits)  # type: ignore[no-untyped-call]
    return found


class _InputsBelowClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, zero_point: int, bits: int) -> Tensor:
        scale = clip / (2**bits - 1 - zero_point)
        ctx.save_for_backward(x, scale, clip)
        ctx.grid = zero_point, bits
        return _on_grid(x, scale, zero_point, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, clip = ctx.saved_tensors
        low, _ = _ends(scale, *ctx.grid)
        high = float(clip)
        # Comparisons into a buffer of x's dtype give the mask as numbers in one pass.
        mask = torch.ge(x, high, out=torch.empty_like(x))
        of_clip = _dot(slope, mask)
        if low < 0:
            of_clip = of_clip + low / high * _dot(slope, torch.le(x, low, out=mask))
        return _between(slope, x, low, high), of_clip.reshape(1), None, None


def _on_grid(x: Tensor, scale: Tensor, zero_point: int, bits: int) -> Tensor:
    """What torch's own fake quantization gives, in passes that use the whole width of the processor."""
    most = 2**bits - 1 - zero_point
    return torch.mul(x, scale.reciprocal()).round_().clamp_(-zero_point, most).mul_(scale)


def _ends(scale: Tensor, zero_point: int, bits: int) -> tuple[float, float]:
    """The values of the first and of the last code."""
    step = float(scale)
    return -zero_point * step, (2**bits - 1 - zero_point) * step


def _between(slope: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """The slope where low < x < high, else 0."""
    found: Tensor = torch.ops.aten.hardtanh_backward(slope, x, low, high)
    return found


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """The sum of products. It is taken in the order in which `one` lies in memory: channels last, nothing is copied."""
    order = sorted(range(one.ndim), key=one.stride, reverse=True)
    found: Tensor = torch.dot(one.permute(order).reshape(-1), other.permute(order).reshape(-1))
    return found


def squash(blocks: Tensor, bits: int, *, unit: bool) -> Tensor:
    """What DoReFa rounds: tanh(w), spread over [-1, 1] in each block where `unit`; at 1 bit the weights themselves.

    The largest magnitude is taken for a constant: its gradient would fall on one weight alone.

    blocks  float32 [blocks, length]
    """
    if bits == 1:
        return blocks
    bent = blocks.tanh()
    return bent / _largest(bent).unsqueeze(1) if unit else bent


def span_scale(squashed: Tensor, bits: int) -> Tensor:
    """The step of the 2**bits levels that span what `squash` gave, or at 1 bit lie at its mean magnitude.

    squashed  float32 [blocks, length]
    returns   float32 [blocks]
    """
    if bits == 1:
        return squashed.detach().abs().mean(1).mul(2)
    return _largest(squashed).mul(2 / (2**bits - 1))


def _largest(blocks: Tensor) -> Tensor:
    return blocks.detach().abs().amax(1).clamp_min(2.0**-126)


def nearest_middle(squashed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes float32 in [0, 2**bits) of the levels scale * (code - (2**bits - 1) / 2) nearest to each value.

    squashed  float32 [blocks, length]
    scale     float32 [blocks], above 0
    """
    # Half up, so that 1 bit is the sign with that of zero positive.
    return (squashed / scale.unsqueeze(1) + 2.0 ** (bits - 1)).floor().clamp(0, 2**bits - 1)
