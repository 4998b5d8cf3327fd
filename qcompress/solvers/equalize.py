"""Channel ranges are made equal and high biases absorbed in closed form: data-free quantization.

Nagel et al. 2019, arXiv 1906.04721. What one layer hands to the next may be scaled channel by channel, by factors above
0 that the next layer takes back, as long as all between them is positively homogeneous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEAD = 2.0**-14
"""A channel this much smaller than the largest of its layer hands nothing on but a constant."""
SETTLED = 1e-6
ABSORBED_DEVIATIONS = 3.0


@dataclass(frozen=True)
class Peaks:
    """The largest |weight| of each kernel of a layer: float32 or float64 [groups, outputs a group, inputs a group]."""

    values: Tensor

    def outputs(self, inputs: Tensor) -> Tensor:
        """The range of each output channel, [outputs], once inputs [inputs] are scaled so."""
        groups, _, width = self.values.shape
        return (self.values * inputs.reshape(groups, 1, width)).amax(2).flatten()

    def inputs(self, outputs: Tensor) -> Tensor:
        """The range of each input channel, [inputs], once outputs [outputs] are scaled so."""
        groups, height, _ = self.values.shape
        return (self.values * outputs.reshape(groups, height, 1)).amax(1).flatten()


@dataclass(frozen=True)
class Chain:
    """Layers in a row: a pair, or more with depthwise layers between the first and the last.

    layers   indices of the layers
    limits   of each link between them the largest factor that its values may get, float64 [channels], infinite for any
    repeats  how many input channels of the last layer, side by side, each channel of the last link becomes
    """

    layers: tuple[int, ...]
    limits: tuple[Tensor, ...]
    repeats: int = 1


def live_channels(ranges: Tensor) -> Tensor:
    """Which channels of each layer do something, bool [layers, channels], of their ranges [layers, channels]."""
    return ranges > DEAD * ranges.amax(1, keepdim=True)


def equalizing_factors(ranges: Tensor, live: Tensor) -> Tensor:
    """The factor for each layer's channels after which a channel has one range in all layers, their geometric mean.

    ranges   [layers, channels], at least 0
    live     bool [layers, channels]
    returns  float64 [layers, channels], above 0, of product 1 over the layers

    Of two layers the factors are 1/s and s with s = sqrt(r1 / r2), section 4.1; of three the cube root takes the place
    of the square root, as in AIMET's code. Where a channel is dead in some layer, its ranges in the others become the
    median of all channels' and the dead layer takes what is left: a useless range must not widen a grid. AIMET leaves
    such channels alone.
    """
    logs = torch.where(live, ranges, 1.0).double().log()
    whole = live.all(0)
    if not bool(whole.any()):
        return torch.ones_like(logs)
    level = torch.where(whole, logs.mean(0), logs[:, whole].mean(0).median())
    factors = level - logs
    # Beside each other, dead layers move as the others do, so that going on and on leads nowhere.
    factors = torch.where(live, factors, factors[:, whole].median(1, keepdim=True).values)
    rest = factors.sum(0) / (~live).sum(0).clamp_min(1)
    return torch.where(live, factors, factors - rest).exp()


def equalize(chains: Sequence[Chain], peaks: Sequence[Peaks], sweeps: int) -> list[list[Tensor]]:
    """For each chain the factors of the values on each of its links, float64 [channels] above 0.

    Chains share layers, so they are gone through in turn until nothing moves, at most `sweeps` times. Where factors
    have limits, all are divided by one number so that they keep them: the ranges are then equal but for one factor a
    layer, which a grid for the whole tensor does not see. A channel that is dead in some layer stops at its limit.
    """
    scales = [[torch.ones_like(limit) for limit in chain.limits] for chain in chains]
    outputs = [one.values.new_ones(one.values.shape[0] * one.values.shape[1], dtype=torch.float64) for one in peaks]
    inputs = [one.values.new_ones(one.values.shape[0] * one.values.shape[2], dtype=torch.float64) for one in peaks]
    # Scaling must not bring a dead channel to life.
    live = [live_channels(_ranges(chain, peaks, outputs, inputs)) for chain in chains]
    for _ in range(sweeps):
        moved = 0.0
        for chain, alive, links in zip(chains, live, scales, strict=True):
            ranges = _ranges(chain, peaks, outputs, inputs)
            # The factor of a link is that of all the layers before it.
            for index, step in enumerate(equalizing_factors(ranges, alive)[:-1].cumprod(0)):
                step = _limited(step, chain.limits[index] / links[index], alive.all(0))
                links[index] *= step
                outputs[chain.layers[index]] *= step
                repeats = chain.repeats if index == len(links) - 1 else 1
                inputs[chain.layers[index + 1]] /= step.repeat_interleave(repeats)
                moved = max(moved, float(step.log().abs().max()))
        if moved < SETTLED:
            break
    return scales


def _limited(step: Tensor, limit: Tensor, whole: Tensor) -> Tensor:
    """The factors divided by one number so that none of the whole channels is above its limit; the others cut to it."""
    excess = float((step / limit)[whole].max()) if bool(whole.any()) else 0.0
    return torch.minimum(step / excess if excess > 0 else step, limit)


def _ranges(chain: Chain, peaks: Sequence[Peaks], outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The ranges of a chain's channels in each of its layers, as scaled so far: float64 [layers, channels]."""
    *before, last = chain.layers
    ranges = [peaks[layer].outputs(inputs[layer]) * outputs[layer] for layer in before]
    wide = peaks[last].inputs(outputs[last]) * inputs[last]
    return torch.stack([*ranges, wide.reshape(-1, chain.repeats).amax(1)])


def absorbable(mean: Tensor, deviation: Tensor, rectified: bool, cap: Tensor | None = None) -> Tensor:
    """What can be taken from a layer's outputs and given to the next layer's bias, at least 0 where `rectified`.

    mean, deviation  float64 [channels], of the outputs as N(mean, deviation**2)
    rectified        whether negative outputs change on the way: then only what almost every output exceeds, mean - 3
                     deviations (section 4.1.3); else all of the mean
    cap              where the activation ends; no more than it is taken
    """
    if not rectified:
        return mean.clone()
    reach = (mean - ABSORBED_DEVIATIONS * deviation.abs()).clamp_min(0)
    return reach if cap is None else torch.minimum(reach, cap)
