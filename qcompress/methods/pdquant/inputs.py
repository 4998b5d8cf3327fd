"""What all samples bring into a block: from the network in full precision, and as it is quantized so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.model.block_correction import correct_inputs, norms_in, seen_statistics
from qcompress.model.graph import batch_norm_of
from qcompress.model.live import LiveModel
from qcompress.model.stages import Stage, State, TracedStage, join_states, pick_samples
from qcompress.registry import PdquantConfig


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
