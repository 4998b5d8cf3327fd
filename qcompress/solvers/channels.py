"""Error feedback and descent where input channels are independent but for their means.

H = blockdiag(V_c) + m m^T, with V_c [taps, taps] what the places of channel c have in common, and m the channel's mean
at each of them. Once a tap is decided, what it leaves to those after it follows from the inverse of the rest of V_c and
from one number a row, since Sherman and Morrison's formula takes the means out: O(columns x taps) a row, with no
factorization of H. The codes are those of solvers.unbounded under the whole of H, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qcompress.solvers.unbounded import BitCosts, Prices


@dataclass(frozen=True)
class ChannelInputs:
    """What the inputs of a layer are taken to be.

    within  float64 [channels, taps, taps]: covariances of a channel's taps; [1, taps, taps] where channels are alike
    means   float64 [channels], of a channel's inputs
    """

    within: Tensor
    means: Tensor

    @property
    def channels(self) -> int:
        """Input channels, each `taps` columns."""
        return len(self.means)

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return self.within.shape[-1]

    @property
    def columns(self) -> int:
        """Columns of a row."""
        return self.channels * self.taps

    @property
    def largest_mean(self) -> float:
        """The largest of the means' magnitudes."""
        return float(self.means.abs().max()) if self.channels else 0.0

    @cached_property
    def relative_means(self) -> Tensor:
        """float64 [channels]: the means in units of the largest, exactly 1 where all are equal."""
        largest = self.largest_mean
        return self.means / largest if largest else torch.ones_like(self.means)

    @property
    def energies(self) -> Tensor:
        """float64 [channels, taps]: the second moments of every input."""
        return self.within.diagonal(dim1=1, dim2=2) + self.means.square().unsqueeze(1)

    def dense(self) -> Tensor:
        """The Hessian, float64 [columns, columns]."""
        means, each = self.means.repeat_interleave(self.taps), torch.arange(self.channels)
        blocks = self.within.new_zeros(self.channels, self.taps, self.channels, self.taps)
        blocks[each, :, each] = self.within
        return blocks.reshape(self.columns, self.columns) + means.outer(means)

    def damped(self, damping: float) -> ChannelInputs:
        """With a share of the mean of the Hessian's diagonal added to that diagonal."""
        each = torch.eye(self.taps, dtype=self.within.dtype, device=self.within.device)
        return replace(self, within=self.within + damping * float(self.energies.mean()) * each)

    def part(self, channels: Tensor | slice) -> ChannelInputs:
        """Some of the channels, or all in another order."""
        within = self.within if len(self.within) == 1 else self.within[channels]
        return ChannelInputs(within, self.means[channels])

    def order(self) -> Tensor:
        """The channels, those of the most energy first: they are decided while most can make up for their errors."""
        return self.energies.sum(1).argsort(descending=True, stable=True)

    def rests(self) -> list[Rest]:
        """Of every tap, what the taps of its channel from it on have."""
        inverse, found = torch.linalg.inv(self.within), []
        for _ in range(self.taps):
            found.append(Rest.of(inverse, self.relative_means))
            # The inverse without the first tap, which elimination takes out.
            inverse = inverse[:, 1:, 1:] - inverse[:, 1:, :1] * inverse[:, :1, 1:] / inverse[:, :1, :1]
        return found

    def shares(self, rests: list[Rest]) -> Tensor:
        """float64 [channels, taps]: how much of a tap's error the means pass on to all that come after it."""
        whole, square = rests[0].totals, self.largest_mean**2
        later = whole.flip(0).cumsum(0).flip(0) - whole
        return square / (1 + square * (torch.stack([rest.totals for rest in rests], 1) + later.unsqueeze(1)))


@dataclass(frozen=True)
class Rest:
    """The inverse of what is left of each channel's covariances: its first row, and its products with the means.

    row     float64 [channels, taps left], of one channel where all are alike
    pulls   float64 [channels, taps left]: with the channel's mean, relative to the largest, at every tap
    totals  float64 [channels]: with that mean on both sides
    """

    row: Tensor
    pulls: Tensor
    totals: Tensor

    @classmethod
    def of(cls, inverse: Tensor, relative_means: Tensor) -> Rest:
        sums = inverse.sum(1)
        means = relative_means.unsqueeze(1)
        return cls(inverse[:, 0], sums * means, (sums.sum(1, keepdim=True) * means.square()).squeeze(1))


def energies_of(inputs: ChannelInputs) -> Tensor:
    """The conditional energy of every column, as solvers.unbounded.conditional_energies, float64 [channels, taps]."""
    order = inputs.order()
    ordered = inputs.part(order)
    rests = ordered.rests()
    return _energies(rests, ordered.shares(rests))[order.argsort()]


