"""Weight sharing: what is true of codebooks and of the codes that name their entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contexts import context_at, context_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompress.coding.grids import centroid_values, decode, decode_rows, row_spans, take_rows
from qcompress.coding.rows import codebook_shape
from qcompress.methods import kmeans, learned
from qcompress.registry import KmeansConfig, LearnedConfig, refuse_cost
from qcompress.types.encoded import Codebook


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def encode(weight: Tensor, **options: Any) -> Codebook:
    return kmeans.encode(weight, KmeansConfig(**options), context_of(weight))


OPTIONS: list[dict[str, Any]] = [
    {"bits": 1},
    {"bits": 4},
    {"bits": 3, "granularity": "channel"},
    {"bits": 2, "group_size": 4},
    {"bits": 4, "dim": 2},
    {"bits": 5, "dim": 4},
    {"bits": 3, "dim": 2, "group_size": 4},
    {"bits": 10, "dim": 2},
    {"bits": 3, "codebook": "int8"},
    {"bits": 3, "codebook": "f32"},
    {"bits": 4, "dim": 4, "codebook": "int8"},
    {"bits": 4, "init": "random"},
    {"bits": 4, "init": "linear"},
    {"bits": 4, "init": "density"},
    {"bits": 4, "init": "k-means++"},
    {"bits": 4, "zero": True},
]


def nearest(weight: Tensor, encoded: Codebook) -> Tensor:
    """Each vector's nearest entry of its table, by comparison with every one."""
    values = centroid_values(encoded).double()
    tables, _, dim = values.shape
    rows = weight.flatten(1).double().reshape(tables, -1, dim, weight.flatten(1).shape[1]).movedim(2, 3)
    distance = (rows.unsqueeze(3) - values[:, None, None]).square().sum(-1)
    found = values[torch.arange(tables)[:, None, None], distance.argmin(-1)]
    return found.movedim(3, 2).reshape(len(weight), -1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_its_nearest_stored_entry(options: dict[str, Any], dtype: torch.dtype) -> None:
    weight = gaussian(8, 6, 3, dtype=dtype) * 0.1
    encoded = encode(weight, **options)
    tables, entries, dim = codebook_shape(KmeansConfig(**options), 8, 18)
    assert tuple(encoded.centroids.shape) == (tables, entries, dim)
    assert encoded.codes.shape == (8 // dim, 18)
    wanted = nearest(weight, encoded)
    error = (decode_rows(encoded).double() - weight.flatten(1).double()).square().sum()
    least = (wanted - weight.flatten(1).double()).square().sum()
    assert float(error) == pytest.approx(float(least), rel=1e-6, abs=1e-12)
    assert encoded.codes.dtype == (torch.uint8 if options["bits"] <= 8 else torch.int16)


@given(st.integers(1, 4), st.integers(0, 100))
def test_entries_are_the_means_of_their_weights(bits: int, seed: int) -> None:
    """Of the codebook as found; as stored they are within half precision of it."""
    weight = gaussian(6, 20, seed=seed)
    encoded = encode(weight, bits=bits, codebook="f32")
    values = centroid_values(encoded).flatten()
    for code in encoded.codes.unique().tolist():
        members = weight[encoded.codes == code].double()
        assert float(values[code]) == pytest.approx(float(members.mean()), abs=1e-5)


def test_more_bits_never_lose_more_and_enough_lose_nothing() -> None:
    weight = gaussian(8, 40, dtype=torch.bfloat16)
    errors = [float((decode_rows(encode(weight, bits=bits)) - weight.float()).square().sum()) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    few = torch.tensor([0.5, -0.25, 1.0, 2.0])[torch.arange(64).remainder(4)].view(8, 8)
    assert torch.equal(decode_rows(encode(few, bits=2)), few)
    assert torch.equal(decode_rows(encode(few, bits=3)), few)


def test_an_exact_zero() -> None:
    encoded = encode(gaussian(8, 20) + 0.3, bits=3, zero=True)
    assert 0.0 in centroid_values(encoded).flatten().tolist()


@pytest.mark.parametrize("value", [0.0, -1.5])
def test_constant_weights(value: float) -> None:
    weight = torch.full((4, 8), value)
    for options in ({"bits": 4}, {"bits": 2, "dim": 2}, {"bits": 1, "granularity": "channel"}):
        assert torch.equal(decode_rows(encode(weight, **options)), weight)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pieces_of_rows_are_rows_of_the_whole(options: dict[str, Any]) -> None:
    encoded = encode(gaussian(8, 6, 3), **options)
    whole = decode_rows(encoded)
    for values in (1, 20, 50, 10**6):
        spans = list(row_spans(encoded, values))
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == 8
        parts = [decode_rows(take_rows(encoded, start, stop)) for start, stop in spans]
        assert torch.equal(torch.cat(parts), whole)


def test_random_starts_follow_their_generator() -> None:
    weight = gaussian(8, 60)
    config = KmeansConfig(bits=4, init="random", codebook="f32")
    found = [centroid_values(kmeans.encode(weight, config, context_at(0, seed))) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_learned_entries_are_assigned_then_recentred() -> None:
    weight = gaussian(5, 30)
    representatives = torch.tensor([0.9, -1.1, 0.05])
    cells = (weight.unsqueeze(2) - representatives.sort().values).abs().argmin(2)
    config = LearnedConfig(bits=2, codebook="f32")
    context = context_at(0, representatives=representatives)
    encoded = learned.encode(weight, config, context)
    assert torch.equal(encoded.codes.long(), cells)
    means = torch.stack([weight[cells == code].mean() for code in range(3)])
    torch.testing.assert_close(centroid_values(encoded).flatten()[:3], means)
    kept = learned.encode(weight, LearnedConfig(bits=2, recentre=False, codebook="f32"), context)
    torch.testing.assert_close(centroid_values(kept).flatten()[:3], representatives.sort().values)
    torch.testing.assert_close(decode(kept), representatives.sort().values[cells])


REFUSED = [
    ({"bits": 4, "dim": 4}, (10, 64), "dim 4 does not divide its 10 channels"),
    ({"bits": 4, "group_size": 3}, (10, 64), "group_size 3 does not divide its 10 channels"),
    ({"bits": 4, "dim": 4, "group_size": 2}, (8, 64), "dim 4 does not divide the 2 channels of a codebook"),
]


@pytest.mark.parametrize(("options", "shape", "words"), REFUSED)
def test_codebooks_that_cannot_be_are_refused(options: dict[str, Any], shape: tuple[int, ...], words: str) -> None:
    assert words in str(KmeansConfig(**options).refuse(shape))


COSTS = [
    # 2 x 150 bytes of codes, 200 vectors of 8 in float32.
    ({"bits": 12, "dim": 8, "codebook": "f32"}, [(16, 100)], 300 + 6400),
    # 8 x 64 bytes of codes, 256 entries of float16.
    ({"bits": 8}, [(8, 64)], 512 + 512),
    # 8 channels of 64 entries in 8 bits and a code of 6 for each.
    ({"bits": 6, "granularity": "channel", "codebook": "int8"}, [(8, 64)], 8 * 48 + 8 * 64),
    ({"bits": 2, "group_size": 4}, [(8, 64)], 8 * 16 + 2 * 4 * 2),
    # Together they have one codebook: 2 x 8 x 64 codes, 256 entries once.
    ({"bits": 8, "share": "model"}, [(8, 64), (8, 64)], 1024 + 512),
]


@pytest.mark.parametrize(("options", "shapes", "needed"), COSTS)
def test_codebooks_that_cannot_pay_are_refused_at_just_their_price(
    options: dict[str, Any], shapes: list[tuple[int, ...]], needed: int
) -> None:
    config = KmeansConfig(**options)
    assert refuse_cost(config, shapes, needed + 1) is None
    assert f"are no less than the {needed} of now" in str(refuse_cost(config, shapes, needed))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4, "granularity": "group"}, "needs group_size"),
        ({"bits": 4, "granularity": "channel", "dim": 2}, "spans channels"),
        ({"bits": 4, "dim": 2, "zero": True}, "for scalars"),
        ({"bits": 4, "dim": 2, "init": "linear"}, "for scalars"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KmeansConfig(**options)
