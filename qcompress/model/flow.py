"""What flows through a traced network, batch by batch: held, or computed anew where that would take much memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from qcompress.model.anew import Anew
from qcompress.model.filed import FiledStates
from qcompress.model.products import Call
from qcompress.model.stages import Stage, State, TracedStage

HELD_BYTES = 400_000_000
"""Of the states before a stage: more are computed anew, from those before an earlier stage, when they are needed."""
MOST_DEFERRED = 4
"""Stages in a row whose states are computed anew: each takes the time of all before it again."""

Shape: TypeAlias = tuple[int, ...]


class Flow(Anew[State]):
    """The states before a stage, one a batch, until those behind the stage are held.

    held    before the first of `passed`
    passed  stages that lie between, in which no weight changes any more
    shapes  of the values of nodes without their samples; needed where stages lie between
    sizes   samples of each batch, likewise
    """

    def __init__(
        self,
        module: nn.Module,
        held: Sequence[State],
        passed: tuple[TracedStage, ...] = (),
        shapes: Mapping[fx.Node, Shape] | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        self._module = module
        self._held = held
        self._passed = passed
        self._shapes = shapes or {}
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._held)

    @torch.no_grad()
    def make(self, index: int) -> State:
        state = self._held[index]
        for stage in self._passed:
            state = stage.run(self._module, state)
        return state

    @property
    def filed(self) -> bool:
        """Whether the states wait in a file."""
        return isinstance(self._held, FiledStates)

    def let_go(self, index: int) -> None:
        """Hold the state of a batch no longer."""
        if isinstance(self._held, list):
            self._held[index] = None

    def shapes_of(self, node: fx.Node) -> list[Shape]:
        """Of the value of a node in each state."""
        if not self._passed:
            return [tuple(state[node].shape) for state in self._held]
        return [(size, *self._shapes[node]) for size in self._sizes]

    def deferred(
        self, stage: Stage, behind: Stage, shapes: Mapping[fx.Node, Shape], sizes: Sequence[int], flows: int
    ) -> Flow | None:
        """The states behind a stage, to be computed anew; None where they are rather held.

        behind  the stage after it
        flows   how many networks' states there are
        """
        if not self._held or len(self._passed) == MOST_DEFERRED or not isinstance(stage, TracedStage):
            return None
        if not (first_call(stage) and first_call(behind)):
            return None
        passed = (*self._passed, stage)
        nodes = {*self._held[0], *(node for one in passed for node in one.nodes)}
        nodes -= {node for one in passed for node in one.spent}
        if not nodes <= {*shapes}:
            return None
        numbers = sum(sizes) * sum(torch.Size(shapes[node]).numel() for node in nodes)
        if flows * numbers * torch.float32.itemsize <= HELD_BYTES:
            return None
        return Flow(self._module, self._held, passed, shapes, sizes)


def first_call(stage: Stage) -> fx.Node | None:
    """The one call of a compressed layer in a traced stage where that is what the stage begins with, else None."""
    if not isinstance(stage, TracedStage) or len(stage.layers) != 1:
        return None
    first, *others = stage.nodes
    return None if any(node.target == stage.layers[0] for node in others) else first


def call_of(node: fx.Node, state: State) -> Call:
    """The call that a node makes from a state before it."""

    def value(one: fx.Node) -> Any:
        return state[one]

    return Call(fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value))


def calls_of(node: fx.Node, states: Flow) -> CallsAnew:
    """The calls that the first node of a stage makes, each from the state before it when it is asked for."""
    first = next(iter((*node.args, *node.kwargs.values())))
    assert isinstance(first, fx.Node)
    return CallsAnew(lambda index: call_of(node, states[index]), states.shapes_of(first))


class CallsAnew(Anew[Call]):
    """Calls of a module, one a batch, each made anew whenever it is asked for.

    make    gives that of a batch
    shapes  of their first argument
    """

    def __init__(self, make: Callable[[int], Call], shapes: Sequence[Shape]) -> None:
        self._make = make
        self.shapes = [*shapes]

    def __len__(self) -> int:
        return len(self.shapes)

    def make(self, index: int) -> Call:
        return self._make(index)
