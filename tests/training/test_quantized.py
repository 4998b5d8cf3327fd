"""What training on grids adds: distillation, batch norms taken anew, quantizers that come off, where they start."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model.networks import Residual, Untraceable, batches, decisions, live
from torch import Tensor, nn

from qcompress.coding.affine import decode
from qcompress.coding.half import from_half
from qcompress.encoded import ActivationGrid, Affine
from qcompress.errors import DataError, ModelError, TrainingError
from qcompress.methods.lsq import InputStep, LearnedStep
from qcompress.methods.pact import InputClip
from qcompress.model.batches import Batch, Batches
from qcompress.model.live import LiveModel, find_tensor
from qcompress.registry import METHODS, PactConfig
from qcompress.settings import (
    ActivationSettings,
    CausalLm,
    Classification,
    Distil,
    FactoryTask,
    Reconstruction,
    Sgd,
    Training,
    TrainingOptions,
)
from qcompress.training.adjusted import adjusted_tensors
from qcompress.training.dress import dressed, trained_weight
from qcompress.training.learn import Learn
from qcompress.training.loop import Data, Watch
from qcompress.training.losses import distilled, make_loss
from qcompress.training.norms import refresh_norms
from qcompress.training.optimizers import make_optimizer
from qcompress.training.starts import Start, input_starts
from qcompress.types import Decision, TensorInfo


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


def learn(kind: type[nn.Module], size: int = 16, count: int = 48) -> Learn:
    x = torch.cat([batch.args[0] for batch in batches(kind, 4, count // 4)])

    def read(indices: Sequence[int]) -> Batch:
        return Batch((x[list(indices)],), labels=torch.tensor(list(indices)) % 2)

    training = Training(options=TrainingOptions(epochs=1), optimizer=Sgd(lr=0.01))
    return Learn(Data(Batches(count, size, read)), make_loss(Classification()), training, Watch(), 0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def tied() -> tuple[LiveModel, list[Decision]]:
    from qcompress.model.live import make_live_model

    torch.manual_seed(0)
    module, data = Tied(), [Batch((torch.randn(8, 6),))]
    config = METHODS["lsq"].config(bits=2)
    own = [Decision(TensorInfo("first.weight", (6, 6), "F32"), "lsq", config, "test")]
    last = Decision(TensorInfo("last.weight", (3, 6), "F32"), "rtn", METHODS["rtn"].config(bits=8), "test")
    return make_live_model(module, [*own, last], data, data[0], device=torch.device("cpu")), own


def test_tied_copies_follow_and_what_others_compressed_stays() -> None:
    found, own = tied()
    weights = {d.tensor.name: LearnedStep(find_tensor(found.quantized, d.tensor.name), d) for d in own}
    before = copy.deepcopy(found.quantized.state_dict())
    with dressed(found, weights) as module:
        layers: Any = module
        assert torch.equal(layers.first.weight, layers.second.weight)
        assert len(layers.second.weight.unique()) <= 4 * 6
        assert not layers.last.weight.requires_grad and layers.last.bias.requires_grad
        optimizer = make_optimizer(Sgd(lr=0.1), module, [])
        module(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        moved = trained_weight(module, "first.weight")
    after = found.quantized.state_dict()
    assert after.keys() == before.keys()
    assert torch.equal(after["first.weight"], moved) and torch.equal(after["second.weight"], moved)
    assert found.quantized.first.weight is found.quantized.second.weight  # type: ignore[union-attr]
    assert torch.equal(after["last.weight"], before["last.weight"])
    assert not any(parameter.requires_grad for parameter in found.quantized.parameters())
    # The copy is stored once, so it is no tensor that was adjusted.
    assert set(adjusted_tensors(found, {"first.weight"})) == {"first.bias", "second.bias", "last.bias"}


def test_quantizers_come_off_after_an_error_too() -> None:
    found, own = tied()
    weights = {d.tensor.name: LearnedStep(find_tensor(found.quantized, d.tensor.name), d) for d in own}
    start = Start(ActivationGrid(2, 0.5, 0), 0.4, 0.0, 6, False)
    before = set(found.quantized.state_dict())
    with pytest.raises(RuntimeError), dressed(found, weights, {"first": InputStep(start, by_mean=True)}) as module:
        assert "first.qcompress_input.step" in module.state_dict()
        raise RuntimeError
    assert set(found.quantized.state_dict()) == before
    assert not [hook for one in found.quantized.modules() for hook in one._forward_pre_hooks]


def test_a_weight_that_is_no_number_is_named() -> None:
    found, own = tied()
    weights = {d.tensor.name: LearnedStep(find_tensor(found.quantized, d.tensor.name), d) for d in own}
    with dressed(found, weights) as module:
        with torch.no_grad():
            module.first.parametrizations.weight.original[0, 0] = torch.inf  # type: ignore[union-attr]
        with pytest.raises(TrainingError, match=r"first\.weight"):
            trained_weight(module, "first.weight")


def test_starts_are_those_of_the_network_as_it_was() -> None:
    found = live(Residual, "lsq", bits=2)
    found.activations = ActivationSettings(bits=3)
    teach = learn(Residual)
    starts = input_starts(found, teach)
    assert set(starts) == set(found.layers)
    assert {name for name, one in starts.items() if one.fixed} == {"stem"}
    assert {name: one.grid.bits for name, one in starts.items()} == {"stem": 8, "conv1": 3, "conv2": 3, "fc": 3}
    assert starts["stem"].middle == 128 and starts["conv1"].middle == 0
    x = torch.cat([batch.args[0] for batch in teach.first_batches(torch.device("cpu"))])
    assert starts["stem"].mean == pytest.approx(float(x.abs().mean()), rel=1e-5)
    assert starts["stem"].features == 3 * 8 * 8 and starts["fc"].features == 8
    low, high = float(x.min()), float(x.max())
    assert starts["stem"].grid.scale == pytest.approx((high - low) / 255, rel=1e-5)
    step = InputStep(starts["conv1"], by_mean=True)
    assert float(step.step.detach()) == pytest.approx(2 * starts["conv1"].mean / 7**0.5, rel=1e-5)
    assert not InputStep(starts["stem"], by_mean=True).step.requires_grad
    found.activations = None
    assert input_starts(found, teach) == {}


def test_a_range_in_the_recipe_is_where_inputs_start() -> None:
    found = live(Residual, "pact", bits=2)
    grids = {}
    for name in ("minmax", "mse"):
        found.activations = ActivationSettings(bits=2, range=name)  # type: ignore[arg-type]
        grids[name] = input_starts(found, learn(Residual))["conv1"].grid.scale
    assert grids["mse"] < grids["minmax"]


def test_networks_that_cannot_be_traced_begin_with_the_first_layer() -> None:
    found = live(Untraceable, "lsq", blocks=("blocks.*",), bits=2)
    found.activations = ActivationSettings(bits=4)
    starts = input_starts(found, learn(Untraceable))
    assert {name for name, one in starts.items() if one.fixed} == {"embed"}


def test_one_bit_below_zero_is_refused() -> None:
    low = Start(ActivationGrid(1, 0.5, 1), 0.4, -1.0, 6, False)
    with pytest.raises(ModelError, match="use 2 bits or more"):
        InputClip("fc", low, PactConfig(bits=2))
    clip = InputClip("fc", Start(ActivationGrid(1, 0.5, 0), 0.4, 0.0, 6, False), PactConfig(bits=2, clip=6.0))
    assert clip.grid() == ActivationGrid(1, 6.0, 0)


def test_groups_of_their_own_are_in_no_other() -> None:
    module = nn.Linear(3, 4)
    optimizer = make_optimizer(
        Sgd(lr=0.1, weight_decay=0.5), module, [], [{"params": [module.weight], "weight_decay": 0.25, "lr": 0.2}]
    )
    found = {id(p): (group["weight_decay"], group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    assert found == {id(module.weight): (0.25, 0.2), id(module.bias): (0.0, 0.1)}


def test_too_few_samples_are_refused_before_anything_is_measured() -> None:
    found = live(Residual, "lsq", bits=2)
    found.activations = ActivationSettings(bits=3)
    with pytest.raises(DataError, match="fewer than"):
        input_starts(found, learn(Residual, size=64))


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_a_rule_s_own_rate_is_that_of_its_steps(method: str) -> None:
    moved = []
    for rate in (1e-9, 10.0):
        found = live(Residual, method, bits=2)
        found.activations = ActivationSettings(bits=3, range="mse")
        teach = learn(Residual)
        starts = input_starts(found, teach)
        config: dict[str, Any] = {"bits": 2, "learning_rate": rate}
        result = METHODS[method].load()(found, decisions(found.module, method, **config), teach)
        grids = {name: grid for name, grid in result.activations.items() if not starts[name].fixed}
        moved.append(max(abs(grid.scale / starts[name].grid.scale - 1) for name, grid in grids.items()))
    assert moved[0] < 1e-6 and moved[1] > 1e-3


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_references_are_what_the_codes_round(method: str) -> None:
    found = live(Residual, method, bits=4)
    result = METHODS[method].load()(found, decisions(found.module, method, bits=4), learn(Residual))
    assert len(result.references) == len(found.layers)
    for name, reference in result.references.items():
        encoded = result.encoded[name]
        assert isinstance(encoded, Affine)
        steps = from_half(encoded.scale, encoded.exponent).reshape(-1, *[1] * (reference.ndim - 1))
        inside = (encoded.codes.view(reference.shape) > 0) & (encoded.codes.view(reference.shape) < 15)
        off = ((decode(encoded) - reference).abs() / steps)[inside]
        assert len(off) and float(off.max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_steps_stay_above_nothing_whatever_the_rate(method: str) -> None:
    """A rate that throws steps across zero leaves them positive, and the network finite."""
    found = live(Residual, method, bits=2)
    found.activations = ActivationSettings(bits=3)
    teach = learn(Residual)
    config: dict[str, Any] = {"bits": 2, "learning_rate": 1e4}
    result = METHODS[method].load()(found, decisions(found.module, method, **config), teach)
    assert all(grid.scale > 0 for grid in result.activations.values())
    for name, encoded in result.encoded.items():
        if name in ("stem.weight", "conv1.weight"):
            assert bool((encoded.scale > 0).all()) and bool(encoded.scale.isfinite().all())
