"""What batch norms say of the values behind them, carried on through the graph: means and ranges without any data.

Nagel et al. 2019, arXiv 1906.04721, sections 4.2.1 and 5. A channel behind a batch norm is taken for normal, with the
batch norm's bias and weight as mean and deviation; a sum for normal, with the sums of means and of variances.
Zeros that a layer pads with are not counted, and pooling leaves a channel as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qcompress.encoded import ActivationGrid
from qcompress.model.activations import INPUT_BITS, activation_grid, watched_inputs
from qcompress.model.chains import keeps_channels
from qcompress.model.graph import node_numbers, node_shapes
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.normals import ClippedNormal, normal
from qcompress.model.operations import BatchNorm, batch_norm_at, clip_bounds, inputs_of, kind_of, option, padding_at


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
    unknown = [name for name in names if name not in models]

    def watch(name: str, x: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(x))
        before = ranges.get(name, (low, high))
        ranges[name] = (min(low, before[0]), max(high, before[1]))

    if unknown:
        with watched_inputs(live.quantized, unknown, watch):
            live.quantized(*live.example.args, **live.example.kwargs)
    return {
        name: activation_grid(*ranges[name], INPUT_BITS if name in inputs else bits) for name in names if name in ranges
    }
