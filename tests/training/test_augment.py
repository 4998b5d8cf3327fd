"""Images are changed each time they are drawn, and batch norms take their statistics anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompress.data.batches import Batch
from qcompress.errors import DataError
from qcompress.training.loop import augment, refresh_norms
from qcompress.training.parallel import World


def images(count: int = 12) -> Batch:
    return Batch(args=(torch.arange(count * 3 * 8 * 8, dtype=torch.float32).view(count, 3, 8, 8),))


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flip_gives_each_image_or_its_mirror_and_both_occur() -> None:
    batch = images(64)
    before, after = batch.args[0], augment(batch, ["flip"], drawn()).args[0]
    same = (after == before).flatten(1).all(1)
    mirrored = (after == before.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and 10 < int(same.sum()) < 54


def test_crop_gives_windows_of_the_padded_image_and_all_places_occur() -> None:
    count = 600
    before = torch.rand(1, 1, 8, 8).expand(count, 1, 8, 8) + 1
    after = augment(Batch(args=(before,)), ["crop4"], drawn()).args[0]
    windows = F.unfold(F.pad(before[:1], (4, 4, 4, 4)), 8)[0].T
    where = (after.flatten(1).unsqueeze(1) == windows.unsqueeze(0)).all(2)
    assert bool((where.sum(1) == 1).all())
    assert len(where.nonzero()[:, 1].unique()) == 81


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_draw_together_what_one_process_draws(world: int) -> None:
    whole = augment(images(12), ["flip", "crop4"], drawn()).args[0]
    for rank in range(world):
        part = Batch(args=(images(12).args[0][rank::world],))
        found = augment(part, ["flip", "crop4"], drawn(), World(rank, world)).args[0]
        assert torch.equal(found, whole[rank::world])


def test_inputs_by_name_are_augmented_too_and_text_is_refused() -> None:
    named = Batch(kwargs={"pixels": images().args[0], "more": torch.zeros(12)})
    found = augment(named, ["flip"], drawn())
    assert torch.equal(found.kwargs["pixels"], augment(images(), ["flip"], drawn()).args[0])
    assert torch.equal(found.kwargs["more"], torch.zeros(12))
    with pytest.raises(DataError, match="augment"):
        augment(Batch(args=(torch.zeros(3, 7),)), ["flip"], drawn())


def test_batch_norms_get_the_mean_of_the_batches_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
    )
    data = [Batch((torch.randn(16, 3, 6, 6) * 2 + 1,)) for _ in range(3)]
    before = copy.deepcopy(module.state_dict())
    refresh_norms(module, data)
    outputs = torch.stack([module[0](batch.args[0]) for batch in data]).detach()
    first: Any = module[1]
    torch.testing.assert_close(first.running_mean, outputs.mean((0, 1, 3, 4)))
    torch.testing.assert_close(first.running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    after = module.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{place}.running_{what}" for place in (1, 5) for what in ("mean", "var")
    }
    assert first.momentum == 0.1 and not any(one.training for one in module.modules())
    # A second time gives the same: the statistics come from the data alone.
    refresh_norms(module, data)
    assert all(torch.equal(value, after[name]) for name, value in module.state_dict().items())
