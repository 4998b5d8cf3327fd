"""Error feedback and descent where input channels are alike: the Hessian is a small one a channel, and a common mean.

H = I (x) V + m**2 1 1^T, with V [taps, taps] what the places of one channel have in common. Once a tap is decided, what
it leaves to those after it follows from the inverse of the rest of V and from one number a row, since Sherman and
Morrison's formula takes the mean out: O(columns x taps) a row, with no factorization. The codes are those of
solvers.unbounded under the whole of H, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.solvers.unbounded import BitCosts, Prices


@dataclass(frozen=True)
class AlikeChannels:
    """What the inputs of a layer are taken to be.

    within    float64 [taps, taps]: second moments of one channel less the squared mean
    mean      of every input
    channels  input channels, each `taps` columns
    """

    within: Tensor
    mean: float
    channels: int

    @property
    def columns(self) -> int:
        """Columns of a row."""
        return self.channels * len(self.within)

    def dense(self) -> Tensor:
        """The Hessian, float64 [columns, columns]."""
        each = torch.eye(self.channels, dtype=self.within.dtype, device=self.within.device)
        return torch.kron(each, self.within) + self.mean**2

    def damped(self, damping: float) -> AlikeChannels:
        """With a share of the mean of the Hessian's diagonal added to that diagonal."""
        each = torch.eye(len(self.within), dtype=self.within.dtype, device=self.within.device)
        more = damping * (float(self.within.diagonal().mean()) + self.mean**2)
        return AlikeChannels(self.within + more * each, self.mean, self.channels)

    def rests(self) -> list[Rest]:
        """Of every tap, what the taps of its channel from it on have."""
        inverse, found = torch.linalg.inv(self.within), []
        for _ in range(len(self.within)):
            found.append(Rest.of(inverse))
            # The inverse without the first tap, which elimination takes out.
            inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
        return found

    def shares(self, rests: list[Rest]) -> Tensor:
        """float64 [channels, taps]: how much of a tap's error the mean passes on to all that come after it."""
        later = torch.arange(self.channels - 1, -1, -1, dtype=torch.float64) * rests[0].total
        totals = torch.tensor([rest.total for rest in rests], dtype=torch.float64)
        return self.mean**2 / (1 + self.mean**2 * (totals + later.unsqueeze(1)))


@dataclass(frozen=True)
class Rest:
    """The inverse of what is left of one channel's moments: its first row, and its row sums.

    row   float64 [taps left]
    sums  alike
    """

    row: Tensor
    sums: Tensor

    @classmethod
    def of(cls, inverse: Tensor) -> Rest:
        return cls(inverse[0], inverse.sum(0))

    @property
    def total(self) -> float:
        return float(self.sums.sum())


def energies_of(inputs: AlikeChannels) -> Tensor:
    """The conditional energy of every column, as solvers.unbounded.conditional_energies, float64 [channels, taps]."""
    rests = inputs.rests()
    first = torch.stack([rest.row[0] for rest in rests])
    own = torch.stack([rest.sums[0] for rest in rests])
    return (first - inputs.shares(rests) * own.square()).reciprocal()


def feedback_alike(
    target: Tensor, step: float, inputs: AlikeChannels, bit_costs: BitCosts | None, *, damping: float = 0.01
) -> Tensor:
    """The codes [rows, columns] of the target's rows, integers in its dtype: those of `feedback_unbounded`.

    target  float32 or float64 [rows, columns]
    step    of all columns
    """
    inputs = inputs.damped(damping)
    rests, taps = inputs.rests(), len(inputs.within)
    shares, energies = inputs.shares(rests), energies_of(inputs)
    prices = _Priced(bit_costs, energies)
    left = (target / step).T.reshape(inputs.channels, taps, -1).contiguous()
    codes, passed = torch.empty_like(left), torch.zeros_like(left[0, 0])
    along = rests[0].sums.to(left).unsqueeze(1)
    for channel in range(inputs.channels):
        own = left[channel].addcmul_(along, passed)
        for tap, rest in enumerate(rests):
            share, energy = float(shares[channel, tap]), float(energies[channel, tap])
            wanted = own[tap]
            code = codes[channel, tap] = prices.cheapest(wanted, channel * taps + tap, energy)
            error = (wanted - code).mul_(energy)
            if tap + 1 < taps:
                own[tap + 1 :] -= (rest.row - share * rest.sums[0] * rest.sums)[1:].to(own).unsqueeze(1) * error
            passed.add_(error, alpha=share * float(rest.sums[0]))
    return codes.reshape(inputs.columns, -1).T.contiguous()


def descend_alike(
    codes: Tensor,
    target: Tensor,
    step: float,
    inputs: AlikeChannels,
    bit_costs: BitCosts | None,
    *,
    sweeps: int = 2,
    damping: float = 1e-4,
) -> Tensor:
    """The codes after coordinate descent: those of `descend_unbounded`. Ends early when nothing changes."""
    prices = _Priced(bit_costs, energies_of(inputs.damped(max(damping, 0.01))))
    inputs = inputs.damped(damping)
    taps, mean2 = len(inputs.within), inputs.mean**2
    within = inputs.within.to(target)
    bends = (inputs.within.diagonal() + mean2).tolist()
    found = codes.T.reshape(inputs.channels, taps, -1).clone()
    errors = found - (target / step).T.reshape(found.shape)
    common = errors.sum((0, 1)).mul_(mean2)
    for _ in range(sweeps):
        before = found.clone()
        for channel in range(inputs.channels):
            slope = within @ errors[channel]
            for tap, bend in enumerate(bends):
                old = found[channel, tap].clone()
                wanted = old - (slope[tap] + common) / bend
                found[channel, tap] = prices.cheapest(wanted, channel * taps + tap, bend, old)
                move = found[channel, tap] - old
                errors[channel, tap] += move
                slope += within[:, tap : tap + 1] * move
                common.add_(move, alpha=mean2)
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
