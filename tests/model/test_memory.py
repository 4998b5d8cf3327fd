"""What modules remember is what they would compute, whatever changes between two runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from qcompress.model.memory import Memory


class Counted(nn.Module):
    """An affine map that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.computed = 0

    def forward(self, x: Tensor) -> Tensor:
        self.computed += 1
        return self.linear(x)


@dataclass
class Opaque:
    value: Tensor


class Hiding(Counted):
    """Gives an object whose tensors nobody sees."""

    def forward(self, x: Tensor) -> Opaque:  # type: ignore[override]
        return Opaque(super().forward(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Counted(), Counted()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.two(self.one(x).relu())
        return found, {"twice": 2 * found}


class Part(nn.Module):
    """A module that is called twice, one of others, one whose output changes in place, and one that hides its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.changed, self.hiding, self.last = Counted(), Inner(), Counted(), Hiding(), Counted()

    def forward(self, x: Tensor) -> Tensor:
        found, more = self.inner(self.norm(self.norm(x)))
        changed = self.changed(found)
        changed += more["twice"]
        return self.last(self.hiding(changed).value)


BATCHES = 2


def made(seed: int = 0) -> tuple[Part, list[Tensor]]:
    torch.manual_seed(seed)
    part = Part()
    part.requires_grad_(False)
    return part, [torch.randn(3, 4) for _ in range(BATCHES)]


def run(memory: Memory, part: Part, inputs: list[Tensor], waiting: tuple[str, ...] = ()) -> list[Tensor]:
    found = []
    with memory.answering(waiting):
        for place, x in enumerate(inputs):
            memory.start(place)
            found.append(part(x))
    return found


def counts(part: Part) -> dict[str, int]:
    return {name: one.computed for name, one in part.named_modules() if isinstance(one, Counted)}


def test_nothing_is_computed_twice_that_can_be_remembered() -> None:
    part, inputs = made()
    memory = Memory(part)
    first = run(memory, part, inputs)
    assert counts(part)["norm"] == 2 * BATCHES
    again = run(memory, part, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    repeated = dict.fromkeys(("changed", "hiding"), BATCHES)
    once = dict.fromkeys(("inner.one", "inner.two", "last"), BATCHES) | {"norm": 2 * BATCHES}
    assert counts(part) == once | {name: 2 * count for name, count in repeated.items()}


CHANGES: dict[str, Callable[[Part], object]] = {
    "a weight that is waited for": lambda part: part.inner.two.linear.weight.mul_(2),
    "a weight before it": lambda part: part.norm.linear.weight.mul_(2),
    "a bias behind it": lambda part: part.last.linear.bias.add_(1),
    "another tensor in its place": lambda part: setattr(part.inner.one.linear, "weight", nn.Parameter(torch.eye(4))),
    "nothing": lambda part: None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("waiting", [(), ("inner.two.linear",), ("norm",), ("inner.two.linear", "last.linear")])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_gives_what_it_would_without_memory(change: str, waiting: tuple[str, ...], seed: int) -> None:
    """Also where something else changes than was foreseen."""
    part, inputs = made(seed)
    memory = Memory(part)
    for _ in range(2):
        run(memory, part, inputs, waiting)
        with torch.no_grad():
            CHANGES[change](part)
        found = run(memory, part, inputs, waiting)
        assert all(torch.equal(one, part(x)) for one, x in zip(found, inputs, strict=True))


def test_forward_methods_are_as_they_were() -> None:
    part, _ = made()
    own = part.norm.forward
    part.norm.forward = own  # type: ignore[method-assign]
    with pytest.raises(TypeError), Memory(part).answering(()):
        part(None)
    assert vars(part.norm)["forward"] is own
    assert "forward" not in vars(part.inner)
