"""A sweep hands on the inputs of each layer, and refuses those that no statistics can be made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress.calibration.activations import measure_activations
from qcompress.data.batches import Batch
from qcompress.errors import DataError
from qcompress.model.layers import MatrixLayer, blank_gram, drawn_places, measure_gram
from qcompress.model.live import LiveModel, find_tensor, make_live_model
from qcompress.model.runs import LARGEST_INPUT, layer_calls, refuse_unusable
from qcompress.model.sweep import GramMemory, sweep
from qcompress.registry import METHODS
from qcompress.types.run import FitContext, Gram
from qcompress.types.settings import ActivationSettings

from .networks import Residual, decisions, live

REFUSED = r"layer .*: its inputs hold NaN, Inf or values beyond 1e\+18"


def spoilt(method: str, value: float) -> LiveModel:
    """A live model with one such value in the last batch of its calibration data."""
    found = live(Residual, method, bits=3) if method != "rd" else live(Residual, method)
    *others, last = found.calibration
    x = last.args[0].clone()
    x.view(-1)[-1] = value
    found.calibration = [*others, Batch((x,))]
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20, -1e20])
def test_inputs_that_no_statistics_can_be_made_of_are_refused_with_the_layer(value: float) -> None:
    found = spoilt("gptq", value)
    with pytest.raises(DataError, match=REFUSED):
        for step in sweep(found, found.weights):
            step.gram()
    with pytest.raises(DataError, match=REFUSED):
        measure_activations(found, ActivationSettings(range="minmax"), [], [*found.layers])


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.fits and one.needs == "calibration"])
def test_no_method_takes_them(method: str) -> None:
    found = spoilt(method, 1e20)
    options = {} if METHODS[method].rates else {"bits": 3}
    with pytest.raises(DataError, match=REFUSED):
        METHODS[method].load_fit()(found, decisions(found.module, method, **options), FitContext(rate=3.0))


@pytest.mark.parametrize("x", [torch.tensor([LARGEST_INPUT, -LARGEST_INPUT]), torch.tensor([2**62]), torch.zeros(0)])
def test_what_can_be_squared_or_is_an_index_passes(x: Tensor) -> None:
    refuse_unusable("a", x)


class Gated(nn.Module):
    """Three layers of one input, one behind them, and two of another input; the shape says which way the code goes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.gate, self.up = nn.Linear(6, 10), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (self.q(x) * self.k(x)).softmax(-1) * self.v(x)
        x = x + self.o(mixed)
        if x.shape[0] < 0:
            return x
        return x + (self.gate(x).sigmoid() * self.up(x))[..., :6]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_layers_of_one_input_share_a_pass_that_ends_with_them() -> None:
    """What each sees is what a pass of its own through the whole block shows."""
    torch.manual_seed(0)
    module = Blocks()
    data = [Batch((torch.randn(4, 5, 6),)) for _ in range(2)]
    wanted = decisions(module, "gptq", bits=3)
    found = make_live_model(module, wanted, data, data[0], device=torch.device("cpu"), blocks=("blocks.*",))
    counts = dict.fromkeys(("q", "o", "gate", "up"), 0)
    for layer in counts:
        found.quantized.get_submodule(f"blocks.1.{layer}").register_forward_pre_hook(
            lambda *_, layer=layer: counts.update({layer: counts[layer] + 1})
        )
    order = []
    for step in sweep(found, found.weights):
        assert step.stage is not None
        order.append(step.name)
        before = dict(counts)
        alone = layer_calls(step.stage, found.quantized, step.noisy_states, [step.name])[step.name]
        counts.update(before)
        assert all(torch.equal(a, b.first) for a, b in zip(step.noisy, alone, strict=True))
        weight = find_tensor(found.quantized, step.tensor)
        with torch.no_grad():
            weight.copy_(weight.mul(4).round().div(4))
    assert order == [f"blocks.{block}.{layer}" for block in range(2) for layer in ("q", "k", "v", "o", "gate", "up")]
    # Of two batches each: a pass for q, k and v, one for o, one for gate and up, none of which runs what lies behind,
    # and one through the whole block.
    assert counts == {"q": 8, "o": 6, "gate": 4, "up": 4}


