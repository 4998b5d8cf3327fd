"""Blocks of weights are walked in pieces that fit in cache, with sums that do not depend on the walk.

A solver sees a few whole blocks at a time, in units of 2**exponent, where scales and offsets are what float16 holds.
Sums are folded by halves with plain additions: torch's own sums round differently with the number of rows and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.coding.rows import spans

CHUNK_VALUES = 2**18
PIECE_VALUES = 2**16
LANES_UP_TO = 512
TERMS = 3


def fold(values: Tensor, dim: int) -> Tensor:
    """The sums along `dim`, which goes; `values` is destroyed. Halves are added pairwise, in a fixed order."""
    while (size := values.shape[dim]) > 1:
        first, second = values.chunk(2, dim)
        (first if size % 2 == 0 else first.narrow(dim, 0, size // 2)).add_(second)
        values = first
    return values.select(dim, 0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A few whole blocks.

    blocks  float32 [blocks, length], in the weights' own units
    unit    2**-exponent
    dim     along which a block runs in a piece: 0 for short blocks, which lie side by side as [length, blocks] so that
            every operation is long; else 1
    held    the only piece, where the blocks fit in one
    room    float32, one piece's worth for each of up to TERMS sums, to be written to; chunks of one walk share it
    centre  float32, what is taken from every piece, broadcast over it; None is nothing
    """

    blocks: Tensor
    unit: float
    dim: int
    held: Tensor | None
    room: Tensor
    centre: Tensor | None = None

    @property
    def length(self) -> int:
        return self.blocks.shape[1]

    def pieces(self) -> Iterator[Tensor]:
        """float32 [length, blocks] or [blocks, at most PIECE_VALUES], times `unit`; not to be written to."""
        if self.held is not None:
            yield self.held
            return
        for columns in spans(self.length, PIECE_VALUES):
            piece = self.blocks[:, columns] * self.unit
            yield piece if self.centre is None else piece.sub_(self.centre)

    def spread(self, per_block: Tensor) -> Tensor:
        """One number a block, [blocks], as float32 that broadcasts over a piece."""
        return per_block.float().unsqueeze(self.dim)

    def totals(self, terms: int, fill: Callable[[Tensor, Tensor], object]) -> Tensor:
        """Each block's sums, float64 [terms, blocks]; `fill(piece, room)` writes room float32 [terms, *piece]."""
        parts = []
        for piece in self.pieces():
            room = self.room[: terms * piece.numel()].view(terms, *piece.shape)
            fill(piece, room)
            parts.append(fold(room, self.dim + 1).double())
        return parts[0] if len(parts) == 1 else fold(torch.stack(parts), 0)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each block, float32 [blocks], times `unit`."""
        low, high = extremes(self.blocks)
        return low * self.unit, high * self.unit

    def centred(self) -> tuple[Chunk, Tensor]:
        """The blocks less their means, and the means, float64 [blocks] as float32 holds them."""
        mean = (self.totals(1, lambda x, room: room.copy_(x))[0] / self.length).float()
        centre = self.spread(mean)
        held = None if self.held is None else self.held - centre
        return replace(self, held=held, centre=centre), mean.double()


def walk(blocks: Tensor, exponent: int) -> Iterator[Chunk]:
    """The blocks float32 [blocks, length] in order, a cacheful at a time, at least once; no values are one zero."""
    if not blocks.numel():
        blocks = blocks.new_zeros(blocks.shape[0], 1)
    count, length = blocks.shape
    unit = 2.0**-exponent
    dim = 0 if length <= LANES_UP_TO else 1
    rows_at_once = max(1, CHUNK_VALUES // length)
    room = blocks.new_empty(TERMS * min(rows_at_once, max(1, count)) * min(length, PIECE_VALUES))
    for rows in spans(max(1, count), rows_at_once):
        part = blocks[rows]
        held = None
        if length <= PIECE_VALUES:
            held = (part.t().contiguous() if dim == 0 else part).mul(unit)
        yield Chunk(part, unit, dim, held, room)


def extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each block, float32 [blocks]; 0 where a block is empty."""
    if not blocks.shape[1]:
        return blocks.new_zeros(blocks.shape[0]), blocks.new_zeros(blocks.shape[0])
    # Twice over the values is faster than torch's aminmax.
    return blocks.amin(1), blocks.amax(1)
