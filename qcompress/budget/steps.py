"""Steps of weights alone are chosen for all tensors of a plan together, so that rounding takes so many bits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.budget.exact import ExactWeights
from qcompress.budget.scales import step_factors
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.coding.payload import entropy_bits
from qcompress.plan.allocate import has_steps
from qcompress.registry import RdConfig
from qcompress.report.figures import sample_stride
from qcompress.solvers.unbounded import bisect_rate, root_mean_square
from qcompress.types.plan import Decision, Plan

SAMPLED_WEIGHTS = 1 << 11
"""Of each tensor, that steps are first chosen by."""
LOG_STEPS = (-110.0, 130.0)
"""Logarithms of steps between which they lie: wide enough for weights of any size that float32 has."""
SAMPLED_RATE = 6.0
"""Bits a weight that a sample can tell: beyond, half the step takes a bit more."""
DISK_ERROR = 2.0**-10
"""The share of a step that rounding it to float16 changes at most."""
BELOW_MEDIAN = 11.0
"""Decibels that rounding a tensor may lie under the file's median: coding moves errors, to 12 at most."""
LEAST_SQNR = 3.0
"""Decibels under which no tensor is left where the file's median is at twice of that."""


@dataclass(frozen=True)
class Rounding:
    """What rounding a sample makes of it.

    step   in the unit of the sample
    bits   a code: the entropy of the codes' order-0 distribution
    sqnr   in decibels, infinite without error
    """

    step: float
    bits: float
    sqnr: float


def rounded(sample: Tensor, step: float) -> Rounding:
    """A sample rounded to multiples of a step."""
    exact = sample.double()
    codes = (exact / step).round()
    error, energy = float((codes * step - exact).square().sum()), float(exact.square().sum())
    sqnr = 10 * math.log10(energy / error) if error > 0 and energy > 0 else math.inf
    return Rounding(step, entropy(codes), sqnr)


def entropy(codes: Tensor) -> float:
    """Bits a code of integers of any size: of their order-0 distribution."""
    _, counts = torch.unique(codes, return_counts=True)
    return entropy_bits(counts.numpy())


def keeps_apart(sample: Tensor, step: float) -> bool:
    """Whether values that differ have codes that do, be it by what the disk makes of the step."""
    codes = (sample.double() / (step * (1 - DISK_ERROR))).round()
    return len(torch.unique(codes)) == len(torch.unique(sample))


@dataclass(frozen=True)
class RoundedWeights:
    """Samples of all tensors whose steps are to be chosen, and what they take when they are rounded.

    decisions  of these tensors
    samples    of each tensor, float32, in units of the square root of its deviation times its factor
    factors    of each tensor's step beside that root, see `step_factors`
    exact      what tensors take that are stored as they are
    """

    decisions: Sequence[Decision]
    samples: Sequence[Tensor]
    factors: Sequence[float]
    exact: ExactWeights

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: Plan, behind: Mapping[str, str] | None = None) -> RoundedWeights:
        """Of the tensors of a plan; `behind` as `step_factors` takes it."""
        decisions = [decision for decision in plan.decisions if has_steps(decision)]
        known = step_factors(checkpoint, plan, behind)
        factors = [known.get(decision.tensor.name, 1.0) for decision in decisions]
        samples = [_sample(checkpoint, one, factor) for one, factor in zip(decisions, factors, strict=True)]
        return cls(decisions, samples, factors, ExactWeights(checkpoint))

    @property
    def counts(self) -> list[int]:
        """Of each tensor's weights."""
        return [decision.tensor.numel for decision in self.decisions]

    def roundings(self, step: float) -> list[Rounding]:
        """Every sample rounded to a common step, but to a finer one where the others would leave too little of it."""
        found = [rounded(sample, step) for sample in self.samples]
        decibels = [one.sqnr for one in found if math.isfinite(one.sqnr)]
        if not decibels:
            return found
        middle = statistics.median(decibels)
        least = max(middle - BELOW_MEDIAN, min(LEAST_SQNR, middle / 2))
        return [
            one if one.sqnr >= least else _held(sample, least) for one, sample in zip(found, self.samples, strict=True)
        ]

    def rate(self, step: float) -> float:
        """The entropy of the weights rounded to a common step, in bits a weight."""
        bits = (one.bits for one in self.roundings(step))
        return sum(rate * count for rate, count in zip(bits, self.counts, strict=True)) / sum(self.counts)

    def step(self, rate: float) -> float:
        """The least common step under which weights take at most so many bits each."""
        told = min(rate, SAMPLED_RATE)
        log = bisect_rate(lambda log: self.rate(math.exp(log)), told, *LOG_STEPS)
        return math.exp(log - (rate - told) * math.log(2))

    def plan_for(self, plan: Plan, rate: float) -> Plan:
        """The plan with the steps of so many bits a weight; weights that take no more as they are stay so."""
        found = {d.tensor.name: d for d in self._decided(self.roundings(self.step(rate)))}
        return replace(plan, decisions=tuple(found.get(d.tensor.name, d) for d in plan.decisions))

    def _decided(self, roundings: Sequence[Rounding]) -> Iterator[Decision]:
        each = zip(self.decisions, self.samples, self.factors, roundings, strict=True)
        for decision, sample, factor, one in each:
            exact = self.exact.of(decision, math.inf if keeps_apart(sample, one.step) else one.bits)
            if exact is not None:
                yield exact
                continue
            assert isinstance(decision.config, RdConfig)
            yield replace(decision, config=decision.config.changed(step=one.step * factor))


def _held(sample: Tensor, least: float) -> Rounding:
    """A sample on the widest step, about, that leaves at least so many decibels of it."""
    step = root_mean_square(sample) * math.sqrt(12) * 10 ** (-least / 20)
    while (found := rounded(sample, step)).sqnr < least:
        step *= 0.95
    return found


def _sample(checkpoint: Checkpoint, decision: Decision, factor: float) -> Tensor:
    tensor = decision.tensor
    flat = tensor_view(checkpoint.shard_of(tensor.name), tensor).reshape(-1)
    taken = flat[:: sample_stride(flat.numel(), SAMPLED_WEIGHTS)].float()
    deviation = root_mean_square(taken)
    return taken / (deviation**0.5 * factor) if deviation > 0 else torch.zeros_like(taken)
