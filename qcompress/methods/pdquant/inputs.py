"""The inputs of a block are kept here: from the network in full precision, and as it is quantized so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.model.graph import batch_norm_of
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.operations import BatchNorm
from qcompress.model.stages import Stage, State, TracedStage, join_states, pick_samples
from qcompress.registry import PdquantConfig

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


@dataclass(frozen=True)
class Inputs:
    """States of all samples at once.

    clean      from the network in full precision
    noisy      from the quantized one
    corrected  the clean ones, moved towards the statistics of the batch norms in the block where that is asked for
    """

    samples: int
    clean: State
    noisy: State
    corrected: State

    def noisy_of(self, chosen: Tensor) -> State:
        return pick_samples(self.noisy, chosen, self.samples)

    def clean_of(self, chosen: Tensor) -> State:
        return pick_samples(self.clean, chosen, self.samples)

    def mixed(self, noisy: State, chosen: Tensor, share: float, generator: torch.Generator) -> State:
        """The noisy states of some samples with each number, by a coin of `share`, from the corrected ones."""
        return _mixed(noisy, pick_samples(self.corrected, chosen, self.samples), share, generator)


def make_inputs(
    live: LiveModel, stage: Stage, config: PdquantConfig, clean: Sequence[State], noisy: Sequence[State]
) -> Inputs:
    """Of the states of every calibration batch before the stage, those of all samples."""
    sizes = [batch.size for batch in live.calibration]
    joined, samples = join_states(clean, sizes), sum(sizes)
    corrected = joined
    if config.distribution_correction and isinstance(stage, TracedStage):
        corrected = _corrected(live, stage, config, joined, samples)
    return Inputs(samples, joined, join_states(noisy, sizes), corrected)


def _corrected(live: LiveModel, stage: TracedStage, config: PdquantConfig, clean: State, samples: int) -> State:
    module = live.module
    every = (batch_norm_of(live, name) for name in live.layers)
    norms = seen_statistics(module, norms_in(stage, [norm for norm in every if norm is not None]))
    sources = [node for node, value in clean.items() if isinstance(value, Tensor)]
    if not norms or len(sources) != 1:
        return clean
    (source,) = sources
    parts = []
    for chosen in torch.arange(samples, device=live.device).split(config.batch_size):  # type: ignore[no-untyped-call]
        state = pick_samples(clean, chosen, samples)
        moved = correct_inputs(
            state[source],
            partial(_run_with, stage, module, state, source),
            module,
            norms,
            steps=config.correction_steps or 1,
            closeness=config.correction_weight,
        )
        parts.append(moved)
    return {**clean, source: torch.cat(parts)}


def _run_with(stage: Stage, module: nn.Module, state: State, source: Any, x: Tensor) -> State:
    """The state after a traced stage where one value of its input is x."""
    return stage.run(module, {**state, source: x})


def _mixed(noisy: State, clean: State, share: float, generator: torch.Generator) -> Any:
    """The noisy state with each number, by a coin of `share`, taken from the clean one."""
    if isinstance(noisy, Tensor) and noisy.is_floating_point():
        coin = torch.rand(noisy.shape, generator=generator, device=noisy.device) < share
        return torch.where(coin, clean, noisy)
    if isinstance(noisy, dict):
        return {key: _mixed(value, clean[key], share, generator) for key, value in noisy.items()}
    if isinstance(noisy, tuple):
        return tuple(_mixed(one, other, share, generator) for one, other in zip(noisy, clean, strict=True))
    if hasattr(noisy, "args"):
        return type(noisy)(noisy.batch, _mixed(noisy.args, clean.args, share, generator), noisy.kwargs, noisy.output)
    return noisy
