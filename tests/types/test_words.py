"""Sizes, hints, and how a user's words are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompress.types.words import MOST_LISTED, nearest, parse_size, plain, quoted, suggest


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1", 1),
        ("2000000", 2_000_000),
        ("17B", 17),
        ("2MB", 2_000_000),
        ("1.2MB", 1_200_000),
        (" 1.2 mb ", 1_200_000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1.5MiB", 1_572_864),
        ("4GB", 4 * 10**9),
        ("4GiB", 4 * 2**30),
        ("1TB", 10**12),
        ("0.3KB", 300),
        ("1.0009KB", 1000),
        ("4.35MB", 4_350_000),
    ],
)
def test_size(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "MB", "2M", "2K", "-1MB", "1e6", "1,000", "1_000", ".5MB", "1.MB", "2 MBs", "٣MB", "2MB\n", "iB", "2iB"],
)
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB$"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0.0MB", "0.9", "0.0001KB"])
def test_less_than_a_byte(text: str) -> None:
    with pytest.raises(ValueError, match="is less than one byte"):
        parse_size(text)


@given(st.integers(1, 10**14), st.sampled_from(["KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    base = 1024 if "i" in unit else 1000
    assert parse_size(f"{number}{unit}") == number * base ** ("KMGT".index(unit[0]) + 1)


def test_nearest() -> None:
    assert nearest("bit", ["bits", "axis"]) == "bits"
    assert nearest("GroupSize", ["granularity", "group_size"]) == "group_size"
    assert nearest("group-size", ["group_size"]) == "group_size"
    assert nearest("model.layer.0.weight", ["model.layers.0.weight", "model.layers.0.bias"]) == "model.layers.0.weight"
    assert nearest("zzz", ["bits"]) is None
    assert nearest("bits", []) is None
    assert nearest("b" * 10**6, ["bits"]) is None


@given(st.sampled_from(["a", "Axis", "group_size"]))
def test_a_word_is_nearest_to_itself(word: str) -> None:
    assert nearest(word, ["b", "a", "Axis", "group_size"]) == word


def test_suggest() -> None:
    assert suggest("bit", ["bits"]) == "did you mean `bits`?"
    assert suggest("zzz", ["b", "a"]) == "valid here: `b`, `a`"
    assert suggest("zzz", [f"k{i}" for i in range(MOST_LISTED + 3)]).endswith("and 3 more")


@given(st.text(st.characters(), max_size=200))
def test_words_are_shown_on_one_printable_line(word: str) -> None:
    assert plain(word).isprintable()
    assert len(plain(word[:60])) >= len(word[:60])
    if word.isprintable() and len(word) <= 60:
        assert quoted(word) == f"`{word}`"
