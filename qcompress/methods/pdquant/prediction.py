"""What the network predicts in full precision, and how far a block's output leads it away from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qcompress.methods.pdquant.inputs import Inputs
from qcompress.model.block_prediction import fitting_probes, prediction_difference, probe, quadratic_difference
from qcompress.model.stages import Stage, State, TracedStage, WholeStage, last_output, replace_output, stage_output
from qcompress.registry import PdquantConfig


@dataclass(frozen=True)
class Rest:
    """The network in full precision, from a block on.

    stages  the block and those after it
    """

    module: nn.Module
    stages: Sequence[Stage]

    @property
    def block(self) -> Stage:
        return self.stages[0]

    def logits(self, state: State) -> Tensor:
        """From the state after the block."""
        for stage in self.stages[1:]:
            state = stage.run(self.module, state)
        return last_output(state)

    def logits_from(self, state: State, y: Tensor) -> Tensor:
        """Where the block gives y instead of what `state` holds."""
        if isinstance(self.block, TracedStage):
            return self.logits({**state, self.block.nodes[-1]: y})
        return self.logits(replace_output(state, y))


@dataclass(frozen=True)
class Prediction:
    """The prediction difference of some samples, times its weight.

    plain      the block's outputs in full precision, of every sample
    quadratic  whether it is learned in its quadratic form
    known      of every sample, its probes (see model.block_prediction) for that form, else its logits in full precision
    """

    rest: Rest
    config: PdquantConfig
    inputs: Inputs
    plain: Tensor
    quadratic: bool
    known: Tensor

    def loss(self, chosen: Tensor, state: State) -> Tensor:
        """In the form in which it is learned, from the samples' states after the quantized block."""
        weight, known = self.config.prediction, self.known[chosen]
        if self.quadratic:
            return weight * quadratic_difference(known, stage_output(self.rest.block, state) - self.plain[chosen])
        return weight * prediction_difference(known, self.rest.logits(state), self.config.temperature)

    def exact(self, chosen: Tensor, state: State) -> float:
        """Through the rest of the network, in either form."""
        wanted = self.rest.logits(self.rest.block.run(self.rest.module, self.inputs.clean_of(chosen)))
        difference = prediction_difference(wanted, self.rest.logits(state), self.config.temperature)
        return self.config.prediction * float(difference)


def make_prediction(
    rest: Rest, config: PdquantConfig, inputs: Inputs, clean: Sequence[State], generator: torch.Generator
) -> Prediction | None:
    """None where it has no weight and where the block is the whole network.

    clean  the states of every calibration batch before the block, in full precision
    """
    block = rest.block
    if not config.prediction or isinstance(block, WholeStage):
        return None
    plain = stage_output(block, block.run(rest.module, inputs.clean))
    quadratic = config.prediction_form == "quadratic" and len(rest.stages) > 1
    count = fitting_probes(plain)
    known = []
    for state in [block.run(rest.module, state) for state in clean]:
        if quadratic:
            y = stage_output(block, state)
            known.append(probe(y, partial(rest.logits_from, state), config.temperature, count, generator))
        else:
            known.append(rest.logits(state))
    return Prediction(rest, config, inputs, plain, quadratic, torch.cat(known))
