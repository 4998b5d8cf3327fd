"""A method's context is made here from the weight that it encodes, as a run makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompress.coding.grids import exponent_for
from qcompress.types.run import EncodeContext, FitContext

ALONE = FitContext()
"""The context of a method on a live model without a budget or training."""


def context_of(weight: Tensor, seed: int = 0, **parts: Any) -> EncodeContext:
    """The context of a weight whose largest value says the exponent, and whatever else a method may draw on."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    return context_at(exponent_for(largest), seed, **parts)


def context_at(exponent: int, seed: int = 0, **parts: Any) -> EncodeContext:
    """The context of a weight whose exponent is this one."""
    return EncodeContext(exponent, torch.Generator().manual_seed(seed), **parts)
