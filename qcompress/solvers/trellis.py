"""The Viterbi algorithm finds the codes of a trellis, each survivor with an error feedback of its own.

Entropy-coded trellis-coded quantization with union quantizers (Fischer and Wang 1992; Joshi, Crump and Fischer 1995):
the state of a row says whether its next code k stands for 2k half-steps or for 2k - sgn(k), and the parity of k says
what the next state is (coding.trellis). A path runs along the columns of a row in their own order, since decoding does.
Eight survivors a row carry their own rest of the row; decisions in one column see what feedback made of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.coding.trellis import NEXT_STATE, STATES
from qcompress.coding.unbounded.tokens import CLASSES
from qcompress.solvers.feedback import BLOCK_COLUMNS, inverse_factor
from qcompress.solvers.hessian import grouped
from qcompress.solvers.unbounded import BitCosts


def trellis_codes(
    target: Tensor,
    steps: Tensor,
    hessian: Tensor,
    bit_costs: BitCosts | None = None,
    *,
    damping: float = 0.01,
    block: int = BLOCK_COLUMNS,
) -> Tensor:
    """The codes [rows, columns] of the target's rows in its dtype, integers without bound.

    Arguments are those of `feedback_unbounded`; `steps` is the step of an even state's codes, twice the distance
    between neighbouring values of both union quantizers.
    """
    groups, columns = hessian.shape[:2]
    order = torch.arange(columns, device=hessian.device).expand(groups, columns)
    upper = inverse_factor(hessian, order, damping, target.dtype)
    scales = grouped(steps.to(target.dtype).expand(target.shape), groups)
    pivots = upper.diagonal(dim1=1, dim2=2).unsqueeze(1)
    # Costs in a unit near their own: their squares must not vanish, or paths are as good as any other.
    unit = (scales / pivots).mean()
    weighed = None
    if bit_costs is not None and bit_costs.lam > 0:
        # Both quantizers together have half the step that a bit is weighed against.
        weighed = bit_costs.weighed(grouped(bit_costs.classes, groups), (scales / (2 * pivots * unit)).square())
    rest = grouped(target, groups).expand(STATES, -1, -1, -1).clone()
    rows = rest.shape[2]
    costs = rest.new_full((STATES, groups, rows), torch.inf)
    costs[0] = 0
    before, parity = (one.to(target.device) for one in _arrivals())
    odd = (torch.arange(STATES, device=target.device) & 1).view(-1, 1, 1)
    chosen = torch.empty((columns, STATES, groups, rows), dtype=torch.int32, device=target.device)
    origins = torch.empty((columns, STATES, groups, rows), dtype=torch.uint8, device=target.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        work = rest[:, :, :, start:stop].clone()
        errors = work.new_empty((stop - start, STATES, groups, rows))
        inner = upper[:, start:stop, start:stop]
        for column in range(stop - start):
            here = start + column
            step, pivot, w = scales[:, :, here], pivots[:, :, here], work[:, :, :, column]
            codes, values = _nearest(w / (step / 2), odd)
            error = (w - values * (step / 2)) / pivot
            cost = (error / unit).square_()
            if weighed is not None:
                cost += weighed.costs(weighed.classes[:, :, here] + CLASSES * (1 + odd), codes)
            # [2 parities, 2 magnitudes, states, groups, rows] -> the cheaper magnitude of each parity.
            cost, which = cost.min(1)
            codes, error = (one.gather(1, which.unsqueeze(1)).squeeze(1) for one in (codes, error))
            total = costs + cost
            arriving = torch.stack([total[parity[:, way], before[:, way]] for way in (0, 1)])
            costs, way = arriving.min(0)
            source = torch.where(way == 0, before[:, :1, None], before[:, 1:, None])
            via = torch.where(way == 0, parity[:, :1, None], parity[:, 1:, None])
            pick = source.unsqueeze(0)
            chosen[here] = _of(codes, via, pick).int()
            errors[column] = _of(error, via, pick)
            origins[here] = source.to(torch.uint8)
            work = work.gather(0, source.unsqueeze(3).expand_as(work))
            work[:, :, :, column:] -= errors[column].unsqueeze(3) * inner[:, column, column:].unsqueeze(1)
        if stop < columns:
            lineage, errors = _traced(origins[start:stop], errors)
            rest = rest.gather(0, lineage.unsqueeze(3).expand_as(rest))
            rest[:, :, :, stop:] -= torch.einsum("csgr,gck->sgrk", errors, upper[:, start:stop, stop:])
    best = costs.argmin(0, keepdim=True)
    found = torch.empty((columns, groups, rows), dtype=target.dtype, device=target.device)
    for column in range(columns - 1, -1, -1):
        found[column] = chosen[column].gather(0, best)[0].to(target.dtype)
        best = origins[column].gather(0, best).long()
    return found.permute(1, 2, 0).reshape(target.shape)


def _arrivals() -> tuple[Tensor, Tensor]:
    """(state before, parity of the code), each int64 [state, 2]: the two ways into every state."""
    ways = [[(s, p) for s in range(STATES) for p in (0, 1) if NEXT_STATE[s][p] == state] for state in range(STATES)]
    before, parity = torch.tensor(ways).unbind(2)
    return before, parity


def _nearest(u: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, half-steps), each [2 parities, 2 magnitudes, states, groups, rows]: the nearest code of each parity, and
    the one of that parity next to it towards zero.

    u  in half-steps [states, groups, rows]
    """
    sign = torch.where(u < 0, -1.0, 1.0).to(u.dtype)
    # Of magnitude k an odd state's code lies at 2k - 1, so that the k next to u is that next to (|u| + 1) / 2.
    wanted = (u.abs() + odd) / 2
    pairs = []
    for parity in (0, 1):
        near = 2 * ((wanted - parity) / 2).round_() + parity
        if parity == 0:
            # In odd states zero lies at 0 and two at 3 half-steps.
            near = torch.where((odd == 1) & (near == 2) & (u.abs() < 1.5), torch.zeros_like(near), near)
        else:
            near = near.abs()
        pairs.append(torch.stack((near, (near - 2).abs() if parity else (near - 2).clamp_min(0))))
    magnitudes = torch.stack(pairs)
    halves = 2 * magnitudes - odd * (magnitudes > 0)
    return magnitudes * sign, halves * sign


def _of(values: Tensor, via: Tensor, source: Tensor) -> Tensor:
    """values [2, states, groups, rows] at parity `via` and state `source`, both [states, groups, rows] or alike."""
    both = values.gather(1, source.expand(2, -1, -1, -1))
    return torch.where(via == 0, both[0], both[1])


def _traced(origins: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """(state in which each survivor began the block int64 [states, groups, rows], the errors along its path)."""
    at = torch.arange(STATES, device=errors.device).view(-1, 1, 1).expand(errors.shape[1:]).contiguous()
    along = torch.empty_like(errors)
    for column in range(len(origins) - 1, -1, -1):
        along[column] = errors[column].gather(0, at)
        at = origins[column].gather(0, at).long()
    return at, along
