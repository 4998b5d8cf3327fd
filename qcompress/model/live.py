"""Methods see a live model as the network as it was, its copy as it will be, and calibration data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompress.coding.grids import decode
from qcompress.data.batches import Batch
from qcompress.errors import ModelError
from qcompress.model.pretrained import Names
from qcompress.model.products import caller_of
from qcompress.model.routing import Tape
from qcompress.model.stages import BlockStage, HeadStage, Stage, TailStage, WholeStage, execution_order, traced_stages
from qcompress.model.trace import Untraceable, trace
from qcompress.types.encoded import Encoded
from qcompress.types.plan import Decision
from qcompress.types.run import seeded_generator
from qcompress.types.settings import ActivationSettings


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
        try:
            return trace(self.module, self.layers, self.example), ""
        except Untraceable as problem:
            return None, str(problem)

    @cached_property
    def routes(self) -> bool:
        """Whether the network decides by values what goes where, as one with experts does."""
        tape = Tape()
        with torch.no_grad(), tape:
            self.module(*self.example.args, **self.example.kwargs)
        return tape.decides

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The network cut into stages, each beginning with a compressed layer where it could be traced."""
        return make_stages(self)

    def put(self, tensors: Mapping[str, Encoded]) -> None:
        """Put decoded weights and adjusted tensors into the quantized copy, by tensor name."""
        put_tensors(self.quantized, {name: decode(one) for name, one in tensors.items()})


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
    )
    # The trace may leave constants on the module, which its copy needs too.
    _ = live.traced
    live.quantized = copy.deepcopy(module)
    return live


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
    inside = {name: block for block in blocks for name in live.layers if name == block or name.startswith(f"{block}.")}
    called = execution_order(live.module, {*live.layers, blocks[0]}, live.example)
    first = called.index(blocks[0])
    outer = [name for name in called if name not in inside and name != blocks[0]]
    before = tuple(name for name in outer if called.index(name) < first)
    after = tuple(name for name in outer if called.index(name) > first)
    stages: list[Stage] = [HeadStage(blocks[0], before)]
    stages += [BlockStage(block, tuple(name for name in live.layers if inside.get(name) == block)) for block in blocks]
    return (*stages, TailStage("output", after, tuple(blocks)))


def named_blocks(live: LiveModel) -> list[str]:
    """The module names that the recipe's globs name, in the order in which a forward pass calls them."""
    names = [name for name, _ in live.module.named_modules() if name]
    chosen: set[str] = set()
    for glob in live.blocks:
        matches = {name for name in names if fnmatchcase(name, glob) and name.count(".") == glob.count(".")}
        if not matches:
            raise ModelError(live.place, f"blocks: {glob!r} names no module", f"modules are named like {names[-1]!r}")
        chosen |= matches
    called = execution_order(live.module, chosen, live.example)
    idle = sorted(chosen - set(called))
    if idle:
        raise ModelError(live.place, f"blocks: the model never calls {idle[0]!r}", "name blocks that it calls")
    return called
