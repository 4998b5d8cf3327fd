"""k-means weight sharing: the codebook of least squared error, of scalars or of vectors across channels."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.encoded import Codebook
from qcompress.registry import KmeansConfig
from qcompress.solvers.codebooks import BookEvidence, encode_nearest, first_codebooks


def encode(weight: Tensor, config: KmeansConfig, exponent: int, evidence: BookEvidence) -> Codebook:
    """The weight in the entries of its codebook, each weight or vector in the nearest as stored.

    weight    float [rows, ...] on the CPU, of its own dtype: of 16 bits the optimum is exact
    exponent  of centroids of half precision
    evidence  with a codebook that tensors share, only codes are chosen

    Vectors are `dim` neighbouring rows of one column: with sensitivities, the columns' mean squared inputs, all of a
    vector counts alike, so the nearest entry is the same with and without them.
    """
    matrix = weight.reshape(len(weight), -1)
    matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
    if evidence.shared is not None:
        values, exponent = evidence.shared
    else:
        values = first_codebooks(matrix, config, config.init, evidence, zero=config.zero)
    return encode_nearest(matrix, values, config, exponent, tuple(weight.shape))
