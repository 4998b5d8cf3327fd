"""Every value lies in just one piece, pieces come in order, and none is larger than asked."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcompress.coding.rows import row_slices, tiles


@given(st.integers(0, 40), st.integers(0, 90), st.sampled_from([8, 16, 64]))
def test_tiles_cover_the_matrix_in_order(rows: int, columns: int, limit: int) -> None:
    seen = np.zeros((rows, columns), int)
    for index, (row_span, column_span) in enumerate(tiles(rows, columns, limit)):
        piece = seen[row_span, column_span]
        assert 0 < piece.size <= max(limit, 1)
        assert column_span.start % 8 == 0
        assert not piece.any()
        piece[...] = index + 1
    assert (seen > 0).all()
    first_of_tile = np.unique(seen.ravel(), return_index=True)[1]
    assert (np.diff(first_of_tile) > 0).all()


@given(st.integers(0, 40), st.integers(0, 30), st.integers(1, 64), st.sampled_from([1, 2, 4]))
def test_row_slices_cover_the_rows_in_multiples_of_the_unit(rows: int, columns: int, limit: int, unit: int) -> None:
    rows *= unit
    found = list(row_slices(rows, columns, limit, unit))
    assert [row for span in found for row in range(rows)[span]] == list(range(rows))
    for span in found:
        height = span.stop - span.start
        assert height == unit or (height % unit == 0 and height * columns <= max(limit, unit * columns))
