"""Weights [6, 192] on which quantizers like to fail, and the error of an encoded weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contexts import context_of
from torch import Tensor

from qcompress.coding.grids import decode
from qcompress.types.encoded import Affine


def gaussian(rows: int = 6, columns: int = 192, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _with(change: Callable[[Tensor], object]) -> Tensor:
    weight = gaussian()
    change(weight)
    return weight


AWKWARD = {
    "any": gaussian(),
    "zero": torch.zeros(6, 192),
    "constant": torch.full((6, 192), -0.3),
    "one huge value": _with(lambda w: w[2, 5].fill_(1e6)),
    "one dead channel": _with(lambda w: w[3].zero_()),
    "closer than float16": 1 + 1e-5 * gaussian(),
    "subnormal": 1e-40 * gaussian(),
    "large": 1e30 * gaussian(),
    "one side": gaussian().abs() + 0.5,
    "two values": gaussian().sign(),
}


def encode(method: Callable[..., Affine], weight: Tensor, config: Any) -> Affine:
    return method(weight, config, context_of(weight))


def squared_error(weight: Tensor, encoded: Affine) -> float:
    return float((decode(encoded).double() - weight.double()).square().sum())


def sqnr(weight: Tensor, encoded: Affine) -> float:
    """Decibels."""
    power = weight.double().square().sum()
    return float(10 * torch.log10(power / squared_error(weight, encoded)))


def assert_same(first: Affine, second: Affine) -> None:
    """Equal codes and grids, bit for bit."""
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale.view(torch.int16), second.scale.view(torch.int16))
    for name in ("offset", "zero_point"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_cut_does_not_matter(method: Callable[..., Affine], weight: Tensor, config: Any, cut: int) -> None:
    """The rows encoded at once, and in two parts, are the same."""
    context = context_of(weight)
    whole = method(weight, config, context)
    parts = [method(part.contiguous(), config, context) for part in (weight[:cut], weight[cut:])]
    for name in ("codes", "scale", "offset", "zero_point"):
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
