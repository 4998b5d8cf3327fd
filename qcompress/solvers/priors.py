"""What the inputs of a layer look like when nobody has seen them: Hessians of its weight's shape alone.

A convolution behind a ReLU sees inputs of a positive mean whose neighbours in a channel are alike. Both ask for
roundings whose errors sum to little, over each kernel and over each output channel: what SQuant (arXiv 2202.07471)
reaches by flipping them, here in the form of error feedback.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from qcompress.types import Shape

MEAN, VARIANCE = 0.4, 0.34
"""Of a standard normal variable behind a ReLU: 1 / sqrt(2 pi) and 1/2 - 1 / (2 pi)."""
NEIGHBOURS = 0.5
"""The correlation of places that touch."""
COLOURS = 0.9
"""The correlation of an image's channels, whose mean was taken away."""
MOST_COLOURS = 4
MOST_COLUMNS = 1152
"""Wider weights are taken for several layers side by side: little is left to win, and Hessians cost their cube."""


def prior_hessian(shape: Shape) -> Tensor | None:
    """The second moments of a convolution's inputs, float64 [columns, columns]; None for a weight of two dimensions.

    Without a kernel nothing says what the inputs are, and a layer may stand behind a normalization to mean zero.

    shape  of the weight, rows first: [rows, channels of a group, *kernel]
    """
    if len(shape) < 3:
        return None
    channels, kernel = shape[1], shape[2:]
    places = torch.tensor(list(itertools.product(*map(range, kernel))), dtype=torch.float64)
    distances = (places.unsqueeze(1) - places.unsqueeze(0)).abs().sum(2)
    taps = NEIGHBOURS**distances
    if channels <= MOST_COLOURS and math.prod(kernel) > 1 and channels > 1:
        colours = COLOURS + (1 - COLOURS) * torch.eye(channels, dtype=torch.float64)
        return torch.kron(colours, taps)
    columns = channels * len(places)
    return VARIANCE * torch.kron(torch.eye(channels, dtype=torch.float64), taps) + MEAN**2 * torch.ones(
        columns, columns, dtype=torch.float64
    )


def split_channels(shape: Shape) -> int:
    """Into how many equal parts the input channels go, each at most MOST_COLUMNS columns or one channel wide."""
    channels, taps = shape[1], math.prod(shape[2:])
    parts = max(1, min(channels, math.ceil(channels * taps / MOST_COLUMNS)))
    while channels % parts:
        parts += 1
    return parts
