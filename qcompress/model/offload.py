"""A network goes block by block: the weights of one are there while it runs, and go when another one's come.

What lies outside the blocks comes and goes as one more. Parameters have no data until then; buffers always do, as the
constructor has made them, since tables that no checkpoint holds, such as rotary ones, cannot be had otherwise.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qcompress.coding.rows import weight_from_rows
from qcompress.data.batches import Batch, first_tensor, run_model
from qcompress.errors import CheckpointError, InputError, ModelError, Subject
from qcompress.model.build import build_network, refuse_misfit, take_shapes, tied_names
from qcompress.model.pretrained import Names, Stack
from qcompress.model.routing import Tape
from qcompress.model.stages import TailStage, block_stages
from qcompress.types.config import Shape
from qcompress.types.run import ModelRun

OUTER = ""
"""What lies in no block."""
NONE_HINT = "`offload: none` builds the network whole"
FEWEST = 2
PORTION_BYTES = 1 << 28
"""Of what flows between blocks while a network is measured: so much goes through a block before the next comes."""

Read = Callable[[str], Tensor]
"""A tensor of the checkpoint by its name there."""


@dataclass(frozen=True)
class _Source:
    """What a parameter is made of: one tensor of the checkpoint, or several that are rows of a stack."""

    parts: tuple[str, ...]
    stack: Stack | None = None

    def value(self, read: Read) -> Tensor:
        if self.stack is None:
            return read(self.parts[0])
        return weight_from_rows(torch.cat([read(name) for name in self.parts]), self.stack.shape, self.stack.axis)


class Offloaded:
    """A network without data whose blocks get their weights when they run, in float32 on a device.

    While the network as a whole runs, what lies outside its blocks is there too. Ties hold.

    decides  whether it decides by values what goes where, once `refuse_no_chain` has run it
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[str],
        sources: Mapping[str, _Source],
        read: Read,
        device: torch.device,
    ) -> None:
        self.module = module
        self.blocks = tuple(blocks)
        self._sources = sources
        self._read = read
        self._device = device
        self._ties = tied_names(module)
        self._bare = dict(module.named_parameters(remove_duplicate=False))
        self._held: set[str] = set()
        self._running = False
        self.decides = False
        self._groups: dict[str, list[str]] = {}
        for name in self._bare:
            self._groups.setdefault(self.block_of(name), []).append(name)
        for name in (OUTER, *self.blocks):
            self._hold_while_running(name)

    def block_of(self, tensor: str) -> str:
        """The block that a tensor or a module lies in, by its name, or OUTER."""
        return next((one for one in self.blocks if tensor == one or tensor.startswith(f"{one}.")), OUTER)

    def bytes_of(self, block: str) -> int:
        """What the weights of a block take."""
        names = {self._ties.get(name, name) for name in self._groups.get(block, ())}
        return sum(torch.float32.itemsize * self._bare[name].numel() for name in names)

    def hold(self, block: str) -> None:
        """Read the weights of a block, unless they are there, in place of those of another."""
        if block in self._held:
            return
        self.release(but=OUTER if self._running else None)
        # A tape of what the network decides must not see what is done here, and what is made here may change later.
        with _disable_current_modes(), torch.inference_mode(mode=False), torch.no_grad():
            made: dict[str, nn.Parameter] = {}
            for name in self._groups.get(block, ()):
                first = self._ties.get(name, name)
                if first not in made:
                    value = self._sources[first].value(self._read)
                    value = value.to(self._device, torch.float32 if value.is_floating_point() else value.dtype)
                    made[first] = nn.Parameter(value, requires_grad=False)
                _place(self.module, name, made[first])
        self._held.add(block)

    def hold_of(self, tensor: str) -> None:
        """Read the weights of the block that a tensor lies in, unless they are there."""
        self.hold(self.block_of(tensor))

    def release(self, but: str | None = None) -> None:
        """Let go of the weights of all blocks but one."""
        for block in self._held - {but}:
            for name in self._groups.get(block, ()):
                _place(self.module, name, self._bare[name])
        self._held &= {but}

    def _hold_while_running(self, block: str) -> None:
        part = self.module.get_submodule(block)
        plain = part.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = self._running
            self.hold(block)
            self._running = before or block == OUTER
            try:
                return plain(*args, **kwargs)
            finally:
                self._running = before

        part.forward = forward


