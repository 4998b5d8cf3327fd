"""Every penalty as its formula reads, by autograd: slow and obvious."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def soft_range(x: Tensor, alpha: Tensor) -> Tensor:
    high = torch.softmax(alpha * x, 0)
    low = torch.softmax(-alpha * x, 0)
    return (high * x).sum() - (low * x).sum()


def dsmm(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    matrix = weight.flatten(1)
    deviation = weight.detach().double().std(correction=0) if config.normalize == "std" else 1.0
    if config.granularity == "channel":
        alphas = terms.get("alpha")
        if alphas is None:
            alphas = 2 / matrix.detach().std(1, correction=0)
        each = [soft_range(row, a) / deviation + torch.exp(-a) for row, a in zip(matrix, alphas, strict=True)]
        return torch.stack(each).sum() / (len(each) if config.reduction == "mean" else 1)
    alpha = terms["alpha"][0] if terms else 2 / matrix.detach().flatten().std(correction=0)
    whole = matrix[: len(matrix) - len(matrix) % config.dim]
    ranges = torch.stack([soft_range(whole[j :: config.dim].flatten(), alpha) for j in range(config.dim)])
    total = ranges.mean() if config.reduction == "mean" else ranges.sum()
    return total / deviation + torch.exp(-alpha)


def _rows(config: Any, weight: Tensor) -> list[Tensor]:
    matrix = weight.flatten(1)
    return list(matrix) if config.granularity == "channel" else [matrix.flatten()]


def _over(config: Any, parts: list[Tensor]) -> Tensor:
    stacked = torch.stack(parts)
    return stacked.mean() if config.reduction == "mean" else stacked.sum()


def linf(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    return _over(config, [row.abs().max() for row in _rows(config, weight)])


def margin(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    parts = []
    for row, limit in zip(_rows(config, weight), terms["margin"], strict=True):
        pull = 1.0 if config.tail_fraction is None else 1 / (config.tail_fraction * len(row))
        parts.append(limit + pull * (row.abs() - limit).clamp_min(0).sum())
    return _over(config, parts)


def kurtosis(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    parts = []
    for row in _rows(config, weight):
        centred = row - row.mean()
        parts.append((centred.pow(4).mean() / centred.square().mean().square() - config.target).square())
    return _over(config, parts)


def l2(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    return (weight.square().mean() if config.reduction == "mean" else weight.square().sum()) / 2


def _waves(config: Any, height: Tensor, gap: Tensor | float) -> Tensor:
    height = height.abs() if config.power == 1 else height.square()
    if config.height == "gap":
        height = height * (gap / math.pi) ** config.power
    return height.mean() if config.reduction == "mean" else height.sum()


def sine(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    if config.bits is not None:
        matrix = weight.flatten(1) if config.granularity == "channel" else weight.reshape(1, -1)
        high = matrix.detach().amax(1, keepdim=True).clamp_min(0)
        low = matrix.detach().amin(1, keepdim=True).clamp_max(0)
        step = (high - low) / (2**config.bits - 1)
        return _waves(config, torch.sin(math.pi * matrix / step), step)
    low, high = config.range
    gap = (high - low) / (config.levels - 1)
    return _waves(config, torch.sin(math.pi * (weight - low) / gap), gap)


def cosine(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    low, high = config.range
    gap = (high - low) / config.levels
    return _waves(config, torch.cos(math.pi * (weight - low) / gap), gap)


def _nearest(config: Any, each: Tensor) -> Tensor:
    least = each.min(1).values
    return least.mean() if config.reduction == "mean" else least.sum()


def min_squared(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    return _nearest(config, (weight.reshape(-1, 1) - terms["representatives"]).square())


def exponential(config: Any, weight: Tensor, terms: dict[str, Tensor]) -> Tensor:
    return _nearest(config, 1 - torch.exp(-config.scale * (weight.reshape(-1, 1) - terms["representatives"]).abs()))
