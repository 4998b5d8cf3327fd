"""What a layer can make up for on the other side of a sum: the error that its skip connection has gathered so far."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompress.model.graph import batch_norm_of, layer_call, node_shapes, single_consumer
from qcompress.model.layers import drawn_places
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.operations import inputs_of, kind_of
from qcompress.model.stages import TracedStage
from qcompress.model.sweep import LayerStep

SMALLEST_GAIN = 0.05
"""Channels whose batch norm multiplies by less than this share of the median make up for nothing."""


def measure_skip(live: LiveModel, step: LayerStep) -> Tensor | None:
    """E[d x^T], float64 [groups, rows a group, columns], at the places that the layer's Gram was measured at.

    x are the layer's inputs in the quantized network and d is what its output lacks for the sum that it ends in: the
    difference of the sum's other side between both networks, in units of the layer's output before its batch norm.
    None where the output ends in no such sum, or the other side comes later.
    """
    if not live.traced or not isinstance(step.stage, TracedStage):
        return None
    other = _other_side(live, step.name)
    states = list(zip(step.clean_states, step.noisy_states, strict=True))
    if other is None or len(states) != len(step.noisy) or not all(other in a and other in b for a, b in states):
        return None
    gains = _gains(live, step.name)
    total: Tensor | None = None
    count = 0
    generator = live.generator(step.name)
    places = drawn_places(step.layer, step.noisy, generator)
    for (clean, noisy), x in zip(states, step.noisy, strict=True):
        lack = (clean[other] - noisy[other]).float()
        lack = torch.where(gains != 0, lack / gains, 0.0)
        state = generator.get_state()
        columns = step.layer.columns(x.float(), places, generator)
        generator.set_state(state)
        picked = step.layer.picked(lack, places, generator)
        product = torch.matmul(picked.transpose(1, 2), columns).double()
        total = product if total is None else total + product
        count += columns.shape[1]
    return None if total is None else total / count


def _other_side(live: LiveModel, name: str) -> fx.Node | None:
    """The other summand of the sum that a layer's output, or its batch norm's, goes to; of the same shape."""
    call, norm = layer_call(live, name), batch_norm_of(live, name)
    own = call if norm is None else norm.node
    reader = None if own is None else single_consumer(live.module, own)
    if call is None or own is None or reader is None or kind_of(live.module, reader) != "add":
        return None
    sides = inputs_of(reader)
    shapes = node_shapes(live)
    if len(sides) != 2 or reader.kwargs.get("alpha", 1) != 1 or shapes.get(sides[0]) != shapes.get(sides[1]):
        return None
    others = [side for side in sides if side is not own]
    return others[0] if len(others) == 1 else None


def _gains(live: LiveModel, name: str) -> Tensor:
    """What a unit of the layer's output adds to the sum, float32 [1, channels, 1, ...]; 0 for channels left alone."""
    norm = batch_norm_of(live, name)
    if norm is None:
        return torch.ones((), device=live.device)
    gains = (find_tensor(live.module, norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        gains = gains * find_tensor(live.module, norm.weight).detach()
    gains = torch.where(gains.abs() >= SMALLEST_GAIN * gains.abs().median(), gains, 0.0)
    rank = len(node_shapes(live)[norm.node])
    return gains.reshape(1, -1, *([1] * (rank - 2)))
