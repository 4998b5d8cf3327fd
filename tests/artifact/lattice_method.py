"""A method for tests of the artifact alone: every weight rounded to the nearest point of a lattice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qcompress.registry import METHODS, Method
from qcompress.types import Lattice


@dataclass(frozen=True, kw_only=True)
class RoundedConfig:
    """step: as a part of the standard deviation of the weight."""

    step: float = 0.4
    trellis: bool = False
    axis: int | tuple[int, ...] | None = None
    form: ClassVar[str] = "lattice"
    bits: ClassVar[None] = None
    granularity: ClassVar[str] = "tensor"
    group_size: ClassVar[None] = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}


def encode(rows: Tensor, config: RoundedConfig, exponent: int) -> Lattice:
    """The lattice of the weight [rows, ...] with steps that differ from row to row."""
    matrix = rows.reshape(len(rows), -1).double()
    step = (config.step * matrix.std() * 2.0**-exponent).clamp(2.0**-20, 60000).half()
    eighths = (8 * torch.log2(matrix.std(1) / matrix.std() + 1e-3)).round().clamp(-40, 40).to(torch.int8)
    scale = step.double() * 2.0**exponent * torch.exp2(eighths.double() / 8)
    codes = (matrix / scale.unsqueeze(1)).round().int()
    return Lattice(codes, step, exponent, tuple(codes.shape), rows=eighths, trellis=config.trellis)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `rounded` a method of this process."""
    method = Method(
        "rounded", "quantize", RoundedConfig, "weights", False, lambda *_: None, "artifact.lattice_method:encode"
    )
    monkeypatch.setitem(METHODS, "rounded", method)  # type: ignore[arg-type]
