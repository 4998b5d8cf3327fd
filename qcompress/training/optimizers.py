"""Optimizers and learning rates are made here as a recipe names them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, assert_never

import torch
from torch import Tensor, nn

from qcompress.types.settings import AdamW, Constant, Cosine, Optimizer, Schedule, Sgd, Step

Group: TypeAlias = Mapping[str, Any]
"""Parameters with settings of their own: {"params": [...]}, "lr", "momentum" and "weight_decay" where they differ."""

FUSED_DEVICES = ("cpu", "cuda")
"""On which torch has a step that goes through the memory once."""


def make_optimizer(
    settings: Optimizer,
    module: nn.Module,
    learned: Sequence[Group],
    apart: Sequence[Group] = (),
) -> torch.optim.Optimizer:
    """The optimizer of a module's parameters and of what regularizers learn.

    Weights of two dimensions or more decay; biases, norms and what is learned beside the weights never do.

    learned  what regularizers learn
    apart    groups of the module's own parameters; their "weight_decay" is 0 where they have none
    """
    elsewhere = {id(parameter) for group in apart for parameter in group["params"]}
    trained = [one for one in module.parameters() if one.requires_grad and id(one) not in elsewhere]
    every = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        *({"weight_decay": 0.0, **group} for group in (*learned, *apart)),
    ]
    groups = [group for group in every if group["params"]]
    refuse_decay(groups, (p for group in learned for p in group["params"]))
    fused = all(_fits_fused(parameter) for group in groups for parameter in group["params"])
    match settings:
        case Sgd():
            # Nesterov asks for momentum in every group, which groups of their own may be without.
            for group in groups:
                group["nesterov"] = settings.nesterov and group.get("momentum", settings.momentum) > 0
            made: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=settings.lr, momentum=settings.momentum, fused=fused
            )
        case AdamW():
            for group in groups:
                group.pop("momentum", None)
            made = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.epsilon, fused=fused)
        case _:
            assert_never(settings)
    if fused:
        made.register_step_pre_hook(_lay_gradients)
    return made


def _fits_fused(parameter: Tensor) -> bool:
    """Whether a step may go through its memory in one pass: dense, and where torch has such a step."""
    return parameter.device.type in FUSED_DEVICES and torch.empty_like(parameter).stride() == parameter.stride()


def _lay_gradients(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Fused steps go through parameters and gradients as they lie in memory, and do not look whether they lie alike."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)


def refuse_decay(groups: Iterable[Group], learned: Iterable[Tensor]) -> None:
    """Raise ValueError where anything that is learned beside the weights would decay."""
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    if any(id(term) in decayed for term in learned):
        raise ValueError("a temperature, representative or margin is in a group that decays")


def rate_at(schedule: Schedule, warm_up: float, share: float) -> float:
    """The learning rate as a share of its highest, `share` of all steps being done."""
    if share < warm_up:
        return share / warm_up
    match schedule:
        case Constant():
            return 1.0
        case Cosine():
            rest = (share - warm_up) / max(1 - warm_up, 1e-12)
            return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * rest)) / 2
        case Step():
            return schedule.factor ** sum(share >= place for place in schedule.at)
        case _:
            assert_never(schedule)
