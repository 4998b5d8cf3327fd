"""The tables that codes of several matrices share, and the levels that each matrix is coded with, are chosen here.

Both are chosen by actual length, for all matrices of a pool together. A table is described by the density of each bin
of magnitudes, kept as its negative logarithm in eighths of a bit, each bin's as the difference to the bin before; the
two signs share it. That is some 20 times shorter than the frequencies, and costs less than a thousandth of a bit a
code. artifact/SPEC.md, "Pools".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.ans import CHUNK_CODES, Table
from qcompress.coding.rows import kernel_positions
from qcompress.coding.trellis import trellis_states
from qcompress.coding.unbounded.tokens import (
    BIN_BITS,
    CLASSES,
    CONTEXTS,
    FIRST_OPEN,
    TOKEN_BITS,
    TOKEN_START,
    TOKENS,
    Classes,
    Codes,
    Contexts,
    Kinds,
    Levels,
    Tokens,
    measure_levels,
    narrowed,
    tokens_from_codes,
)
from qcompress.types.encoded import ClassUse, Unbounded

Slopes = NDArray[np.int32]

PRECISION = 16
"""Frequencies sum to 2**16; part of the format."""
STEEPEST = 255
"""Eighths of a bit by which neighbouring bins may differ; part of the format."""
POOLED_WEIGHTS = 1 << 18
"""A tensor of more weights has tables of its own."""
POOL_WEIGHTS = 1 << 22
"""The weights of a file's pool at most: the codes of all its tensors wait in memory for their tables."""
COUNTED_CODES = 1 << 16
"""Codes that are counted at a time."""
COUNTED_BINS = 1 << 19
"""Kinds of codes times tokens: of more, each choice of levels is counted for itself."""
_MOST = 511
_RARE = 0.3
_ROUNDS = 2
_EXP2: tuple[int, ...] = tuple(round(2 ** (15 + i / 8)) for i in range(8))


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix of codes.

    rows   where they stand in it
    codes  int8, int16 or int32 [rows, columns]
    odd    uint8 [rows, columns], on a trellis: whether the state of a code is odd
    """

    rows: slice
    codes: Codes
    tokens: Tokens
    odd: NDArray[np.uint8] | None

    def contexts(self, classes: Contexts) -> Contexts:
        """The table of every code, uint8 [rows, columns], given the classes of the codes, alike."""
        if self.odd is None:
            return classes
        return np.asarray(classes + CLASSES + self.odd * np.uint8(CLASSES), np.uint8)


@dataclass(frozen=True)
class Source:
    """One matrix of codes on its way to its streams: it is read as often as that takes, some rows at a time.

    shape    rows and columns
    taps     columns of one input channel
    trellis  whether the codes of a row drive one
    read     gives all rows in their order, int8, int16 or int32, `chunk_rows` of them at a time
    """

    shape: tuple[int, int]
    taps: int
    trellis: bool
    read: Callable[[], Iterator[Codes]]

    def pieces(self) -> Iterator[Piece]:
        """All rows, piece by piece."""
        start = 0
        for codes in self.read():
            yield make_piece(codes, start, trellis=self.trellis)
            start += len(codes)


def chunk_rows(columns: int) -> int:
    """The rows of a chunk; a row that is longer than one is several."""
    return max(1, CHUNK_CODES // max(columns, 1))


def make_piece(codes: Codes, start: int = 0, *, trellis: bool) -> Piece:
    """Codes of some rows, the first of them row `start`, with their tokens and, on a trellis, their states' oddness."""
    odd = np.asarray(trellis_states(codes) & 1, np.uint8) if trellis else None
    return Piece(slice(start, start + len(codes)), codes, tokens_from_codes(codes), odd)


@dataclass(frozen=True)
class Pool:
    """Levels of each matrix of a pool, and the slopes of the tables that they share, by context."""

    levels: tuple[Levels, ...]
    slopes: Mapping[int, Slopes]

    @cached_property
    def tables(self) -> dict[int, Table]:
        """Context -> its table. Raises ValueError where slopes make none."""
        return {context: table_from_slopes(slopes) for context, slopes in self.slopes.items()}