def return_unused_memory() -> None:
    """Give back to the system what has been freed between pieces in use: it grows from block to block otherwise.

    The C library of Linux has a function for it; where there is none nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    part: Any = module.get_submodule(owner)
    part._parameters[leaf] = value


@dataclass(frozen=True)
class Blueprint:
    """A network whose parameters have no data, and what of a checkpoint goes where in it.

    module   in eval mode; its buffers are on the device
    blocks   names of those that run one after another, in the order of the modules
    names    that the network has for the tensors of the checkpoint
    """

    module: nn.Module
    blocks: tuple[str, ...]
    names: Names
    sources: Mapping[str, _Source]
    device: torch.device

    def network(self, read: Read) -> Offloaded:
        """A network of its own, whose weights `read` gives."""
        return Offloaded(copy.deepcopy(self.module), self.blocks, self.sources, read, self.device)


def make_blueprint(
    model_run: ModelRun,
    blocks: Sequence[str],
    shapes: Mapping[str, Shape],
    tensors: Sequence[str],
    read: Read,
    source: str,
    error: type[InputError] = CheckpointError,
) -> Blueprint:
    """What a network that goes block by block is built from; its buffers have their values already.

    blocks   names of modules
    shapes   of all names of the checkpoint, those without data of their own too
    tensors  those that have data of their own
    raises   ModelError, naming it, for a buffer that the constructor does not give alike each time, and for a parameter
             that is made of others in another way than row by row; what `refuse_misfit` raises
    """
    module = bare_network(model_run)
    taken = take_shapes(module, shapes)
    refuse_misfit(module, taken, source, error=error)
    back = {place: name for name, place in taken.places.items()}
    ties = tied_names(module)
    sources: dict[str, _Source] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if name in taken.stacks:
            stack = taken.stacks[name]
            found = _Source(tuple(sorted(stack.parts, key=lambda part: stack.parts[part])), stack)
        elif name in back:
            found = _Source((back[name],))
        elif name in taken.values:
            what = "is merged of several tensors of the checkpoint, and not of whole rows"
            raise ModelError(model_run.place("model"), what, NONE_HINT, Subject(name))
        else:
            continue
        first = ties.get(name, name)
        if first in sources:
            _refuse_other_twin(source, name, first, found.value(read), sources[first].value(read), error)
        sources.setdefault(first, found)
        if not isinstance(value, nn.Parameter):
            with torch.no_grad():
                value.copy_(found.value(read))
    unsaved = [name for name, _ in module.named_parameters() if ties.get(name, name) not in sources]
    if unsaved:
        what = "is saved under another name than the network has for it"
        raise ModelError(model_run.place("model"), what, NONE_HINT, Subject(unsaved[0]))
    module.requires_grad_(False)
    for one in module.modules():
        for leaf, buffer in one.named_buffers(recurse=False):
            one._buffers[leaf] = buffer.to(model_run.device)
    return Blueprint(module, tuple(blocks), taken.names(tensors), sources, model_run.device)


def _refuse_other_twin(source: str, name: str, twin: str, one: Tensor, other: Tensor, error: type[InputError]) -> None:
    if not torch.equal(one, other):
        what = f"differs from {twin!r} in the checkpoint, and the network has one tensor for both"
        raise error(source, what, "build it with tie_word_embeddings: false", Subject(name))


def bare_network(model_run: ModelRun) -> nn.Module:
    """The network that a recipe names, in float32 and eval mode; its parameters have no data, its buffers have.

    raises  ModelError, naming it, for a buffer that no checkpoint holds and that is another each time; as
            `build_network`
    """
    networks = []
    for _ in range(2):
        with _parameters_without_data():
            networks.append(build_network(model_run).float())
    module, again = networks
    held = module.state_dict().keys()
    twins = dict(again.named_buffers())
    for name, buffer in module.named_buffers():
        if name not in held and (buffer.is_meta or not torch.equal(buffer, twins[name])):
            what = "is a buffer that no checkpoint holds and that its constructor cannot make again"
            raise ModelError(model_run.place("model"), what, NONE_HINT, Subject(name))
    part: Any
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False
    return module


@contextmanager
def _parameters_without_data() -> Iterator[None]:
    """Parameters lose their data when a module registers them meanwhile; what is one tensor stays one."""
    register = nn.Module.register_parameter
    made: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def bare(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is None or param.is_meta:
            return
        known = made.get(id(param))
        if known is None or known[0]() is not param:
            without = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
            known = made[id(param)] = (weakref.ref(param), without)
        self._parameters[name] = known[1]

    nn.Module.register_parameter = bare  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """The members of the list of modules of one kind that has the most weights; none where there is no such list."""
    best: tuple[int, tuple[str, ...]] = (0, ())
    for name, one in module.named_modules():
        children = [*one.named_children()]
        if not isinstance(one, nn.ModuleList | nn.Sequential) or len(children) < FEWEST:
            continue
        if len({type(child) for _, child in children}) == 1:
            weights = sum(value.numel() for value in one.parameters())
            if weights > best[0]:
                best = (weights, tuple(f"{name}.{child}" if name else child for child, _ in children))
    return best[1]


class _Chain:
    """What was seen of the blocks while a network ran: whether each goes on from what the one before it gave."""

    def __init__(self, blocks: Sequence[str]) -> None:
        self._blocks = tuple(blocks)
        self._next = 0
        self._first: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self.output: Any = None
        self.problem: str | None = None

    def enter(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = self._blocks[index]
        if index == self._next == 0:
            self._first = (args, kwargs)
        hidden = self.output if isinstance(self.output, Tensor) or self.output is None else self.output[0]
        if index != self._next:
            self._say(f"does not run {name!r} when the blocks before it have run, and once")
        elif not args or not isinstance(args[0], Tensor):
            self._say(f"gives {name!r} no tensor as its first argument")
        elif index and args[0] is not hidden:
            self._say(f"does not give {name!r} what {self._blocks[index - 1]!r} has made")
        elif not _alike((args[1:], kwargs), (self._first[0][1:], self._first[1])):
            self._say(f"gives {name!r} other arguments than {self._blocks[0]!r}")
        self._next = index + 1

    def _say(self, problem: str) -> None:
        self.problem = self.problem or problem

    @property
    def complete(self) -> bool:
        return self._next == len(self._blocks)


def _alike(one: Any, other: Any) -> bool:
    """Whether two arguments are the same object, or made of such."""
    if one is other:
        return True
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    plain = (bool, int, float, str)
    return isinstance(one, plain) and isinstance(other, plain) and one == other


@contextmanager
def _watched(module: nn.Module, blocks: Sequence[str]) -> Iterator[_Chain]:
    chain = _Chain(blocks)

    def before(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: chain.enter(index, args, kwargs)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        chain.output = output

    parts = [module.get_submodule(name) for name in blocks]
    handles = [
        part.register_forward_pre_hook(before(index), with_kwargs=True, prepend=True)
        for index, part in enumerate(parts)
    ]
    handles += [part.register_forward_hook(after) for part in parts]
    try:
        yield chain
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def refuse_no_chain(network: Offloaded, example: Batch, place: str) -> None:
    """Raise ModelError where the blocks of a network are not its whole way, one after another."""
    with _watched(network.module, network.blocks) as chain, Tape() as tape:
        wanted = run_model(network.module, example)
    network.decides = tape.decides
    problem = chain.problem
    if problem is None and not chain.complete:
        problem = f"does not run all of its {len(network.blocks)} blocks"
    if problem is None:
        tail = TailStage("output", (), network.blocks)
        found = first_tensor(tail.run(network.module, replace(tail.begin(example), output=chain.output)))
        if not torch.equal(found, wanted):
            problem = "makes its output of more than what its last block gives"
    if problem is not None:
        what = f"cannot go block by block: {type(network.module).__name__} {problem}"
        raise ModelError(place, what, "name other units under `model.blocks`, or say `offload: none`")


@torch.no_grad()
def run_blocks(network: Offloaded, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Batch]]:
    """What the network makes of each batch, with that; a block's weights are read once for many batches."""
    stages = block_stages(network.blocks, (), network.blocks[:1])
    head, *middle, tail = stages
    waiting: list[Any] = []

    def finished() -> Iterator[tuple[Tensor, Batch]]:
        for stage in middle:
            for index, state in enumerate(waiting):
                waiting[index] = stage.run(network.module, state)
        for state in waiting:
            yield first_tensor(tail.run(network.module, state)), state.batch
        waiting.clear()

    taken = 0
    for batch in batches:
        state = head.run(network.module, head.begin(batch))
        waiting.append(state)
        taken += sum(x.nbytes for x in (*state.args, *batch.args) if isinstance(x, Tensor))
        if taken > PORTION_BYTES:
            yield from finished()
            taken = 0
    yield from finished()
