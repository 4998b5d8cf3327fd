"""A method for tests of the artifact alone: every weight rounded to the nearest point of a grid without ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from qcompress.registry import METHODS, Method
from qcompress.types.config import Form, MethodConfig
from qcompress.types.encoded import Unbounded
from qcompress.types.run import EncodeContext


@dataclass(frozen=True, kw_only=True)
class RoundedConfig(MethodConfig):
    """step: as a part of the root mean square of the weight; columns: whether columns have steps of their own."""

    step: float = 0.4
    trellis: bool = False
    columns: bool = False
    axis: int | tuple[int, ...] | None = None

    bits: ClassVar[None] = None

    @property
    def form(self) -> Form:
        return "unbounded"


def encode(rows: Tensor, config: RoundedConfig, context: EncodeContext) -> Unbounded:
    """The codes of the weight [rows, ...]: no two rows and, on request, no two taps and channels have one step."""
    matrix, exponent = rows.reshape(len(rows), -1).double(), context.exponent
    size = matrix.square().mean().sqrt().clamp(min=1e-30)
    step = (config.step * size * 2.0**-exponent).clamp(2.0**-20, 60000).half()
    by_row = (8 * torch.log2(matrix.square().mean(1).sqrt() / size + 1e-3)).round().clamp(-40, 40)
    taps = rows[0, 0].numel() if rows.ndim > 2 else 1
    channels, own = matrix.shape[1] // taps, torch.zeros(matrix.shape[1])
    factors: dict[str, Tensor] = {}
    if config.columns:
        factors = {"channels": torch.arange(channels) % 7 - 3, "taps": torch.arange(taps) % 5 - 2}
        own = (factors["channels"].unsqueeze(1) + factors["taps"]).reshape(-1)
    scale = step.double() * 2.0**exponent * torch.exp2((by_row.unsqueeze(1) + own) / 8)
    codes = (matrix / scale).round().int()
    factors = {name: factor.to(torch.int8) for name, factor in {**factors, "rows": by_row}.items()}
    return Unbounded(codes, step, exponent, tuple(codes.shape), trellis=config.trellis, **factors)


METHOD = Method("rounded", "quantize", RoundedConfig, "weights", module="artifact.unbounded_method")


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `rounded` a method of this process."""
    monkeypatch.setitem(METHODS, "rounded", METHOD)  # type: ignore[arg-type]