@dataclass(frozen=True)
class TokenCounts:
    """How often each (context, token) occurs in one matrix, where it does at all.

    places  int64, ascending: context * TOKENS + token
    counts  int64, of each place
    """

    places: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, dense: NDArray[np.int64]) -> TokenCounts:
        """Those of int64 [contexts * tokens]."""
        places = np.flatnonzero(dense)
        return cls(places, dense[places])


def make_source(unbounded: Unbounded) -> Source:
    """The codes of a tensor that are in memory."""
    codes = narrowed(unbounded.codes.cpu().numpy())
    tall = chunk_rows(codes.shape[1])

    def read() -> Iterator[Codes]:
        return (codes[start : start + tall] for start in range(0, len(codes), tall))

    taps = kernel_positions(unbounded.shape, unbounded.axis)
    return Source((codes.shape[0], codes.shape[1]), taps, unbounded.trellis, read)


def pooled(sizes: Sequence[int]) -> list[bool]:
    """Which tensors of so many weights share the pool of their file: the small ones, while it has room for them."""
    room = POOL_WEIGHTS
    found = [False] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: sizes[place]):
        if sizes[place] <= min(room, POOLED_WEIGHTS):
            found[place] = True
            room -= sizes[place]
    return found


def fit_pool(sources: Sequence[Source]) -> tuple[Pool, list[TokenCounts]]:
    """The levels and tables under which codes and side information are shortest, and each matrix's counts under them.

    For each matrix by itself: no levels, those of rows, of columns, or both, by length under the tables of all.
    """
    options = [_level_options(source) for source in sources]
    counts = [_count_options(source, own) for source, own in zip(sources, options, strict=True)]
    side = _side_bits(options)
    # At first as if all matrices had made the same choice.
    tables = [_ideal_bits(total_counts([own[choice] for own in counts])) for choice in range(len(options[0]))]
    costs = np.array([[_cost(one, bits) for one, bits in zip(own, tables, strict=True)] for own in counts]) + side
    chosen = costs.argmin(1)
    for _ in range(_ROUNDS):
        bits = _ideal_bits(total_counts([own[choice] for own, choice in zip(counts, chosen, strict=True)]))
        again = (np.array([[_cost(one, bits) for one in own] for own in counts]) + side).argmin(1)
        if (again == chosen).all():
            break
        chosen = again
    found = [own[choice] for own, choice in zip(counts, chosen, strict=True)]
    total = total_counts(found)
    slopes = {int(context): fit_slopes(total[context]) for context in np.flatnonzero(total.any(1))}
    return Pool(tuple(own[choice] for own, choice in zip(options, chosen, strict=True)), slopes), found


def _level_options(source: Source) -> tuple[Levels, ...]:
    full = measure_levels(source.read(), source.shape, source.taps)
    return (
        Levels(full.base),
        replace(full, channels=None, taps=None),
        replace(full, rows=None),
        full,
    )


