"""Unbounded codes as tokens of one byte, and the raw bits of what a token leaves open.

A magnitude below 16 is a bin of its own; above, every octave has four bins. Token 0 is zero, tokens 2b - 1 and 2b are
the positive and the negative codes of bin b. artifact/SPEC.md has the table, "Tokens".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint8]
Codes = NDArray[np.int32]

LARGEST_CODE = 2**31 - 1
_EXACT = 16
_BINS = _EXACT + 4 * 27
_LOOKUP = 1 << 12

BIN_BITS: NDArray[np.int64] = np.array([0 if b < _EXACT else (b - _EXACT) // 4 + 2 for b in range(_BINS)])
"""Raw bits of each bin's magnitudes; a bin holds 2**bits of them."""

BIN_START: NDArray[np.int64] = np.array(
    [b if b < _EXACT else (4 + (b - _EXACT) % 4) << (b - _EXACT) // 4 + 2 for b in range(_BINS)]
)
"""The smallest magnitude of each bin."""

TOKENS = 2 * _BINS - 1
"""How many tokens there are: a code of magnitude LARGEST_CODE still has one."""

_TOKEN_BIN = (np.arange(TOKENS) + 1) // 2
TOKEN_BITS: NDArray[np.int64] = BIN_BITS[_TOKEN_BIN]
"""Raw bits of each token."""

TOKEN_START: NDArray[np.int32] = (BIN_START[_TOKEN_BIN] * np.where(np.arange(TOKENS) % 2, 1, -1)).astype(np.int32)
"""The code of least magnitude of each token."""

TOKEN_PARITY: NDArray[np.uint8] = (BIN_START[_TOKEN_BIN] & 1).astype(np.uint8)
"""The parity of each token's code, where no raw bit is to come: that of an open token is its lowest raw bit."""

FIRST_OPEN = 2 * _EXACT - 1
"""The lowest token that leaves raw bits open."""


def _bins(magnitudes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(BIN_START, magnitudes, "right") - 1


_SMALL = np.arange(-_LOOKUP, _LOOKUP + 1)
_SMALL_TOKENS: Tokens = (2 * _bins(np.abs(_SMALL)) - (_SMALL > 0)).astype(np.uint8)


def tokens_from_codes(codes: Codes) -> Tokens:
    """The token of each code, uint8, in the shape of the codes. Raises ValueError for a code of -2**31."""
    flat = codes.reshape(-1)
    if not flat.size:
        return np.zeros(codes.shape, np.uint8)
    low, high = int(flat.min()), int(flat.max())
    if low < -LARGEST_CODE:
        raise ValueError(f"the code {low} is beyond {LARGEST_CODE}")
    if max(-low, high) <= _LOOKUP:
        return _SMALL_TOKENS.take(codes + _LOOKUP, mode="clip")
    wide = codes.astype(np.int64)
    tokens: Tokens = (2 * _bins(np.abs(wide)) - (wide > 0)).astype(np.uint8)
    return tokens


def raw_bits(codes: Codes, tokens: Tokens) -> NDArray[np.uint8]:
    """The raw bits of the codes in their order, packed: lowest bit first, each code's own lowest first."""
    counts, offsets = _open(codes, tokens)
    bits = np.zeros(int(counts.sum()), np.uint8)
    ends = np.cumsum(counts)
    for bit in range(int(counts.max(initial=0))):
        has = counts > bit
        bits[(ends - counts)[has] + bit] = offsets[has] >> bit & 1
    return np.packbits(bits, bitorder="little")


def _open(codes: Codes, tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Raw bits and their value, of the codes that have any."""
    flat, kinds = codes.reshape(-1), tokens.reshape(-1)
    places = np.flatnonzero(kinds >= FIRST_OPEN)
    kinds = kinds[places]
    return TOKEN_BITS[kinds], np.abs(flat[places].astype(np.int64)) - np.abs(TOKEN_START[kinds].astype(np.int64))


def codes_from_tokens(tokens: Tokens, raw: memoryview) -> tuple[Codes, memoryview]:
    """The codes of tokens, and what is left of the raw bytes behind theirs.

    tokens  uint8, any shape
    raw     begins as `raw_bits` packs them
    raises  ValueError where a token is unknown, or the raw bits are too few or not filled up with zeros
    """
    if int(tokens.max(initial=0)) >= TOKENS:
        raise ValueError(f"a token is not below {TOKENS}")
    codes = TOKEN_START.take(tokens, mode="clip")
    flat = codes.reshape(-1)
    places = np.flatnonzero(tokens.reshape(-1) >= FIRST_OPEN)
    counts = TOKEN_BITS[tokens.reshape(-1)[places]]
    total = int(counts.sum())
    n_bytes = -(-total // 8)
    if len(raw) < n_bytes:
        raise ValueError(f"{len(raw)} bytes of raw bits, and the tokens need {n_bytes}")
    bits = np.unpackbits(np.frombuffer(raw[:n_bytes], np.uint8), bitorder="little")
    if bits[total:].any():
        raise ValueError("the bits that fill up the raw bits are not zero")
    starts = np.cumsum(counts) - counts
    offsets = np.zeros(len(places), np.int32)
    for bit in range(int(counts.max(initial=0))):
        has = counts > bit
        offsets[has] |= bits[starts[has] + bit].astype(np.int32) << bit
    flat[places] += np.where(flat[places] > 0, offsets, -offsets)
    return codes, raw[n_bytes:]
