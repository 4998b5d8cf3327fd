"""Distribution correction: a block's inputs moved towards what its batch norms have seen in training.

Liu et al. 2023, arXiv 2212.07048, section 3.3, as the official code does it: statistics are those of each image over
its places, and images whose maps have a single place are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompress.model.live import find_tensor
from qcompress.model.operations import BatchNorm
from qcompress.model.stages import TracedStage

LEARNING_RATE = 1e-3
LEAST_RATE = 1e-5
PATIENCE = 100
EPSILON = 1e-6


@dataclass(frozen=True)
class SeenStatistics:
    """What one batch norm saw in training: mean and standard deviation, float32 [channels]; `owner` is its module."""

    owner: str
    mean: Tensor
    deviation: Tensor


def seen_statistics(module: nn.Module, norms: Sequence[BatchNorm]) -> list[SeenStatistics]:
    """Of every batch norm that is a module of its own, whose inputs can be watched."""
    return [
        SeenStatistics(
            norm.owner,
            find_tensor(module, norm.running_mean).float(),
            (find_tensor(module, norm.running_var).float() + EPSILON).sqrt(),
        )
        for norm in norms
        if norm.node.op == "call_module"
    ]


def correct_inputs(
    x: Tensor,
    run: Callable[[Tensor], object],
    module: nn.Module,
    norms: Sequence[SeenStatistics],
    *,
    steps: int,
    closeness: float,
) -> Tensor:
    """x [samples, ...] after `steps` of Adam on its distance from the statistics, and from where it was.

    run        the block of `module` on inputs like x
    closeness  weight of the squared distance from x, summed over channels and averaged over the rest (1 / lambda_c)
    """
    if not norms:
        return x
    moved = x.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([moved], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=PATIENCE, min_lr=LEAST_RATE)
    with torch.enable_grad():
        for _ in range(steps):
            with _distances(module, norms) as found:
                run(moved)
            if not found:
                return x
            loss = torch.stack(found).sum() + closeness * (moved - x).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step(float(loss.detach()))
    return moved.detach()


@contextmanager
def _distances(module: nn.Module, norms: Sequence[SeenStatistics]) -> Iterator[list[Tensor]]:
    """The squared distances of every batch norm's inputs from its statistics, as the module runs."""
    found: list[Tensor] = []

    def make_hook(norm: SeenStatistics) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            places = args[0].flatten(2) if args[0].ndim > 2 else None
            if places is not None and places.shape[2] > 1:
                mean, variance = places.mean(2), places.var(2)
                found.append((mean - norm.mean).square().mean())
                found.append(((variance + EPSILON).sqrt() - norm.deviation).square().mean())

        return hook

    handles = [module.get_submodule(norm.owner).register_forward_pre_hook(make_hook(norm)) for norm in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def norms_in(stage: TracedStage, norms: Sequence[BatchNorm]) -> list[BatchNorm]:
    """The batch norms whose nodes lie in a stage."""
    nodes = set(stage.nodes)
    return [norm for norm in norms if norm.node in nodes]
