"""Weight sharing on representatives that training has learned.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614, sections II-E and III-C: every weight goes to the nearest
representative, then each representative to the mean of its weights; the weights are not assigned anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.coding.codebook import store_centroids
from qcompress.registry import LearnedConfig
from qcompress.solvers.kmeans import assign_scalars, recentre
from qcompress.types import Codebook


def encode(
    weight: Tensor, config: LearnedConfig, exponent: int, generator: torch.Generator, representatives: Tensor
) -> Codebook:
    """The weight in the entries that training has learned.

    weight           float [rows, ...] on the CPU
    representatives  float [at most 2**bits], in any order; entries beyond them repeat the last
    """
    matrix = weight.reshape(len(weight), -1).float()
    entries = min(2**config.bits, matrix.numel())
    values = torch.unique(representatives.float())[:entries]
    codes = assign_scalars(matrix, values)
    if config.recentre:
        values = recentre(matrix, codes, values)
    values = torch.cat((values, values[-1:].expand(entries - len(values))))
    centroids, scale, exponent = store_centroids(values.view(1, -1, 1), config.codebook, exponent)
    kind = torch.uint8 if config.bits <= 8 else torch.int16
    return Codebook(codes.to(kind), config.bits, centroids, exponent, tuple(weight.shape), scale)
