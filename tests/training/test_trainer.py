"""The Trainer that a method is given: it trains as the recipe says, and shows the first batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model.networks import Residual

from qcompress.errors import DataError
from qcompress.training.trainer import INIT_SAMPLES
from qcompress.types.data_settings import Crop4, Flip

from .small import assert_same, make_trainer, weights

CPU = torch.device("cpu")


def test_the_first_batches_are_drawn_by_the_seed_and_not_augmented() -> None:
    trainer = make_trainer(Residual)
    found = trainer.first_batches(CPU)
    augmented = replace(trainer, data=replace(trainer.data, augment=(Flip(), Crop4()))).first_batches(CPU)
    (whole,) = replace(trainer.data.batches, batch_size=48)
    for batch, again in zip(found, augmented, strict=True):
        assert torch.equal(batch.args[0], again.args[0])
        assert all(bool((whole.args[0] == row).flatten(1).all(1).any()) for row in batch.args[0])
    others = replace(trainer, seed=1).first_batches(CPU)
    assert not all(torch.equal(one.args[0], two.args[0]) for one, two in zip(found, others, strict=True))


@pytest.mark.parametrize("size", [16, 48])
def test_they_are_whole_batches_and_no_more_than_are_needed(size: int) -> None:
    found = make_trainer(Residual, size=size).first_batches(CPU)
    assert all(batch.size == size for batch in found)
    assert len(found) == min(48 // size, max(1, INIT_SAMPLES // size))
    with pytest.raises(DataError, match="fewer than"):
        make_trainer(Residual, size=64).first_batches(CPU)


def test_how_training_went_is_kept_and_equal_seeds_train_alike() -> None:
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(Residual())
        trainer = make_trainer(Residual)
        assert trainer.trained is None
        assert trainer(modules[-1]) is trainer.trained and trainer.trained.steps == 3
    assert_same(weights(modules[0]), weights(modules[1]))