def _energies(rests: list[Rest], shares: Tensor) -> Tensor:
    first = torch.stack([rest.row[:, 0] for rest in rests], 1)
    own = torch.stack([rest.pulls[:, 0] for rest in rests], 1)
    return (first - shares * own.square()).reciprocal()


def feedback_channels(
    target: Tensor, step: float, inputs: ChannelInputs, bit_costs: BitCosts | None, *, damping: float = 0.01
) -> Tensor:
    """The codes [rows, columns] of the target's rows, integers in its dtype: those of `feedback_unbounded`.

    target  float32 or float64 [rows, columns]
    step    of all columns
    """
    inputs = inputs.damped(damping)
    order, taps = inputs.order(), inputs.taps
    inputs = inputs.part(order)
    rests = inputs.rests()
    shares = inputs.shares(rests)
    energies = _energies(rests, shares)
    prices = _Priced(bit_costs, energies)
    left = (target / step).T.reshape(inputs.channels, taps, -1).contiguous()
    codes, passed = torch.empty_like(left), torch.zeros_like(target[:, 0])
    along = rests[0].pulls.to(left).unsqueeze(2)
    # What an error leaves to the taps of its own channel, and to the number that all later channels take up.
    pulled = shares * torch.stack([rest.pulls[:, 0] for rest in rests], 1)
    spread = [
        (rest.row - pulled[:, tap : tap + 1] * rest.pulls)[:, 1:].to(left).unsqueeze(2)
        for tap, rest in enumerate(rests)
    ]
    each = zip(order.tolist(), energies.tolist(), pulled.tolist(), strict=True)
    for place, (channel, energy, pull) in enumerate(each):
        own = left[channel].addcmul_(along[place], passed)
        for tap in range(taps):
            wanted = own[tap]
            code = codes[channel, tap] = prices.cheapest(wanted, channel * taps + tap, energy[tap])
            error = (wanted - code).mul_(energy[tap])
            if tap + 1 < taps:
                own[tap + 1 :] -= spread[tap][place] * error
            passed.add_(error, alpha=pull[tap])
    return codes.reshape(inputs.columns, -1).T.contiguous()


def descend_channels(
    codes: Tensor,
    target: Tensor,
    step: float,
    inputs: ChannelInputs,
    bit_costs: BitCosts | None,
    *,
    sweeps: int = 2,
    damping: float = 1e-4,
) -> Tensor:
    """The codes after coordinate descent: those of `descend_unbounded`. Ends early when nothing changes."""
    prices = _Priced(bit_costs, energies_of(inputs.damped(max(damping, 0.01))))
    inputs = inputs.damped(damping)
    taps, square, relative = inputs.taps, inputs.largest_mean**2, inputs.relative_means
    within = inputs.within.to(target).expand(inputs.channels, -1, -1)
    means, bends = relative.tolist(), inputs.energies.tolist()
    found = codes.T.reshape(inputs.channels, taps, -1).clone()
    errors = found - (target / step).T.reshape(found.shape)
    weighed = errors if bool((relative == 1).all()) else errors * relative.to(errors).reshape(-1, 1, 1)
    common = weighed.sum((0, 1)).mul_(square)
    del weighed
    for _ in range(sweeps):
        before = found.clone()
        for channel, (mean, own_bends) in enumerate(zip(means, bends, strict=True)):
            slope = within[channel] @ errors[channel]
            for tap, bend in enumerate(own_bends):
                old = found[channel, tap].clone()
                wanted = old - slope[tap].add(common, alpha=mean) / bend
                found[channel, tap] = prices.cheapest(wanted, channel * taps + tap, bend, old)
                move = found[channel, tap] - old
                errors[channel, tap] += move
                slope += within[channel, :, tap : tap + 1] * move
                common.add_(move, alpha=square * mean)
        if torch.equal(before, found):
            break
    return found.reshape(inputs.columns, -1).T.contiguous()


class _Priced:
    """Chooses the codes of one column after another, whose errors weigh differently and whose bits weigh the same."""

    def __init__(self, bit_costs: BitCosts | None, energies: Tensor) -> None:
        self._prices = None if bit_costs is None or bit_costs.lam <= 0 else Prices(bit_costs.bits)
        if bit_costs is not None and self._prices is not None:
            self._classes = bit_costs.classes.T.contiguous()
            self._lam = bit_costs.lam * float(energies.mean())

    def cheapest(self, wanted: Tensor, column: int, weight: float, old: Tensor | None = None) -> Tensor:
        """Of the codes near what is wanted, [rows] in steps, and the old ones those of least error and bits.

        weight  of a squared error
        """
        if self._prices is None:
            return wanted.round()
        return self._prices.cheapest(wanted, self._classes[column], self._lam / weight, old)
