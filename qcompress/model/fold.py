"""Batch norms folded into the layers before them; what stays of a batch norm adds a bias and keeps its statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.coding.affine import TORCH_DTYPES
from qcompress.model.graph import BatchNorm, batch_norm_of, layer_call, read_once
from qcompress.model.layers import CONVOLUTIONS, TRANSPOSED
from qcompress.model.live import LiveModel, find_tensor, layer_name, put_tensors
from qcompress.types import Decision, Encoded, Fitted, Kept

_PLAIN = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True)
class Statistics:
    """What the batch norm of a folded layer says of its channels, all float64 [channels].

    before     mean of the layer's outputs
    after      mean of what the batch norm makes of them
    deviation  the standard deviation of both, not negative
    """

    before: Tensor
    after: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class FoldedLayer:
    """A layer whose batch norm, if it has one, does no more than move its outputs from one mean to another.

    weight  in its own shape
    bias    the layer's own, where it has one
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm | None = None
    statistics: Statistics | None = None

    @property
    def can_move(self) -> bool:
        """Whether it has a home for a bias."""
        return self.bias is not None or self.statistics is not None

    @property
    def kernels(self) -> Tensor:
        """The weight as [groups, outputs a group, inputs a group, taps]."""
        return kernels(self.module, self.weight)

    def scaled_outputs(self, factor: Tensor) -> FoldedLayer:
        """The layer with its outputs, and its batch norm's, times factor [channels] above 0."""
        statistics = self.statistics
        if statistics is not None:
            parts = (statistics.before, statistics.after, statistics.deviation)
            statistics = Statistics(*(part * factor for part in parts))
        bias = None if self.bias is None else self.bias.double().mul(factor).to(self.bias.dtype)
        view = factor.reshape(self.kernels.shape[0], -1, 1, 1)
        return replace(self, weight=self._weight_times(view), bias=bias, statistics=statistics)

    def scaled_inputs(self, factor: Tensor) -> FoldedLayer:
        """The layer that gives for inputs divided by factor [channels] what this one gives."""
        return replace(self, weight=self._weight_times(factor.reshape(self.kernels.shape[0], 1, -1, 1)))

    def _weight_times(self, factor: Tensor) -> Tensor:
        scaled = self.kernels.double().mul(factor).to(self.weight.dtype)
        if isinstance(self.module, TRANSPOSED):
            scaled = scaled.transpose(1, 2)
        return scaled.reshape(self.weight.shape)

    def moved(self, shift: Tensor) -> FoldedLayer:
        """The layer with shift [channels] added to what comes out of its bias, or its batch norm.

        Statistics tell what comes out as long as the shift makes up for one of its inputs or its weights.
        """
        if self.bias is not None:
            return replace(self, bias=self.bias.double().add(shift).to(self.bias.dtype))
        assert self.statistics is not None
        return replace(self, statistics=replace(self.statistics, before=self.statistics.before - shift))

    def lowered(self, amount: Tensor) -> FoldedLayer:
        """The layer with amount [channels] taken from what its batch norm gives, whose mean becomes as much less."""
        assert self.statistics is not None
        return replace(self, statistics=replace(self.statistics, after=self.statistics.after - amount))

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors by name: under them the module and its batch norm, as they are, compute this layer.

        dtype  of the bias and of the batch norm on the disk: they come rounded to it, and what that makes of the batch
           norm's gain the weight takes back
        """
        found: dict[str, Tensor] = {}
        stored = self
        if self.norm is not None and self.statistics is not None:
            found, gain = _identity_norm(self.norm, self.statistics, dtype)
            stored = replace(self, statistics=None).scaled_outputs(1 / gain)
        if stored.bias is not None:
            found[f"{self.name}.bias"] = stored.bias.to(dtype)
        found = {name: value.to(self.weight.dtype) for name, value in found.items()}
        return found | {f"{self.name}.weight": stored.weight}


def _identity_norm(norm: BatchNorm, statistics: Statistics, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a batch norm that has these statistics and moves what it gets from `before` to `after`; its gain.

    The gain is 1 but for rounding: sqrt(variance + eps) is the batch norm's weight. Where the variance does not fit the
    dtype, the nearest that does takes its place, and the gain stays 1.
    """
    assert norm.weight is not None and norm.bias is not None
    most = torch.finfo(dtype).max / 2
    variance = statistics.deviation.square().clamp_max(most).to(dtype).double()
    weight = (variance + norm.eps).sqrt().to(dtype).double()
    gain = weight / (variance + norm.eps).sqrt()
    parts = {
        # What is subtracted comes after the layer, which has been divided by the gain.
        norm.running_mean: (statistics.before / gain).to(dtype),
        norm.running_var: variance,
        norm.weight: weight,
        norm.bias: statistics.after.to(dtype),
    }
    return parts, gain


