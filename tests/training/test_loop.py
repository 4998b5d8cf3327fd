"""The training loop: what it computes, what it keeps, and that breaking it off changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.data.batches import Batch, Batches
from qcompress.data.measurement import Measurement
from qcompress.data.tasks import measure
from qcompress.errors import DataError, ModelError, TrainingError
from qcompress.registry.regularizers import DsmmConfig, L2Config
from qcompress.training.loop import Data, Watch, norm_batches, refresh_norms
from qcompress.training.optimizers import rate_at
from qcompress.training.penalties import Penalties, attach_penalties
from qcompress.types.data_settings import Crop4, Flip
from qcompress.types.plan import Rule
from qcompress.types.settings import AdamW, Classification, Cosine, Sgd, Training

from .small import assert_same, batches, net, points, rules, run, settings, weights


def test_a_loop_without_frills_is_the_textbook_one() -> None:
    module, other = net(), net()
    data = batches()
    trained = run(module, settings(), penalties=Penalties([]), data=Data(data))
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in other.parameters() if p.ndim >= 2], "weight_decay": 1e-3},
            {"params": [p for p in other.parameters() if p.ndim < 2]},
        ],
        lr=0.05,
        momentum=0.9,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
    from qcompress.types.run import seeded_generator

    other.train()
    for epoch in range(3):
        for samples in data.shuffled(seeded_generator(5, f"order of epoch {epoch}", "cpu")):
            batch = data.read(samples)
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
        run(module, settings())
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
    wanted = run(whole, training, watch("whole"), penalties=penalties)
    broken, lost = start()
    steps = iter(range(1, 100))

    def after_step(_: float) -> None:
        if next(steps) > stop:
            raise Broken

    with pytest.raises(Broken):
        run(broken, training, watch("broken"), penalties=lost, after_step=after_step)
    resumed, again = start()
    torch.manual_seed(999)
    found = run(resumed, training, watch("broken", resume=True), penalties=again)
    assert_same(weights(resumed), weights(whole))
    assert_same(again.saved(), penalties.saved())
    assert found.loss == wanted.loss
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_accumulated_batches_are_one_large_batch() -> None:
    """Without batch norm, whose statistics are of the single batches."""

    def plain() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    large, small = plain(), plain()
    rule = [Rule("0.weight", "dsmm", DsmmConfig(preset="paper-dsmm", strength=1.0), "a")]
    for module, size, accumulate in ((large, 32, 1), (small, 16, 2)):
        penalties = attach_penalties(module, rule)
        run(module, settings(accumulate=accumulate), penalties=penalties, data=Data(batches(size)))
    for name, value in weights(large).items():
        torch.testing.assert_close(value, small.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"norm_batches": 2, "accumulate": 2}])
def test_channels_last_gives_the_same_but_for_rounding_and_weights_as_they_lay(options: dict[str, Any]) -> None:
    seen: list[bool] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    plain, module = net(), net()
    run(plain, settings(**options))
    handle = module.register_forward_pre_hook(watch)
    run(module, settings(memory_format="channels_last", **options))
    handle.remove()
    assert seen and all(seen)
    for name, value in weights(module).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert all(one.is_contiguous() for one in module.state_dict().values())
    assert all(one.grad is not None and one.grad.is_contiguous() for one in module.parameters())


def test_channels_last_is_refused_where_the_network_cannot_take_it() -> None:
    class Viewed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1)

    module = nn.Sequential(nn.Conv2d(3, 4, 3), Viewed(), nn.Linear(144, 4))
    with pytest.raises(ModelError, match=r"does not run channels last: .*; leave memory_format out"):
        run(module, settings(memory_format="channels_last"), penalties=Penalties([]))
    run(module, settings(), penalties=Penalties([]))


def test_the_best_epoch_is_kept_where_asked() -> None:
    kept: list[dict[str, Tensor]] = []
    scores = iter([0.4, 0.9, 0.6])

    def measured(module: nn.Module) -> list[Measurement]:
        kept.append(weights(module))
        found = measure(Classification(), module, batches(), torch.device("cpu"))[0]
        return [Measurement("top1", next(scores), found.samples, 0, 1, True, found.per_sample, found.weights)]

    module = net()
    trained = run(module, settings(keep="best"), Watch(measure=measured))
    assert trained.kept == 2 and [one["top1"] for one in trained.metrics] == [0.4, 0.9, 0.6]
    assert_same(weights(module), kept[1])
    scores = iter([0.4, 0.9, 0.6])
    last = net()
    assert run(last, settings(), Watch(measure=measured)).kept == 3
    assert_same(weights(last), kept[-1])


def test_a_loss_that_is_not_finite_stops_and_names_the_step() -> None:
    x, y = points()
    x[:] = float("inf")

    def read(indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(list(indices))
        return Batch(args=(x[chosen],), labels=y[chosen])

    with pytest.raises(TrainingError, match="step 1 of 18"):
        run(net(), settings(), data=Data(Batches(96, 16, read)))


def test_fewer_samples_than_a_step_are_refused() -> None:
    with pytest.raises(DataError, match="96 samples, fewer than the 128"):
        run(net(), settings(), data=Data(batches(128)))
    with pytest.raises(DataError, match="fewer than the 192"):
        run(net(), settings(accumulate=4), data=Data(batches(48)))


def test_frozen_batch_norms_keep_what_they_have_seen() -> None:
    module = net()
    before = module[1].running_mean.clone()  # type: ignore[index]
    run(module, settings(batch_norm="frozen"))
    assert torch.equal(module[1].running_mean, before)  # type: ignore[index]
    run(module, settings())
    assert not torch.equal(module[1].running_mean, before)  # type: ignore[index]


def test_half_precision_and_clipping_train_too() -> None:
    x, y = points()
    for options in ({"precision": "bfloat16"}, {"clip_norm": 0.1}):
        module = net()
        before = F.cross_entropy(module(x), y).detach()
        run(module, settings(**options))
        assert module[0].weight.dtype == torch.float32  # type: ignore[index]
        assert float(F.cross_entropy(module(x), y).detach()) < float(before)


def test_strong_decay_by_a_regularizer_shrinks_only_its_weights() -> None:
    module = net()
    norm = float(module[6].weight.detach().norm())  # type: ignore[index]
    penalties = attach_penalties(module, [Rule("6.weight", "l2", L2Config(strength=5.0), "a")])
    run(module, settings(), penalties=penalties)
    assert float(module[6].weight.detach().norm()) < 0.4 * norm  # type: ignore[index]


def test_the_log_has_a_line_a_few_steps_and_one_an_epoch(tmp_path: Path) -> None:
    said: list[str] = []
    log = tmp_path / "log.jsonl"
    run(net(), settings(log_steps=5), Watch(log=log, say=said.append))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "epoch" not in line] == [5, 10, 15]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3]
    assert all({"loss", "penalty", "lr"} <= line.keys() for line in lines if "epoch" not in line)
    assert any("s left" in line for line in said) and any("epoch 3 of 3" in line for line in said)


def one_step(**options: Any) -> tuple[nn.Module, float]:
    """A network after one plain step with all samples, and how far its weights have moved."""
    module = net()
    before = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    training = Training(**options, optimizer=Sgd(lr=0.5, momentum=0.0))
    run(module, training, penalties=Penalties([]), data=Data(batches(96)))
    return module, float((torch.nn.utils.parameters_to_vector(module.parameters()).detach() - before).norm())


def test_a_clipped_gradient_moves_the_weights_as_far_as_its_norm_allows() -> None:
    _, free = one_step()
    for share in (0.5, 0.1):
        assert one_step(clip_norm=share * free / 0.5)[1] == pytest.approx(share * free, rel=1e-3)
    assert one_step(clip_norm=10 * free)[1] == pytest.approx(free, rel=1e-6)


def test_rates_rise_and_fall_as_the_schedule_says_in_every_group(tmp_path: Path) -> None:
    module, log, seen = net(), tmp_path / "log.jsonl", []
    training = settings(warm_up=0.25, log_steps=1)
    shares: list[float] = []
    own = [{"params": [module[6].bias], "lr": 0.7}]  # type: ignore[index]
    step = torch.optim.SGD.step

    def watched(optimizer: torch.optim.SGD, *args: Any) -> Any:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watched)
        run(module, training, Watch(log=log), penalties=Penalties([]), after_step=shares.append, groups=own)
    wanted = [rate_at(Cosine(), 0.25, step / 18) for step in range(18)]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["lr"] for line in lines if "epoch" not in line] == pytest.approx([0.05 * rate for rate in wanted])
    assert [rates[0] for rates in seen] == pytest.approx([0.05 * rate for rate in wanted])
    assert [rates[-1] for rates in seen] == pytest.approx([0.7 * rate for rate in wanted])
    assert shares == pytest.approx([step / 18 for step in range(1, 19)])


def test_where_less_is_better_the_lowest_epoch_is_kept() -> None:
    scores = iter([3.0, 1.0, 2.0])

    def measured(module: nn.Module) -> list[Measurement]:
        score = next(scores)
        return [Measurement("perplexity", score, 1, score, score, False, np.ones(1), np.ones(1))]

    assert run(net(), settings(keep="best"), Watch(measure=measured)).kept == 2


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    module, again = net(), net()
    run(module, settings(), Watch(state=state))
    shares: list[float] = []
    found = run(again, settings(), Watch(state=state, resume=True), after_step=shares.append)
    assert shares == [1.0] and found.steps == 18
    assert_same(weights(again), weights(module))


def test_a_state_is_only_gone_on_from_where_that_is_asked_for(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    one, other = net(), net()
    run(one, settings(), Watch(state=state))
    run(other, settings(), Watch(state=state))
    assert_same(weights(one), weights(other))


def test_norms_are_those_of_the_last_weights_where_batches_are_given_for_them() -> None:
    module, other = net(), net()
    plain = Data(batches())
    run(module, settings(norm_batches=6), penalties=Penalties([]), data=plain)
    run(other, settings(), penalties=Penalties([]), data=plain)
    assert torch.equal(module[0].weight, other[0].weight), "norms change no gradient"  # type: ignore[index]
    x, _ = points()
    outputs = module[0](x).detach()  # type: ignore[index]
    torch.testing.assert_close(module[1].running_mean, outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_norms_are_taken_from_images_as_training_sees_them() -> None:
    """Of images that are 1 everywhere, only black around them has another value."""
    ones = Batches(32, 16, lambda indices: Batch((torch.ones(len(indices), 1, 8, 8),)))
    spread = []
    for augment in ((), (Flip(),), (Flip(), Crop4())):
        norm = nn.BatchNorm2d(1)
        refresh_norms(norm, norm_batches(Data(ones, augment), 2, seed=0))
        spread.append(float(norm.running_var))  # type: ignore[arg-type]
    assert spread[0] == spread[1] == 0 and spread[2] > 0.1


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
