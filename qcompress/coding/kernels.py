"""The inner loops of decoding: streams of several chunks are read in step, so that none waits for its own last code.

Plain functions of arrays. numba compiles them where it is installed (compiled.py); without it they are what tests run.
They spell out what arrays could do at once, since compiling that takes seconds. States are uint64, and so is every
number that meets one: numba, as numpy, makes a float of uint64 and a signed integer. Whatever is not as
artifact/SPEC.md has it they tell by False alone; the slower way then says what.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

LANES = 4
"""Streams that are read in step: as many as a core overlaps."""
MODEL_BITS = 24
BUCKETS = 1 << 11
"""Equal parts of the model's range: in most of them lies one interval alone."""

Bytes: TypeAlias = NDArray[np.uint8]
U32: TypeAlias = NDArray[np.uint32]
U64: TypeAlias = NDArray[np.uint64]
I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]

_BUCKET_BITS = 13
_ONE, _WORD, _MODEL, _BUCKET = np.uint64(1), np.uint64(32), np.uint64(MODEL_BITS), np.uint64(_BUCKET_BITS)
_MASK = np.uint64((1 << MODEL_BITS) - 1)
_LENGTH, _INDEX = np.uint64((1 << MODEL_BITS + 1) - 1), np.uint64(2 * MODEL_BITS + 1)
_LEAST = np.uint64(1 << 32)


def make_intervals(frequencies: I64, sizes: I64, precisions: I64, starts: U32, stride: int, buckets: U64) -> None:
    """Fill in the intervals that the codes of each table own, and which one holds the start of each bucket.

    frequencies  [all of them], those of one table behind another's
    sizes        [tables], codes of each table; 0 where there is none: then the first is filled in as one of one code
    precisions   [tables]
    starts       [tables * stride], to be filled in, as SPEC.md has them; stride: more than any table has codes
    buckets      [tables * BUCKETS], to be filled in: start, length and number of the interval, in 24, 25 and 8 bits
    """
    at = 0
    for table in range(len(sizes)):
        size, before, first = int(sizes[table]), 0, table * stride
        for code in range(size):
            starts[first + code] = (before * ((1 << MODEL_BITS) - size) >> precisions[table]) + code
            before += int(frequencies[at + code])
        at += size
        if not table:
            size = max(size, 1)
        starts[first + size] = 1 << MODEL_BITS
        bucket = table * BUCKETS
        for code in range(size):
            start, end = int(starts[first + code]), int(starts[first + code + 1])
            following = table * BUCKETS + (end + (1 << _BUCKET_BITS) - 1 >> _BUCKET_BITS)
            while bucket < following:
                buckets[bucket] = start | end - start << MODEL_BITS | code << 2 * MODEL_BITS + 1
                bucket += 1


def _next(
    x: Any, at: Any, word: Any, bottom: Any, words: U32, starts: U32, start: Any, buckets: U64, bucket: Any
) -> tuple[Any, ...]:
    """The state, the place in the words, the word there, and the interval, one code later.

    start, bucket  where those of the table begin
    """
    q = x & _MASK
    bucket = buckets[bucket + (q >> _BUCKET)]
    interval, length = bucket >> _INDEX, bucket >> _MODEL & _LENGTH
    q -= bucket & _MASK
    while q >= length:
        q -= length
        interval += _ONE
        length = np.uint64(starts[start + interval + _ONE] - starts[start + interval])
    x = (x >> _MODEL) * length + q
    # Whether a word is due is as good as random: so no jump, and the next one is read before that is known.
    due = np.uint64(x < _LEAST and at > bottom)
    x = (x << _WORD) | word if due else x
    at -= due
    return x, at, np.uint64(words[at]), interval


def _begin(words: U32, states: U64, places: U64, bottoms: U64) -> None:
    """Fill in the states with which streams begin, and move the places on."""
    for lane in range(len(states)):
        x, at = np.uint64(0), places[lane]
        while at > bottoms[lane] and x < _LEAST:
            x = (x << _WORD) | np.uint64(words[at])
            at -= _ONE
        states[lane] = x
        places[lane] = at


def _read_one(
    words: U32,
    states: U64,
    places: U64,
    bottoms: U64,
    starts: U32,
    buckets: U64,
    names: Bytes,
    stride: int,
    runs: I64,
    into: Bytes,
) -> None:
    """`_read_runs` of a single stream."""
    x, at, bottom = states[0], places[0], bottoms[0]
    word = np.uint64(words[at])
    done = np.uint64(0)
    for table in range(runs.shape[1]):
        start, bucket = np.uint64(table * stride), np.uint64(table * BUCKETS)
        end = done + np.uint64(runs[0, table])
        for place in range(done, end):
            x, at, word, found = _next(x, at, word, bottom, words, starts, start, buckets, bucket)
            into[0, place] = names[start + found]
        done = end
    states[0] = x
    places[0] = at


