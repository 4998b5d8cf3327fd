"""A weight seen as rows, one a channel, and rows seen as blocks, one a grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qcompress.types import Decision, Granularity, Shape, row_shape

if TYPE_CHECKING:
    from torch import Tensor


def rows_from_weight(weight: Tensor, axis: tuple[int, ...]) -> Tensor:
    """The weight as [rows, ...]: a view where the channel axes already lead."""
    if weight.ndim < 2:
        return weight.reshape(1, -1)
    order = (*axis, *(index for index in range(weight.ndim) if index not in axis))
    return weight.permute(order).reshape(row_shape(tuple(weight.shape), axis))


def tap_count(shape: Shape, axis: tuple[int, ...]) -> int:
    """Columns of one input channel: the sizes behind the first one that is no channel axis; 1 of a plain matrix."""
    if len(shape) < 2:
        return 1
    rest = [size for index, size in enumerate(shape) if index not in axis]
    return math.prod(rest[1:])


def weight_from_rows(rows: Tensor, shape: Shape, axis: tuple[int, ...]) -> Tensor:
    """The inverse of `rows_from_weight`: rows [rows, ...] of any inner shape back to `shape`, contiguous."""
    if len(shape) < 2:
        return rows.reshape(shape)
    order = (*axis, *(index for index in range(len(shape)) if index not in axis))
    permuted = rows.reshape([shape[index] for index in order])
    back = [order.index(index) for index in range(len(shape))]
    return permuted.permute(back).contiguous()


def grid_shape(rows: Shape, granularity: Granularity, group_size: int | None) -> tuple[int, int]:
    """How many grids a weight of shape [rows, ...] has: ([1 or rows], groups a row).

    Raises ValueError where group_size does not divide the columns.
    """
    if granularity == "tensor":
        return (1, 1)
    if granularity == "channel":
        return (rows[0], 1)
    columns = math.prod(rows[1:])
    if group_size is None or columns % group_size:
        raise ValueError(f"group size {group_size} does not divide {columns} columns")
    return (rows[0], columns // group_size)


def blocks_from_rows(rows: Tensor, granularity: Granularity, group_size: int | None) -> Tensor:
    """Rows [rows, ...] as [blocks, length], one block a grid, blocks in the order of the flattened grid shape."""
    grids = math.prod(grid_shape(tuple(rows.shape), granularity, group_size))
    return rows.reshape(grids, rows.numel() // grids if grids else 0)


def codebook_shape(config: Any, rows: int, columns: int) -> tuple[int, int, int]:
    """(tables, entries, dim) of the codebooks of a weight: one table a tensor, a channel, or `group_size` channels.

    A table has no more entries than there are vectors for it; it may have fewer.
    """
    unit = {"tensor": rows, "channel": 1, "group": config.group_size}[config.granularity]
    vectors = max(unit // config.dim, 1) * columns
    return (rows // unit, min(2**config.bits, vectors), config.dim)


def stored_codebook_shape(decision: Decision) -> tuple[int, int, int]:
    """(tables, entries, dim) as a decision's codebook will be stored; by its header alone the most it can be."""
    shape = row_shape(decision.tensor.shape, decision.axis)
    tables, entries, dim = codebook_shape(decision.config, shape[0], math.prod(shape[1:]))
    if decision.book.shared is not None:
        # Other tensors have vectors for it too.
        entries = int(2**decision.config.bits)
    return (tables, entries if decision.book.entries is None else decision.book.entries, dim)


def dim_of(decision: Decision) -> int:
    """Rows that have one code together."""
    return int(getattr(decision.config, "dim", 1))
