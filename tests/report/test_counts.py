"""What a report says of codes and codebooks, against counting one code at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from qcompress.report import counts
from qcompress.report.counts import codebook_figures, measure_counts, stored_codebook_figures


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([1, 3, 2**20]))
def test_dead_and_duplicate_entries(tables: int, entries: int, dim: int, seed: int, piece: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, entries, (tables * 2, 3)).astype(np.uint8)
    values = random.integers(0, 3, (tables, entries, dim)).astype(np.float32)
    dead = duplicates = 0
    for table in range(tables):
        named = set(codes[2 * table : 2 * table + 2].flatten().tolist())
        dead += sum(entry not in named for entry in range(entries))
        kinds = [tuple(entry) for entry in values[table].tolist()]
        duplicates += sum(kind in kinds[:index] for index, kind in enumerate(kinds))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "PIECE", piece)
        found = codebook_figures(codes, values)
    assert (found["entries"], found["dead"], found["duplicates"]) == (entries, dead, duplicates)
    if dim == 1:
        assert found["levels"] == pytest.approx(np.sort(values[:, :, 0], axis=1).mean(0).tolist())
    else:
        assert "levels" not in found
    if tables == 1:
        stored = stored_codebook_figures(values, len(np.unique(codes)))
        assert (stored["dead"], stored["duplicates"]) == (dead, duplicates)


def test_levels_end_where_a_chart_has_no_room() -> None:
    codes = np.zeros((1, 4), np.uint8)
    assert len(codebook_figures(codes, np.arange(64, dtype=np.float32).reshape(1, 64, 1))["levels"]) == 64
    assert "levels" not in codebook_figures(codes, np.arange(65, dtype=np.float32).reshape(1, 65, 1))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=16).filter(any))
@example([5, 0])
@example([1, 1, 1, 1])
def test_entropy_and_levels_of_any_counts(found: list[int]) -> None:
    figures = measure_counts(np.array(found))
    assert figures.levels_used == sum(1 for count in found if count)
    assert figures.entropy == pytest.approx(stats.entropy(found, base=2), abs=1e-9)
    assert math.copysign(1, figures.entropy or 0.0) == 1
