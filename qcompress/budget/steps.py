"""Steps of weights alone are chosen for all tensors of a plan together, so that rounding takes so many bits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qcompress.budget.exact import ExactWeights
from qcompress.budget.scales import step_factors
from qcompress.checkpoint.checkpoint import Checkpoint, strided_values
from qcompress.plan.allocate import has_steps
from qcompress.registry import RdConfig
from qcompress.report.figures import sample_stride
from qcompress.solvers.unbounded import bisect_rate, root_mean_square
from qcompress.types.plan import Decision, Plan

SAMPLED_WEIGHTS = 1 << 11
"""Of each tensor, that steps are first chosen by: where there are no more than fill HELD_WEIGHTS."""
HELD_WEIGHTS = 1 << 23
"""Of all tensors together, which are held while steps are chosen."""
LEAST_SAMPLED = 1 << 8
"""Of each of very many tensors."""
LOG_STEPS = (-110.0, 130.0)
"""Logarithms of steps between which they lie: wide enough for weights of any size that float32 has."""
ROUNDED_AT_ONCE = 1 << 17
WEIGHTS_A_CODE = 1 << 5
"""That a sample has at the rate which it can still tell: beyond, half the step takes a bit more."""
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


def rounded(samples: Tensor, step: float) -> list[Rounding]:
    """Samples [samples, weights], the weights of each in their order, rounded to multiples of a step."""
    found = []
    for part in torch.split(samples, max(1, ROUNDED_AT_ONCE // max(1, samples.shape[1]))):
        exact = part.double()
        codes = (exact / step).round_()
        bits = _entropies(codes)
        error, energy = (codes * step - exact).square_().sum(1), exact.square().sum(1)
        silent = (error <= 0) | (energy <= 0)
        sqnr = 10 * (energy / error).log10_().masked_fill_(silent, math.inf)
        found += [Rounding(step, *both) for both in zip(bits.tolist(), sqnr.tolist(), strict=True)]
    return found


def _entropies(codes: Tensor) -> Tensor:
    """Bits a code of each row [rows, columns] whose codes ascend, float64 [rows]: of their order-0 distribution."""
    rows, columns = codes.shape
    if not codes.numel():
        return codes.new_zeros(rows)
    starts = torch.ones_like(codes, dtype=torch.bool)
    starts[:, 1:] = codes[:, 1:] != codes[:, :-1]
    places = starts.reshape(-1).nonzero().reshape(-1)
    shares = torch.diff(places, append=places.new_tensor([codes.numel()])).double() / columns
    return -codes.new_zeros(rows).index_add_(0, places // columns, shares * shares.log2())


def keeps_apart(sample: Tensor, step: float) -> bool:
    """Whether values that differ have codes that do, be it by what the disk makes of the step."""
    codes = (sample.double() / (step * (1 - DISK_ERROR))).round()
    return len(torch.unique(codes)) == len(torch.unique(sample))


@dataclass(frozen=True)
class RoundedWeights:
    """Samples of all tensors whose steps are to be chosen, and what they take when they are rounded.

    decisions  of these tensors
    stacks     samples of equal length, float32 [tensors, weights], the weights of each in ascending order and in units
               of the square root of its deviation times its factor, and whose they are: places in `decisions`
    factors    of each tensor's step beside that root, see `step_factors`
    exact      what tensors take that are stored as they are
    """

    decisions: Sequence[Decision]
    stacks: Sequence[tuple[Sequence[int], Tensor]]
    factors: Sequence[float]
    exact: ExactWeights

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: Plan, behind: Mapping[str, str] | None = None) -> RoundedWeights:
        """Of the tensors of a plan; `behind` as `step_factors` takes it."""
        decisions = [decision for decision in plan.decisions if has_steps(decision)]
        known = step_factors(checkpoint, plan, behind)
        factors = [known.get(decision.tensor.name, 1.0) for decision in decisions]
        most = _sampled(decisions)
        by_length: dict[int, dict[int, Tensor]] = {}
        for place, (decision, factor) in enumerate(zip(decisions, factors, strict=True)):
            sample = _sample(checkpoint, decision, factor, most)
            by_length.setdefault(len(sample), {})[place] = sample
        stacks = [([*samples], torch.stack([*samples.values()])) for samples in by_length.values()]
        return cls(decisions, stacks, factors, ExactWeights(checkpoint))

    @cached_property
    def samples(self) -> list[Tensor]:
        """Of each tensor, float32 [weights]: rows of the stacks."""
        rows = {place: row for places, stack in self.stacks for place, row in zip(places, stack, strict=True)}
        return [rows[place] for place in range(len(rows))]

    @property
    def counts(self) -> list[int]:
        """Of each tensor's weights."""
        return [decision.tensor.numel for decision in self.decisions]

    def roundings(self, step: float) -> list[Rounding]:
        """Every sample rounded to a common step, but to a finer one where the others would leave too little of it."""
        of: dict[int, Rounding] = {}
        for places, stack in self.stacks:
            of |= zip(places, rounded(stack, step), strict=True)
        found = [of[place] for place in range(len(of))]
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
        told = min(rate, math.log2(_sampled(self.decisions) / WEIGHTS_A_CODE))
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


def _sampled(decisions: Sequence[Decision]) -> int:
    """Weights of each tensor that are sampled."""
    return min(SAMPLED_WEIGHTS, max(LEAST_SAMPLED, HELD_WEIGHTS // max(1, len(decisions))))


def _held(sample: Tensor, least: float) -> Rounding:
    """A sample on the widest step, about, that leaves at least so many decibels of it."""
    step = root_mean_square(sample) * math.sqrt(12) * 10 ** (-least / 20)
    while (found := rounded(sample.unsqueeze(0), step)[0]).sqnr < least:
        step *= 0.95
    return found


def _sample(checkpoint: Checkpoint, decision: Decision, factor: float, most: int) -> Tensor:
    tensor = decision.tensor
    stride = sample_stride(tensor.numel, most)
    taken = strided_values(checkpoint.shard_of(tensor.name), tensor, stride).float()
    deviation = root_mean_square(taken)
    return (taken / (deviation**0.5 * factor) if deviation > 0 else torch.zeros_like(taken)).sort().values
