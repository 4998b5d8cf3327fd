"""First codebooks of a weight, and codes against codebooks as they are stored."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qcompress.coding.codebook import centroid_values, store_centroids
from qcompress.coding.rows import codebook_shape
from qcompress.solvers.kmeans import Start, assign_scalars, cluster_rows, cluster_scalars
from qcompress.solvers.kmeans_vectors import assign_vectors, cluster_vectors
from qcompress.types import Codebook, Shape


def table_parts(matrix: Tensor, config: Any) -> Tensor:
    """Rows [rows, columns] as [tables, rows a table, columns]; a view."""
    tables, _, _ = codebook_shape(config, *matrix.shape)
    return matrix.reshape(tables, -1, matrix.shape[1])


def vectors_from_rows(rows: Tensor, dim: int) -> Tensor:
    """Points [vectors, dim] of rows [rows, columns]: `dim` neighbouring rows of a column each."""
    return rows.reshape(-1, dim, rows.shape[1]).movedim(1, 2).reshape(-1, dim)


def rows_from_vectors(points: Tensor, columns: int) -> Tensor:
    """The inverse of `vectors_from_rows`."""
    dim = points.shape[1]
    return points.view(-1, columns, dim).movedim(2, 1).reshape(-1, columns)


def first_codebooks(
    matrix: Tensor, config: Any, start: Start, generator: torch.Generator, *, zero: bool = False
) -> Tensor:
    """The codebooks of least squared error, float [tables, entries, dim]; where fewer values differ than a table has
    entries, its last one is repeated.

    matrix  float [rows, columns] on the CPU, of the weight's own dtype: of 16 bits the optimum is exact
    """
    tables, entries, dim = codebook_shape(config, *matrix.shape)
    if dim > 1:
        kind: Literal["random", "k-means++"] = "random" if start == "random" else "k-means++"
        parts = [vectors_from_rows(part.float(), dim) for part in table_parts(matrix, config)]
        found = [cluster_vectors(part, entries, start=kind, generator=generator).centroids for part in parts]
        return torch.stack([_filled(one.T, entries).T for one in found])
    if tables == 1:
        one = cluster_scalars(matrix, entries, start=start, zero=zero, generator=generator).centroids
        return _filled(one.view(1, -1), entries).unsqueeze(2)
    rows = table_parts(matrix, config).reshape(tables, -1)
    each = cluster_rows(rows, entries, start=start, zero=zero, generator=generator).centroids
    return _filled(each, entries).unsqueeze(2)


def encode_nearest(matrix: Tensor, values: Tensor, config: Any, exponent: int, shape: Shape) -> Codebook:
    """Every weight or vector in the nearest of these entries as they are stored.

    matrix    float [rows, columns] on the CPU
    values    float [tables, entries, dim], ascending where dim is 1
    exponent  of centroids of half precision
    """
    centroids, scale, exponent = store_centroids(values, config.codebook, exponent)
    kind = torch.uint8 if config.bits <= 8 else torch.int16
    codes = torch.empty(len(matrix) // config.dim, matrix.shape[1], dtype=kind)
    encoded = Codebook(codes, config.bits, centroids, exponent, shape, scale)
    parts, places = table_parts(matrix, config), codes.view(len(values), -1, matrix.shape[1])
    for part, into, table in zip(parts, places, centroid_values(encoded), strict=True):
        if config.dim == 1:
            found = assign_scalars(part, table[:, 0])
        else:
            found = assign_vectors(vectors_from_rows(part.float(), config.dim), table)
        into.copy_(found.view(into.shape))
    return encoded


def _filled(centroids: Tensor, entries: int) -> Tensor:
    """[tables, centroids] with the last one repeated up to `entries`."""
    missing = entries - centroids.shape[1]
    return centroids if missing <= 0 else torch.cat((centroids, centroids[:, -1:].expand(-1, missing)), 1)
