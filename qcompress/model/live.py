"""Methods see a live model as the network as it was, its copy as it will be, and calibration data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompress.coding.grids import decode
from qcompress.data.batches import Batch
from qcompress.errors import ModelError
from qcompress.model.filed import FiledStates
from qcompress.model.offload import Blueprint, Offloaded, Read, refuse_no_chain
from qcompress.model.pretrained import Names
from qcompress.model.products import caller_of
from qcompress.model.routing import Tape
from qcompress.model.stages import (
    Stage,
    State,
    WholeStage,
    block_stages,
    execution_order,
    glob_modules,
    traced_stages,
)
from qcompress.model.trace import Untraceable, trace
from qcompress.types.encoded import Encoded
from qcompress.types.plan import Decision
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import seeded_generator
from qcompress.types.settings import ActivationSettings


@dataclass(frozen=True)
class Position:
    """Where a live model that goes block by block stands: before one of its stages, which is all that methods see.

    clean, noisy  what flows into it in the full-precision network and in the quantized one, for each batch
    alone         the same of the quantized one where it decides by itself what goes where
    inputs        its layers that see the network's own input
    """

    clean: Sequence[State]
    noisy: Sequence[State]
    alone: Sequence[State]
    inputs: frozenset[str] = frozenset()


@dataclass
class LiveModel:
    """A network with the checkpoint's weights, in eval mode on `device`, float32.

    module       the network as it was; methods never change it
    quantized    its copy: what has been encoded so far is in place, and methods put there what they encode
    layers       modules whose calls show what flows into the compressed weights, in the order of their first call
    calibration  batches on `device`; none where the recipe has no calibration data
    activations  what the recipe asks of activation quantizers; None where it asks for none
    blocks       globs over module names, see ModelSettings
    place        names the recipe's model section in errors
    names        that the network has for the tensors of the checkpoint
    weights      names of the compressed weights
    unreached    weights, or rows of them, that a sweep found that no calibration sample reaches
    offloaded    both networks where their weights come and go block by block, see model.offload
    cut          the stages, where they are known already
    at           where a network that goes block by block stands
    filed        the folder where states between blocks wait in files; None: they are held in memory
    world        the ranks that divide the calibration batches; both networks are the same on all
    """

    module: nn.Module
    quantized: nn.Module
    layers: tuple[str, ...]
    calibration: Sequence[Batch]
    example: Batch
    device: torch.device
    seed: int = 0
    activations: ActivationSettings | None = None
    blocks: tuple[str, ...] = ()
    place: str = "model"
    names: Names = field(default_factory=Names)
    weights: tuple[str, ...] = ()
    unreached: set[str] = field(default_factory=set)
    offloaded: tuple[Offloaded, Offloaded] | None = None
    cut: tuple[Stage, ...] | None = None
    at: Position | None = None
    filed: Path | None = None
    world: World = ALONE

    @property
    def own_batches(self) -> Sequence[Batch]:
        """This rank's share of the calibration batches: every `size`-th; all of them where there is one process."""
        return self.calibration[self.world.rank :: self.world.size]

    def generator(self, name: str) -> torch.Generator:
        """Random numbers for one layer."""
        return seeded_generator(self.seed, name, self.device)

    @cached_property
    def graph(self) -> fx.Graph:
        """The traced network. Raises ModelError where it cannot be traced."""
        graph, reason = self._trace
        if graph is None:
            hint = "name its units under `model.blocks`, or choose a method that needs no graph"
            raise ModelError(self.place, f"the model cannot be traced: {reason}", hint)
        return graph

    @property
    def traced(self) -> bool:
        return self._trace[0] is not None

    @cached_property
    def _trace(self) -> tuple[fx.Graph | None, str]:
        if self.offloaded is not None:
            return None, "it goes block by block"
        try:
            return trace(self.module, self.layers, self.example), ""
        except Untraceable as problem:
            return None, str(problem)

    @cached_property
    def routes(self) -> bool:
        """Whether the network decides by values what goes where, as one with experts does."""
        if self.offloaded is not None:
            return self.offloaded[0].decides
        tape = Tape()
        with torch.no_grad(), tape:
            self.module(*self.example.args, **self.example.kwargs)
        return tape.decides

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The network cut into stages, each beginning with a compressed layer where it could be traced."""
        return make_stages(self) if self.cut is None else self.cut

    def begin(self) -> tuple[Sequence[State], Sequence[State]]:
        """What flows into the first stage in the full-precision network and in the quantized one, for each batch that
        is this rank's."""
        if self.at is not None:
            return _own(self.at.clean), _own(self.at.noisy)
        states = [self.stages[0].begin(batch) for batch in self.own_batches]
        return states, [*states]

    def weight(self, name: str) -> Tensor:
        """A tensor of the network as it was."""
        if self.offloaded is not None:
            self.offloaded[0].hold_of(name)
        return find_tensor(self.module, name).detach()

    def put(self, tensors: Mapping[str, Encoded]) -> None:
        """Put decoded weights and adjusted tensors into the quantized copy, by tensor name."""
        if self.offloaded is not None:
            for name in tensors:
                self.offloaded[1].hold_of(name)
        put_tensors(self.quantized, {name: decode(one) for name, one in tensors.items()})


