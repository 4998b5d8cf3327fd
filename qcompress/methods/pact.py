"""PACT with DoReFa weights trains the clips of inputs, and rounds weights after a hyperbolic tangent.

Choi et al. 2018, arXiv 1805.06085 (inputs); Zhou et al. 2016, arXiv 1606.06160 (weights). As published a clip
starts at a number, the levels of weights span [-1, 1], and first and last layer stay as they are. Ours starts a clip
with the least squared error of what flows there, gives levels the span of the weights after the tangent, and quantizes
every layer that the recipe names; inputs below zero get levels there too. What is stored is the rounded tangent: the
weight that the codes stand for is tanh(w), not w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.calibration.activations import LEAST_SCALE
from qcompress.coding.grids import exponent_for, from_half, round_scale
from qcompress.errors import ModelError
from qcompress.model.live import LiveModel, find_tensor, layer_name
from qcompress.registry import PactConfig
from qcompress.solvers.learned_grids import (
    affine_of_blocks,
    blocks_of,
    expected_size,
    inputs_below_clip,
    least_scale,
    nearest_middle,
    span_scale,
    squash,
    weight_of_blocks,
)
from qcompress.training.fake_quantize import (
    LEAST_SHARE,
    ActivationInit,
    activation_inits,
    adjusted_tensors,
    train_grids,
)
from qcompress.training.trainer import Trainer, trainer_of
from qcompress.types.encoded import ActivationGrid, Affine, Fitted
from qcompress.types.plan import Decision
from qcompress.types.run import FitContext


def fit(live: LiveModel, decisions: Sequence[Decision[PactConfig]], context: FitContext) -> Fitted:
    """Codes of trained weights after their tangent, the quantizers of inputs, and all else that training changed.

    The references are the tangents, which the codes round.

    raises  DataError, ModelError, TrainingError
    """
    trainer = trainer_of(context)
    configs = {layer_name(decision.tensor.name): decision.config for decision in decisions}
    weights = {d.tensor.name: SquashedWeight(find_tensor(live.quantized, d.tensor.name), d) for d in decisions}
    inputs = {
        name: InputClip(name, start, configs.get(name, decisions[0].config)).to(live.device)
        for name, start in activation_inits(live, trainer).items()
    }
    groups = [_group(one, configs.get(name, decisions[0].config), trainer) for name, one in inputs.items()]
    bounded = [(one.clip, one.least) for one in inputs.values()]
    trained = train_grids(live, trainer, weights, inputs, bounded, groups)
    encoded = {name: weights[name].encode(weight) for name, weight in trained.items()}
    return Fitted(
        {**encoded, **adjusted_tensors(live, set(encoded))},
        references={name: weights[name].reference(weight).cpu() for name, weight in trained.items()},
        activations={name: one.grid() for name, one in inputs.items()},
    )


def _group(one: InputClip, config: PactConfig, trainer: Trainer) -> Mapping[str, Any]:
    """How the optimizer treats a clip: a layer without a rule of its own follows the first."""
    decay = trainer.training.optimizer.weight_decay if config.clip_decay is None else config.clip_decay
    rate = {} if config.learning_rate is None else {"lr": config.learning_rate}
    return {"params": [one.clip] if one.clip.requires_grad else [], "weight_decay": decay, **rate}


class SquashedWeight(nn.Module):
    """A weight on the levels that span its tangent, with the gradient straight through the rounding."""

    def __init__(self, weight: Tensor, decision: Decision[PactConfig]) -> None:
        super().__init__()
        self.config = decision.config
        self.decision = decision
        largest = float(self._squash(blocks_of(weight.detach(), decision)).abs().max())
        # A layer that is zero would stay zero for ever on the scales that the least exponent allows.
        self.exponent = exponent_for(largest or expected_size(decision))

    def forward(self, weight: Tensor) -> Tensor:
        squashed = self._squash(blocks_of(weight, self.decision))
        codes, half = self._codes(squashed.detach())
        scale = from_half(half, self.exponent).unsqueeze(1)
        values = (codes - (2.0**self.config.bits - 1) / 2) * scale
        return weight_of_blocks(_Straight.apply(squashed, values), self.decision)  # type: ignore[no-untyped-call]

    def encode(self, weight: Tensor) -> Affine:
        """The codes and scales of what `forward` gives for the trained weight."""
        codes, half = self._codes(self._squash(blocks_of(weight, self.decision)))
        return affine_of_blocks(codes, half, self.exponent, self.decision)

    def reference(self, weight: Tensor) -> Tensor:
        """What the codes round, shaped like the weight."""
        return weight_of_blocks(self._squash(blocks_of(weight, self.decision)), self.decision)

    def _squash(self, blocks: Tensor) -> Tensor:
        return squash(blocks, self.config.bits, unit=self.config.scale == "unit")

    def _codes(self, squashed: Tensor) -> tuple[Tensor, Tensor]:
        """Codes float32 [blocks, length], and scales as they are stored."""
        scale = span_scale(squashed, self.config.bits).clamp_min(least_scale(self.exponent))
        half = round_scale(scale, self.exponent)
        return nearest_middle(squashed, from_half(half, self.exponent), self.config.bits), half


class _Straight(torch.autograd.Function):
    """The second value forward, the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


class InputClip(nn.Module):
    """A layer's first input, clipped and on the levels below its clip; the zero point stays.

    clip   float32 [1]
    least  below which it does not fall
    """

    def __init__(self, name: str, start: ActivationInit, config: PactConfig) -> None:
        super().__init__()
        grid = start.grid
        given = config.clip if not start.fixed else None
        zero_point = grid.zero_point if given is None else start.middle
        most = 2**grid.bits - 1 - zero_point
        if not most:
            raise ModelError(
                f"layer {name}", "its inputs lie below zero, which 1 bit cannot hold", "use 2 bits or more"
            )
        self.bits, self.zero_point, self.most = grid.bits, zero_point, most
        clip = max(given or grid.scale * most, LEAST_SCALE * most)
        self.clip = nn.Parameter(torch.tensor([clip]), requires_grad=not start.fixed)
        self.register_buffer("least", torch.tensor([max(clip * LEAST_SHARE, LEAST_SCALE * most)]), persistent=False)
        self.least: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return inputs_below_clip(x.float(), self.clip, self.zero_point, self.bits)

    def grid(self) -> ActivationGrid:
        return ActivationGrid(self.bits, float(self.clip.detach() / self.most), self.zero_point)
