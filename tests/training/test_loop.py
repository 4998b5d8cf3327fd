"""The training loop: what it computes, what it keeps, and that breaking it off changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.checkpoint import read_tensors, write_checkpoint
from qcompress.errors import DataError, TrainingError
from qcompress.model.batches import Batch, Batches
from qcompress.model.tasks import Measurement, measure
from qcompress.registry.regularizers import DsmmConfig, L2Config, MinSquaredConfig
from qcompress.settings import AdamW, Classification, Cosine, Sgd, Training, TrainingOptions
from qcompress.training.attach import attach_penalties
from qcompress.training.loop import Data, Trained, Watch, train
from qcompress.training.losses import make_loss
from qcompress.training.penalties import Penalties
from qcompress.types import Rule


def points(count: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    y = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    return x, y


def batches(size: int = 16, count: int = 96) -> Batches:
    x, y = points(count)

    def read(indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(list(indices))
        return Batch(args=(x[chosen],), labels=y[chosen])

    return Batches(count, size, read)


def net(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8, 4),
    )


def rules() -> list[Rule]:
    return [
        Rule("0.weight", "dsmm", DsmmConfig(preset="paper-dsmm"), "a"),
        Rule("6.weight", "min-squared", MinSquaredConfig(levels=4, start=0.3, ramp=0.2), "b"),
    ]


def settings(**options: Any) -> Training:
    optimizer = options.pop("optimizer", Sgd(lr=0.05, momentum=0.9, weight_decay=1e-3))
    return Training(options=TrainingOptions(epochs=3, **options), optimizer=optimizer, schedule=Cosine())


def learn(module: nn.Module, training: Training, watch: Watch | None = None, **more: Any) -> Trained:
    penalties = more.pop("penalties", None)
    penalties = attach_penalties(module, rules()) if penalties is None else penalties
    data = more.pop("data", Data(batches(), ("flip", "crop4")))
    return train(module, data, make_loss(Classification()), training, penalties, watch or Watch(), seed=5, **more)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_loop_without_frills_is_the_textbook_one() -> None:
    module, other = net(), net()
    data = batches()
    trained = learn(module, settings(), penalties=Penalties([]), data=Data(data))
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in other.parameters() if p.ndim >= 2], "weight_decay": 1e-3},
            {"params": [p for p in other.parameters() if p.ndim < 2]},
        ],
        lr=0.05,
        momentum=0.9,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
    from qcompress.model.live import seeded_generator

    other.train()
    for epoch in range(3):
        for batch in data.shuffled(seeded_generator(5, f"order of epoch {epoch}", "cpu")):
            optimizer.zero_grad()
            F.cross_entropy(other(*batch.args), batch.labels).backward()
            optimizer.step()
            schedule.step()
    for name, value in weights(module).items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert trained.steps == 18 and not module.training


def test_equal_seeds_give_equal_weights() -> None:
    one, other = net(dropout=0.3), net(dropout=0.3)
    for module in (one, other):
        torch.manual_seed(0)
        learn(module, settings())
    assert_same(weights(one), weights(other))


class Broken(Exception):
    pass


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.05), AdamW(lr=0.01, weight_decay=0.1)])
@pytest.mark.parametrize("stop", [1, 6, 7, 17])
def test_going_on_after_a_break_gives_the_same_bits(tmp_path: Path, optimizer: Any, stop: int) -> None:
    training = settings(save_steps=1, log_steps=1, optimizer=optimizer)

    def watch(name: str, resume: bool = False) -> Watch:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return Watch(log=folder / "log.jsonl", state=folder / "state.safetensors", resume=resume, identity="x")

    def start() -> tuple[nn.Module, Penalties]:
        module = net(dropout=0.3)
        torch.manual_seed(0)
        return module, attach_penalties(module, rules())

    whole, penalties = start()
    wanted = learn(whole, training, watch("whole"), penalties=penalties)
    broken, lost = start()
    steps = iter(range(1, 100))

    def after_step(_: float) -> None:
        if next(steps) > stop:
            raise Broken

    with pytest.raises(Broken):
        learn(broken, training, watch("broken"), penalties=lost, after_step=after_step)
    resumed, again = start()
    torch.manual_seed(999)
    found = learn(resumed, training, watch("broken", resume=True), penalties=again)
    assert_same(weights(resumed), weights(whole))
    assert_same(again.saved(), penalties.saved())
    assert found.loss == wanted.loss
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_saved_states_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    module = net()
    learn(module, settings(), Watch(state=state, identity="x"))
    tensors, metadata = read_tensors(state)
    assert "qcompress-training" in metadata
    with pytest.raises(TrainingError, match="another recipe"):
        learn(net(), settings(), Watch(state=state, identity="y", resume=True))
    write_checkpoint({"a": torch.zeros(2)}, state)
    with pytest.raises(TrainingError, match="no saved state"):
        learn(net(), settings(), Watch(state=state, identity="x", resume=True))
    write_checkpoint({name: value for name, value in tensors.items() if "0.weight" not in name}, state, metadata)
    with pytest.raises(TrainingError, match="no saved state"):
        learn(net(), settings(), Watch(state=state, identity="x", resume=True))
    state.write_bytes(b"not safetensors")
    with pytest.raises(TrainingError, match="no saved state"):
        learn(net(), settings(), Watch(state=state, identity="x", resume=True))


def test_accumulated_batches_are_one_large_batch() -> None:
    """Without batch norm, whose statistics are of the single batches."""

    def plain() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    large, small = plain(), plain()
    rule = [Rule("0.weight", "dsmm", DsmmConfig(preset="paper-dsmm", strength=1.0), "a")]
    for module, size, accumulate in ((large, 32, 1), (small, 16, 2)):
        penalties = attach_penalties(module, rule)
        learn(module, settings(accumulate=accumulate), penalties=penalties, data=Data(batches(size)))
    for name, value in weights(large).items():
        torch.testing.assert_close(value, small.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_the_best_epoch_is_kept_where_asked() -> None:
    kept: list[dict[str, Tensor]] = []
    scores = iter([0.4, 0.9, 0.6])

    def measured(module: nn.Module) -> list[Measurement]:
        kept.append(weights(module))
        found = measure(Classification(), module, batches(), torch.device("cpu"))[0]
        return [Measurement("top1", next(scores), found.samples, 0, 1, True, found.per_sample, found.weights)]

    module = net()
    trained = learn(module, settings(keep="best"), Watch(measure=measured))
    assert trained.kept == 2 and [one["top1"] for one in trained.metrics] == [0.4, 0.9, 0.6]
    assert_same(weights(module), kept[1])
    scores = iter([0.4, 0.9, 0.6])
    last = net()
    assert learn(last, settings(), Watch(measure=measured)).kept == 3
    assert_same(weights(last), kept[-1])


def test_a_loss_that_is_not_finite_stops_and_names_the_step() -> None:
    x, y = points()
    x[:] = float("inf")

    def read(indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(list(indices))
        return Batch(args=(x[chosen],), labels=y[chosen])

    with pytest.raises(TrainingError, match="step 1 of 18"):
        learn(net(), settings(), data=Data(Batches(96, 16, read)))


def test_fewer_samples_than_a_step_are_refused() -> None:
    with pytest.raises(DataError, match="96 samples, fewer than the 128"):
        learn(net(), settings(), data=Data(batches(128)))
    with pytest.raises(DataError, match="fewer than the 192"):
        learn(net(), settings(accumulate=4), data=Data(batches(48)))


def test_frozen_batch_norms_keep_what_they_have_seen() -> None:
    module = net()
    before = module[1].running_mean.clone()  # type: ignore[index]
    learn(module, settings(batch_norm="frozen"))
    assert torch.equal(module[1].running_mean, before)  # type: ignore[index]
    learn(module, settings())
    assert not torch.equal(module[1].running_mean, before)  # type: ignore[index]


def test_half_precision_and_clipping_train_too() -> None:
    x, y = points()
    for options in ({"precision": "bfloat16"}, {"clip_norm": 0.1}):
        module = net()
        before = F.cross_entropy(module(x), y).detach()
        learn(module, settings(**options))
        assert module[0].weight.dtype == torch.float32  # type: ignore[index]
        assert float(F.cross_entropy(module(x), y).detach()) < float(before)


def test_strong_decay_by_a_regularizer_shrinks_only_its_weights() -> None:
    module = net()
    norm = float(module[6].weight.detach().norm())  # type: ignore[index]
    penalties = attach_penalties(module, [Rule("6.weight", "l2", L2Config(strength=5.0), "a")])
    learn(module, settings(), penalties=penalties)
    assert float(module[6].weight.detach().norm()) < 0.4 * norm  # type: ignore[index]


def test_the_log_has_a_line_a_few_steps_and_one_an_epoch(tmp_path: Path) -> None:
    said: list[str] = []
    log = tmp_path / "log.jsonl"
    learn(net(), settings(log_steps=5), Watch(log=log, say=said.append))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "epoch" not in line] == [5, 10, 15]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3]
    assert all({"loss", "penalty", "lr"} <= line.keys() for line in lines if "epoch" not in line)
    assert any("s left" in line for line in said) and any("epoch 3 of 3" in line for line in said)