@pytest.mark.parametrize("paired", [True, False])
def test_each_layer_is_computed_once_a_pass_beside_those_that_share_its_input(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = Blocks()
    data = [Batch((torch.randn(4, 5, 6),)) for _ in range(2)]
    wanted = decisions(module, "gptq", bits=3)
    found = make_live_model(module, wanted, data, data[0], device=torch.device("cpu"), blocks=("blocks.*",))
    assert len(found.stages) == 4 and not found.routes
    computed = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: computed.append(1) or linear(*given))
    for step in sweep(found, found.weights, paired=paired):
        found.quantized.get_submodule(step.name).weight.mul_(1.5)
    # Each of a block's 6 layers once with its final weight; q and k before v is reached, and gate before up.
    quantized = 2 * 2 * (6 + 3)
    assert len(computed) == quantized + (2 * 2 * 6 if paired else 2 * 6)


def test_layers_of_one_input_have_one_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Blocks()
    data = [Batch((torch.randn(4, 5, 6),)) for _ in range(2)]
    wanted = decisions(module, "gptq", bits=3)
    found = make_live_model(module, wanted, data, data[0], device=torch.device("cpu"), blocks=("blocks.*",))
    measured: list[MatrixLayer] = []

    def counted(layer: MatrixLayer, *given: Any) -> Gram:
        measured.append(layer)
        return measure_gram(layer, *given)

    monkeypatch.setattr("qcompress.model.sweep.measure_gram", counted)
    for step in sweep(found, found.weights):
        assert isinstance(step.layer, MatrixLayer)
        alone = measure_gram(step.layer, step.noisy, step.clean, found.generator(step.name))
        shared, state = step.gram(), step.generator.get_state()
        assert torch.equal(shared.hessian, alone.hessian)
        assert shared.cross is not None and alone.cross is not None
        assert torch.equal(shared.cross, alone.cross)
        other = found.generator(step.name)
        drawn_places(step.layer, step.noisy, other)
        assert torch.equal(state, other.get_state())
        weight = find_tensor(found.quantized, step.tensor)
        weight.mul_(1.5)
    assert len(measured) == 2 * 3


class Changing(nn.Module):
    """What the second layer sees is the tensor that the first one saw, changed in place by what the first one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        x += self.first(x)
        return self.second(x)


class Changed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Changing()])

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < 0:
            return x
        return self.blocks[0](x)


def test_a_tensor_that_changes_in_place_is_another_input() -> None:
    torch.manual_seed(0)
    module = Changed()
    data = [Batch((torch.randn(4, 6),))]
    wanted = decisions(module, "gptq", bits=3)
    found = make_live_model(module, wanted, data, data[0], device=torch.device("cpu"), blocks=("blocks.*",))
    for step in sweep(found, found.weights):
        if step.name.endswith("second"):
            x = data[0].args[0]
            assert torch.equal(step.noisy[0], x + find_tensor(found.quantized, "blocks.0.first.bias"))
        else:
            with torch.no_grad():
                find_tensor(found.quantized, step.tensor).zero_()


def test_what_weights_of_one_gram_share_is_made_once() -> None:
    made: list[str] = []

    def make(what: str) -> str:
        made.append(what)
        return what

    one, other = (blank_gram(1, 3, torch.device("cpu")) for _ in range(2))
    found = [gram.once(what, lambda what=what: make(what)) for gram in (one, one, other) for what in ("a", "b", "a")]
    assert found == ["a", "b", "a"] * 3
    assert made == ["a", "b"] * 2


def test_a_gram_is_that_of_the_inputs_of_both_networks() -> None:
    noisy, clean, other = ([torch.ones(2, 3)] for _ in range(3))
    gram, memory = blank_gram(1, 3, torch.device("cpu")), GramMemory()
    assert memory.known(noisy, clean) is None
    memory.keep(noisy, clean, gram)
    assert memory.known([*noisy], [*clean]) is gram
    assert memory.known(noisy, other) is memory.known(noisy, None) is memory.known(other, clean) is None
    memory.forget()
    assert memory.known(noisy, clean) is None
