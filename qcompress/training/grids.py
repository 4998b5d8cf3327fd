"""Weights and inputs that are trained on grids, with whatever says where those grids lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.model.live import LiveModel
from qcompress.training.dress import dressed, trained_weight
from qcompress.training.learn import Learn

LEAST_SHARE = 2.0**-10
"""A step or a clip stays above this share of where it started: one that crossed zero would never come back."""


def train_grids(
    live: LiveModel,
    learn: Learn,
    weights: Mapping[str, nn.Module],
    inputs: Mapping[str, nn.Module],
    bounded: Sequence[tuple[Tensor, Tensor]],
    groups: Sequence[Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Tensor name -> the trained weight beneath its grid; all quantizers come off `live.quantized` again.

    weights, inputs  see training.dress
    bounded          (parameter, the least it may be): what a step leads below that is brought back to it
    groups           parameters that have an optimizer's settings of their own
    raises           DataError, TrainingError
    """

    def after_step(_: float) -> None:
        with torch.no_grad():
            for parameter, least in bounded:
                parameter.clamp_(min=least)

    with dressed(live, weights, inputs) as module:
        learn(module, after_step, groups)
        return {name: trained_weight(module, name) for name in weights}
