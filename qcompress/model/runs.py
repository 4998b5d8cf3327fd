"""A stage runs over the states before it: to what is behind it, and for what its modules are called with on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from qcompress.errors import DataError
from qcompress.model.filed import FiledStates
from qcompress.model.flow import CallsAnew, Flow, call_of, calls_of, first_call
from qcompress.model.memory import Memory
from qcompress.model.products import Call
from qcompress.model.routing import Tape
from qcompress.model.stages import BlockStage, Stage, State, TracedStage

Calls: TypeAlias = Mapping[str, Sequence[Call]]
"""Every call of some modules, by their names."""
LARGEST_INPUT = 1e18
"""A magnitude whose square float32 still holds."""


def refuse_unusable(name: str, x: Tensor) -> None:
    """Raise DataError where no statistics can be made of a layer's input: NaN, Inf, or squares beyond float32.

    x  floats or, of a lookup, integers
    """
    # Of NaN both ends are NaN. The absolute values would take as much memory again.
    if x.is_floating_point() and x.numel() and not all(abs(float(end)) <= LARGEST_INPUT for end in torch.aminmax(x)):
        what = f"its inputs hold NaN, Inf or values beyond {LARGEST_INPUT:g}"
        raise DataError(f"layer {name}", what, "check data.calibration and data.normalize, and the checkpoint")


class Runs:
    """Runs of one stage of one network over the same states, as many as there are layers to look at.

    tapes   one a batch, keep or give what the network decides by values
    behind  takes the states behind the stage
    """

    def __init__(
        self,
        stage: Stage,
        module: nn.Module,
        states: Sequence[State],
        tapes: Sequence[Tape] | None = None,
        behind: list[State] | FiledStates | None = None,
    ) -> None:
        self._stage = stage
        self._module = module
        self._states = states
        self._tapes = tapes
        self._behind: list[State] | FiledStates = [] if behind is None else behind
        self._after: Sequence[State] | None = None
        self._memory: Memory | None = None

    def calls(self, names: Sequence[str], *, last: bool = False) -> Calls:
        """Every call of the named modules in a run of the whole stage.

        last  whether no weight changes any more, so that what the run ends in is kept for `after`
        """
        if not names:
            return {}
        if known := self._known_calls(names) or self._calls_again(names):
            return known
        seen: dict[str, list[Call]] = {name: [] for name in names}
        with _watching(self._module, names, lambda name, call: seen[name].append(call)):
            after = [self._run(place) for place in range(len(self._states))]
        self._after = after if last else None
        return seen

    def next_calls(self, names: Sequence[str], waiting: Sequence[str]) -> Calls:
        """Every call of the named modules, each of which is called once by a state, as far as is known.

        waiting  modules whose weights will change before the next run, those named among them
        """
        if known := self._known_calls(names):
            return known
        # A tape counts on that all operations run again, and of a traced stage none runs twice but what is called so.
        if self._memory is None and self._tapes is None and not isinstance(self._stage, TracedStage):
            self._memory = Memory(self._module, self._stage.name if isinstance(self._stage, BlockStage) else "")
        seen: dict[str, list[Call]] = {name: [] for name in names}
        missing: set[str] = set()

        def watch(name: str, call: Call) -> None:
            seen[name].append(call)
            missing.discard(name)
            if not missing:
                raise _AllSeen

        with _watching(self._module, names, watch), self._answering(waiting):
            for place in range(len(self._states)):
                missing |= {*names}
                with suppress(_AllSeen):
                    self._run(place)
        alike = all(len(calls) == len(self._states) for calls in seen.values())
        return seen if alike else self.calls(names)

    def after(self) -> Sequence[State]:
        """The states after the stage."""
        if self._after is None:
            with self._answering(()):
                for place in range(len(self._states)):
                    self._behind.append(self._run(place))
                    if isinstance(self._states, Flow):
                        self._states.let_go(place)
            self._after = self._behind
        return self._after

    @property
    def repeats(self) -> bool:
        """Whether each batch runs again for every layer: there is no memory for what the layers of all batches see."""
        return isinstance(self._states, Flow) and self._states.filed and self._tapes is None

    def anew(self, name: str, shapes: Sequence[tuple[int, ...]]) -> CallsAnew:
        """The calls of a module, one a batch and each from a run of its own.

        shapes  of their first arguments
        """

        def make(place: int) -> Call:
            seen: list[Call] = []

            def watch(_: str, call: Call) -> None:
                seen.append(call)
                raise _AllSeen

            with _watching(self._module, [name], watch), suppress(_AllSeen):
                self._run(place)
            return seen[0]

        return CallsAnew(make, shapes)

    def _calls_of(self, place: int, names: Sequence[str]) -> dict[str, list[Call]]:
        """The calls of the named modules in the run of one batch."""
        seen: dict[str, list[Call]] = {name: [] for name in names}
        with _watching(self._module, names, lambda name, call: seen[name].append(call)):
            self._run(place)
        return seen

    def _calls_again(self, names: Sequence[str]) -> Calls:
        """The calls of modules that each batch calls once, made anew when they are needed; none where that is not so.

        Modules that always see one input have the same calls.
        """
        if not self.repeats:
            return {}
        shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
        like = {name: set(names) for name in names}
        for place in range(len(self._states)):
            seen = self._calls_of(place, names)
            for name, calls in seen.items():
                if len(calls) != 1 or not isinstance(calls[0].first, Tensor):
                    return {}
                shapes[name].append(tuple(calls[0].first.shape))
                like[name] = {one for one in like[name] if one == name or calls[0].is_like(seen[one][0])}
        found: dict[str, CallsAnew] = {}
        for name in names:
            twin = next((one for one in names if one in like[name] and one in found), name)
            found[name] = found.get(twin) or self.anew(name, shapes[name])
        return found

    def _known_calls(self, names: Sequence[str]) -> Calls:
        """The calls of the layer that a traced stage begins with, which its states hold; none where it has others."""
        first = first_call(self._stage)
        if first is None or [*names] != [*self._stage.layers]:
            return {}
        if isinstance(self._states, Flow) and isinstance(next(iter((*first.args, *first.kwargs.values()))), fx.Node):
            return {names[0]: calls_of(first, self._states)}
        return {names[0]: [call_of(first, state) for state in self._states]}

    def _answering(self, waiting: Sequence[str]) -> AbstractContextManager[None]:
        return nullcontext() if self._memory is None else self._memory.answering(waiting)

    @torch.no_grad()
    def _run(self, place: int) -> State:
        if self._memory is not None:
            self._memory.start(place)
        with nullcontext() if self._tapes is None else self._tapes[place]:
            return self._stage.run(self._module, self._states[place])


@contextmanager
def _watching(module: nn.Module, names: Sequence[str], see: Callable[[str, Call], None]) -> Iterator[None]:
    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, Call.of(args, kwargs))

        return module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_stage(
    stage: Stage,
    module: nn.Module,
    states: Sequence[State],
    tapes: Sequence[Tape] | None = None,
) -> list[State]:
    """The states after a stage; `tapes`, one a batch, keep or give what the network decides by values."""
    return [*Runs(stage, module, states, tapes).after()]


@torch.no_grad()
def run_through(stage: Stage, module: nn.Module, states: Sequence[State]) -> None:
    """Run a stage for what is watched in it: nothing that is behind it is kept."""
    for state in states:
        stage.run(module, state)


def layer_calls(
    stage: Stage, module: nn.Module, states: Sequence[State], names: Sequence[str], tapes: Sequence[Tape] | None = None
) -> Calls:
    """Every call of the named modules while the stage runs."""
    return Runs(stage, module, states, tapes).calls(names)


class _AllSeen(Exception):
    """Every module that is waited for was called."""


def layer_inputs(
    stage: Stage, module: nn.Module, states: Sequence[State], names: Sequence[str]
) -> dict[str, list[Tensor]]:
    """The first argument of every call of the named layers while the stage runs: one tensor a call and batch.

    raises  DataError for inputs that no statistics can be made of
    """
    found = {n: [call.first for call in calls] for n, calls in layer_calls(stage, module, states, names).items()}
    for name, inputs in found.items():
        for x in inputs:
            refuse_unusable(name, x)
    return found
