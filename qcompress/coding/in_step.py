"""Chunks that decode by themselves are decoded several at a time by compiled loops, where these are to be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompress.coding import kernels
from qcompress.coding.kernels import BUCKETS, LANES
from qcompress.coding.rows import spans

Bytes: TypeAlias = NDArray[np.uint8]
Loop: TypeAlias = Callable[..., Any]
Loops: TypeAlias = Callable[[Loop], Loop | None]
"""Gives a function of kernels.py as it is to be called, or None: `COMPILER.of`."""
Frequencies: TypeAlias = tuple[NDArray[np.int64], Bytes, int]
"""A table: int64 [used], uint8 [used], the codes, and the precision."""


@dataclass(frozen=True)
class Intervals:
    """What decodes codes under some tables: `kernels.make_intervals` says what starts and buckets are.

    names  uint8 [tables * stride], the codes
    known  uint8 [tables], 1 where there is one
    """

    starts: NDArray[np.uint32]
    buckets: NDArray[np.uint64]
    names: Bytes
    stride: int
    known: Bytes


def make_intervals(make: Loop, tables: Mapping[int, Frequencies], count: int) -> Intervals:
    """Those of tables by their numbers, which are below `count`; `make` is the kernel of this name."""
    sizes, precisions = np.zeros(count, np.int64), np.zeros(count, np.int64)
    stride = 1 + max((len(frequencies) for frequencies, *_ in tables.values()), default=1)
    names = np.zeros((count, stride), np.uint8)
    for number, (frequencies, codes, precision) in tables.items():
        sizes[number], precisions[number] = len(frequencies), precision
        names[number, : len(codes)] = codes
    starts, buckets = np.zeros(count * stride, np.uint32), np.zeros(count * BUCKETS, np.uint64)
    flat = [np.zeros(0, np.int64), *(tables[number][0] for number in sorted(tables))]
    make(np.concatenate(flat), sizes, precisions, starts, stride, buckets)
    return Intervals(starts, buckets, names.reshape(-1), stride, (sizes > 0).astype(np.uint8))


@dataclass(frozen=True)
class Streams:
    """Some streams side by side: their words, and where each ends and begins, as kernels have them."""

    words: NDArray[np.uint32]
    places: NDArray[np.uint64]
    bottoms: NDArray[np.uint64]


def streams_of(parts: Sequence[bytes]) -> Streams | None:
    """Streams, with empty ones behind them up to LANES, but one alone; None where one has bytes that no code needs."""
    if any(part and not part[-1] for part in parts):
        return None
    sizes = [-(-len(part) // 4) for part in parts] + [0] * fill(len(parts))
    joined = b"".join([bytes(4), *(part.ljust(4 * size, b"\0") for part, size in zip(parts, sizes, strict=False))])
    ends = np.cumsum(sizes, dtype=np.uint64)
    return Streams(np.frombuffer(joined, "<u4").astype(np.uint32), ends, ends - np.array(sizes, np.uint64))


def fill(parts: int) -> int:
    """How many empty lanes so many chunks need beside them."""
    return 0 if parts == 1 else LANES - parts


def ends_of(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Where the parts of each lane begin, and the last ends, empty lanes included."""
    return np.cumsum([0, *sizes, *[0] * fill(len(sizes))])


def groups(chunks: int) -> Iterator[slice]:
    """Neighbouring chunks, at most LANES at a time."""
    return spans(chunks, LANES)


def decode_in_step(loops: Loops, chunks: Sequence[tuple[bytes, int]], table: Frequencies) -> list[Bytes] | None:
    """The codes of chunks under one table, uint8 [codes] each; None where that needs the slower way.

    chunks  of each its stream, and how many codes
    """
    make, decode = loops(kernels.make_intervals), loops(kernels.decode_codes)
    if make is None or decode is None:
        return None
    intervals = make_intervals(make, {0: table}, 1)
    done: list[Bytes] = []
    for span in groups(len(chunks)):
        streams = streams_of([stream for stream, _ in chunks[span]])
        if streams is None:
            return None
        runs = np.diff(ends_of([count for _, count in chunks[span]])).reshape(-1, 1)
        into = np.empty((len(runs), int(runs.max())), np.uint8)
        about = (intervals.starts, intervals.buckets, intervals.names, intervals.stride)
        if not decode(streams.words, streams.places, streams.bottoms, *about, runs, into):
            return None
        done.extend(codes[:count] for codes, (_, count) in zip(into, chunks[span], strict=False))
    return done