def _count_options(source: Source, options: Sequence[Levels]) -> list[TokenCounts]:
    """The counts under each of some levels, of which the last have all parts that the others have."""
    kinds = Kinds(options[-1], *source.shape)
    if kinds.count * TOKENS > COUNTED_BINS:
        return [_count(source, levels) for levels in options]
    joint = np.zeros((2 if source.trellis else 1, kinds.count, TOKENS), np.int64)
    step = max(1, max(COUNTED_CODES, joint.size) // max(source.shape[1], 1))
    for piece in source.pieces():
        for start in range(0, len(piece.codes), step):
            rows = slice(piece.rows.start + start, min(piece.rows.start + start + step, piece.rows.stop))
            keys = kinds.of_rows(rows, TOKENS)
            keys += piece.tokens[start : start + step]
            if piece.odd is not None:
                keys += piece.odd[start : start + step] * np.int64(kinds.count * TOKENS)
            joint += np.bincount(keys.reshape(-1), minlength=joint.size).reshape(joint.shape)
    found = []
    for levels in options:
        dense = np.zeros((CONTEXTS, TOKENS), np.int64)
        classes = kinds.classes(levels)
        for odd, own in enumerate(joint):
            np.add.at(dense, classes + (CLASSES * (1 + odd) if source.trellis else 0), own)
        found.append(TokenCounts.of(dense.reshape(-1)))
    return found


def _count(source: Source, levels: Levels) -> TokenCounts:
    classes = Classes(levels, *source.shape)
    dense = np.zeros(CONTEXTS * TOKENS, np.int64)
    for piece in source.pieces():
        _count_into(dense, piece.tokens, piece.contexts(classes[piece.rows, :]))
    return TokenCounts.of(dense)


def _count_into(dense: NDArray[np.int64], tokens: Tokens, contexts: Contexts) -> None:
    """Add to int64 [contexts * tokens] how often each token occurs in each context."""
    for own, some in _pieces(contexts, tokens):
        found = np.bincount(own.astype(np.int64) * TOKENS + some)
        dense[: len(found)] += found


def _pieces(contexts: NDArray[Any], *others: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Contexts [rows, columns] and what belongs to them, flat, so much at a time that it stays in the cache."""
    rows, columns = contexts.shape
    step = max(1, COUNTED_CODES // max(columns, 1))
    for start in range(0, rows, step):
        yield tuple(one[start : start + step].reshape(-1) for one in (contexts, *others))


def total_counts(counts: Sequence[TokenCounts]) -> NDArray[np.int64]:
    """Those of several matrices together, int64 [CONTEXTS, TOKENS]."""
    total = np.zeros(CONTEXTS * TOKENS, np.int64)
    for one in counts:
        total[one.places] += one.counts
    return total.reshape(CONTEXTS, TOKENS)


def _ideal_bits(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits of every token in every context, flat; where it does not occur, a little more than if it did once."""
    present = np.maximum(counts, 0.5)
    bits: NDArray[np.float64] = np.log2(np.maximum(counts.sum(1, keepdims=True), 1) / present) + TOKEN_BITS
    return bits.reshape(-1)


def _cost(counts: TokenCounts, bits: NDArray[np.float64]) -> float:
    return float(counts.counts @ bits[counts.places])


def _side_bits(options: Sequence[Sequence[Levels]]) -> NDArray[np.float64]:
    """About the bits that the levels of each option take, float64 [matrices, options], from those of the full ones."""
    bits = np.zeros((len(options), 4))
    for part, users in (("rows", (1, 3)), ("channels", (2, 3)), ("taps", (2, 3))):
        values = [getattr(own[3], part) for own in options]
        flat = np.concatenate(values)
        low = int(flat.min())
        counts = np.bincount(flat - low)
        cost = np.log2(len(flat) / np.maximum(counts, 1))
        for place, own in enumerate(values):
            bits[place, users] += cost[own - low].sum()
    return bits


def fit_slopes(counts: NDArray[np.int64]) -> Slopes:
    """The slopes of the density that makes codes of these counts shortest, int32 [bins - 1].

    counts  int64 [tokens], not all 0
    """
    bins = (int(np.flatnonzero(counts)[-1]) + 1) // 2 + 1
    padded = np.zeros(2 * bins, np.float64)
    padded[1:] = counts[: 2 * bins - 1]
    by_bin = padded.reshape(bins, 2).sum(1)
    # A bin without codes between others still needs a density; zero has no sign to choose.
    density = np.maximum(by_bin, _RARE) * np.exp2(-BIN_BITS[:bins] - (np.arange(bins) > 0))
    eighths = np.rint(-8 * np.log2(density / density[0])).astype(np.int32)
    slopes: Slopes = np.clip(np.diff(eighths, prepend=0)[1:], -STEEPEST, STEEPEST)
    return slopes


def table_from_slopes(slopes: Slopes) -> Table:
    """The table, in integers alone, so that it is the same on every machine. Raises ValueError where it cannot be.

    slopes  int32 [bins - 1]
    """
    eighths = np.cumsum(slopes, dtype=np.int64)
    if np.abs(eighths).max(initial=0) > _MOST:
        raise ValueError("a density is beyond 2**64 times that of zero, or below its inverse")
    weights = [_weight(0, 0)] + [_weight(int(q), int(b)) for q, b in zip(eighths, BIN_BITS[1:], strict=False)]
    total = 2 * sum(weights) - weights[0]
    by_bin = [max(1, weight * 2**PRECISION // total) for weight in weights]
    frequencies = np.repeat(np.array(by_bin, np.int64), 2)[1:]
    # What rounding has left or taken goes to the most frequent token, which has more than that.
    frequencies[frequencies.argmax()] += 2**PRECISION - frequencies.sum()
    codes = np.arange(len(frequencies), dtype=np.uint8)
    return Table(PRECISION if len(codes) > 1 else 0, codes, frequencies if len(codes) > 1 else np.ones(1, np.int64))


def _weight(eighths: int, raw_bits: int) -> int:
    """2**(79 + raw_bits - eighths / 8), the fraction of the power rounded to 16 bits."""
    return _EXP2[-eighths % 8] << 64 + raw_bits - -(-eighths // 8)


class ClassCounter:
    """Counts what the codes of one matrix take under each table of its pool, piece by piece.

    counts  of all codes, where they are known: then the pieces need only be asked for what tokens leave open
    """

    def __init__(self, counts: TokenCounts | None = None) -> None:
        self._counts = np.zeros(CONTEXTS * TOKENS, np.int64)
        self._is_counted = counts is not None
        if counts is not None:
            self._counts[counts.places] = counts.counts
        self._open = np.zeros(CONTEXTS, np.float64)

    def add(self, piece: Piece, contexts: Contexts) -> None:
        """Count some of the codes, each in its context."""
        if not self._is_counted:
            _count_into(self._counts, piece.tokens, contexts)
        places = np.flatnonzero(piece.tokens.reshape(-1) >= FIRST_OPEN)
        if places.size:
            beyond = np.abs(piece.codes.reshape(-1)[places].astype(np.float64))
            beyond -= np.abs(TOKEN_START[piece.tokens.reshape(-1)[places]])
            # Integers, which float64 adds exactly.
            self._open += np.bincount(contexts.reshape(-1)[places], beyond, CONTEXTS)

    def uses(self, pool: Pool) -> tuple[ClassUse, ...]:
        """What all codes take, by context."""
        uses = []
        counts, known = self._counts.reshape(CONTEXTS, TOKENS), bits_of_tables(pool)
        magnitudes = counts @ np.abs(TOKEN_START.astype(np.float64)) + self._open
        for context in np.flatnonzero(counts.any(1)).tolist():
            own, bits = counts[context], known[context]
            used = own > 0
            total = int(own.sum())
            ideal = float((own[used] * (np.log2(total / own[used]) + TOKEN_BITS[used])).sum())
            table = float(own[: len(bits)] @ bits)
            uses.append(
                ClassUse(
                    context=context,
                    count=total,
                    magnitude=float(magnitudes[context]) / total,
                    ideal_bits=ideal / total,
                    table_bits=table / total,
                )
            )
        return tuple(uses)


def bits_of_tables(pool: Pool) -> dict[int, NDArray[np.float64]]:
    """Bits of every token in every context that has a table, raw bits included, float64 [tokens of the table]."""
    found: dict[int, NDArray[np.float64]] = {}
    for context, table in pool.tables.items():
        found[context] = table.precision - np.log2(table.frequencies) + TOKEN_BITS[: len(table.codes)]
    return found
