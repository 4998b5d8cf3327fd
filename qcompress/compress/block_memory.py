"""What a network that goes block by block takes in memory is held against what it may take, before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qcompress.artifact.memory import ALLOW, refuse_memory
from qcompress.data.batches import Batch
from qcompress.model.live import LiveModel
from qcompress.model.offload import OUTER
from qcompress.model.stages import BlockStage
from qcompress.registry import METHODS
from qcompress.types.plan import Decision, row_shape

GRAM_BYTES = 32
"""Of each entry of a layer's second moments: those of one or both networks, damped, and their factor, in float64."""
CALIBRATED_BYTES = 24
"""Of each weight of a layer that is encoded from its inputs: weights, target, rest, errors and codes."""
ALONE_BYTES = 16
"""Of each weight that is encoded from itself alone."""


@dataclass(frozen=True)
class _Flow:
    """Bytes of what flows through a block, for one batch.

    state  what flows into it
    inner  what its modules give
    """

    state: int
    inner: int


@torch.no_grad()
def choose_filed(
    live: LiveModel, decisions: Sequence[Decision], most: int | None, source: Path, folder: Path
) -> Path | None:
    """The folder where states between blocks are to wait, or None where there is memory for those of all samples.

    most    bytes that compressing may take besides the program; None: all that there is
    source  of the network, named in errors
    raises  ResourceError where one batch at a time takes more
    """
    if most is None:
        return None
    encoding = {one.tensor.name: _encoding_bytes(one) for one in decisions if one.compresses}
    name = max(encoding, key=lambda one: encoding[one]) if encoding else ""
    assert live.offloaded is not None
    clean, noisy = live.offloaded
    least = 2 * max(clean.bytes_of(block) for block in (OUTER, *clean.blocks)) + encoding.get(name, 0)
    held = 0
    if live.calibration:
        flow, example = _flow(live), _values(live.example)
        sizes = [_values(batch) / example for batch in live.calibration]
        # Both networks; behind a stage there are the states before it too.
        least += int(2 * max(sizes) * (2 * flow.state + flow.inner))
        held = int(2 * sum(sizes) * (2 * flow.state + flow.inner))
    for network in (clean, noisy):
        network.release()
    refuse_memory(most, least, source, name, "compressing the network block by block", ALLOW)
    return None if least + held <= most else folder


def _encoding_bytes(decision: Decision) -> int:
    rows, *columns = row_shape(decision.tensor.shape, decision.axis)
    width = torch.Size(columns).numel()
    if METHODS[decision.method or ""].needs == "weights":
        return ALONE_BYTES * rows * width
    return GRAM_BYTES * width * width + CALIBRATED_BYTES * rows * width


def _flow(live: LiveModel) -> _Flow:
    """What one sample or two make flow through the first block."""
    head, block = live.stages[:2]
    state = head.run(live.module, head.begin(live.example))
    assert isinstance(block, BlockStage)
    # Held until all are counted, so that no other takes the place of one that is gone.
    given: dict[int, Tensor] = {}

    def see(_module: Any, _args: Any, output: Any) -> None:
        given.update((id(one), one) for one in tree_leaves(output) if isinstance(one, Tensor))

    handles = [one.register_forward_hook(see) for one in live.module.get_submodule(block.name).modules()]
    try:
        block.run(live.module, state)
    finally:
        for handle in handles:
            handle.remove()
    into = {id(one): one for one in tree_leaves((state.args, dict(state.kwargs))) if isinstance(one, Tensor)}
    return _Flow(_bytes(into.values()), _bytes(given.values()))


def _bytes(tensors: Any) -> int:
    return sum(one.nbytes for one in tensors)


def _values(batch: Batch) -> int:
    """Of all inputs of a batch, in proportion to which what flows grows."""
    return sum(x.numel() for x in (*batch.args, *batch.kwargs.values()))
