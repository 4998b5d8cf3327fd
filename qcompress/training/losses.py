"""What training makes small: each task's own loss, or a callable that the recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.errors import DataError, ModelError
from qcompress.model.batches import Batch
from qcompress.model.code import find_callable
from qcompress.model.data_text import IGNORED
from qcompress.settings import (
    CausalLm,
    Classification,
    FactoryTask,
    Reconstruction,
    SequenceClassification,
    Task,
    Translation,
)

Loss = Callable[[Tensor, Batch], Tensor]
"""(output, batch) -> scalar."""


def make_loss(
    task: Task, smoothing: float = 0.0, name: str | None = None, root: Path = Path(), allow_code: bool = False
) -> Loss:
    """The loss of a task: cross-entropy over labels or tokens, or the mean squared error.

    smoothing  share of each target that is spread over all classes
    name       "module:function" or "file.py:function" in its place
    raises     ModelError for a task that has no loss of its own, and for a name that is no callable; UsageError for a
               file without leave to run it
    """
    if name is not None:
        return find_callable(name, root, allow_code, "finetune.loss")
    match task:
        case Classification() | SequenceClassification():
            return lambda output, batch: _labels_loss(output, batch, smoothing)
        case CausalLm():
            return lambda output, batch: _next_tokens_loss(output, batch, smoothing)
        case Translation():
            return lambda output, batch: _tokens_loss(output, _labels(batch), smoothing)
        case Reconstruction():
            return lambda output, batch: F.mse_loss(output.float(), _labels(batch).float())
        case FactoryTask():
            raise ModelError("finetune", "a task from code has no loss of its own", "add `loss: file.py:function`")
        case _:
            assert_never(task)


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise DataError("data.train", "has no labels", "name the array or the file of labels")
    return batch.labels


def _labels_loss(output: Tensor, batch: Batch, smoothing: float) -> Tensor:
    labels = _labels(batch)
    if output.ndim != 2 or labels.shape != output.shape[:1]:
        what = f"the model gives {list(output.shape)} for labels of {list(labels.shape)}"
        raise DataError("data.train", what, "give one label a sample, and a model that gives [samples, classes]")
    if int(labels.max()) >= output.shape[1] or int(labels.min()) < 0:
        what = f"label {int(labels.max())} is outside the model's {output.shape[1]} classes"
        raise DataError("data.train", what, "check the labels, and the model's number of classes")
    return F.cross_entropy(output.float(), labels, label_smoothing=smoothing)


def _next_tokens_loss(output: Tensor, batch: Batch, smoothing: float) -> Tensor:
    tokens = batch.args[0] if batch.args else batch.kwargs["input_ids"]
    targets = tokens[:, 1:].clone()
    if batch.lengths is not None:
        places = torch.arange(1, tokens.shape[1], device=tokens.device)
        targets[places >= batch.lengths.unsqueeze(1)] = IGNORED
    mask = batch.kwargs.get("attention_mask")
    if mask is not None:
        targets[mask[:, 1:] == 0] = IGNORED
    return _tokens_loss(output[:, :-1], targets, smoothing)


def _tokens_loss(output: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The mean over all tokens that count; nothing where none does."""
    if not bool((targets != IGNORED).any()):
        return output.sum() * 0
    return F.cross_entropy(output.flatten(0, 1).float(), targets.flatten(), label_smoothing=smoothing)
