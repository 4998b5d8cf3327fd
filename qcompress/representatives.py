"""What finetune-reg has learned, beside a checkpoint, for the methods that take it up."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.errors import DataError, InputError, raise_all
from qcompress.registry import METHODS
from qcompress.types import Decision, Plan

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = "representatives"


def representatives_path(checkpoint: Path) -> Path:
    """Where finetune-reg leaves what it learned: `model.reg.safetensors` beside `model.safetensors`."""
    # `.` and `..` have no name of their own.
    checkpoint = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.safetensors')}.reg.safetensors")


def takes_representatives(decision: Decision) -> bool:
    return decision.method is not None and METHODS[decision.method].representatives


@functools.cache
def read_representatives(path: Path) -> Mapping[str, Tensor]:
    """Tensor name -> its representatives, float [levels]. Raises CheckpointError."""
    from qcompress.checkpoint import read_tensors

    tensors, _ = read_tensors(path)
    ending = f".{SUFFIX}"
    return {name.removesuffix(ending): value for name, value in tensors.items() if name.endswith(ending)}


def with_representatives(plan: Plan, path: Path) -> Plan:
    """The plan whose learned codebooks have the bits that their representatives need.

    raises  DataError (Refusals where several) where the file is missing, and for a tensor that has none, too many for
            its bits, or a set of them for each channel
    """
    if not any(takes_representatives(decision) for decision in plan.decisions):
        return plan
    if not path.is_file():
        mend = "train with min-squared, exponential, sine or cosine, or name their file with --representatives"
        raise DataError(str(path), "there are no learned representatives", mend)
    import torch

    found = read_representatives(path)
    errors: list[InputError] = []
    decisions = []
    for decision in plan.decisions:
        if takes_representatives(decision):
            values = found.get(decision.tensor.name)
            because = _unfit(values, decision)
            if because is not None:
                mend = "give it a rule of its own with kmeans, more bits, or keep: {}"
                errors.append(DataError(f"{path}: tensor {decision.tensor.name!r}", because, mend))
            elif values is not None:
                entries = len(torch.unique(values.float()))
                bits = max(1, math.ceil(math.log2(entries)))
                config = replace(decision.config, bits=bits)
                decision = replace(decision, config=config, book=replace(decision.book, entries=entries))
        decisions.append(decision)
    raise_all(errors)
    return replace(plan, decisions=tuple(decisions))


def _unfit(values: Tensor | None, decision: Decision) -> str | None:
    if values is None:
        return "no representatives were learned for it"
    if values.ndim != 1:
        return f"it has a grid for each channel, {list(values.shape)}, and no one codebook"
    if values.numel() > 2**decision.config.bits:
        return f"it has {values.numel()} representatives, more than {decision.config.bits} bits can name"
    if not bool(values.isfinite().all()):
        return "its representatives hold NaN or Inf"
    return None
