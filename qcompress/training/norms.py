"""Statistics of batch norms taken anew, with weights and quantizers as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qcompress.model.batches import Batch, run_model


@torch.no_grad()
def refresh_norms(module: nn.Module, batches: Iterable[Batch]) -> None:
    """Give every batch norm the mean of the batches' statistics; all else stays, and the module is left in eval mode.

    Training keeps a running mean over weights that no longer are: with few levels they change in leaps.
    """
    module.eval()
    norms = [
        one
        for one in module.modules()
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.running_mean is not None
    ]
    if not norms:
        return
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    try:
        for norm in norms:
            norm.reset_running_stats()
            # Without a momentum the statistics are a plain mean.
            norm.momentum = None
            norm.train()
        for batch in batches:
            run_model(module, batch)
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        module.eval()
