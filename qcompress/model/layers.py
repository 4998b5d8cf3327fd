"""A layer as a matrix product: its inputs as rows of a matrix, whatever it slides or scatters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class MatrixLayer:
    """A layer whose output is weight rows times input columns: for group g, out[g] = inputs[g] @ rows[g].T + bias.

    groups  how many independent products: of a depthwise convolution, one a channel
    """

    module: nn.Module
    groups: int

    def columns(self, x: Tensor) -> Tensor:
        """The inputs float32 [groups, positions, columns] of x, positions in the order of samples, then places."""
        module: Any = self.module
        if isinstance(module, CONVOLUTIONS):
            return _patches(module, x)
        if isinstance(module, TRANSPOSED):
            return _spread_patches(module, x)
        return x.reshape(1, -1, x.shape[-1])

    def outputs(self, y: Tensor) -> Tensor:
        """The layer's output y as [positions, channels], positions as in `columns`."""
        if isinstance(self.module, (*CONVOLUTIONS, *TRANSPOSED)):
            return y.movedim(1, -1).reshape(-1, y.shape[1])
        return y.reshape(-1, y.shape[-1])


def matrix_layer(module: nn.Module) -> MatrixLayer | None:
    """The module as a matrix product, or None for one that is none, or that computes more than its class."""
    if isinstance(module, CONVOLUTIONS):
        plain = type(module).forward in {kind.forward for kind in CONVOLUTIONS}
        return MatrixLayer(module, module.groups) if plain else None
    if isinstance(module, TRANSPOSED):
        plain = type(module).forward in {kind.forward for kind in TRANSPOSED}
        return MatrixLayer(module, 1) if plain and module.groups == 1 else None
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return MatrixLayer(module, 1)
    # transformers' Conv1D: a linear layer whose weight lies transposed.
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return MatrixLayer(module, 1)
    return None


def _patches(module: Any, x: Tensor) -> Tensor:
    """What each place of the output sees: [groups, samples * places, channels / groups * kernel]."""
    dimensions = len(module.kernel_size)
    x = _batched(x, dimensions)
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    return _unfold(x, module.kernel_size, module.stride, module.dilation, module.groups)


def _spread_patches(module: Any, x: Tensor) -> Tensor:
    """A transposed convolution is a convolution with the mirrored kernel over inputs spread by its stride."""
    dimensions = len(module.kernel_size)
    x = _batched(x, dimensions)
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(slice(None), slice(None), *(slice(None, None, stride) for stride in module.stride))] = x
    padding = []
    for kernel, dilation, pad, more in zip(
        module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True
    ):
        edge = dilation * (kernel - 1) - pad
        padding = [edge, edge + more, *padding]
    spread = F.pad(spread, padding)
    columns = _unfold(spread, module.kernel_size, (1,) * dimensions, module.dilation, 1)
    mirrored = columns.reshape(*columns.shape[:2], x.shape[1], *module.kernel_size)
    return mirrored.flip(list(range(3, 3 + dimensions))).reshape(columns.shape)


def _batched(x: Tensor, dimensions: int) -> Tensor:
    return x if x.ndim == dimensions + 2 else x.unsqueeze(0)


def _unfold(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Tensor:
    samples, channels = x.shape[:2]
    for axis, (size, step, spacing) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        # Unfolded dimensions come last, one after another, in the order of the kernel's.
        x = x.unfold(axis, spacing * (size - 1) + 1, step)[..., ::spacing]
    places = x.shape[2 : 2 + len(kernel)]
    x = x.reshape(samples, groups, channels // groups, math.prod(places), math.prod(kernel))
    return x.permute(1, 0, 3, 2, 4).reshape(groups, samples * math.prod(places), -1)


@dataclass
class Gram:
    """Second moments of a layer's inputs: what its output error depends on.

    hessian  float64 [groups, columns, columns], the mean over positions of x^ x^T, x^ from the quantized network
    cross    the mean of x x^^T, x from the full-precision network; None where both networks gave the same
    mean     float64 [groups, columns], of x^; `clean_mean` of x
    count    positions
    """

    hessian: Tensor
    cross: Tensor | None
    mean: Tensor
    clean_mean: Tensor
    count: int


def measure_gram(layer: MatrixLayer, noisy: list[Tensor], clean: list[Tensor] | None) -> Gram:
    """The Gram of a layer from its inputs, batch by batch; `clean` None where there is only one network.

    Sums run in float32 within a batch and in float64 over batches.
    """
    hessian: Tensor | None = None
    cross: Tensor | None = None
    mean = clean_mean = torch.zeros(())
    count = 0
    for index, x in enumerate(noisy):
        columns = layer.columns(x.float())
        own = torch.matmul(columns.transpose(1, 2), columns).double()
        first = columns.sum(1, dtype=torch.float64)
        hessian = own if hessian is None else hessian.add_(own)
        mean = mean + first
        count += columns.shape[1]
        if clean is not None:
            other = layer.columns(clean[index].float())
            both = torch.matmul(other.transpose(1, 2), columns).double()
            cross = both if cross is None else cross.add_(both)
            clean_mean = clean_mean + other.sum(1, dtype=torch.float64)
    assert hessian is not None and count
    mean = mean / count
    return Gram(
        hessian=hessian / count,
        cross=None if cross is None else cross / count,
        mean=mean,
        clean_mean=mean if clean is None else clean_mean / count,
        count=count,
    )
