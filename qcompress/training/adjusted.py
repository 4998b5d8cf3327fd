"""What training changed beside the weights that a method encodes."""

from __future__ import annotations

from collections.abc import Collection

import torch

from qcompress.encoded import Encoded, Kept
from qcompress.model.live import LiveModel
from qcompress.training.dress import shared_names


def adjusted_tensors(live: LiveModel, encoded: Collection[str]) -> dict[str, Encoded]:
    """Every real tensor of `live.quantized` that differs from the network as it was.

    encoded  those that are not asked for, nor tied copies of them
    """
    before = live.module.state_dict()
    encoded = shared_names(live.quantized, encoded)
    return {
        name: Kept(value.detach().clone())
        for name, value in live.quantized.state_dict().items()
        if name not in encoded and name in before and value.is_floating_point() and not torch.equal(value, before[name])
    }
