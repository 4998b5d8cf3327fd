"""How far the output of a changed network is from that of the network as it was, on a few samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.errors import RecipeError
from qcompress.evaluate import Setting
from qcompress.model.batches import Batch, Batches, run_model
from qcompress.model.live import LiveModel
from qcompress.report.sensitivity import DivergenceKind
from qcompress.settings import CausalLm, Classification, SequenceClassification, Task, Translation

REFERENCE_BYTES = 1 << 29
"""Most bytes that the outputs of the network as it was may take."""


@dataclass(frozen=True)
class Probe:
    """The data that a network's outputs are compared on, and what the network as it was made of them.

    reference  of each batch the output, or where predictions are compared their log-probabilities
    """

    kind: DivergenceKind
    data: str
    batches: Sequence[Batch]
    reference: Sequence[Tensor]

    @property
    def samples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def divergence(self, module: nn.Module) -> float:
        """Between the module's outputs and the reference, at least 0."""
        total = weight = 0.0
        with torch.inference_mode():
            for batch, reference in zip(self.batches, self.reference, strict=True):
                output = run_model(module, batch)
                if self.kind == "relative-error":
                    total += float((output.float() - reference).double().square().sum())
                    weight += float(reference.double().square().sum())
                    continue
                each = F.kl_div(output.float().log_softmax(-1), reference, reduction="none", log_target=True).sum(-1)
                counted = counted_places(batch, each)
                total += float((each.double() * counted).sum())
                weight += float(counted.sum())
        # Rounding may leave a little less than nothing; a network that breaks has no finite divergence.
        found = total / weight if weight else 0.0
        return max(found, 0.0) if math.isfinite(found) else 1e30


def counted_places(batch: Batch, each: Tensor) -> Tensor:
    """1 where a prediction counts, 0 behind a text's end; shaped like `each`, [samples] or [samples, length, ...]."""
    counted = torch.ones_like(each, dtype=torch.float64)
    if each.ndim != 2:
        return counted
    mask = batch.kwargs.get("attention_mask")
    if mask is not None and mask.shape == each.shape:
        counted = counted * mask
    if batch.lengths is not None:
        counted = counted * (torch.arange(each.shape[1], device=each.device) < batch.lengths.unsqueeze(1))
    return counted


def make_probe(live: LiveModel, setting: Setting, samples: int) -> Probe:
    """The first samples of the calibration data, or without any of the eval data, through the network as it was.

    raises  RecipeError where the recipe has neither
    """
    data = setting.recipe.data
    source: Sequence[Batch] | Batches
    if live.calibration:
        part, source = "calibration", live.calibration
    elif data is not None and data.eval is not None:
        part, source = "eval", setting.batches("eval")
    else:
        what = "has no data that the network's outputs could be compared on"
        raise RecipeError(setting.recipe.source, what, "add `data.calibration`")
    kind: DivergenceKind = "kl" if _predicts(setting.recipe.task) else "relative-error"
    batches: list[Batch] = []
    reference: list[Tensor] = []
    left, room = samples, REFERENCE_BYTES
    with torch.inference_mode():
        for batch in source:
            if left <= 0 or room <= 0:
                break
            batch = batch.first(left).to(live.device)
            output = run_model(live.module, batch).float()
            batches.append(batch)
            reference.append(output.log_softmax(-1) if kind == "kl" else output)
            left, room = left - batch.size, room - 4 * output.numel()
    return Probe(kind, part, batches, reference)


def _predicts(task: Task | None) -> bool:
    """Whether a network's output are the logits of predictions."""
    return isinstance(task, Classification | SequenceClassification | CausalLm | Translation)
