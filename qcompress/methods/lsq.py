"""LSQ trains weights and inputs on grids whose steps are trained with them.

Esser et al. 2020, arXiv 1902.08153: values are clipped, then rounded; the gradient of a step is that of the rounded
values by it, times 1 / sqrt(N Qp); steps start at 2 mean|v| / sqrt(Qp). Levels of weights are -2**(bits-1) to
2**(bits-1) - 1. Ours has a step for each grid of the recipe's granularity, N counting its weights alone; 8 bits
over the whole range, not trained, for the network's own input; and the first and the last layer as all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qcompress.calibration.activations import LEAST_SCALE
from qcompress.coding.grids import exponent_for, from_half, round_scale
from qcompress.model.live import LiveModel, find_tensor, layer_name
from qcompress.registry import LsqConfig
from qcompress.solvers.learned_grids import (
    affine_of_blocks,
    blocks_of,
    expected_size,
    gradient_share,
    inputs_on_steps,
    least_error_step,
    least_scale,
    step_start,
    weight_of_blocks,
    weights_on_steps,
)
from qcompress.training.fake_quantize import (
    LEAST_SHARE,
    ActivationInit,
    activation_inits,
    adjusted_tensors,
    train_grids,
)
from qcompress.training.trainer import trainer_of
from qcompress.types.encoded import ActivationGrid, Affine, Fitted
from qcompress.types.plan import Decision
from qcompress.types.run import FitContext


def fit(live: LiveModel, decisions: Sequence[Decision[LsqConfig]], context: FitContext) -> Fitted:
    """Codes of trained weights on trained steps, the quantizers of inputs, and all else that training changed.

    The references are the trained weights, which the codes round.

    raises  DataError, ModelError, TrainingError
    """
    trainer = trainer_of(context)
    configs = {layer_name(decision.tensor.name): decision.config for decision in decisions}
    by_range = live.activations is not None and live.activations.range is not None
    weights = {d.tensor.name: LearnedStep(find_tensor(live.quantized, d.tensor.name), d) for d in decisions}
    inputs = {
        # A layer without a rule of its own starts as the first does.
        name: InputStep(start, configs.get(name, decisions[0].config).start == "mean" and not by_range).to(live.device)
        for name, start in activation_inits(live, trainer).items()
    }
    learned: list[tuple[str, Tensor, Tensor]] = [
        (layer_name(name), one.step, one.least) for name, one in weights.items()
    ]
    learned += [(name, one.step, one.least) for name, one in inputs.items() if one.step.requires_grad]
    groups = [
        {"params": [step], "lr": configs[name].learning_rate}
        for name, step, _ in learned
        if name in configs and configs[name].learning_rate is not None
    ]
    trained = train_grids(live, trainer, weights, inputs, [(step, least) for _, step, least in learned], groups)
    encoded = {name: weights[name].encode(weight) for name, weight in trained.items()}
    return Fitted(
        {**encoded, **adjusted_tensors(live, set(encoded))},
        references={name: weight.cpu() for name, weight in trained.items()},
        activations={name: one.grid() for name, one in inputs.items()},
    )


class LearnedStep(nn.Module):
    """A weight on the grids of its steps.

    step   float32 [grids], as many as the granularity has
    least  float32 [grids], below which no step falls
    """

    def __init__(self, weight: Tensor, decision: Decision[LsqConfig]) -> None:
        super().__init__()
        config = decision.config
        self.decision, self.bits = decision, config.bits
        blocks = blocks_of(weight.detach(), decision)
        most = 2 ** (self.bits - 1) - 1
        mean = step_start(blocks.abs().mean(1), most)
        start = mean if config.start == "mean" else least_error_step(blocks, self.bits)
        if not bool((start > 0).any()):
            # A layer that is zero has no step of its own, and would stay zero for ever on the least step there is.
            expected = expected_size(decision)
            self.exponent = exponent_for(expected)
            start = torch.full_like(start, float(step_start(torch.tensor(expected / 2), most)))
        else:
            self.exponent = exponent_for(float(blocks.abs().max()))
            start = torch.where(start > 0, start, start.sum() / (start > 0).sum())
        floor = least_scale(self.exponent)
        start = start.clamp_min(floor)
        self.step = nn.Parameter(start)
        self.register_buffer("least", (start * LEAST_SHARE).clamp_min(floor), persistent=False)
        self.least: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        values = weights_on_steps(blocks_of(weight, self.decision), self.step, self.bits, self.exponent)
        return weight_of_blocks(values, self.decision)

    def encode(self, weight: Tensor) -> Affine:
        """The codes and steps of what `forward` gives for the trained weight."""
        blocks = blocks_of(weight, self.decision)
        step = self.step.detach()
        half = round_scale(step, self.exponent)
        values = weights_on_steps(blocks, step, self.bits, self.exponent)
        codes = (values / from_half(half, self.exponent).unsqueeze(1)).round() + 2.0 ** (self.bits - 1)
        return affine_of_blocks(codes, half, self.exponent, self.decision)


class InputStep(nn.Module):
    """A layer's first input on the grid of its step; the zero point stays.

    step      float32 [1]
    least     below which it does not fall
    by_mean   whether it starts from the mean rather than from the grid
    """

    def __init__(self, start: ActivationInit, by_mean: bool) -> None:
        super().__init__()
        grid = start.grid
        from_mean = by_mean and start.mean > 0 and not start.fixed
        zero_point = start.middle if from_mean else grid.zero_point
        self.bits, self.zero_point = grid.bits, zero_point
        most = 2**grid.bits - 1 - zero_point
        step = float(step_start(torch.tensor(start.mean), most)) if from_mean else grid.scale
        self.step = nn.Parameter(torch.tensor([max(step, LEAST_SCALE)]), requires_grad=not start.fixed)
        self.register_buffer("least", torch.tensor([max(step * LEAST_SHARE, LEAST_SCALE)]), persistent=False)
        self.least: Tensor
        self.share = gradient_share(start.features, max(most, 1))

    def forward(self, x: Tensor) -> Tensor:
        return inputs_on_steps(x.float(), self.step, self.zero_point, self.bits, self.share)

    def grid(self) -> ActivationGrid:
        return ActivationGrid(self.bits, float(self.step.detach()), self.zero_point)
