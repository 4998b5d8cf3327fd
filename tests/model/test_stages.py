"""A network cut into stages computes what it computes whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.networks import Mlp, Residual, Separable, Untraceable, batches, decisions, inputs, live
from qcompress.data.batches import Batch
from qcompress.errors import ModelError
from qcompress.model.live import LiveModel, make_live_model, put_tensors
from qcompress.model.runs import layer_inputs, run_stage
from qcompress.model.stages import last_output
from qcompress.model.sweep import sweep
from qcompress.model.trace import Untraceable as CannotTrace
from qcompress.model.trace import run, trace

KINDS = [Residual, Separable, Mlp, Untraceable]


def outputs(found: LiveModel, module: nn.Module) -> list[torch.Tensor]:
    states = [found.stages[0].begin(batch) for batch in found.calibration]
    for stage in found.stages:
        states = run_stage(stage, module, states)
    return [last_output(state) for state in states]


@pytest.mark.parametrize(("kind", "blocks"), [*((kind, ()) for kind in KINDS), (Untraceable, ("blocks.*",))])
def test_stages_one_after_another_are_the_network(kind: type[nn.Module], blocks: tuple[str, ...]) -> None:
    found = live(kind, blocks=blocks)
    for batch, output in zip(found.calibration, outputs(found, found.module), strict=True):
        torch.testing.assert_close(output, found.module(*batch.args))


@pytest.mark.parametrize("kind", [Residual, Separable, Mlp])
def test_every_layer_begins_a_stage_of_its_own(kind: type[nn.Module]) -> None:
    found = live(kind)
    assert found.traced
    assert [stage.layers for stage in found.stages if stage.layers] == [(name,) for name in found.layers]


def test_named_blocks_hold_their_layers() -> None:
    found = live(Untraceable, blocks=("blocks.*",))
    assert not found.traced
    assert [stage.layers for stage in found.stages] == [
        ("embed",),
        *[(f"blocks.{i}.first", f"blocks.{i}.second") for i in range(3)],
        ("head",),
    ]


def test_a_network_that_nothing_cuts_is_one_stage() -> None:
    found = live(Untraceable)
    assert [stage.layers for stage in found.stages] == [found.layers]


def test_a_stage_leaves_the_state_it_was_given() -> None:
    found = live(Residual)
    states = [found.stages[0].begin(batch) for batch in found.calibration]
    for stage in found.stages:
        before = [{node: value.clone() for node, value in state.items()} for state in states]
        after = run_stage(stage, found.module, states)
        for old, state in zip(before, states, strict=True):
            assert old.keys() == state.keys()
            assert all(torch.equal(old[node], state[node]) for node in old)
        states = after


def test_rectifiers_overwrite_what_a_layer_gave_them_alone_and_nothing_else() -> None:
    """What a stage gives is what the network computes out of place, and its rectifiers are as they were."""
    for kind in (Residual, Separable, Mlp):
        found = live(kind)
        (batch,) = found.calibration[:1]
        state = found.stages[0].begin(batch)
        for stage in found.stages:
            before = {node: value.clone() for node, value in state.items() if isinstance(value, torch.Tensor)}
            with torch.no_grad():
                after = stage.run(found.module, state)
            kept = stage.run(found.module, state)
            assert all(torch.equal(state[node], value) for node, value in before.items())
            assert all(torch.equal(after[node], kept[node]) for node in after if isinstance(after[node], torch.Tensor))
            state = after
        assert not any(getattr(part, "inplace", False) for part in found.module.modules())


def test_a_state_holds_nothing_that_is_no_longer_needed() -> None:
    found = live(Mlp)
    state = found.stages[0].begin(found.calibration[0])
    for stage in found.stages:
        state = stage.run(found.module, state)
        assert len(state) == 1


@pytest.mark.parametrize(("kind", "blocks"), [(Residual, ()), (Untraceable, ("blocks.*",)), (Untraceable, ())])
def test_a_sweep_shows_each_layer_what_a_whole_run_shows_it(kind: type[nn.Module], blocks: tuple[str, ...]) -> None:
    """The slow way: after each change, hooks on the whole network."""
    found = live(kind, blocks=blocks)
    seen = []
    for step in sweep(found, found.weights):
        seen.append(step.name)
        for module, inputs_seen in ((found.quantized, step.noisy), (found.module, step.clean)):
            expected = whole_inputs(found, module, step.name)
            for one, other in zip(inputs_seen, expected, strict=True):
                torch.testing.assert_close(one, other)
        weight = found.quantized.get_submodule(step.name).weight
        put_tensors(found.quantized, {f"{step.name}.weight": weight * 0.9})
    assert seen == list(found.layers)


def whole_inputs(found: LiveModel, module: nn.Module, name: str) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in found.calibration:
            module(*batch.args)
    handle.remove()
    return seen


def test_a_sweep_at_once_shows_one_network_only() -> None:
    found = live(Residual)
    for step in sweep(found, found.weights, sequential=False):
        assert step.noisy is step.clean
        put_tensors(found.quantized, {f"{step.name}.weight": torch.zeros(()).expand(1)})
        torch.testing.assert_close(step.clean[0], whole_inputs(found, found.module, step.name)[0])


def test_a_layer_that_is_called_twice_has_one_stage_for_all_between() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(torch.relu(self.other(torch.relu(self.shared(x)))))

    module, data = Twice(), batches(Mlp)
    found = make_live_model(module, decisions(module, "rtn", bits=4), data, data[0], device=torch.device("cpu"))
    assert [stage.layers for stage in found.stages if stage.layers] == [("shared", "other")]
    stage = found.stages[-1]
    states = [found.stages[0].begin(batch) for batch in data]
    assert len(layer_inputs(stage, found.module, states, ["shared"])["shared"]) == 2 * len(data)


def test_a_trace_runs_on_any_copy_and_changes_nothing_in_place() -> None:
    found = live(Residual)
    x = inputs(Residual, 2)
    before = x.clone()
    put_tensors(found.quantized, {"fc.weight": torch.zeros(5, 8)})
    for module in (found.module, found.quantized):
        torch.testing.assert_close(run(found.graph, module, Batch((x,))), module(x))
    assert torch.equal(x, before)


def test_what_cannot_be_traced_says_why() -> None:
    with pytest.raises(CannotTrace, match=r"\w"):
        trace(Untraceable().eval(), (), batches(Untraceable)[0])
    with pytest.raises(ModelError, match=r"model\.blocks"):
        _ = live(Untraceable).graph


def test_a_trace_that_computes_something_else_is_refused() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).calls += 1
            return x * self.calls

    with pytest.raises(CannotTrace, match="other outputs"):
        trace(Counting(), (), batches(Mlp)[0])


@pytest.mark.parametrize(("glob", "what"), [("layer.*", "names no module"), ("unused", "never calls")])
def test_block_globs_must_name_what_runs(glob: str, what: str) -> None:
    found = live(Untraceable, blocks=(glob,))
    found.module.add_module("unused", nn.Linear(2, 2))
    with pytest.raises(ModelError, match=what):
        _ = found.stages
