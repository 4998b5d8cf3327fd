"""Batch norms tell the means and ranges of the values behind them, carried on through the graph without any data.

Nagel et al. 2019, arXiv 1906.04721, sections 4.2.1 and 5. A channel behind a batch norm is taken for normal, with the
batch norm's bias and weight as mean and deviation; a sum for normal, with the sums of means and of variances.
Zeros that a layer pads with are not counted, and pooling leaves a channel as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qcompress.model.chains import keeps_channels
from qcompress.model.graph import node_numbers, node_shapes
from qcompress.model.layers import CONVOLUTIONS, TRANSPOSED
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.operations import BatchNorm, batch_norm_at, clip_bounds, inputs_of, kind_of, option, padding_at
from qcompress.types.run import InputMoments

RANGE_DEVIATIONS = 6.0


@dataclass(frozen=True)
class ClippedNormal:
    """Values modelled as min(max(x, low), high) with x normal, one model a channel: float64 [channels].

    mean_known  false behind a max-pool, which moves the mean in no closed form, and the range not at all
    """

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor
    mean_known: bool = True

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the values."""
        return clipped_moments(self.mean, self.deviation, self.low, self.high)

    @property
    def range(self) -> tuple[float, float]:
        """The ends that hold six deviations of every channel."""
        reach = RANGE_DEVIATIONS * self.deviation
        low, high = (_bounded(end, self.low, self.high) for end in (self.mean - reach, self.mean + reach))
        return float(low.min()), float(high.max())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> ClippedNormal:
        """All four tensors changed alike."""
        low, high = change(self.low), change(self.high)
        return ClippedNormal(change(self.mean), change(self.deviation), low, high, self.mean_known)

    def clipped(self, low: Tensor | float = -math.inf, high: Tensor | float = math.inf) -> ClippedNormal:
        """min(max(value, low), high), bounds as numbers or one a channel."""
        low, high = (torch.as_tensor(end).to(self.mean) for end in (low, high))
        return replace(self, low=_bounded(self.low, low, high), high=_bounded(self.high, low, high))

    def bent(self, slope: Tensor) -> ClippedNormal:
        """max(value, 0) + slope * min(value, 0), taken for normal; slope one number or one a channel."""
        (above, above_variance), (below, below_variance) = self.clipped(low=0.0).moments, self.clipped(high=0.0).moments
        mean = above + slope * below
        # One of the two parts is always zero, and so is their product.
        second = above_variance + above.square() + slope.square() * (below_variance + below.square())
        return replace(normal(mean, (second - mean.square()).clamp_min(0).sqrt()), mean_known=self.mean_known)

    def plus(self, other: ClippedNormal) -> ClippedNormal:
        """The sum of the two as if independent, taken for normal within the sums of their bounds."""
        (mean, variance), (other_mean, other_variance) = self.moments, other.moments
        return ClippedNormal(
            mean + other_mean,
            (variance + other_variance).sqrt(),
            self.low + other.low,
            self.high + other.high,
            self.mean_known and other.mean_known,
        )


def normal(mean: Tensor, deviation: Tensor) -> ClippedNormal:
    """The normal itself, cut off nowhere."""
    bound = torch.full_like(mean, math.inf)
    return ClippedNormal(mean, deviation, -bound, bound)