def kernels(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a linear layer or a convolution as [groups, outputs a group, inputs a group, taps]."""
    groups: Any = getattr(module, "groups", 1)
    first, second = weight.shape[:2]
    split = weight.reshape(groups, first // groups, second, math.prod(weight.shape[2:]))
    return split.transpose(1, 2) if isinstance(module, TRANSPOSED) else split


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, and computes no more than that."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _PLAIN)


def is_free(live: LiveModel, layer: str) -> bool:
    """Whether a layer is plain, is called once, and shares its tensors with no other."""
    module = live.module.get_submodule(layer)
    tensors = [f"{layer}.{part}" for part, _ in module.named_parameters(recurse=False)]
    return is_plain(module) and layer_call(live, layer) is not None and all(read_once(live, one) for one in tensors)


def read_layer(live: LiveModel, layer: str) -> FoldedLayer:
    """A plain layer of the network as it is, without its batch norm."""
    module: Any = live.module.get_submodule(layer)
    return FoldedLayer(layer, module, module.weight.detach(), None if module.bias is None else module.bias.detach())


def fold_layer(live: LiveModel, layer: str, norm: BatchNorm) -> FoldedLayer:
    """A free layer with its affine batch norm folded in: weight * gamma / sqrt(variance + eps), and likewise its bias.

    The batch norm keeps the statistics of what comes out, so that what reads it still finds N(beta, gamma**2).
    """
    assert norm.weight is not None and norm.bias is not None
    mean, variance, gamma, beta = (
        find_tensor(live.module, name).double()
        for name in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    gain = gamma / (variance + norm.eps).sqrt()
    statistics = Statistics(before=mean * gain, after=beta, deviation=(variance.sqrt() * gain).abs())
    return replace(read_layer(live, layer).scaled_outputs(gain), norm=norm, statistics=statistics)


def why_not_folded(live: LiveModel, layer: str, norm: BatchNorm) -> str | None:
    """Why a layer's batch norm cannot be folded into it, or None."""
    if not is_free(live, layer):
        return "the layer is called more than once, shares its weight, or computes more than its class says"
    if not norm.affine:
        return "its batch norm has no weight and bias to hold what is folded"
    return None


def fold_batch_norms(live: LiveModel, decisions: Sequence[Decision]) -> Fitted:
    """The batch norms of the decided layers folded in `live.quantized`, the weights themselves not yet encoded.

    returns  `encoded` holds the adjusted batch norms and biases, `references` the folded weights; notes name what was
             left as it is
    """
    encoded: dict[str, Encoded] = {}
    references: dict[str, Tensor] = {}
    notes = []
    for decision in decisions:
        layer = layer_name(decision.tensor.name)
        norm = batch_norm_of(live, layer)
        if norm is None:
            continue
        reason = why_not_folded(live, layer, norm)
        if reason is not None:
            notes.append(f"{layer}: batch norm not folded: {reason}")
            continue
        tensors = fold_layer(live, layer, norm).tensors(TORCH_DTYPES[decision.tensor.dtype])
        put_tensors(live.quantized, tensors)
        references[decision.tensor.name] = tensors.pop(f"{layer}.weight")
        encoded |= {name: Kept(value) for name, value in tensors.items()}
    return Fitted(encoded, references=references, notes=tuple(notes))
