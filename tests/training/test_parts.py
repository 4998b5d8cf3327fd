"""Augmentation, learning rates, optimizer groups, losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcompress.errors import DataError, ModelError
from qcompress.model.batches import Batch
from qcompress.settings import (
    AdamW,
    CausalLm,
    Classification,
    Constant,
    Cosine,
    FactoryTask,
    Reconstruction,
    Sgd,
    Step,
    Translation,
)
from qcompress.training.augment import augment
from qcompress.training.losses import make_loss
from qcompress.training.optimizers import make_optimizer, rate_at, refuse_decay
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


@given(st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1))
def test_rates_stay_between_nothing_and_the_highest(warm_up: float, final: float, share: float) -> None:
    for schedule in (Constant(), Cosine(final=final), Step(at=(0.3, 0.6), factor=0.5)):
        assert 0 <= rate_at(schedule, warm_up, share) <= 1
        assert rate_at(schedule, warm_up, warm_up) == 1 or isinstance(schedule, Step)


def test_known_rates() -> None:
    assert rate_at(Constant(), 0.2, 0.1) == pytest.approx(0.5)
    assert rate_at(Cosine(), 0.0, 0.5) == pytest.approx(0.5)
    assert rate_at(Cosine(final=0.1), 0.0, 1.0) == pytest.approx(0.1)
    assert [rate_at(Step(at=(0.5, 0.75), factor=0.1), 0.0, t) for t in (0.4, 0.5, 0.8)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("settings", [Sgd(lr=0.1, weight_decay=0.01, nesterov=True), AdamW(lr=0.1, weight_decay=0.01)])
def test_only_matrices_decay(settings: Sgd | AdamW) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    term = torch.ones(1, requires_grad=True)
    optimizer = make_optimizer(settings, module, [{"params": [term], "lr": 0.5, "momentum": 0.0}])
    assert optimizer.param_groups[-1]["lr"] == 0.5
    before = {id(p): p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decayed = not torch.equal(parameter, before[id(parameter)])
            assert decayed == (parameter.ndim >= 2)


def test_what_is_learned_must_not_be_in_a_decaying_group() -> None:
    term = torch.ones(1)
    with pytest.raises(ValueError, match="decays"):
        refuse_decay([{"params": [term], "weight_decay": 0.1}], [term])
    refuse_decay([{"params": [term], "weight_decay": 0.0}], [term])


def test_losses_are_the_tasks_own() -> None:
    logits = torch.randn(5, 4, generator=drawn())
    labels = torch.tensor([0, 1, 2, 3, 0])
    found = make_loss(Classification(), 0.1)(logits, Batch(args=(logits,), labels=labels))
    smooth = 0.9 * F.one_hot(labels, 4) + 0.1 / 4
    assert float(found) == pytest.approx(float(-(smooth * logits.log_softmax(1)).sum(1).mean()))
    target = torch.randn(5, 4, generator=drawn(1))
    found = make_loss(Reconstruction())(logits, Batch(args=(logits,), labels=target))
    assert float(found) == pytest.approx(float((logits - target).square().mean()))


def test_padding_does_not_count_in_the_loss_of_tokens() -> None:
    logits = torch.randn(2, 5, 7, generator=drawn())
    tokens = torch.tensor([[1, 2, 3, 4, 5], [1, 6, 0, 0, 0]])
    batch = Batch(args=(tokens,), lengths=torch.tensor([5, 2]))
    found = float(make_loss(CausalLm())(logits, batch))
    log = logits.log_softmax(2)
    wanted = [log[0, t, tokens[0, t + 1]] for t in range(4)] + [log[1, 0, 6]]
    assert found == pytest.approx(float(-torch.stack(wanted).mean()))
    masked = Batch(
        kwargs={"input_ids": tokens, "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])},
    )
    assert float(make_loss(CausalLm())(logits, masked)) == pytest.approx(found)
    labels = torch.tensor([[2, 3, -100, -100, -100], [-100] * 5])
    found = float(make_loss(Translation())(logits, Batch(args=(tokens,), labels=labels)))
    assert found == pytest.approx(float(-(log[0, 0, 2] + log[0, 1, 3]) / 2))
    nothing = make_loss(Translation())(logits, Batch(args=(tokens,), labels=torch.full((2, 5), -100)))
    assert float(nothing) == 0 and math.isfinite(float(nothing))


@pytest.mark.parametrize(
    ("labels", "words"), [(None, "no labels"), (torch.tensor([0, 9]), "outside"), (torch.zeros(3).long(), "one label")]
)
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_loss(Classification())(torch.zeros(2, 4), Batch(args=(torch.zeros(2, 1),), labels=labels))


def test_a_task_from_code_needs_a_loss_from_code() -> None:
    with pytest.raises(ModelError, match="loss"):
        make_loss(FactoryTask(factory="x.py:f"))
    assert make_loss(FactoryTask(factory="x.py:f"), name="torch.nn.functional:mse_loss") is F.mse_loss
