"""Roundings flipped until the errors of every kernel, then of every channel, sum to nearly nothing.

SQuant's idea (Guo et al. 2022, arXiv 2202.07471) on a grid without ends: whichever values lie nearest to a tie go the
other way, as many as the sum is in steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flipped(wish: Tensor, codes: Tensor) -> Tensor:
    """The codes with each row's sum of errors brought within half a step by the cheapest changes of one.

    wish   weights in steps [rows, columns]
    codes  integers of the same dtype, each the nearest to its wish or one beside it
    """
    error = codes - wish
    total = error.sum(1, keepdim=True)
    count = total.abs().round()
    # The larger an error of the sum's sign, the less it costs to turn it over.
    towards = error * total.sign()
    order = towards.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return codes - torch.where(rank < count, total.sign(), torch.zeros_like(total))


def flip_lattice(wish: Tensor, kernels: int) -> Tensor:
    """The codes of weights in steps [rows, columns], flipped within kernels of `columns / kernels` and within rows.

    Rounds as they come to the nearest, so that sums of rows are mended by whole kernels' cheapest values.
    """
    codes = wish.round()
    columns = wish.shape[1]
    if 1 < kernels < columns:
        shape = (-1, columns // kernels)
        codes = flipped(wish.reshape(shape), codes.reshape(shape)).reshape(wish.shape)
    return flipped(wish, codes)
