"""What a block learns to lower: the distance of its outputs, and of the network's prediction, from full precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompress.methods.pdquant.inputs import Inputs
from qcompress.methods.pdquant.prediction import Prediction
from qcompress.model.stages import Stage, stage_output
from qcompress.registry import PdquantConfig

EVALUATED_SAMPLES = 256


@dataclass(frozen=True)
class Loss:
    """The loss of one block.

    module      the network that is quantized
    targets     the block's outputs in full precision from corrected inputs, of every sample
    channels    the axis of its channels
    prediction  None where only the outputs matter
    """

    stage: Stage
    module: nn.Module
    config: PdquantConfig
    inputs: Inputs
    targets: Tensor
    channels: int
    prediction: Prediction | None

    def energy(self) -> float:
        """What the squared error would be if the block gave nothing."""
        return float(self.targets.double().square().sum()) / self._positions(self.targets)

    def of(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Reconstruction from mixed inputs and prediction difference from noisy ones, for some samples."""
        noisy = self.inputs.noisy_of(chosen)
        state = self.stage.run(self.module, noisy)
        mixed = state
        if self.config.drop:
            mixed = self.stage.run(self.module, self.inputs.mixed(noisy, chosen, self.config.drop, generator))
        error = self._error(stage_output(self.stage, mixed), chosen)
        return error if self.prediction is None else error + self.prediction.loss(chosen, state)

    def whole(self) -> float:
        """The exact loss on inputs of the quantized network, over all samples or the first so many."""
        total, count = 0.0, min(self.inputs.samples, EVALUATED_SAMPLES)
        size = self.config.batch_size
        for start in range(0, count, size):
            chosen = torch.arange(start, min(start + size, count), device=self.targets.device)
            state = self.stage.run(self.module, self.inputs.noisy_of(chosen))
            error = float(self._error(stage_output(self.stage, state), chosen))
            if self.prediction is not None:
                error += self.prediction.exact(chosen, state)
            total += error * len(chosen)
        return total / count

    def _error(self, found: Tensor, chosen: Tensor) -> Tensor:
        return (found - self.targets[chosen]).square().sum() / self._positions(found)

    def _positions(self, y: Tensor) -> int:
        """What the squared error is averaged over: samples and places, channels being summed."""
        return y.numel() // y.shape[self.channels]
