"""Side information by hand: what is accepted, and every limit that a reader holds it to."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from qcompress.coding.ans import varint
from qcompress.coding.unbounded.side import FACTOR_LIMIT, LEVEL_LIMIT, Grid, Matrix, parse_side, side_bytes
from qcompress.coding.unbounded.tables import Pool
from qcompress.coding.unbounded.tokens import BIN_BITS, Levels

ONE = 0x3C00
NO_CLASSES = b"\0\0\0"


def fixed(flags: int = 0, step: int = ONE) -> bytes:
    return struct.pack("<BbbH", flags, 0, 0, step)


def parse(data: bytes, rows: int = 1) -> tuple[Grid, Levels]:
    grids, pool = parse_side(memoryview(data), [Matrix(rows, 1, 1)])
    return grids[0], pool.levels[0]


def level_rows(bins: int, slope: int = 0, offset: int = 0) -> bytes:
    """The level of one row under a table of flat or falling density, its stream of no information."""
    return fixed(1) + NO_CLASSES + varint(offset) + bytes([bins]) + varint(slope) * bins + varint(0)


def test_the_least_is_fixed_fields_no_classes_and_no_raw_bits() -> None:
    grid, levels = parse(fixed() + NO_CLASSES + varint(0))
    assert (grid.step, grid.value, grid.trellis) == (ONE, 1.0, False)
    assert (grid.rows, grid.channels, grid.taps, levels.rows) == (None,) * 4


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (varint(1), "longer than it is"),
        (varint(2) + b"x", "longer than it is"),
        (varint(1) + b"x", "raw bits that no number needs"),
        (varint(1) + b"\0", "raw bits that no number needs"),
        (b"", "no integer at byte 8"),
    ],
)
def test_raw_bits_are_just_what_the_numbers_need(rest: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(fixed() + NO_CLASSES + rest)


@pytest.mark.parametrize("flags", [1 << 6, 1 << 7])
def test_flags_without_a_meaning_are_refused(flags: int) -> None:
    with pytest.raises(ValueError, match="unknown flags"):
        parse(fixed(flags) + NO_CLASSES + varint(0))


@pytest.mark.parametrize("step", [0, 0x7C00, 0x7C01, 0x8001, 0xBC00])
def test_a_step_is_finite_and_above_zero(step: int) -> None:
    with pytest.raises(ValueError, match="not a finite float16 above 0"):
        parse(fixed(step=step) + NO_CLASSES + varint(0))


@pytest.mark.parametrize("step", [1, 0x7BFF])
def test_the_least_and_the_largest_step_are_steps(step: int) -> None:
    assert parse(fixed(step=step) + NO_CLASSES + varint(0))[0].step == step


def test_a_table_of_a_field_has_no_bins_that_no_number_has() -> None:
    most = len(BIN_BITS) - 1
    _, levels = parse(level_rows(most))
    assert levels.rows is not None and levels.rows.tolist() == [0]
    with pytest.raises(ValueError, match="too many bins"):
        parse(level_rows(most + 1))


def test_slopes_and_offsets_of_fields_have_limits() -> None:
    _, levels = parse(level_rows(0, offset=2 * LEVEL_LIMIT))
    assert levels.rows is not None and levels.rows.tolist() == [LEVEL_LIMIT]
    assert parse(level_rows(1, slope=2 * 255))
    for data in (level_rows(0, offset=2 * LEVEL_LIMIT + 2), level_rows(1, slope=2 * 256)):
        with pytest.raises(ValueError, match="out of range"):
            parse(data)


@pytest.mark.parametrize("part", ["rows", "channels"])
@pytest.mark.parametrize("sign", [1, -1])
def test_factors_fit_a_byte_and_levels_their_limit(part: str, sign: int) -> None:
    def side(factor: int, level: int) -> bytes:
        grid = Grid(ONE, 0, trellis=False, **{part: np.array([sign * factor], np.int32)})
        return side_bytes([grid], Pool((Levels(0, np.array([sign * level], np.int32)),), {}))

    grid, levels = parse(side(FACTOR_LIMIT, LEVEL_LIMIT))
    assert getattr(grid, part).tolist() == [sign * FACTOR_LIMIT]
    assert levels.rows is not None and levels.rows.tolist() == [sign * LEVEL_LIMIT]
    with pytest.raises(ValueError, match=r"beyond 127|out of range"):
        parse(side(FACTOR_LIMIT + 1, LEVEL_LIMIT))
    with pytest.raises(ValueError, match=r"beyond 255|out of range"):
        parse(side(FACTOR_LIMIT, LEVEL_LIMIT + 1))
