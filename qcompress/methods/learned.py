"""Weights are shared on the representatives that training has learned.

Malchiodi, Ferraretto, Frasca 2026, arXiv 2602.03614, sections II-E and III-C: every weight goes to the nearest
representative, then each representative to the mean of its weights; the weights are not assigned anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.clustering.codebooks import spread_sensitivity
from qcompress.clustering.kmeans import assign_scalars, recentre
from qcompress.coding.grids import store_centroids
from qcompress.registry import LearnedConfig
from qcompress.types.encoded import Codebook
from qcompress.types.run import EncodeContext


def encode(weight: Tensor, config: LearnedConfig, context: EncodeContext) -> Codebook:
    """The weight, float [rows, ...] on the CPU, in the entries that training has learned.

    The context's representatives come in any order, and equal ones are one entry; its sensitivities weigh the means.
    """
    assert context.representatives is not None
    matrix = weight.reshape(len(weight), -1).float()
    values = torch.unique(context.representatives.float())
    codes = assign_scalars(matrix, values)
    if config.recentre:
        weights = None
        if context.sensitivity is not None:
            weights = spread_sensitivity(context.sensitivity, len(matrix), 1).reshape(matrix.shape)
        values = recentre(matrix, codes, values, weights)
    centroids, scale, exponent = store_centroids(values.view(1, -1, 1), config.codebook, context.exponent)
    kind = torch.uint8 if config.bits <= 8 else torch.int16
    return Codebook(codes.to(kind), config.bits, centroids, exponent, tuple(weight.shape), scale)
