"""Weight sharing on representatives that training has learned.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614, sections II-E and III-C: every weight goes to the nearest
representative, then each representative to the mean of its weights; the weights are not assigned anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.coding.codebook import store_centroids
from qcompress.encoded import Codebook
from qcompress.registry import LearnedConfig
from qcompress.solvers.codebooks import BookEvidence, spread_sensitivity
from qcompress.solvers.kmeans import assign_scalars, recentre


def encode(
    weight: Tensor, config: LearnedConfig, exponent: int, evidence: BookEvidence, representatives: Tensor
) -> Codebook:
    """The weight in the entries that training has learned.

    weight           float [rows, ...] on the CPU
    evidence         its sensitivities weigh the means
    representatives  float [at most 2**bits], in any order; equal ones are one entry
    """
    matrix = weight.reshape(len(weight), -1).float()
    values = torch.unique(representatives.float())
    codes = assign_scalars(matrix, values)
    if config.recentre:
        weights = None
        if evidence.sensitivity is not None:
            weights = spread_sensitivity(evidence.sensitivity, len(matrix), 1).reshape(matrix.shape)
        values = recentre(matrix, codes, values, weights)
    centroids, scale, exponent = store_centroids(values.view(1, -1, 1), config.codebook, exponent)
    kind = torch.uint8 if config.bits <= 8 else torch.int16
    return Codebook(codes.to(kind), config.bits, centroids, exponent, tuple(weight.shape), scale)
