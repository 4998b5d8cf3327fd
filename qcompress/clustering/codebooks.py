"""First codebooks of a weight are made here, and codes against codebooks as they are stored."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qcompress.clustering.kmeans import Start, assign_scalars, cluster_rows, cluster_scalars
from qcompress.clustering.kmeans_vectors import assign_vectors, cluster_vectors
from qcompress.coding.grids import centroid_values, store_centroids
from qcompress.coding.rows import codebook_shape
from qcompress.registry import ClusterConfig
from qcompress.types.config import Shape
from qcompress.types.encoded import Codebook
from qcompress.types.run import EncodeContext

FIRST_LOOK = 4
"""Times as many vectors as there are entries that are looked at first, and so many times as many each time after."""
MOST_LOOK = 2**18
BINS_EACH = 2**8
FEWEST_BINS = 2**12
"""Bins for wide scalars, up to 2**16: the bound is some 2e-3 of the error, the error itself that of 2**16 bins."""


def table_parts(matrix: Tensor, config: ClusterConfig) -> Tensor:
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


def spread_sensitivity(sensitivity: Tensor, rows: int, dim: int) -> Tensor:
    """What an error of each vector counts, [rows / dim, columns]: that of its column; a vector of two groups has the
    mean of both.

    sensitivity  [columns] or [groups, columns], rows in equal groups
    """
    groups = sensitivity.reshape(-1, sensitivity.shape[-1])
    each = groups.repeat_interleave(rows // len(groups), 0) if len(groups) > 1 else groups.expand(rows, -1)
    return each.reshape(rows // dim, dim, -1).mean(1) if len(groups) > 1 and dim > 1 else each[: rows // dim]


def first_codebooks(
    matrix: Tensor, config: ClusterConfig, start: Start, context: EncodeContext, *, zero: bool = False
) -> Tensor:
    """The codebooks of least squared error, float [tables, entries, dim]: no more entries than any table needs, the
    last of a table with fewer repeated.

    matrix  float [rows, columns] on the CPU, of the weight's own dtype: of 16 bits the optimum is exact
    """
    tables, entries, dim = codebook_shape(config, *matrix.shape)
    weights = None
    if context.sensitivity is not None:
        weights = spread_sensitivity(context.sensitivity, len(matrix), dim).reshape(tables, -1)
    if dim > 1:
        kind: Literal["random", "k-means++"] = "random" if start == "random" else "k-means++"
        found = []
        for index, part in enumerate(table_parts(matrix, config)):
            points, each = vectors_from_rows(part.float(), dim), None if weights is None else weights[index]
            found.append(cluster_vectors(points, entries, each, start=kind, generator=context.generator).centroids)
        most = max(len(one) for one in found)
        return torch.stack([torch.cat((one, one[-1:].expand(most - len(one), -1))) for one in found])
    if tables == 1:
        each = None if weights is None else weights.view(matrix.shape)
        found_one = cluster_scalars(
            matrix,
            entries,
            each,
            start=start,
            zero=zero,
            generator=context.generator,
            bins=max(FEWEST_BINS, BINS_EACH * entries),
        )
        return found_one.centroids.view(1, -1, 1)
    rows = table_parts(matrix, config).reshape(tables, -1)
    each_row = cluster_rows(rows, entries, weights, start=start, zero=zero, generator=context.generator).centroids
    used = 1 + int((each_row[:, 1:] != each_row[:, :-1]).sum(1).max()) if entries > 1 else 1
    return each_row[:, :used].unsqueeze(2)


def count_entries(matrix: Tensor, config: ClusterConfig, *, zero: bool = False) -> int:
    """How many entries a table of `first_codebooks` has at most: as many as vectors differ, if its codes can name them.

    matrix  float [rows, columns]; looked at no further than where there are enough
    zero    one entry more is kept for exactly 0
    """
    _, entries, dim = codebook_shape(config, *matrix.shape)
    spare = int(zero)
    most = 1
    for part in table_parts(matrix, config):
        # More each time: mostly the first look tells.
        seen, done, look = torch.empty(0, dim), 0, FIRST_LOOK * entries
        while done < part.numel() // dim:
            points = _some_vectors(part, dim, done, done + look)
            seen = _unique(torch.cat((seen, points)))
            if len(seen) + spare >= entries:
                return entries
            done, look = done + look, min(FIRST_LOOK * look, MOST_LOOK)
        most = max(most, len(seen) + spare)
    return most


def _some_vectors(part: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Vectors [about stop - start, dim] of rows [rows, columns]: those numbered so, and the others of their rows."""
    columns = part.shape[1]
    if dim == 1:
        return part.reshape(-1, 1)[start:stop].float()
    first, last = start // columns, -(-stop // columns)
    return vectors_from_rows(part[first * dim : last * dim].float(), dim)


def _unique(points: Tensor) -> Tensor:
    """The different vectors [n, dim] in some order."""
    found: Tensor = torch.unique(points).unsqueeze(1) if points.shape[1] == 1 else torch.unique(points, dim=0)
    return found


def encode_nearest(matrix: Tensor, values: Tensor, config: ClusterConfig, exponent: int, shape: Shape) -> Codebook:
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