def _own(states: Sequence[State]) -> Sequence[State]:
    """States that may be let go one by one, while others still hold them."""
    return states if isinstance(states, FiledStates) else [*states]


def fresh_copy(live: LiveModel) -> LiveModel:
    """The same live model with nothing encoded yet, whatever became of the first."""
    again = replace(live)
    _ = again.traced
    again.quantized = copy.deepcopy(again.module)
    return again


def layer_name(tensor: str) -> str:
    """The module that a tensor belongs to: what stands before its last dot."""
    return tensor.rpartition(".")[0]


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite parameters and buffers in place, by name."""
    with torch.no_grad():
        for name, value in tensors.items():
            find_tensor(module, name).copy_(value)


def find_tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor


def make_live_model(
    module: nn.Module,
    decisions: Iterable[Decision],
    calibration: Sequence[Batch],
    example: Batch,
    *,
    device: torch.device,
    seed: int = 0,
    activations: ActivationSettings | None = None,
    blocks: tuple[str, ...] = (),
    place: str = "model",
    names: Names | None = None,
    world: World = ALONE,
) -> LiveModel:
    """The live model of a built module with its weights loaded; nothing in it works in place.

    decisions  in the names of the network
    """
    module = module.to(device).float().eval()
    module.requires_grad_(False)
    part: Any
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False
    weights = tuple(decision.tensor.name for decision in decisions if decision.compresses)
    callers = {caller_of(module, weight) for weight in weights}
    example = example.to(device)
    order = _whole_order(module, callers, [example, *calibration])
    live = LiveModel(
        module=module,
        quantized=module,
        layers=tuple(order),
        weights=weights,
        calibration=calibration,
        example=example,
        device=device,
        seed=seed,
        activations=activations,
        blocks=blocks,
        place=place,
        names=names or Names(),
        world=world,
    )
    # The trace may leave constants on the module, which its copy needs too.
    _ = live.traced
    live.quantized = copy.deepcopy(module)
    return live


def make_offloaded_model(
    blueprint: Blueprint,
    reads: tuple[Read, Read],
    decisions: Iterable[Decision],
    calibration: Sequence[Batch],
    example: Batch,
    *,
    seed: int = 0,
    activations: ActivationSettings | None = None,
    place: str = "model",
) -> LiveModel:
    """The live model of a network that goes block by block.

    reads      gives tensors of the checkpoint by their names there: as they are, and as they have been encoded so far
    decisions  in the names of the network
    raises     ModelError where its blocks do not run one after another
    """
    clean, noisy = (blueprint.network(read) for read in reads)
    weights = tuple(decision.tensor.name for decision in decisions if decision.compresses)
    callers = {caller_of(clean.module, weight) for weight in weights}
    example = example.to(blueprint.device)
    refuse_no_chain(clean, example, place)
    first = blueprint.blocks[0]
    called = _whole_order(clean.module, {*callers, first}, [example, *calibration])
    layers = tuple(name for name in called if name in callers)
    return LiveModel(
        module=clean.module,
        quantized=noisy.module,
        layers=layers,
        weights=weights,
        calibration=calibration,
        example=example,
        device=blueprint.device,
        seed=seed,
        activations=activations,
        place=place,
        names=blueprint.names,
        offloaded=(clean, noisy),
        cut=block_stages(blueprint.blocks, layers, called),
    )


def _whole_order(module: nn.Module, names: set[str], batches: Sequence[Batch]) -> list[str]:
    """The named modules in the order of their calls: those that the first batch does not reach come from others.

    A module that only a later batch reaches takes its place behind the one that was called before it.
    """
    order: list[str] = []
    for batch in batches:
        if len(order) == len(names):
            break
        place = 0
        for name in execution_order(module, names, batch):
            if name in order:
                place = max(place, order.index(name) + 1)
            else:
                order.insert(place, name)
                place += 1
    return order


def make_stages(live: LiveModel) -> tuple[Stage, ...]:
    """The stages of a live model; every compressed layer that a forward pass calls lies in exactly one.

    raises  ModelError for block globs that name nothing
    """
    if live.blocks:
        return _block_stages(live)
    if live.traced:
        return traced_stages(live.graph, live.layers)
    return (WholeStage("model", live.layers),)


def _block_stages(live: LiveModel) -> tuple[Stage, ...]:
    blocks = named_blocks(live)
    called = execution_order(live.module, {*live.layers, blocks[0]}, live.example)
    return block_stages(blocks, live.layers, called)


def named_blocks(live: LiveModel) -> list[str]:
    """The module names that the recipe's globs name, in the order in which a forward pass calls them."""
    chosen = {*glob_modules(live.module, live.blocks, live.place)}
    called = execution_order(live.module, chosen, live.example)
    idle = sorted(chosen - set(called))
    if idle:
        raise ModelError(live.place, f"blocks: the model never calls {idle[0]!r}", "name blocks that it calls")
    return called
