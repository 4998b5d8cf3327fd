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
    match settings:
        case Sgd():
            # Nesterov asks for momentum in every group, which groups of their own may be without.
            for group in groups:
                group["nesterov"] = settings.nesterov and group.get("momentum", settings.momentum) > 0
            return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
        case AdamW():
            for group in groups:
                group.pop("momentum", None)
            return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.epsilon)
        case _:
            assert_never(settings)


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