def _read_runs(
    words: U32,
    states: U64,
    places: U64,
    bottoms: U64,
    starts: U32,
    buckets: U64,
    names: Bytes,
    stride: int,
    runs: I64,
    into: Bytes,
) -> bool:
    """The next codes of LANES streams, or of one; False where one has fewer than another and does not end there.

    starts, buckets  see `make_intervals`, which has `stride` starts a table; so has names, the codes of the intervals
    runs             [lanes, tables], how many under each table in turn
    into             [lanes, at least as many], to be filled in
    """
    if len(states) == 1:
        _read_one(words, states, places, bottoms, starts, buckets, names, stride, runs, into)
        return True
    count = 0
    tables, left = np.zeros(LANES, np.int64), np.zeros(LANES, np.int64)
    for lane in range(LANES):
        left[lane] = runs[lane, 0]
        total = 0
        for table in range(runs.shape[1]):
            total += runs[lane, table]
        count = max(count, total)
    done = 0
    while done < count:
        # Up to the next end of a run of any of them.
        stretch = count - done
        for lane in range(LANES):
            while left[lane] == 0:
                tables[lane] += 1
                if tables[lane] == runs.shape[1]:
                    if states[lane] != 0 or places[lane] != bottoms[lane]:
                        return False
                    # At its end a stream gives the lowest code for ever, which nobody looks at.
                    tables[lane], left[lane] = 0, count
                else:
                    left[lane] = runs[lane, tables[lane]]
            stretch = min(stretch, left[lane])
        _read_lanes(words, states, places, bottoms, starts, buckets, names, stride, tables, into, done, done + stretch)
        for lane in range(LANES):
            left[lane] -= stretch
        done += stretch
    return True


def _read_lanes(
    words: U32,
    states: U64,
    places: U64,
    bottoms: U64,
    starts: U32,
    buckets: U64,
    names: Bytes,
    stride: int,
    tables: I64,
    into: Bytes,
    start: int,
    stop: int,
) -> None:
    """Codes of LANES streams, each under one table, in step: the processor works on all of them at once."""
    t0, t1, t2, t3 = tables[0], tables[1], tables[2], tables[3]
    x0, x1, x2, x3 = states[0], states[1], states[2], states[3]
    a0, a1, a2, a3 = places[0], places[1], places[2], places[3]
    b0, b1, b2, b3 = bottoms[0], bottoms[1], bottoms[2], bottoms[3]
    w0, w1, w2, w3 = np.uint64(words[a0]), np.uint64(words[a1]), np.uint64(words[a2]), np.uint64(words[a3])
    s0, s1, s2, s3 = np.uint64(t0 * stride), np.uint64(t1 * stride), np.uint64(t2 * stride), np.uint64(t3 * stride)
    k0, k1, k2, k3 = np.uint64(t0 * BUCKETS), np.uint64(t1 * BUCKETS), np.uint64(t2 * BUCKETS), np.uint64(t3 * BUCKETS)
    for place in range(np.uint64(start), np.uint64(stop)):
        x0, a0, w0, found = _next(x0, a0, w0, b0, words, starts, s0, buckets, k0)
        into[0, place] = names[s0 + found]
        x1, a1, w1, found = _next(x1, a1, w1, b1, words, starts, s1, buckets, k1)
        into[1, place] = names[s1 + found]
        x2, a2, w2, found = _next(x2, a2, w2, b2, words, starts, s2, buckets, k2)
        into[2, place] = names[s2 + found]
        x3, a3, w3, found = _next(x3, a3, w3, b3, words, starts, s3, buckets, k3)
        into[3, place] = names[s3 + found]
    states[0], states[1], states[2], states[3] = x0, x1, x2, x3
    places[0], places[1], places[2], places[3] = a0, a1, a2, a3


def _ended(states: U64, places: U64, bottoms: U64) -> bool:
    """Whether every stream ends here."""
    left = 0
    for lane in range(len(states)):
        left += states[lane] != 0 or places[lane] != bottoms[lane]
    return left == 0


def decode_codes(
    words: U32, places: U64, bottoms: U64, starts: U32, buckets: U64, names: Bytes, stride: int, runs: I64, into: Bytes
) -> bool:
    """Whether streams hold as many codes as they should, which are filled in.

    words    of all streams, one behind another, and one before them
    places   [lanes], the last word of each, with LANES lanes or one; changed
    bottoms  [lanes], the word before each
    starts, buckets, names, stride, runs, into: see `_read_runs`
    """
    states = np.zeros(len(places), np.uint64)
    _begin(words, states, places, bottoms)
    if not _read_runs(words, states, places, bottoms, starts, buckets, names, stride, runs, into):
        return False
    return _ended(states, places, bottoms)


def _open_bits(raw: Bytes, place: int, count: int) -> np.int64:
    """The number of `count` bits at a bit's place, the lowest first."""
    value, got = np.int64(0), 0
    while got < count:
        bit = place + got
        room = min(8 - (bit & 7), count - got)
        value |= ((np.int64(raw[bit >> 3]) >> (bit & 7)) & ((1 << room) - 1)) << got
        got += room
    return value


