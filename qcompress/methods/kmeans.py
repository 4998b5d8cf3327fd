"""k-means weight sharing: the codebook of least squared error, of scalars or of vectors across channels."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.registry import KmeansConfig
from qcompress.solvers.codebooks import encode_nearest, first_codebooks
from qcompress.types import Codebook


def encode(weight: Tensor, config: KmeansConfig, exponent: int, generator: torch.Generator) -> Codebook:
    """The weight in the entries of its codebook, each weight or vector in the nearest as stored.

    weight    float [rows, ...] on the CPU, of its own dtype: of 16 bits the optimum is exact
    exponent  of centroids of half precision

    Vectors are `dim` neighbouring rows of one column.
    """
    matrix = weight.reshape(len(weight), -1)
    matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
    values = first_codebooks(matrix, config, config.init, generator, zero=config.zero)
    return encode_nearest(matrix, values, config, exponent, tuple(weight.shape))
