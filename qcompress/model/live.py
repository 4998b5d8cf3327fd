"""A live model and what methods see of it: the network as it was, its copy as it will be, and calibration data."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from qcompress.coding.affine import decode
from qcompress.encoded import Encoded
from qcompress.errors import ModelError
from qcompress.model.batches import Batch, run_model
from qcompress.model.trace import Untraceable, trace
from qcompress.settings import ActivationSettings
from qcompress.types import Decision

if TYPE_CHECKING:
    from qcompress.model.stages import Stage


@dataclass
class LiveModel:
    """A network with the checkpoint's weights, in eval mode on `device`, float32.

    module       the network as it was; methods never change it
    quantized    its copy: what has been encoded so far is in place, and methods put there what they encode
    layers       module names of the compressed weights, in the order in which a forward pass first calls them
    calibration  batches on `device`; none where the recipe has no calibration data
    activations  what the recipe asks of activation quantizers; None where it asks for none
    blocks       globs over module names, see ModelSettings
    place        names the recipe's model section in errors
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

    def generator(self, name: str) -> torch.Generator:
        """Random numbers for one layer."""
        return seeded_generator(self.seed, name, self.device)

    @cached_property
    def graph(self) -> fx.Graph:
        """The traced network. Raises ModelError where it cannot be traced."""
        graph, reason = self._trace
        if graph is None:
            mend = "name its units under `model.blocks`, or choose a method that needs no graph"
            raise ModelError(self.place, f"the model cannot be traced: {reason}", mend)
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
    def stages(self) -> tuple[Stage, ...]:
        """The network cut into stages, each beginning with a compressed layer where it could be traced."""
        from qcompress.model.stages import make_stages

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


def seeded_generator(seed: int, name: str, device: torch.device | str) -> torch.Generator:
    """Random numbers for one layer or tensor, whatever the order in which they come."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


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
) -> LiveModel:
    """The live model of a built module with its weights loaded; nothing in it works in place."""
    module = module.to(device).float().eval()
    module.requires_grad_(False)
    part: Any
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False
    names = [layer_name(decision.tensor.name) for decision in decisions if decision.compresses]
    example = example.to(device)
    order = execution_order(module, set(names), example)
    live = LiveModel(
        module=module,
        quantized=module,
        layers=tuple(order),
        calibration=calibration,
        example=example,
        device=device,
        seed=seed,
        activations=activations,
        blocks=blocks,
        place=place,
    )
    # The trace may leave constants on the module, which its copy needs too.
    _ = live.traced
    live.quantized = copy.deepcopy(module)
    return live


def execution_order(module: nn.Module, names: set[str], example: Batch) -> list[str]:
    """The named modules that a forward pass calls, in the order of their first call.

    raises  ModelError where the module does not run on the example
    """
    order: dict[str, None] = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name in names
    ]
    try:
        with torch.no_grad():
            run_model(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)
