"""Saved states: what lies in them comes back, and what is damaged or foreign is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompress.checkpoint.checkpoint import read_tensors, write_checkpoint
from qcompress.errors import TrainingError
from qcompress.training.loop import Watch
from qcompress.training.optimizers import make_optimizer
from qcompress.training.penalties import attach_penalties
from qcompress.training.state import (
    DIGEST,
    KEY,
    DamagedState,
    Progress,
    Trainee,
    _digest,
    last_good,
    load_state,
    save_state,
)
from qcompress.types.settings import AdamW, Optimizer, Sgd

from .small import Tied, assert_same, net, rules, run, settings, weights

IDENTITY = "x"


def trainee(optimizer: Optimizer, steps: int = 2, seed: int = 0) -> Trainee:
    """A run that has gone some steps."""
    module = net()
    penalties = attach_penalties(module, rules())
    made = make_optimizer(optimizer, module, penalties.learned(optimizer))
    torch.manual_seed(seed)
    for step in range(steps):
        made.zero_grad()
        module(torch.randn(4, 3, 8, 8)).square().sum().backward()  # type: ignore[no-untyped-call]
        penalties.add(step + 5, 10, 0.01)
        made.step()
        penalties.after(step + 5, 10, 0.01)
    progress = Progress(steps, 1, (0.5, 3), 17, [{"top1": 0.25}], 1, {"0.bias": torch.arange(8.0)}, 2.5)
    return Trainee(module, made, penalties, progress)


def optimizer_state(one: Trainee) -> list[Tensor]:
    groups = one.optimizer.param_groups
    states = [one.optimizer.state[parameter] for group in groups for parameter in group["params"]]
    return [torch.as_tensor(state[key]) for state in states for key in sorted(state) if state[key] is not None]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(tmp_path / "state.safetensors", trainee(Sgd(lr=0.05)), IDENTITY)
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.05), AdamW(lr=0.01)], ids=["sgd", "adamw"])
def test_all_that_changes_comes_back(tmp_path: Path, optimizer: Optimizer) -> None:
    path = tmp_path / "state.safetensors"
    one, other = trainee(optimizer), trainee(optimizer, steps=1, seed=7)
    random = torch.get_rng_state()
    save_state(path, one, IDENTITY)
    torch.manual_seed(99)
    load_state(path, other, IDENTITY)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(weights(other.module), weights(one.module))
    assert_same(other.penalties.saved(), one.penalties.saved())
    found, wanted = optimizer_state(other), optimizer_state(one)
    assert len(found) == len(wanted) > 0 and all(map(torch.equal, found, wanted))
    assert_same(other.progress.best_state, one.progress.best_state)
    other.progress.best_state = one.progress.best_state
    assert other.progress == one.progress


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.05), AdamW(lr=0.01)], ids=["sgd", "adamw"])
def test_what_comes_back_steps_alike_with_channels_last(tmp_path: Path, optimizer: Optimizer) -> None:
    """Files know no order in memory, and steps go through weights and momenta side by side."""
    runs = []
    for seed in (0, 7):
        module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        runs.append(Trainee(module, make_optimizer(optimizer, module, []), attach_penalties(module, []), Progress()))
        torch.manual_seed(seed)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        runs[-1].optimizer.step()
    save_state(tmp_path / "state", runs[0], IDENTITY)
    load_state(tmp_path / "state", runs[1], IDENTITY)
    for one in runs:
        torch.manual_seed(1)
        for parameter in one.module.parameters():
            parameter.grad = torch.randn_like(parameter)
        one.optimizer.step()
    assert_same(weights(runs[1].module), weights(runs[0].module))


def test_equal_runs_leave_equal_states_and_no_other_file(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "other")]
    for path in (*paths, paths[0]):
        save_state(path, trainee(Sgd(lr=0.05)), IDENTITY)
    (one, document), (other, again) = (read_tensors(path) for path in paths)
    assert_same(one, other)
    assert document == again
    assert sorted(tmp_path.iterdir()) == paths


def test_a_tied_tensor_is_saved_once_and_stays_tied(tmp_path: Path) -> None:
    path, module, settings = tmp_path / "state", Tied(), Sgd(lr=0.1)
    one = Trainee(module, make_optimizer(settings, module, []), attach_penalties(module, []), Progress())
    save_state(path, one, IDENTITY)
    assert [name for name in read_tensors(path)[0] if name.endswith("weight")] == [
        "model.first.weight",
        "model.last.weight",
    ]
    before = module.first.weight.detach().clone()
    with torch.no_grad():
        module.first.weight.zero_()
    load_state(path, one, IDENTITY)
    assert module.second.weight is module.first.weight and torch.equal(module.first.weight, before)


def test_a_file_that_is_cut_off_anywhere_is_refused_and_has_no_last_weights(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        saved.write_bytes(whole[:length])
        with pytest.raises(DamagedState):
            load_state(saved, trainee(Sgd(lr=0.05)), IDENTITY)
        assert last_good(saved) is None


def test_a_bit_that_flips_anywhere_is_seen_before_the_run_is_touched(saved: Path) -> None:
    whole = saved.read_bytes()
    for position in range(8, len(whole), max(1, len(whole) // 200)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        saved.write_bytes(changed)
        one = trainee(Sgd(lr=0.05), steps=1)
        before = weights(one.module)
        with pytest.raises(TrainingError):
            load_state(saved, one, IDENTITY)
        assert_same(weights(one.module), before)
        assert last_good(saved) is None


def rewrite(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, object]) -> None:
    """A state file with its checksum made right again."""
    text = json.dumps(document)
    write_checkpoint(tensors, path, {KEY: text, DIGEST: _digest(tensors, text)})


def test_a_state_that_lacks_any_part_is_refused(saved: Path) -> None:
    tensors, metadata = read_tensors(saved)
    needed = [name for name in tensors if name.startswith(("model.", "terms.", "random."))]
    assert needed
    for name in needed:
        rewrite(saved, {key: value for key, value in tensors.items() if key != name}, json.loads(metadata[KEY]))
        with pytest.raises(TrainingError, match="no saved state of this run"):
            load_state(saved, trainee(Sgd(lr=0.05)), IDENTITY)
    for key in json.loads(metadata[KEY]):
        document = {name: value for name, value in json.loads(metadata[KEY]).items() if name != key}
        rewrite(saved, tensors, document)
        if key != "scaler":
            with pytest.raises(TrainingError, match="no saved state of this run"):
                load_state(saved, trainee(Sgd(lr=0.05)), IDENTITY)


def test_a_state_of_another_shape_or_run_is_refused(saved: Path) -> None:
    with pytest.raises(TrainingError, match="another recipe"):
        load_state(saved, trainee(Sgd(lr=0.05)), "y")
    tensors, metadata = read_tensors(saved)
    rewrite(saved, {**tensors, "model.0.weight": torch.zeros(3, 2)}, json.loads(metadata[KEY]))
    with pytest.raises(TrainingError, match="no saved state of this run"):
        load_state(saved, trainee(Sgd(lr=0.05)), IDENTITY)


def test_the_last_weights_are_those_of_the_saved_step(saved: Path) -> None:
    found = last_good(saved)
    assert found is not None
    state, step = found
    assert step == 2
    assert_same(state, weights(trainee(Sgd(lr=0.05)).module))
    assert last_good(saved.with_name("none")) is None


def test_saved_states_of_other_runs_are_refused_and_damaged_ones_dropped(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    module = net()
    run(module, settings(), Watch(state=state, identity="x"))
    assert KEY in read_tensors(state)[1]
    with pytest.raises(TrainingError, match="another recipe"):
        run(net(), settings(), Watch(state=state, identity="y", resume=True))
    write_checkpoint({"a": torch.zeros(2)}, state)
    with pytest.raises(TrainingError, match="no saved state"):
        run(net(), settings(), Watch(state=state, identity="x", resume=True))
    trained = weights(module)
    for damaged in (state.read_bytes()[:-1], b"not safetensors"):
        state.write_bytes(damaged)
        said: list[str] = []
        module = net()
        run(module, settings(), Watch(state=state, identity="x", resume=True, say=said.append))
        assert any("is dropped, and training starts anew" in line for line in said)
        assert_same(weights(module), trained)
