"""Weights as rows: every value in its channel's row, in order, and back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompress.coding.rows import (
    blocks_from_rows,
    column_parts,
    grid_shape,
    row_shape,
    rows_from_weight,
    weight_from_rows,
)

CASES = [
    ((), (0,)),
    ((7,), (0,)),
    ((0,), (0,)),
    ((4, 6), (0,)),
    ((4, 6), (1,)),
    ((4, 6), (0, 1)),
    ((0, 6), (0,)),
    ((6, 0), (0,)),
    ((6, 0), (1,)),
    ((3, 4, 5), (0,)),
    ((3, 4, 5), (1,)),
    ((3, 4, 5), (0, 1)),
    ((3, 4, 5), (0, 2)),
    ((3, 4, 5), (2, 0)),
    ((3, 0, 5), (0, 2)),
    ((4, 3, 2, 5), (0,)),
    ((4, 3, 2, 5), (1,)),
    ((4, 3, 2, 5), (0, 2)),
]


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_round_trip(shape: tuple[int, ...], axis: tuple[int, ...]) -> None:
    weight = numbered(shape)
    rows = rows_from_weight(weight, axis)
    assert tuple(rows.shape) == row_shape(shape, axis)
    for inner in (rows, rows.reshape(rows.shape[0], -1) if rows.numel() else rows):
        back = weight_from_rows(inner, shape, axis)
        assert back.shape == weight.shape
        assert back.is_contiguous()
        assert torch.equal(back, weight)


@pytest.mark.parametrize(("shape", "axis"), [case for case in CASES if len(case[0]) >= 2])
def test_a_row_is_a_channel(shape: tuple[int, ...], axis: tuple[int, ...]) -> None:
    weight = numbered(shape)
    rows = rows_from_weight(weight, axis)
    channels = itertools.product(*(range(shape[index]) for index in axis))
    for row, channel in zip(rows, channels, strict=True):
        where = tuple(channel[axis.index(index)] if index in axis else slice(None) for index in range(len(shape)))
        assert torch.equal(row.flatten(), weight[where].flatten())


@pytest.mark.parametrize("shape", [(), (7,), (0,)])
def test_vectors_and_scalars_are_one_row(shape: tuple[int, ...]) -> None:
    assert rows_from_weight(numbered(shape), (0,)).shape == (1, math.prod(shape))


@pytest.mark.parametrize(("shape", "axis"), [((4, 6), (0,)), ((3, 4, 5), (0,)), ((3, 4, 5), (0, 1)), ((7,), (0,))])
def test_leading_axes_give_a_view(shape: tuple[int, ...], axis: tuple[int, ...]) -> None:
    weight = numbered(shape)
    assert rows_from_weight(weight, axis).data_ptr() == weight.data_ptr()


def test_a_weight_that_is_not_contiguous() -> None:
    weight = numbered((6, 4)).T
    rows = rows_from_weight(weight, (0,))
    assert torch.equal(rows, weight)
    assert torch.equal(weight_from_rows(rows, (4, 6), (0,)), weight)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_any_axes_round_trip(shape: list[int], data: st.DataObject) -> None:
    axis = tuple(data.draw(st.permutations(range(len(shape))))[: data.draw(st.integers(1, len(shape)))])
    weight = numbered(tuple(shape))
    rows = rows_from_weight(weight, axis)
    assert rows.shape[0] == math.prod(shape[index] for index in axis)
    assert torch.equal(weight_from_rows(rows, tuple(shape), axis), weight)


@pytest.mark.parametrize(
    ("granularity", "group_size", "expected"),
    [("tensor", None, (1, 1)), ("channel", None, (4, 1)), ("group", 5, (4, 6)), ("group", 30, (4, 1))],
)
def test_blocks_are_the_stretches_that_share_a_grid(granularity, group_size: int | None, expected) -> None:
    rows = numbered((4, 3, 10))
    assert grid_shape((4, 3, 10), granularity, group_size) == expected
    blocks = blocks_from_rows(rows, granularity, group_size)
    assert blocks.shape == (math.prod(expected), 120 // math.prod(expected))
    # The blocks follow one another in the rows' own order, so each is a stretch of one row, or of all.
    assert torch.equal(blocks.flatten(), rows.flatten())
    if granularity != "tensor":
        row_of_block = blocks[:, 0].long() // 30
        assert torch.equal(row_of_block, torch.arange(4).repeat_interleave(expected[1]))
        assert torch.equal(blocks[:, -1].long() // 30, row_of_block)


@pytest.mark.parametrize(("columns", "group_size"), [(30, 30), (30, 31), (30, 4), (31, 5), (1, 4), (0, 4)])
def test_the_last_group_of_a_row_is_shorter(columns: int, group_size: int) -> None:
    parts = column_parts(columns, "group", group_size)
    rows = numbered((4, columns))
    blocks = [blocks_from_rows(rows[:, part], "group", group_size) for part in parts]
    assert sum(len(one) for one in blocks) == math.prod(grid_shape((4, columns), "group", group_size))
    found = [block[block >= 0] for row in range(4) for one in blocks for block in one.reshape(4, -1)[row : row + 1]]
    assert torch.equal(torch.cat(found), rows.flatten())
    assert all(one.shape[1] == group_size for one in blocks[:-1])
    assert column_parts(columns, "channel", None) == column_parts(columns, "tensor", None) == [slice(0, columns)]


@pytest.mark.parametrize("shape", [(0, 8), (5, 0)])
@pytest.mark.parametrize(("granularity", "group_size"), [("tensor", None), ("channel", None), ("group", 4)])
def test_blocks_of_nothing(shape: tuple[int, int], granularity, group_size: int | None) -> None:
    blocks = blocks_from_rows(numbered(shape), granularity, group_size)
    assert blocks.numel() == 0
    assert blocks.shape[0] == math.prod(grid_shape(shape, granularity, group_size))
