"""The bits that unbounded codes would take are computed without coding them, and so is what each code costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.coding.ans import chunk_count, varint
from qcompress.coding.unbounded.side import grid_of_unbounded, side_bytes
from qcompress.coding.unbounded.streams import overhead_bits
from qcompress.coding.unbounded.tables import Pool, bits_of_tables, fit_pool, make_source, pooled, total_counts
from qcompress.coding.unbounded.tokens import (
    CLASSES,
    CONTEXTS,
    TOKEN_BITS,
    TOKENS,
    Levels,
    class_matrix,
    tokens_from_codes,
)
from qcompress.types.encoded import Unbounded

_BEYOND = 2.0
"""Bits by which each token beyond those of a table is taken to cost more than the one before."""


def coded_bits(unbounded_tensors: Sequence[Unbounded]) -> float:
    """The bits that all unbounded codes of one file take under `ans`: streams and all their side information.

    Within a thousandth of what is written. Raises ValueError for a code beyond 2**31 - 1.
    """
    total = 0.0
    for members, own in make_pools(unbounded_tensors):
        sources = [make_source(unbounded_tensors[member]) for member in members]
        pool, counts = fit_pool(sources)
        side = len(side_bytes([grid_of_unbounded(unbounded_tensors[member]) for member in members], pool))
        total += 8 * (side + (len(varint(side)) if own else 0))
        dense = total_counts(counts)
        total += sum(float(dense[context, : len(bits)] @ bits) for context, bits in bits_of_tables(pool).items())
        total += sum(overhead_bits(chunk_count(*source.shape)) for source in sources)
    return total


def foretold_bits(some_rows: Unbounded, rows: int) -> float:
    """About the bits that `coded_bits` gives for a tensor of so many rows like some that are known."""
    shape = some_rows.codes.shape
    pool, counts = fit_pool([make_source(some_rows)])
    dense = total_counts(counts)
    stream = sum(float(dense[context, : len(bits)] @ bits) for context, bits in bits_of_tables(pool).items())
    side = len(side_bytes([grid_of_unbounded(some_rows)], pool))
    return stream * rows / max(1, shape[0]) + 8 * side + overhead_bits(chunk_count(rows, shape[1]))


def make_pools(unbounded_tensors: Sequence[Unbounded]) -> list[tuple[list[int], bool]]:
    """Which tensors of one file share tables, and whether a tensor's side information lies with its own codes."""
    shared = pooled([unbounded.codes.numel() for unbounded in unbounded_tensors])
    pool = [place for place, is_shared in enumerate(shared) if is_shared]
    return [(pool, False)] * bool(pool) + [([place], True) for place, is_shared in enumerate(shared) if not is_shared]


def class_costs(unbounded_tensors: Sequence[Unbounded], span: int) -> list[tuple[Tensor, Tensor]]:
    """What each code, and any other in its place, costs under the tables that are best for all codes as they are.

    span     the largest |code| that is asked for
    returns  for each tensor of the file: the class of each code, uint8 [rows, columns], below CLASSES, and bits,
             float32 [CONTEXTS, 2 * span + 1], shared by the tensors of a pool: of a code k of class c in column
             k + span of row c, but on a trellis in row c + CLASSES in even states and c + 2 * CLASSES in odd ones
    """
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(unbounded_tensors)
    for members, _ in make_pools(unbounded_tensors):
        sources = [make_source(unbounded_tensors[member]) for member in members]
        pool, _ = fit_pool(sources)
        costs = torch.from_numpy(_cost_rows(pool, span))
        for member, source, levels in zip(members, sources, pool.levels, strict=True):
            classes = class_matrix(levels, *source.shape).copy()
            found[member] = (torch.from_numpy(classes), costs)
    return [one for one in found if one is not None]


def sample_costs(sample: Unbounded, span: int) -> tuple[Levels, Tensor]:
    """Of codes that stand for more of one tensor: their levels, and bits as `class_costs` gives them."""
    pool, _ = fit_pool([make_source(sample)])
    return pool.levels[0], torch.from_numpy(_cost_rows(pool, span))


def _cost_rows(pool: Pool, span: int) -> NDArray[np.float32]:
    """Bits of every code in [-span, span] in every context: of a context that has no table, those of the nearest."""
    tokens = tokens_from_codes(np.arange(-span, span + 1, dtype=np.int32))
    known = bits_of_tables(pool)
    costs = np.zeros((CONTEXTS, 2 * span + 1), np.float32)
    for context in range(CONTEXTS):
        near = [other for other in known if other // CLASSES == context // CLASSES]
        if near:
            bits = known[min(near, key=lambda other: abs(other - context))]
            beyond = np.arange(1, TOKENS - len(bits) + 1)
            rest = bits[-1] - TOKEN_BITS[len(bits) - 1] + _BEYOND * ((beyond + 1) // 2) + TOKEN_BITS[len(bits) :]
            costs[context] = np.concatenate([bits, rest])[tokens]
    return costs
