"""K-means shares weights by the codebook of least squared error, of scalars or of vectors across channels."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.clustering.codebooks import encode_nearest, first_codebooks
from qcompress.registry import KmeansConfig
from qcompress.types.encoded import Codebook
from qcompress.types.run import EncodeContext


def encode(weight: Tensor, config: KmeansConfig, context: EncodeContext) -> Codebook:
    """The weight in the entries of its codebook, each weight or vector in the nearest as stored.

    weight    float [rows, ...] on the CPU, of its own dtype: of 16 bits the optimum is exact

    Vectors are `dim` neighbouring rows of one column: with sensitivities, the columns' mean squared inputs, all of a
    vector counts alike, so the nearest entry is the same with and without them.
    """
    matrix = weight.reshape(len(weight), -1)
    matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
    if context.shared is not None:
        # Only codes are chosen.
        values, exponent = context.shared
    else:
        values, exponent = first_codebooks(matrix, config, config.init, context, zero=config.zero), context.exponent
    return encode_nearest(matrix, values, config, exponent, tuple(weight.shape))
