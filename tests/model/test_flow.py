"""States that are computed anew when they are needed are those that are held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contexts import ALONE
from torch import Tensor, nn

from model.networks import Residual, Separable, decisions, live
from qcompress.coding.grids import decode
from qcompress.data.batches import Batch
from qcompress.model import flow
from qcompress.model.live import make_live_model
from qcompress.model.sweep import sweep
from qcompress.registry import METHODS
from qcompress.types.run import FitContext

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"bits": 3}),
    "gptq of one network": ("gptq", {"bits": 3, "asymmetric": False}),
    "gptq of the network as it was": ("gptq", {"bits": 3, "sequential": False}),
    "adaround": ("adaround", {"bits": 3, "iterations": 3}),
    "adaround on samples": ("adaround", {"bits": 3, "iterations": 3, "objective": "sampled", "batch_size": 8}),
    "rd": ("rd", {"effort": "fast"}),
}


@pytest.mark.parametrize("kind", [Residual, Separable])
@pytest.mark.parametrize("case", CASES)
def test_methods_choose_the_same_from_states_that_are_not_held(
    kind: type[nn.Module], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, options = CASES[case]

    def chosen() -> dict[str, Tensor]:
        found = live(kind, method, **options)
        context = FitContext(4.0) if METHODS[method].rates else ALONE
        fitted = METHODS[method].load_fit()(found, decisions(found.module, method, **options), context)
        return {name: decode(one) for name, one in fitted.encoded.items()}

    held = chosen()
    monkeypatch.setattr(flow, "HELD_BYTES", 0)
    anew = chosen()
    assert held.keys() == anew.keys() and all(torch.equal(anew[name], held[name]) for name in held)


@pytest.mark.parametrize("most", [0, 1, 2])
def test_states_are_held_again_after_some_stages(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "HELD_BYTES", 0)
    monkeypatch.setattr(flow, "MOST_DEFERRED", most)
    found = live(Separable)
    anew = [step.noisy[0] is not step.noisy[0] for step in sweep(found, found.weights)]
    assert len(anew) > 3
    # The first layer sees what all start from.
    assert anew == [bool(place % (most + 1)) for place in range(len(anew))]


def test_states_that_take_little_memory_are_held() -> None:
    found = live(Separable)
    assert all(step.noisy[0] is step.noisy[0] for step in sweep(found, found.weights))


@pytest.mark.parametrize("sequential", [True, False])
def test_each_dense_layer_has_the_gram_of_its_own_inputs(sequential: bool) -> None:
    """Also when the states before the layer before it are let go."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    data = [Batch((torch.randn(6, 4),)) for _ in range(2)]
    found = make_live_model(module, decisions(module, "gptq", bits=4), data, data[0], device=torch.device("cpu"))
    inputs = torch.cat([batch.args[0] for batch in data])
    for layer, step in zip(module, sweep(found, found.weights, sequential=sequential), strict=True):
        assert torch.allclose(step.gram().hessian[0].float(), inputs.T @ inputs / len(inputs), atol=1e-6)
        inputs = layer(inputs)


class Picky(nn.Module):
    """How many samples reach its second layer depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x)[x[:, 0] > 0])
        found: Tensor = self.c(y)
        return found


def test_states_whose_shapes_depend_on_values_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "HELD_BYTES", 0)
    module, x = Picky().eval(), torch.ones(6, 4)
    some = x.clone()
    some[0] = -1.0
    wanted, data = decisions(module, "gptq", bits=3), [Batch((x,)), Batch((some,))]
    found = make_live_model(module, wanted, data, Batch((x[:2],)), device=torch.device("cpu"))
    seen = {step.name: [len(x) for x in step.noisy] for step in sweep(found, found.weights)}
    assert found.traced and seen == {"a": [6, 6], "b": [6, 5], "c": [6, 5]}
