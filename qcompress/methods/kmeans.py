"""k-means weight sharing: the codebook of least squared error, of scalars or of vectors across channels."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.coding.codebook import centroid_values, store_centroids
from qcompress.coding.rows import codebook_shape
from qcompress.registry import KmeansConfig
from qcompress.solvers.kmeans import assign_scalars, cluster_rows, cluster_scalars
from qcompress.solvers.kmeans_vectors import VectorStart, assign_vectors, cluster_vectors
from qcompress.types import Codebook


def encode(weight: Tensor, config: KmeansConfig, exponent: int, generator: torch.Generator) -> Codebook:
    """The weight in the entries of its codebook, each weight or vector in the nearest as stored.

    weight    float [rows, ...] on the CPU, of its own dtype: of 16 bits the optimum is exact
    exponent  of centroids of half precision

    Vectors are `dim` neighbouring rows of one column. Where fewer values differ than a table has entries, its last
    entry is repeated.
    """
    matrix = weight.reshape(len(weight), -1)
    matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
    tables, entries, dim = codebook_shape(config, *matrix.shape)
    parts = matrix.reshape(tables, -1, matrix.shape[1])
    if dim > 1:
        points = [_vectors(part, dim) for part in parts]
        values = torch.stack([_vector_table(part, entries, config, generator) for part in points])
    elif tables == 1:
        found = cluster_scalars(matrix, entries, start=config.init, zero=config.zero, generator=generator)
        values = _filled(found.centroids.view(1, -1), entries).unsqueeze(2)
    else:
        rows = parts.reshape(tables, -1)
        found = cluster_rows(rows, entries, start=config.init, zero=config.zero, generator=generator)
        values = _filled(found.centroids, entries).unsqueeze(2)
    centroids, scale, exponent = store_centroids(values, config.codebook, exponent)
    shape = tuple(weight.shape)
    codes = torch.empty(len(matrix) // dim, matrix.shape[1], dtype=torch.uint8 if config.bits <= 8 else torch.int16)
    encoded = Codebook(codes, config.bits, centroids, exponent, shape, scale)
    stored = centroid_values(encoded)
    for index, table in enumerate(stored):
        part = codes.view(tables, -1, matrix.shape[1])[index]
        if dim == 1:
            part.copy_(assign_scalars(parts[index], table[:, 0]).view(part.shape))
        else:
            part.copy_(assign_vectors(_vectors(parts[index], dim), table).view(part.shape))
    return encoded


def _vectors(rows: Tensor, dim: int) -> Tensor:
    """Points float32 [vectors, dim] of rows [rows, columns]: `dim` neighbouring rows of a column each."""
    return rows.float().reshape(-1, dim, rows.shape[1]).movedim(1, 2).reshape(-1, dim)


def _vector_table(points: Tensor, entries: int, config: KmeansConfig, generator: torch.Generator) -> Tensor:
    start: VectorStart = "random" if config.init == "random" else "k-means++"
    found = cluster_vectors(points, entries, start=start, generator=generator)
    return _filled(found.centroids.T, entries).T


def _filled(centroids: Tensor, entries: int) -> Tensor:
    """[tables, centroids] with the last one repeated up to `entries`."""
    missing = entries - centroids.shape[1]
    return centroids if missing <= 0 else torch.cat((centroids, centroids[:, -1:].expand(-1, missing)), 1)
