"""Codebooks: codes to reals, and real centroids to what the disk holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qcompress.coding.half import HALF_MAX, round_scale
from qcompress.encoded import Codebook

CentroidDtype: TypeAlias = Literal["f16", "f32", "int8"]
INT8_MOST = 127


def store_centroids(values: Tensor, dtype: CentroidDtype, exponent: int) -> tuple[Tensor, Tensor | None, int]:
    """(centroids, scale, exponent) as Codebook has them.

    values    float32 or float64 [tables, entries, dim]
    exponent  of half precision, see coding.affine.exponent_for
    """
    if dtype == "f32":
        return values.float(), None, 0
    reduced = values.double() * 2.0**-exponent
    if dtype == "f16":
        return reduced.clamp(-HALF_MAX, HALF_MAX).half(), None, exponent
    most = reduced.abs().flatten(1).amax(1, keepdim=True)
    scale = round_scale((most / INT8_MOST * 2.0**exponent), exponent, up=True)
    codes = (reduced / scale.double().unsqueeze(2)).round().clamp(-INT8_MOST, INT8_MOST)
    return codes.to(torch.int8), scale, exponent


def centroid_values(encoded: Codebook) -> Tensor:
    """The centroids as float32 [tables, entries, dim]."""
    return stored_values(encoded.centroids, encoded.scale, encoded.exponent)


def stored_values(centroids: Tensor, scale: Tensor | None, exponent: int) -> Tensor:
    """What `store_centroids` gave, as float32 [tables, entries, dim]."""
    values = centroids.float()
    if scale is not None:
        values = values * scale.float().unsqueeze(2)
    return values * 2.0**exponent


def decode_codebook_rows(encoded: Codebook) -> Tensor:
    """The weight as float32 [rows, columns]."""
    values = centroid_values(encoded)
    tables, entries, dim = values.shape
    vectors, columns = encoded.codes.shape
    offsets = torch.arange(tables, device=values.device).repeat_interleave(vectors // tables) * entries
    places = encoded.codes.long() + offsets.unsqueeze(1)
    # [vectors, columns, dim] -> [vectors, dim, columns]: the places of a vector are neighbouring rows.
    found = values.flatten(0, 1)[places]
    return found.movedim(2, 1).reshape(vectors * dim, columns)


def take_codebook_rows(encoded: Codebook, start: int, stop: int) -> Codebook:
    """The rows [start, stop) as a weight of two dimensions; both ends on whole vectors and, with tables of their own
    for some rows, on whole tables."""
    dim, tables = encoded.dim, len(encoded.centroids)
    codes = encoded.codes[start // dim : -(-stop // dim)]
    centroids, scale = encoded.centroids, encoded.scale
    if tables > 1:
        rows = len(encoded.codes) * dim // tables
        own = slice(start // rows, -(-stop // rows))
        centroids, scale = centroids[own], None if scale is None else scale[own]
    shape = (len(codes) * dim, codes.shape[1])
    return replace(encoded, codes=codes, shape=shape, axis=(0,), centroids=centroids, scale=scale)


def with_entries(encoded: Codebook, entries: int) -> Codebook:
    """The same with so many entries a table, no fewer than it has: the last one is repeated."""
    missing = entries - encoded.centroids.shape[1]
    if missing <= 0:
        return encoded
    filled = torch.cat((encoded.centroids, encoded.centroids[:, -1:].expand(-1, missing, -1)), 1)
    return replace(encoded, centroids=filled)


def row_unit(encoded: Codebook) -> int:
    """Rows that must stay together when a weight is cut."""
    tables = len(encoded.centroids)
    return len(encoded.codes) * encoded.dim // tables if tables > 1 else encoded.dim
