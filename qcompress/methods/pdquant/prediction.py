"""The network's prediction is held here against the one that a block's quantized output leads to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.methods.pdquant.inputs import Inputs
from qcompress.model.stages import Stage, State, TracedStage, WholeStage, last_output, replace_output, stage_output
from qcompress.registry import PdquantConfig

PROBE_VALUES = 1 << 28
MOST_PROBES = 4
"""Numbers that probes may take in memory, and how many a sample has at most."""


def prediction_difference(clean: Tensor, found: Tensor, temperature: float) -> Tensor:
    """The mean divergence of softened predictions over samples and places; nothing where both logits are one.

    clean, found  logits [samples, ..., classes]
    """
    classes = clean.shape[-1]
    wanted = F.log_softmax(clean.reshape(-1, classes) / temperature, -1)
    given = F.log_softmax(found.reshape(-1, classes) / temperature, -1)
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def half_fisher(logits: Tensor, signs: Tensor, temperature: float) -> Tensor:
    """(diag p - p p^T)^(1/2) v for p = softmax(logits / T), factored as diag(sqrt p) (v - sqrt p (sqrt p . v)).

    logits, signs  [samples, classes]
    """
    root = F.softmax(logits / temperature, -1).sqrt()
    halved: Tensor = root * (signs - root * (root * signs).sum(-1, keepdim=True))
    return halved


def probe(
    outputs: Tensor, rest: Callable[[Tensor], Tensor], temperature: float, probes: int, generator: torch.Generator
) -> Tensor:
    """g [samples, probes, *output], divided by sqrt(2 probes) T: the sum of squares of g . dy estimates the divergence.

    outputs  a block's full-precision outputs [samples, ...]
    rest     from them to the logits [samples, classes] of the full-precision network
    """
    found = []
    for _ in range(probes):
        y = outputs.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = rest(y)
            flat = logits.reshape(-1, logits.shape[-1])
            signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device).to(flat.dtype) * 2 - 1
            weighted = (flat * half_fisher(flat.detach(), signs, temperature)).sum()
            (gradient,) = torch.autograd.grad(weighted, y)
        found.append(gradient)
    places = flat.shape[0] // len(outputs)
    return torch.stack(found, 1) / (temperature * math.sqrt(2 * probes * places))


def quadratic_difference(probes: Tensor, change: Tensor) -> Tensor:
    """The mean over samples of the divergence that a change of the block's output makes, to second order.

    probes  of these samples, from `probe`; change [samples, ...]
    """
    along: Tensor = (probes.flatten(2) * change.flatten(1).unsqueeze(1)).sum(2)
    total: Tensor = along.square().sum(1).mean()
    return total


def fitting_probes(outputs: Tensor) -> int:
    """How many probes a sample may have, for memory's sake."""
    return max(1, min(MOST_PROBES, PROBE_VALUES // max(outputs.numel(), 1)))


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
    known      of every sample, its probes (see Probes) for that form, else its logits in full precision
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
