"""A network that no checkpoint knows: as its seed initializes it, before training on grids or codebooks begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from qcompress.compress.evaluate import load_network
from qcompress.compress.finetune import train_data
from qcompress.model.build import tied_names
from qcompress.training.loop import norm_batches, refresh_norms, refuse_few
from qcompress.types.ranks import ALONE
from qcompress.types.run import ModelRun

NORM_BATCHES = 8


@contextmanager
def untrained_checkpoint(model_run: ModelRun) -> Iterator[Checkpoint]:
    """The recipe's network as a checkpoint, which is there for as long as the context lasts; equal for equal seeds.

    Batch norms hold the statistics of a few training batches. Without them what flows through the layers shrinks or
    grows from one to the next, and quantizers of inputs would start from sizes that training never meets.

    raises  ModelError, DataError, RecipeError, UsageError
    """
    torch.manual_seed(model_run.recipe.seed)
    module = load_network(model_run, None)
    data = train_data(model_run)
    refuse_few(data, 1, ALONE)
    refresh_norms(module, norm_batches(data, NORM_BATCHES, model_run.recipe.seed))
    tied = tied_names(module)
    values = {name: value.contiguous().clone() for name, value in module.state_dict().items() if name not in tied}
    with tempfile.TemporaryDirectory(prefix="qcompress-") as folder:
        path = Path(folder) / "untrained.safetensors"
        write_checkpoint(values, path, tied)
        yield read_checkpoint(path)
