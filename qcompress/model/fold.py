"""Batch norms are folded into the layers before them; what stays of one adds a bias and keeps its statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.coding.grids import TORCH_DTYPES
from qcompress.model.graph import batch_norm_of, layer_call, read_once
from qcompress.model.layers import CONVOLUTIONS, TRANSPOSED
from qcompress.model.live import LiveModel, find_tensor, layer_name, put_tensors
from qcompress.model.operations import BatchNorm
from qcompress.types.encoded import Encoded, Fitted, Kept
from qcompress.types.plan import Decision

PLAIN = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True)
class Statistics:
    """What a batch norm says of its layer's channels, all float64 [channels].

    before     mean of the layer's outputs
    after      mean of what the batch norm makes of them
    deviation  the standard deviation of what the batch norm makes of them, not negative
    """

    before: Tensor
    after: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class NormedLayer:
    """A layer with the batch norm behind it, if it has one.

    weight  in its own shape
    bias    the layer's own, where it has one
    folded  whether the batch norm does no more than move the outputs from one mean to another
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm | None = None
    statistics: Statistics | None = None
    folded: bool = False

    @property
    def can_move(self) -> bool:
        """Whether it has a home for a bias."""
        return self.bias is not None or self.statistics is not None

    @property
    def kernels(self) -> Tensor:
        """The weight as [groups, outputs a group, inputs a group, kernel positions]."""
        return kernels(self.module, self.weight)

    def scaled_outputs(self, factor: Tensor) -> NormedLayer:
        """The layer with its outputs, and those of its folded batch norm, times factor [channels] above 0."""
        statistics = self.statistics
        if statistics is not None:
            parts = (statistics.before, statistics.after, statistics.deviation)
            statistics = Statistics(*(part * factor for part in parts))
        return replace(self.with_outputs_times(factor), statistics=statistics)

    def with_outputs_times(self, factor: Tensor) -> NormedLayer:
        """The layer with its own outputs times factor [channels], whatever its batch norm makes of them."""
        bias = None if self.bias is None else self.bias.double().mul(factor).to(self.bias.dtype)
        return replace(self, weight=self._weight_times(factor.reshape(self.kernels.shape[0], -1, 1, 1)), bias=bias)

    def scaled_inputs(self, factor: Tensor) -> NormedLayer:
        """The layer that gives for inputs divided by factor [channels] what this one gives."""
        return replace(self, weight=self._weight_times(factor.reshape(self.kernels.shape[0], 1, -1, 1)))

    def _weight_times(self, factor: Tensor) -> Tensor:
        scaled = self.kernels.double().mul(factor).to(self.weight.dtype)
        if isinstance(self.module, TRANSPOSED):
            scaled = scaled.transpose(1, 2)
        return scaled.reshape(self.weight.shape)

    def response(self, x: Tensor) -> Tensor:
        """What the weight makes of inputs that have one value a channel, x float64 [inputs]: float64 [outputs].

        For a transposed convolution the mean over places: each meets one of so many kernel positions.
        """
        response = constant_response(self.kernels, x)
        module: Any = self.module
        return response / math.prod(module.stride) if isinstance(module, TRANSPOSED) else response

    def moved(self, shift: Tensor) -> NormedLayer:
        """The layer with shift [channels] added to what comes out of its bias, or its batch norm.

        Statistics tell what comes out as long as the shift makes up for one of its inputs or its weights.
        """
        if self.bias is not None:
            return replace(self, bias=self.bias.double().add(shift).to(self.bias.dtype))
        assert self.statistics is not None
        return replace(self, statistics=replace(self.statistics, before=self.statistics.before - shift))

    def lowered(self, amount: Tensor) -> NormedLayer:
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
            found = {self.norm.running_mean: self.statistics.before.to(dtype)}
            if self.folded:
                found, gain = _identity_norm(self.norm, self.statistics, dtype)
                stored = self.with_outputs_times(1 / gain)
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
    """The weight of a linear layer or a convolution as [groups, outputs a group, inputs a group, kernel positions]."""
    groups: Any = getattr(module, "groups", 1)
    first, second = weight.shape[:2]
    split = weight.reshape(groups, first // groups, second, math.prod(weight.shape[2:]))
    return split.transpose(1, 2) if isinstance(module, TRANSPOSED) else split


def constant_response(weight: Tensor, x: Tensor) -> Tensor:
    """What kernels give for one value a channel, float64 [outputs].

    weight  [groups, outputs a group, inputs a group, kernel positions]
    x       float64 [inputs]
    """
    groups, _, width, _ = weight.shape
    return torch.einsum("goi,gi->go", weight.sum(3, dtype=torch.float64), x.reshape(groups, width)).flatten()


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, and computes no more than that."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in PLAIN)


def is_free(live: LiveModel, layer: str) -> bool:
    """Whether a layer is plain, is called once, and shares its tensors with no other."""
    module = live.module.get_submodule(layer)
    tensors = [f"{layer}.{part}" for part, _ in module.named_parameters(recurse=False)]
    return is_plain(module) and layer_call(live, layer) is not None and all(read_once(live, one) for one in tensors)


def read_layer(live: LiveModel, layer: str, norm: BatchNorm | None = None) -> NormedLayer:
    """A free layer of the network as it is, with its batch norm."""
    module: Any = live.module.get_submodule(layer)
    bias = None if module.bias is None else module.bias.detach()
    plain = NormedLayer(layer, module, module.weight.detach(), bias)
    if norm is None:
        return plain
    mean, variance = _tensor(live, norm.running_mean), _tensor(live, norm.running_var)
    gamma = torch.ones_like(mean) if norm.weight is None else _tensor(live, norm.weight)
    after = torch.zeros_like(mean) if norm.bias is None else _tensor(live, norm.bias)
    deviation = gamma.abs() * (variance / (variance + norm.eps)).sqrt()
    return replace(plain, norm=norm, statistics=Statistics(mean, after, deviation))


def fold_layer(live: LiveModel, layer: str, norm: BatchNorm) -> NormedLayer:
    """A free layer with its affine batch norm folded in: weight * gamma / sqrt(variance + eps), and likewise its bias.

    The batch norm keeps the statistics of what comes out, so that what reads it still finds N(beta, gamma**2).
    """
    assert norm.weight is not None
    plain = read_layer(live, layer, norm)
    assert plain.statistics is not None
    gain = _tensor(live, norm.weight) / (_tensor(live, norm.running_var) + norm.eps).sqrt()
    statistics = replace(plain.statistics, before=plain.statistics.before * gain)
    return replace(plain.with_outputs_times(gain), statistics=statistics, folded=True)


def _tensor(live: LiveModel, name: str) -> Tensor:
    return find_tensor(live.module, name).detach().double()


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
        if norm is None or decision.tensor.name != f"{layer}.weight":
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
