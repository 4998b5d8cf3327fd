"""Training minimizes each task's own loss, or a callable that the recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.data.batches import Batch, first_tensor
from qcompress.data.text import IGNORED
from qcompress.data.user_code import find_callable
from qcompress.errors import DataError, ModelError
from qcompress.types.settings import (
    CausalLm,
    Classification,
    Distil,
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

    Labels of classes are int64 [samples], or class probabilities, float32 [samples, at most the model's classes].

    smoothing  share of each target that is spread over all classes
    name       "module:function" or "file.py:function" in its place
    raises     ModelError for a task that has no loss of its own, as one from code, and for a name that is no
               callable; UsageError for a file without leave to run it
    """
    if name is not None:
        return find_callable(name, root, allow_code, "finetune.loss")
    match task:
        case Classification() | SequenceClassification():
            return lambda output, batch: _labels_loss(output, batch, smoothing)
        case CausalLm():
            return lambda output, batch: _tokens_loss(output[:, :-1], _next_tokens(batch), smoothing)
        case Translation():
            return lambda output, batch: _tokens_loss(output, _labels(batch), smoothing)
        case Reconstruction():
            return lambda output, batch: F.mse_loss(output.float(), _labels(batch).float())
        case _:
            raise ModelError("finetune", "the task has no loss of its own", "add `loss: file.py:function`")


def distilled(loss: Loss, task: Task, teacher: nn.Module, settings: Distil) -> Loss:
    """(1 - share) of a loss, and share of the distance to what a teacher gives for the same inputs.

    The distance is temperature**2 times the Kullback-Leibler divergence of the outputs' softmaxes at the temperature
    (Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2), the mean over samples, or over the tokens that count; for
    reconstruction the mean squared error.

    teacher  in eval mode, on the batches' device
    raises   ModelError for a task from code, whose outputs may be no logits
    """
    if isinstance(task, FactoryTask):
        raise ModelError("finetune.distil", "a task from code may have outputs that are no logits", "take distil out")
    share = settings.share

    def mixed(output: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = first_tensor(teacher(*batch.args, **batch.kwargs)).float()
        if isinstance(task, Reconstruction):
            distance = F.mse_loss(output.float(), target)
        else:
            rows = _counted(task, batch, output.shape, output.device)
            distance = _divergence(output.float()[rows], target[rows], settings.temperature)
        return (1 - share) * loss(output, batch) + share * distance

    return mixed


def _counted(task: Task, batch: Batch, shape: torch.Size, device: torch.device) -> Tensor:
    """Which rows of logits are scored: bool, the output's shape but for its last dimension."""
    rows = torch.ones(shape[:-1], dtype=torch.bool, device=device)
    match task:
        case CausalLm():
            rows[:, -1] = False
            rows[:, :-1] = _next_tokens(batch) != IGNORED
        case Translation():
            rows = _labels(batch) != IGNORED
    return rows


def _divergence(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """temperature**2 KL(target || output) of logits [rows, classes], the mean over rows; nothing without rows."""
    if not len(output):
        return output.sum() * 0
    ours, theirs = ((one / temperature).log_softmax(1) for one in (output, target))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise DataError("data.train", "has no labels", "name the array or the file of labels")
    return batch.labels


def _labels_loss(output: Tensor, batch: Batch, smoothing: float) -> Tensor:
    labels = _labels(batch)
    are_shares = labels.is_floating_point() and labels.ndim == 2
    if output.ndim != 2 or labels.shape[: labels.ndim - are_shares] != output.shape[:1]:
        what = f"the model gives {list(output.shape)} for labels of {list(labels.shape)}"
        raise DataError("data.train", what, "give one label a sample, and a model that gives [samples, classes]")
    low, high = (0, labels.shape[1] - 1) if are_shares else (int(labels.min()), int(labels.max()))
    if high >= output.shape[1] or low < 0:
        what = f"label {high} is outside the model's {output.shape[1]} classes"
        raise DataError("data.train", what, "check the labels, and the model's number of classes")
    if are_shares:
        # Classes beyond those of the batch have no share in it.
        labels = F.pad(labels, (0, output.shape[1] - labels.shape[1]))
    return F.cross_entropy(output.float(), labels, label_smoothing=smoothing)


def _next_tokens(batch: Batch) -> Tensor:
    """The token after each but the last, int64 [samples, length - 1]; IGNORED where it does not count."""
    tokens = batch.args[0] if batch.args else batch.kwargs["input_ids"]
    targets = tokens[:, 1:].clone()
    if batch.lengths is not None:
        places = torch.arange(1, tokens.shape[1], device=tokens.device)
        targets[places >= batch.lengths.unsqueeze(1)] = IGNORED
    mask = batch.kwargs.get("attention_mask")
    if mask is not None:
        targets[mask[:, 1:] == 0] = IGNORED
    return targets


def _tokens_loss(output: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The mean over all tokens that count; nothing where none does."""
    if not bool((targets != IGNORED).any()):
        return output.sum() * 0
    return F.cross_entropy(output.flatten(0, 1).float(), targets.flatten(), label_smoothing=smoothing)