def decode_plain(
    words: U32,
    places: U64,
    bottoms: U64,
    starts: U32,
    buckets: U64,
    names: Bytes,
    stride: int,
    known: Bytes,
    contexts: Bytes,
    ends: I64,
    raw: Bytes,
    raw_ends: I64,
    token_bits: I64,
    token_starts: I32,
    codes: I32,
) -> bool:
    """Whether chunks of unbounded codes without a trellis are whole; the codes are filled in.

    known     [contexts], 1 where there is a table
    contexts  [codes of all chunks], the table of each, in the order of rows
    ends      [lanes + 1], where the codes of each chunk begin, and the last ends
    raw       of all chunks, and one byte more
    raw_ends  [lanes + 1], where those of each begin, and the last ends
    codes     [codes of all chunks], to be filled in
    """
    lanes, longest = len(places), 0
    runs = np.zeros((lanes, len(known)), np.int64)
    for lane in range(lanes):
        longest = max(longest, ends[lane + 1] - ends[lane])
        for place in range(ends[lane], ends[lane + 1]):
            runs[lane, contexts[place]] += 1
        for context in range(len(known)):
            if runs[lane, context] and not known[context]:
                return False
    ordered = np.empty((lanes, longest), np.uint8)
    if not decode_codes(words, places, bottoms, starts, buckets, names, stride, runs, ordered):
        return False
    following = np.empty(len(known), np.int64)
    for lane in range(lanes):
        total = 0
        for context in range(len(known)):
            following[context] = total
            total += runs[lane, context]
        bit, end = 8 * raw_ends[lane], 8 * raw_ends[lane + 1]
        for place in range(ends[lane], ends[lane + 1]):
            context = contexts[place]
            token = ordered[lane, following[context]]
            following[context] += 1
            code = np.int64(token_starts[token])
            width = token_bits[token]
            if width:
                if bit + width > end:
                    return False
                more = _open_bits(raw, bit, width)
                code += more if code > 0 else -more
                bit += width
            codes[place] = code
        if not _filled_up(raw, bit, end):
            return False
    return True


def _filled_up(raw: Bytes, bit: int, end: int) -> bool:
    """Whether the bits from one to another are the zeros that fill up the last byte, and no more."""
    return end - bit < 8 and (bit == end or raw[bit >> 3] >> (bit & 7) == 0)


def decode_trellis(
    words: U32,
    places: U64,
    bottoms: U64,
    starts: U32,
    buckets: U64,
    names: Bytes,
    stride: int,
    known: Bytes,
    classes: Bytes,
    rows: int,
    columns: int,
    chunks: int,
    raw: Bytes,
    raw_ends: I64,
    token_bits: I64,
    token_starts: I32,
    next_state: Bytes,
    codes: I32,
) -> bool:
    """The same of chunks of one shape that drive a trellis, which are read column by column.

    known       [3 * classes], 1 where there is a table; the second third is of even states, the last of odd ones
    classes     [chunks * rows * columns], the class of each code
    chunks      all others of the lanes are empty
    next_state  [2 * states], of each state and parity
    """
    lanes, third = len(places), len(known) // 3
    streams = np.zeros(lanes, np.uint64)
    _begin(words, streams, places, bottoms)
    states = np.zeros((chunks, rows), np.uint8)
    contexts = np.empty((chunks, rows), np.uint8)
    ordered = np.empty((lanes, rows), np.uint8)
    runs = np.zeros((lanes, len(known)), np.int64)
    following = np.empty(len(known), np.int64)
    bits = np.zeros(chunks, np.int64)
    for lane in range(chunks):
        bits[lane] = 8 * raw_ends[lane]
    for lane in range(chunks, lanes):
        # Empty streams give whatever they are asked for.
        runs[lane, 0] = rows
    for column in range(columns):
        for lane in range(chunks):
            for context in range(len(known)):
                runs[lane, context] = 0
            for row in range(rows):
                own = classes[(lane * rows + row) * columns + column]
                context = own + third * (1 + (states[lane, row] & 1))
                contexts[lane, row] = context
                runs[lane, context] += 1
                if not known[context]:
                    return False
        if not _read_runs(words, streams, places, bottoms, starts, buckets, names, stride, runs, ordered):
            return False
        for lane in range(chunks):
            total = 0
            for context in range(len(known)):
                following[context] = total
                total += runs[lane, context]
            for row in range(rows):
                context = contexts[lane, row]
                token = ordered[lane, following[context]]
                following[context] += 1
                code = np.int64(token_starts[token])
                width = token_bits[token]
                if width:
                    if bits[lane] + width > 8 * raw_ends[lane + 1]:
                        return False
                    more = _open_bits(raw, bits[lane], width)
                    code += more if code > 0 else -more
                    bits[lane] += width
                codes[(lane * rows + row) * columns + column] = code
                states[lane, row] = next_state[2 * states[lane, row] + (code & 1)]
    for lane in range(chunks):
        if not _filled_up(raw, bits[lane], 8 * raw_ends[lane + 1]):
            return False
    return _ended(streams, places, bottoms)
