"""The Gram of inputs that lie on several ranks is that of one process which has them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from worlds import together

from qcompress.model import layers
from qcompress.model.joint import joint_gram
from qcompress.model.layers import InnerProduct, MatrixLayer, matrix_layer, measure_gram, measure_inner_gram
from qcompress.types.ranks import World
from qcompress.types.run import Gram

LAYERS = {
    "linear": (nn.Linear(6, 4), (9, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 3, 3)),
}


def layer_of(name: str) -> MatrixLayer:
    found = matrix_layer(LAYERS[name][0])
    assert found is not None
    return found


def batches(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """The last batch is smaller, as that of data is."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(1 if place == count - 1 else 3, *shape, generator=generator) for place in range(count)]


def assert_alike(one: Gram, other: Gram) -> None:
    assert one.count == other.count
    for part in ("hessian", "mean", "clean_mean"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=1e-12, atol=1e-12)
    assert (one.cross is None) == (other.cross is None)
    if one.cross is not None and other.cross is not None:
        torch.testing.assert_close(one.cross, other.cross, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("few", [True, False], ids=["drawn places", "all places"])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_add_up_what_one_process_adds_up(
    name: str, few: bool, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where places are drawn, they are the same ones, and whatever is drawn afterwards too."""
    if few:
        monkeypatch.setattr(layers, "GRAM_ROWS", 1 << 5)
        monkeypatch.setattr(layers, "GRAM_ROWS_A_COLUMN", 1)
    layer, noisy = layer_of(name), batches(LAYERS[name][1], 5)
    clean = [x + 0.1 * x.square() for x in noisy] if paired else None
    generator = torch.Generator().manual_seed(1)
    alone = measure_gram(layer, noisy, clean, generator)
    after = torch.rand(3, generator=generator)

    def run(world: World) -> tuple[Gram | None, Tensor]:
        own = torch.Generator().manual_seed(1)
        part = slice(world.rank, None, world.size)
        found = joint_gram(layer, noisy[part], None if clean is None else clean[part], own, world)
        return found, torch.rand(3, generator=own)

    for found, drawn in together(3, run):
        assert found is not None
        assert_alike(found, alone)
        assert torch.equal(drawn, after)


def test_a_rank_without_inputs_gets_the_gram_of_the_others() -> None:
    layer, noisy = layer_of("linear"), batches((9, 6), 1)
    alone = measure_gram(layer, noisy, None, torch.Generator())
    for found in together(2, lambda w: joint_gram(layer, noisy[w.rank :], None, torch.Generator(), w)):
        assert found is not None
        assert_alike(found, alone)
    assert together(2, lambda w: joint_gram(layer, [], None, torch.Generator(), w)) == [None, None]


def test_parts_of_an_inner_product_are_added_up_one_by_one() -> None:
    """Some rows are reached on one rank only, and some on none."""
    first, second = torch.randn(7, 3), torch.randn(5, 3)
    parts = [{(0, 2): first, (2, 4): second}, {(0, 2): second}]
    alone, missed = measure_inner_gram(InnerProduct(8), 3, parts, None, torch.Generator())

    def run(world: World) -> tuple[Gram, int]:
        return measure_inner_gram(
            InnerProduct(8),
            3,
            parts[world.rank : world.rank + 1],
            None,
            torch.Generator(),
            world,
            lambda *given: joint_gram(*given, world),
        )

    for found, unreached in together(2, run):
        assert unreached == missed == 4
        assert_alike(found, alone)
