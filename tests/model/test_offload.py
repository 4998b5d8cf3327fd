"""A network whose weights come and go: which are there when, ties, buffers, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from qcompress.data.batches import Batch
from qcompress.errors import InputError
from qcompress.model.offload import Blueprint, bare_network, find_blocks, make_blueprint, refuse_no_chain, run_blocks
from qcompress.types.plan import Recipe
from qcompress.types.run import ModelRun
from qcompress.types.settings import ModelSettings

from .networks import Untraceable, batches


class Tied(Untraceable):
    """The weights of both ends are one tensor; one table is in no checkpoint, and one is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("count", torch.ones(2))
        self.tail = nn.Linear(4, 6)
        self.tail.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.tail(x)[:, :2] * self.table[1] * self.count


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def model_run(kind: type[nn.Module]) -> ModelRun:
    name = f"{kind.__module__}:{kind.__name__}"
    recipe = Recipe(family="quantize", rules=(), model=ModelSettings(factory=name))
    return ModelRun(recipe, torch.device("cpu"), allow_code=True)


def blueprint(kind: type[nn.Module], state: Mapping[str, Tensor]) -> Blueprint:
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    names = [f"blocks.{index}" for index in range(3)]
    return make_blueprint(model_run(kind), names, shapes, [*shapes], state.__getitem__, "m.safetensors")


def there(module: nn.Module) -> set[str]:
    return {name for name, value in module.named_parameters(remove_duplicate=False) if not value.is_meta}


def test_the_weights_of_one_block_are_there_while_it_runs() -> None:
    module = made(Untraceable)
    network = blueprint(Untraceable, module.state_dict()).network(module.state_dict().__getitem__)
    seen: list[set[str]] = []
    for name in network.blocks:
        last = network.module.get_submodule(name).get_submodule("second")
        last.register_forward_pre_hook(lambda *_: seen.append(there(network.module)))
    x = batches(Untraceable)[0]
    assert not there(network.module)
    assert torch.equal(network.module(*x.args), module(*x.args))
    outer = {name for name in there(module) if not name.startswith("blocks.")}
    parts = ("first.weight", "first.bias", "second.weight", "second.bias")
    assert seen == [outer | {f"{name}.{part}" for part in parts} for name in network.blocks]
    network.module.get_submodule("blocks.1")(torch.zeros(1, 6))
    assert there(network.module) == {f"blocks.1.{part}" for part in parts}
    network.release()
    assert not there(network.module)


def test_many_batches_run_through_a_block_before_the_next_is_read() -> None:
    module, data = made(Untraceable), batches(Untraceable)
    read: list[str] = []

    def value(name: str) -> Tensor:
        read.append(name)
        return module.state_dict()[name]

    network = blueprint(Untraceable, module.state_dict()).network(value)
    found = [*run_blocks(network, iter(data))]
    assert all(torch.equal(output, module(*batch.args)) for output, batch in found)
    assert [batch is one for (_, batch), one in zip(found, data, strict=True)] == [True] * 3
    inner = [name for name in read if name.startswith("blocks.")]
    assert len(inner) == len(set(inner)) == 3 * 4


def test_ties_and_buffers_are_those_of_the_constructor() -> None:
    module = made(Tied)
    state = {name: value for name, value in module.state_dict().items() if name != "tail.weight"}
    bare = bare_network(model_run(Tied))
    assert all(value.is_meta for value in bare.parameters())
    assert bare.tail.weight is bare.embed.weight
    assert torch.equal(bare.table, torch.arange(3.0))
    network = blueprint(Tied, state | {"count": torch.full((2,), 7.0)}).network(state.__getitem__)
    assert torch.equal(network.module.count, torch.full((2,), 7.0))
    network.hold("")
    assert network.module.tail.weight is network.module.embed.weight
    other = state | {"tail.weight": state["embed.weight"] + 1}
    with pytest.raises(InputError, match=r"differs from 'embed\.weight'"):
        blueprint(Tied, other)


def test_what_a_checkpoint_lacks_or_has_too_many_is_refused() -> None:
    state = made(Untraceable).state_dict()
    lacking = {name: value for name, value in state.items() if name != "blocks.1.first.bias"}
    with pytest.raises(InputError, match=r"lacks 'blocks\.1\.first\.bias'"):
        blueprint(Untraceable, lacking)


class Twice(Untraceable):
    """Runs its blocks twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in (*self.blocks, *self.blocks):
            x = block(x)[0]
        return self.head(x)


class Scaled(Untraceable):
    """Gives each block a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            x = block(x, scale=0.5 + index)[0]
        return self.head(x)


@pytest.mark.parametrize(("kind", "problem"), [(Twice, "and once"), (Scaled, "other arguments than 'blocks.0'")])
def test_blocks_that_are_no_chain_are_refused(kind: type[nn.Module], problem: str) -> None:
    state = made(kind).state_dict()
    network = blueprint(kind, state).network(state.__getitem__)
    with pytest.raises(InputError, match=problem):
        refuse_no_chain(network, Batch((torch.randn(2, 4),)), "model")


def test_blocks_are_the_list_of_one_kind_with_the_most_weights() -> None:
    module = nn.Module()
    module.small = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    module.mixed = nn.Sequential(nn.Linear(90, 90), nn.ReLU())
    module.large = nn.ModuleList([nn.Linear(20, 20) for _ in range(2)])
    assert find_blocks(module) == ("large.0", "large.1")
    assert find_blocks(nn.Linear(2, 2)) == ()
