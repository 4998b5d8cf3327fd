"""Side information of unbounded codes becomes bytes and back: steps, factors, levels and tables of one pool.

Fixed fields first, a few bytes a tensor; then all that comes in numbers - levels, factors, slopes - as runs of one
stream. artifact/SPEC.md, "Side information".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qcompress.coding.ans import RunReader, Table, encode_runs, parse_varint, varint
from qcompress.coding.unbounded.tables import STEEPEST, Pool, fit_slopes, table_from_slopes
from qcompress.coding.unbounded.tokens import (
    BIN_BITS,
    CLASSES,
    CONTEXTS,
    TOKENS,
    Levels,
    codes_from_tokens,
    raw_bits,
    tokens_from_codes,
)
from qcompress.types.config import Shape
from qcompress.types.encoded import Unbounded

Integers = NDArray[np.int32]

_FIXED = struct.Struct("<BbbH")
_PARTS = ("level rows", "level columns", "step rows", "step channels", "step taps", "trellis")
_GROUPS = range(0, CONTEXTS, CLASSES)
FACTOR_LIMIT = 127
LEVEL_LIMIT = 255
EXPONENTS = (-126, 112)


@dataclass(frozen=True)
class Matrix:
    """The size of one matrix of codes; columns is a multiple of taps."""

    rows: int
    columns: int
    taps: int


@dataclass(frozen=True)
class Grid:
    """What places the codes of one tensor: see types.encoded.Unbounded.

    step     the bits of a float16
    factors  integers: of rows [rows], of channels [columns / taps, or columns without factors of taps], of taps [taps]
    """

    step: int
    exponent: int
    trellis: bool
    rows: Integers | None = None
    channels: Integers | None = None
    taps: Integers | None = None

    @property
    def value(self) -> float:
        """The step of a code whose row and column have no factor."""
        return float(np.array(self.step, np.uint16).view(np.float16)) * 2.0**self.exponent

    def block(self, codes: NDArray[np.int32], rows: slice, columns: slice, width: int, dtype: str) -> Unbounded:
        """Codes of some rows and columns of a matrix of `width` columns as a weight [rows, columns] of their own."""
        own = self if self.rows is None else replace(self, rows=self.rows[rows])
        if columns.stop - columns.start < width and (self.channels is not None or self.taps is not None):
            places = np.arange(columns.start, columns.stop)
            along = np.zeros(len(places), np.int32)
            taps = 1 if self.taps is None else len(self.taps)
            if self.channels is not None:
                along = along + self.channels[places // taps]
            if self.taps is not None:
                along = along + self.taps[places % taps]
            own = replace(own, channels=along, taps=None)
        return unbounded_of_grid(codes, own, (len(codes), codes.shape[1]), (0,), dtype)


def grid_of_unbounded(unbounded: Unbounded) -> Grid:
    """The grid of an unbounded quantizer as side information has it."""
    rows, channels, taps = (
        None if part is None else part.cpu().numpy().astype(np.int32)
        for part in (unbounded.rows, unbounded.channels, unbounded.taps)
    )
    step = int(unbounded.step.cpu().numpy().view(np.uint16))
    return Grid(step, unbounded.exponent, unbounded.trellis, rows, channels, taps)


def side_bytes(grids: Sequence[Grid], pool: Pool) -> bytes:
    """The side information of a pool."""
    fixed = b"".join(_fixed(grid, levels) for grid, levels in zip(grids, pool.levels, strict=True))
    bins = _group_bins(pool)
    tables, runs, raws = [], [], []
    for values in _fields(grids, pool):
        if not values.size:
            continue
        offset = int(np.median(values))
        residuals = (values - offset).astype(np.int32)
        tokens = tokens_from_codes(residuals)
        slopes = fit_slopes(np.bincount(tokens, minlength=TOKENS))
        tables.append(varint(_zigzag(offset)) + _slope_bytes(slopes))
        runs.append((tokens, table_from_slopes(slopes)))
        raws.append(raw_bits(residuals, tokens).tobytes())
    raw = b"".join(raws)
    return b"".join([fixed, bins, *tables, varint(len(raw)), raw, encode_runs(runs)])


def _slope_bytes(slopes: Integers) -> bytes:
    return b"".join([bytes([len(slopes)]), *(varint(_zigzag(slope)) for slope in slopes.tolist())])


def _fixed(grid: Grid, levels: Levels) -> bytes:
    parts = (levels.rows, levels.channels, grid.rows, grid.channels, grid.taps, grid.trellis or None)
    flags = sum(1 << bit for bit, part in enumerate(parts) if part is not None)
    return _FIXED.pack(flags, grid.exponent, levels.base, grid.step)


def _group_bins(pool: Pool) -> bytes:
    """For each third of the contexts: how many bytes follow, the first context, and then the bins of each table."""
    parts = []
    for start in _GROUPS:
        used = [context for context in pool.slopes if start <= context < start + CLASSES]
        if not used:
            parts.append(b"\0")
            continue
        every = range(min(used), max(used) + 1)
        sizes = [len(pool.slopes[context]) + 1 if context in pool.slopes else 0 for context in every]
        parts.append(bytes([len(sizes), min(used) - start, *sizes]))
    return b"".join(parts)


def _fields(grids: Sequence[Grid], pool: Pool) -> Iterator[Integers]:
    for part in ("rows", "channels", "taps"):
        yield _joined([getattr(levels, part) for levels in pool.levels])
    for part in ("rows", "channels", "taps"):
        yield _joined([getattr(grid, part) for grid in grids])
    yield _joined([pool.slopes[context] for context in sorted(pool.slopes)])


def _joined(parts: Sequence[Integers | None]) -> Integers:
    return np.concatenate([np.zeros(0, np.int32), *(part for part in parts if part is not None)]).astype(np.int32)


def count_numbers(data: memoryview, matrices: Sequence[Matrix]) -> int:
    """How many numbers side information holds, but for tables: what its memory goes by. Raises ValueError."""
    at = _FIXED.size * len(matrices)
    if len(data) < at:
        raise ValueError(f"{len(data)} bytes of side information for {len(matrices)} tensors")
    return sum(_counts(list(_FIXED.iter_unpack(data[:at])), matrices))


def parse_side(data: memoryview, matrices: Sequence[Matrix]) -> tuple[list[Grid], Pool]:
    """The grids and the pool that `data` holds, all of it, for matrices of these sizes.

    Nothing is allocated beyond what the sizes allow. Raises ValueError where the format is broken.
    """
    at = _FIXED.size * len(matrices)
    if len(data) < at:
        raise ValueError(f"{len(data)} bytes of side information for {len(matrices)} tensors")
    fixed = list(_FIXED.iter_unpack(data[:at]))
    for flags, exponent, _, step in fixed:
        _check_fixed(flags, exponent, step)
    sizes, at = _parse_group_bins(data, at)
    counts = [*_counts(fixed, matrices), sum(size - 1 for size in sizes.values())]
    limits = [LEVEL_LIMIT] * 3 + [FACTOR_LIMIT] * 3 + [STEEPEST]
    tables = []
    for count in counts:
        offset, table, at = _parse_table(data, at) if count else (0, None, at)
        tables.append((offset, table))
    length, at = parse_varint(data, at)
    if length > len(data) - at:
        raise ValueError("the raw bits of the side information are longer than it is")
    fields = _read_fields(data[at : at + length], RunReader(data[at + length :]), counts, tables, limits)
    return _assemble(fixed, matrices, fields, sizes)


def _check_fixed(flags: int, exponent: int, step: int) -> None:
    if flags >> len(_PARTS):
        raise ValueError(f"unknown flags {flags:#x} of a tensor")
    if not EXPONENTS[0] <= exponent <= EXPONENTS[1]:
        raise ValueError(f"the exponent {exponent} of a step is not in [{EXPONENTS[0]}, {EXPONENTS[1]}]")
    if not 0 < step < 0x7C00:
        raise ValueError("a step is not a finite float16 above 0")


def _parse_group_bins(data: memoryview, at: int) -> tuple[dict[int, int], int]:
    """Context -> the bins of its table, and where they end."""
    sizes: dict[int, int] = {}
    for start in _GROUPS:
        count = data[at] if at < len(data) else 0
        first = data[at + 1] if count and at + 1 < len(data) else 0
        end = at + 1 + (1 + count if count else 0)
        if end > len(data) or first + count > CLASSES:
            raise ValueError("the list of tables is cut off, or names classes that do not exist")
        for place, size in enumerate(data[end - count : end]):
            if size > len(BIN_BITS):
                raise ValueError(f"a table of {size} bins, more than {len(BIN_BITS)}")
            if size:
                sizes[start + first + place] = size
        at = end
    return sizes, at


def _counts(fixed: Sequence[tuple[int, ...]], matrices: Sequence[Matrix]) -> list[int]:
    """How many numbers each field has, but for the slopes."""
    return [sum(part for part in parts) for parts in zip(*map(_part_sizes, fixed, matrices), strict=True)]


def _part_sizes(fixed: tuple[int, ...], matrix: Matrix) -> list[int]:
    """The numbers of one tensor in each field: levels of rows, channels and taps, then factors of these."""
    flags = fixed[0]
    has = [bool(flags >> bit & 1) for bit in range(len(_PARTS))]
    channels = matrix.columns // matrix.taps
    return [
        matrix.rows * has[0],
        channels * has[1],
        matrix.taps * has[1],
        matrix.rows * has[2],
        (channels if has[4] else matrix.columns) * has[3],
        matrix.taps * has[4],
    ]


def _parse_table(data: memoryview, at: int) -> tuple[int, Table, int]:
    offset, at = parse_varint(data, at)
    bins = data[at] if at < len(data) else 255
    if bins >= len(BIN_BITS):
        raise ValueError("a table of the side information is cut off, or has too many bins")
    at += 1
    slopes = []
    for _ in range(bins):
        slope, at = parse_varint(data, at)
        slopes.append(_unzigzag(slope))
    if max(map(abs, slopes), default=0) > STEEPEST or abs(_unzigzag(offset)) > LEVEL_LIMIT:
        raise ValueError("a table of the side information is out of range")
    return _unzigzag(offset), table_from_slopes(np.array(slopes, np.int32)), at


def _read_fields(
    raw: memoryview,
    reader: RunReader,
    counts: Sequence[int],
    tables: Sequence[tuple[int, Table | None]],
    limits: Sequence[int],
) -> list[Integers]:
    runs = [
        reader.read(table, table.model(), count) if table is not None else np.zeros(0, np.uint8)
        for count, (_, table) in zip(counts, tables, strict=True)
    ]
    reader.finish()
    fields = []
    for tokens, (offset, _), limit in zip(runs, tables, limits, strict=True):
        found, raw = codes_from_tokens(tokens, raw)
        values = found.astype(np.int64) + offset
        if np.abs(values).max(initial=0) > limit:
            raise ValueError(f"a number of the side information is beyond {limit}")
        fields.append(values.astype(np.int32))
    if len(raw):
        raise ValueError("the side information has raw bits that no number needs")
    return fields


def _assemble(
    fixed: Sequence[tuple[int, ...]], matrices: Sequence[Matrix], fields: Sequence[Integers], sizes: dict[int, int]
) -> tuple[list[Grid], Pool]:
    take = [_taker(field) for field in fields]
    grids, levels = [], []
    for values, matrix in zip(fixed, matrices, strict=True):
        flags, exponent, base, step = values
        parts = [one(count) for one, count in zip(take, _part_sizes(values, matrix), strict=False)]
        has = [bool(flags >> bit & 1) for bit in range(len(_PARTS))]
        levels.append(Levels(base, parts[0] if has[0] else None, *(parts[1:3] if has[1] else (None, None))))
        factors = [part if flag else None for part, flag in zip(parts[3:], has[2:5], strict=True)]
        grids.append(Grid(step, exponent, has[5], *factors))
    slopes = {context: take[6](size - 1) for context, size in sizes.items()}
    return grids, Pool(tuple(levels), slopes)


def _taker(field: Integers) -> Callable[[int], Integers]:
    """A function that gives the next so many numbers."""
    place = 0

    def take(count: int) -> Integers:
        nonlocal place
        place += count
        return field[place - count : place]

    return take


def _zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def _unzigzag(value: int) -> int:
    return -(value + 1 >> 1) if value & 1 else value >> 1


def unbounded_of_grid(
    codes: NDArray[np.int32], grid: Grid, shape: Shape, axis: tuple[int, ...], dtype: str
) -> Unbounded:
    """The weight of codes [rows, columns] and of the grid that side information has given."""
    import torch

    rows, channels, taps = (
        None if part is None else torch.from_numpy(part.astype(np.min_scalar_type(-int(np.abs(part).max(initial=1)))))
        for part in (grid.rows, grid.channels, grid.taps)
    )
    return Unbounded(
        codes=torch.from_numpy(codes),
        step=torch.from_numpy(np.array(grid.step, np.uint16).view(np.float16)),
        exponent=grid.exponent,
        shape=shape,
        rows=rows,
        channels=channels,
        taps=taps,
        trellis=grid.trellis,
        axis=axis,
        dtype=dtype,
    )
