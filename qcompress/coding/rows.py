"""A weight is seen as rows here, one a channel, rows as blocks, one a grid, and arrays as pieces that fit in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from qcompress.types.config import Granularity, Shape
from qcompress.types.plan import Decision, row_shape
from qcompress.types.run import Whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Sliced(Protocol):
    """A weight [rows, ...] in memory or in a file, which gives its rows by slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes, rows first."""

    def numel(self) -> int:
        """How many weights there are."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some of the rows."""


def rows_from_weight(weight: Tensor, axis: tuple[int, ...]) -> Tensor:
    """The weight as [rows, ...]: a view where the channel axes already lead."""
    if weight.ndim < 2:
        return weight.reshape(1, -1)
    order = (*axis, *(index for index in range(weight.ndim) if index not in axis))
    return weight.permute(order).reshape(row_shape(tuple(weight.shape), axis))


def kernel_positions(shape: Shape, axis: tuple[int, ...]) -> int:
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


WHOLE_SAMPLE = 1 << 18
"""Of larger weights not all rows are in a sample."""
SAMPLED_RUNS = 64
RUN_WEIGHTS = 1 << 10
"""Of rows that lie side by side, so that a sample of short rows is not read one by one."""
MOST_SAMPLED = 1 << 20
"""Weights of a sample of long rows, which has at least one."""


def measure_whole(rows: Sliced, device: torch.device | str, block: int) -> Whole:
    """What is to be known of all rows [rows, ...] before some are encoded, read about `block` weights at a time.

    The sample lies on the device. Nothing depends on how the weight was cut into blocks but the last bit of a sum.
    """
    import torch

    count = rows.shape[0]
    columns = rows.numel() // max(count, 1)
    deviation = largest = 0.0
    for span in row_slices(count if columns else 0, columns, block):
        values = rows[span].to(torch.float32)
        deviation = math.hypot(deviation, float(torch.linalg.vector_norm(values, dtype=torch.float64)))
        largest = max(largest, float(values.abs().amax()))
    runs = [rows[span].to(device=device, dtype=torch.float32).flatten(1) for span in _spread(count, columns)]
    return Whole(deviation / math.sqrt(max(1, count * columns)), largest, torch.cat(runs))


def _spread(rows: int, columns: int) -> list[slice]:
    """Runs of rows, evenly spread: all rows where the weights are few."""
    if rows * columns <= WHOLE_SAMPLE:
        return [slice(0, rows)]
    tall = -(-RUN_WEIGHTS // columns)
    runs = list(spans(rows, tall))
    wanted = max(1, min(SAMPLED_RUNS, MOST_SAMPLED // (tall * columns)))
    return [runs[place * len(runs) // wanted] for place in range(min(wanted, len(runs)))]


def grid_shape(rows: Shape, granularity: Granularity, group_size: int | None) -> tuple[int, int]:
    """How many grids a weight of shape [rows, ...] has: ([1 or rows], groups a row).

    The last group of a row is shorter where the others leave fewer columns than `group_size`.
    """
    if granularity == "tensor":
        return (1, 1)
    if granularity == "channel":
        return (rows[0], 1)
    assert group_size is not None
    return (rows[0], -(-math.prod(rows[1:]) // group_size))


def column_parts(columns: int, granularity: Granularity, group_size: int | None) -> list[slice]:
    """The columns whose groups are equally long, as slices: all of them, or the whole groups and the shorter last."""
    whole = columns if granularity != "group" or group_size is None else columns - columns % group_size
    return [part for part in (slice(0, whole), slice(whole, columns)) if part.stop > part.start] or [slice(0, 0)]


def blocks_from_rows(rows: Tensor, granularity: Granularity, group_size: int | None) -> Tensor:
    """Rows [rows, columns] as [blocks, length], one block a grid, blocks in the order of the flattened grid shape.

    Takes the rows of one part of `column_parts`.
    """
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
    if decision.codebook.shared is not None:
        # Other tensors have vectors for it too.
        entries = 2**decision.config.code_bits
    return (tables, entries if decision.codebook.entries is None else decision.codebook.entries, dim)


def dim_of(decision: Decision) -> int:
    """Rows that have one code together."""
    return int(decision.config.dim) if decision.config.form == "codebook" else 1


def spans(total: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover range(total)."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def cut(span: slice, unit: int) -> Iterator[slice]:
    """A span in parts: what it has of a first unit, whole units, and what it has of a last one. None is empty."""
    first, last = -(-span.start // unit) * unit, span.stop // unit * unit
    ends = [span.start, span.stop] if first > last else [span.start, first, last, span.stop]
    return (slice(start, stop) for start, stop in pairwise(ends) if start < stop)


def row_slices(rows: int, columns: int, limit: int, unit: int = 1) -> Iterator[slice]:
    """Slices of whole rows of about `limit` values, in order: of at least one row, and of multiples of `unit` rows."""
    return spans(rows, unit * max(1, limit // max(columns * unit, 1)))


def tiles(rows: int, columns: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Row and column slices that cut a matrix into pieces of at most `limit` values, in row-major order.

    A piece is as many whole rows as fit, or, of a row longer than `limit`, as many columns. None where there are none.
    """
    for row_span in row_slices(rows if columns else 0, columns, limit):
        for column_span in spans(columns, limit):
            yield row_span, column_span