def clipped_moments(mean: Tensor, deviation: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of min(max(x, low), high) for normal x.

    Nagel et al. 2019, arXiv 1906.04721, appendix C, gives the mean; the variance follows in the same way.

    mean, deviation  float64, of one shape; a deviation of 0 is a constant, its sign does not matter
    low, high        of the same shape, low <= high; infinite where there is no bound
    """
    deviation = deviation.abs()
    safe = torch.where(deviation > 0, deviation, 1.0)
    below, above = (low - mean) / safe, (high - mean) / safe
    mass_below, mass_above = torch.special.ndtr(below), torch.special.ndtr(-above)
    inside = 1 - mass_below - mass_above
    density_below, density_above = _density(below), _density(above)
    # A bound at infinity has neither mass nor density: 0 keeps it from making a product with infinity.
    bottom, top = torch.where(low.isinf(), 0.0, low), torch.where(high.isinf(), 0.0, high)
    first = bottom * mass_below + top * mass_above + mean * inside + safe * (density_below - density_above)
    second = (
        bottom.square() * mass_below
        + top.square() * mass_above
        + (mean.square() + safe.square()) * inside
        + safe * ((mean + bottom) * density_below - (mean + top) * density_above)
    )
    spread = deviation > 0
    variance = (second - first.square()).clamp_min(0)
    return torch.where(spread, first, _bounded(mean, low, high)), torch.where(spread, variance, 0.0)


def _density(x: Tensor) -> Tensor:
    """The standard normal density, 0 at infinity."""
    return (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)


def _bounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def input_moments(
    live: LiveModel, module: nn.Module, caps: Mapping[str, Tensor] | None = None
) -> dict[str, ClippedNormal]:
    """What each compressed layer of `module`, a copy of the network, sees; layers without a closed form are left out.

    caps  of modules' outputs, see Fitted
    """
    walk = _Walk(live, module, caps or {})
    found: dict[str, ClippedNormal] = {}
    for node in live.graph.nodes:
        source = walk.known.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if source is not None and node.op == "call_module" and str(node.target) in live.layers:
            found[str(node.target)] = source
        value = walk.value_at(node, source)
        if value is not None:
            cap = walk.caps.get(str(node.target)) if node.op == "call_module" else None
            walk.known[node] = value if cap is None else value.clipped(high=cap.double())
    return found


def convolution_moments(live: LiveModel) -> dict[str, InputMoments]:
    """The moments of what convolutions see in the network as it was, by the weight's name.

    Those whose input no batch norm tells of are left out, and so are all of a network that cannot be traced. A max-pool
    is taken to leave a channel's moments as they are.
    """
    found: dict[str, InputMoments] = {}
    for name, model in (input_moments(live, live.module) if live.traced else {}).items():
        module: Any = live.module.get_submodule(name)
        if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) or len(model.mean) != module.in_channels:
            continue
        if isinstance(module, TRANSPOSED) and module.groups > 1:
            continue
        mean, variance = (moment.reshape(module.groups, -1).cpu() for moment in model.moments)
        energy = mean.square() + variance
        if bool(energy.isfinite().all() and energy.any()):
            found[f"{name}.weight"] = InputMoments(mean, variance)
    return found


@dataclass(frozen=True)
class _Walk:
    """The models of the nodes that have one, gathered node by node."""

    live: LiveModel
    module: nn.Module
    caps: Mapping[str, Tensor]
    known: dict[fx.Node, ClippedNormal] = field(default_factory=dict)

    def value_at(self, node: fx.Node, source: ClippedNormal | None) -> ClippedNormal | None:
        """The model of what a node gives, from that of its first input and of those before."""
        norm = batch_norm_at(self.live.module, node)
        if norm is not None:
            return self._normed(norm)
        kind = kind_of(self.live.module, node)
        if kind in ("add", "concatenate"):
            return self._joined(node, kind == "add")
        if source is None:
            return None
        match kind:
            case "clip":
                bounds = clip_bounds(self.live.module, node)
                return None if bounds is None else source.clipped(*bounds)
            case "slope":
                return source.bent(self._slope(node))
            case "identity":
                return source
            case "pad" if (extra := self._channel_padding(node)) is not None:
                return source.mapped(lambda part: F.pad(part, extra))
            case _ if keeps_channels(self.live, node):
                repeats = node_shapes(self.live)[node][1] // len(source.mean)
                value = source.mapped(lambda part: part.repeat_interleave(repeats))
                return replace(value, mean_known=value.mean_known and kind != "max_pool")
            case _:
                return None

    def _tensor(self, name: str) -> Tensor:
        return find_tensor(self.module, name).double()

    def _normed(self, norm: BatchNorm) -> ClippedNormal:
        variance = self._tensor(norm.running_var)
        gain = torch.ones_like(variance) if norm.weight is None else self._tensor(norm.weight).abs()
        mean = torch.zeros_like(variance) if norm.bias is None else self._tensor(norm.bias)
        return normal(mean, gain * (variance / (variance + norm.eps)).sqrt())

    def _joined(self, node: fx.Node, summed: bool) -> ClippedNormal | None:
        """The sum of two values, or values side by side along the channels."""
        nodes = inputs_of(node)
        models = [self.known[one] for one in nodes if one in self.known]
        if not nodes or len(models) < len(nodes):
            return None
        if summed:
            alike = len(models) == 2 and models[0].mean.shape == models[1].mean.shape
            return models[0].plus(models[1]) if alike and node.kwargs.get("alpha", 1) == 1 else None
        dim = option(self.live.module, node, "dim", 1, 0)
        if dim % len(node_shapes(self.live)[node]) != 1:
            return None
        mean, deviation, low, high = (
            torch.cat([getattr(model, part) for model in models]) for part in ("mean", "deviation", "low", "high")
        )
        return ClippedNormal(mean, deviation, low, high, all(model.mean_known for model in models))

    def _channel_padding(self, node: fx.Node) -> tuple[int, int] | None:
        """The channels of zeros that a `pad` node puts before and behind; None where it leaves channels alone."""
        padding = padding_at(self.live.module, node, node_numbers(self.live))
        if padding is None or not padding.constant or padding.value != 0:
            return None
        amounts = padding.amounts[2 * (len(node_shapes(self.live)[node]) - 2) :]
        return (amounts[0], amounts[1]) if len(amounts) == 2 and min(amounts) >= 0 else None

    def _slope(self, node: fx.Node) -> Tensor:
        """The slope below zero, one number or one a channel."""
        weight = option(self.live.module, node, "weight", 1)
        if isinstance(weight, fx.Node):
            return self._tensor(str(weight.target))
        if isinstance(weight, nn.Parameter):
            return self._tensor(f"{node.target}.weight")
        return torch.tensor(option(self.live.module, node, "negative_slope", 1, 0.01), dtype=torch.float64)
