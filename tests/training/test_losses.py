"""Losses of the tasks, and the distance to a teacher."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.data.batches import Batch
from qcompress.errors import DataError, ModelError
from qcompress.training.losses import distilled, make_loss
from qcompress.types.settings import TASKS, CausalLm, Classification, Distil, FactoryTask, Reconstruction, Translation


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    named = "torch.nn.functional:mse_loss"
    assert make_loss(FactoryTask(factory="x.py:f"), name=named, allow_code=True) is F.mse_loss


def labelled(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch((torch.randn(count, 3, generator=generator),), labels=torch.arange(count) % 4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_cross_entropy_with_soft_labels(temperature: float) -> None:
    """Up to the teacher's own entropy, which no gradient sees."""
    torch.manual_seed(0)
    teacher, batch = nn.Linear(3, 4), labelled()
    output = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    plain = make_loss(Classification())
    loss = distilled(plain, Classification(), teacher, Distil(share=0.25, temperature=temperature))(output, batch)
    soft = (teacher(batch.args[0]).double() / temperature).softmax(1).detach()
    ours = (output / temperature).log_softmax(1)
    distance = temperature**2 * (soft * (soft.log() - ours)).sum(1).mean()
    torch.testing.assert_close(
        loss.double(), 0.75 * plain(output, batch).double() + 0.25 * distance, rtol=1e-5, atol=1e-6
    )
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_labels_may_be_class_probabilities(share: float) -> None:
    """The loss is that of each label, by its share; classes that the batch does not show have none."""
    torch.manual_seed(0)
    output, batch, teacher = torch.randn(6, 5), labelled(), nn.Linear(3, 5)
    loss = distilled(make_loss(Classification(), 0.1), Classification(), teacher, Distil(share=share))
    assert batch.labels is not None
    other = batch.labels.roll(1)
    mixed = 0.7 * F.one_hot(batch.labels, 4) + 0.3 * F.one_hot(other, 4)
    found = loss(output, replace(batch, labels=mixed))
    torch.testing.assert_close(found, 0.7 * loss(output, batch) + 0.3 * loss(output, replace(batch, labels=other)))
    with pytest.raises(DataError, match="label 3 is outside the model's 3 classes"):
        make_loss(Classification())(output[:, :3], replace(batch, labels=mixed))
    with pytest.raises(DataError, match="one label a sample"):
        make_loss(Classification())(output, replace(batch, labels=mixed[:4]))


def test_a_network_is_at_no_distance_from_itself() -> None:
    batch, teacher = labelled(), nn.Linear(3, 4)
    for task in (Classification(), Reconstruction()):
        loss = distilled(lambda output, _: output.sum() * 0, task, teacher, Distil(share=1.0))
        assert float(loss(teacher(batch.args[0]), batch).detach()) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ModelError, match="take distil out"):
        distilled(make_loss(Classification()), FactoryTask(factory="a:b"), teacher, Distil())


def test_padding_is_not_learned_from() -> None:
    """What the teacher says of positions that do not count changes nothing."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (2, 5))
    said = torch.randn(2, 5, 7)
    output, batch = torch.randn(2, 5, 7), Batch((tokens,), lengths=torch.tensor([5, 3]))

    class Says(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return said

    loss = distilled(lambda output, _: output.sum() * 0, CausalLm(), Says(), Distil(share=1.0))
    before = float(loss(output, batch))
    said[1, 2:] += 3.0
    said[:, -1] -= 5.0
    assert float(loss(output, batch)) == before
    said[1, 1] += torch.arange(7)
    assert float(loss(output, batch)) != before


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
FITTING: dict[str, tuple[Tensor, Batch]] = {
    "classification": (torch.zeros(2, 4), Batch((torch.zeros(2, 1),), labels=torch.tensor([0, 3]))),
    "sequence-classification": (torch.zeros(2, 4), Batch((torch.zeros(2, 1),), labels=torch.tensor([0, 3]))),
    "causal-lm": (torch.zeros(2, 4, 7), Batch((TOKENS,), lengths=torch.tensor([4, 2]))),
    "translation": (torch.zeros(2, 4, 7), Batch((TOKENS,), labels=TOKENS)),
    "reconstruction": (torch.zeros(2, 4), Batch((torch.zeros(2, 1),), labels=torch.ones(2, 4))),
}
"""Task -> an output that fits a batch; a task that has no loss of its own has none."""


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_loss_that_a_gradient_step_lowers_or_asks_for_one(name: str) -> None:
    kind = TASKS[name]
    if name not in FITTING:
        with pytest.raises(ModelError, match="no loss of its own"):
            make_loss(kind(factory="x.py:f") if name == "factory" else kind())
        return
    output, batch = FITTING[name]
    for smoothing in (0.0, 0.1):
        loss_of = make_loss(kind(), smoothing)
        output = output.detach().clone().requires_grad_(True)
        loss = loss_of(output, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.shape == () and bool(loss.isfinite()) and output.grad is not None and bool(output.grad.any())
        moved = (output - 0.1 * output.grad).detach()
        assert float(loss_of(moved, batch)) < float(loss.detach())
        assert torch.equal(loss_of(moved, batch), loss_of(moved, batch))
