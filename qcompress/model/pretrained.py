"""A network of transformers takes a checkpoint as the library's own loading does, which renames and merges tensors.

What `save_pretrained` writes has the names of old checkpoints: `from_pretrained` renames them, stacks the experts of a
layer, splits what was one. The library's loader is called here on a copy of the network without data, so that headers
alone tell where each tensor goes, and the network that is given stays as it is until everything is known to fit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qcompress.data.user_code import import_package
from qcompress.types.encoded import Fitted
from qcompress.types.plan import Decision, Plan, TensorInfo

Value = TypeVar("Value")


@dataclass(frozen=True)
class Names:
    """The names that a network has for the tensors of its checkpoint, where they are others.

    places  name in the checkpoint -> the network's
    merged  names whose tensors the network holds as parts of others only
    """

    places: Mapping[str, str] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()

    def place(self, name: str) -> str:
        """The network's name for a tensor of the checkpoint."""
        return self.places.get(name, name)

    def inward(self, plan: Plan) -> Plan:
        """The plan in the network's names, without what it holds as parts of others."""
        decisions = (one for one in plan.decisions if one.tensor.name not in self.merged)
        return replace(plan, decisions=tuple(map(self._renamed, decisions)))

    def _renamed(self, decision: Decision) -> Decision:
        tied = None if decision.tied_to is None else self.place(decision.tied_to)
        return replace(decision, tensor=self.renamed(decision.tensor), tied_to=tied)

    def renamed(self, tensor: TensorInfo) -> TensorInfo:
        """The tensor in the network's name."""
        return replace(tensor, name=self.place(tensor.name))

    def outward(self, fitted: Fitted) -> Fitted:
        """What was chosen in the network's names, in those of the checkpoint; modules keep the names of the network."""
        return replace(fitted, encoded=self.tensors(fitted.encoded), references=self.tensors(fitted.references))

    def tensors(self, values: Mapping[str, Value], ends: tuple[str, ...] = ("",)) -> dict[str, Value]:
        """What belongs to the network's tensors, by their names in the checkpoint.

        ends  what may stand behind a tensor's name in the keys
        """
        back = {f"{place}{end}": f"{name}{end}" for name, place in self.places.items() for end in ends}
        return {back.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True)
class Taken:
    """What a network of transformers makes of a checkpoint.

    places   name in the checkpoint -> the network's, of each tensor that is taken as it is
    values   the network's name -> what it takes, for all that the checkpoint gives it, of shapes that fit or do not
    surplus  names that the network has no place for
    missing  the network's names that nothing gives a value, tied ones too
    """

    places: Mapping[str, str]
    values: Mapping[str, Tensor]
    surplus: tuple[str, ...]
    missing: tuple[str, ...]

    def names(self, tensors: Iterable[str]) -> Names:
        """The network's names for these tensors of the checkpoint."""
        places = {name: place for name, place in self.places.items() if name != place}
        return Names(places, frozenset(tensors) - set(self.places) - set(self.surplus))


def is_pretrained(module: nn.Module) -> bool:
    """Whether the module is a network of a transformers that converts checkpoints, which version 5 began."""
    bases = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
    return "transformers.modeling_utils.PreTrainedModel" in bases and _loading() is not None


def take(module: nn.Module, state: Mapping[str, Tensor]) -> Taken:
    """What the network makes of the tensors of a checkpoint, which it does not get yet; they may have no data.

    Where all are of one dtype, values that are taken as they are share their memory with `state`; merged ones do not.
    Those that the library cannot merge are missing.
    """
    loading = _loading()
    assert loading is not None and is_pretrained(module)
    dtype = _widest(state)
    skeleton = without_data(module, dtype)
    device = next((str(value.device) for value in state.values()), "meta")
    config = import_package("transformers.modeling_utils").LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        weight_mapping=import_package("transformers.conversion_mapping").get_model_conversion_mapping(skeleton),
    )
    with _silent():
        info, _ = loading.convert_and_load_state_dict_in_model(skeleton, dict(state), config)
        absent = set(info.missing_keys)
        skeleton._adjust_missing_and_unexpected_keys(info)
    found: dict[str, Tensor] = skeleton.state_dict()
    given = {_memory(value): name for name, value in state.items()}
    values = {name: value.detach() for name, value in found.items() if name not in absent}
    values |= {name: torch.empty(tuple(shape), device="meta") for name, shape, _ in info.mismatched_keys}
    return Taken(
        places={given[_memory(value)]: name for name, value in values.items() if _memory(value) in given},
        values=values,
        surplus=tuple(sorted(info.unexpected_keys)),
        missing=tuple(name for name in found if name in info.missing_keys),
    )


def revert(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network as `save_pretrained` writes it: renamed, and apart what loading merges."""
    found: dict[str, Tensor] = _loading().revert_weight_conversion(module, dict(values))
    return found


def _loading() -> Any:
    """The module of transformers that loads checkpoints, or None before version 5, which changed no names."""
    try:
        return import_package("transformers.core_model_loading")
    except ImportError:
        return None


def _widest(state: Mapping[str, Tensor]) -> torch.dtype:
    """A dtype that holds every floating value of at least half precision exactly."""
    kinds = {value.dtype for value in state.values() if value.is_floating_point() and value.itemsize > 1}
    return reduce(torch.promote_types, kinds) if kinds else torch.float32


def without_data(module: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """The same network, parameters and buffers on the meta device, tied where it ties them.

    dtype  of what is floating; its own where absent
    """
    memo: dict[int, Any] = {}
    for one in (*module.parameters(), *module.buffers()):
        bare = torch.empty_like(one, dtype=dtype if one.is_floating_point() else None, device="meta")
        memo[id(one)] = nn.Parameter(bare, one.requires_grad) if isinstance(one, nn.Parameter) else bare
    return copy.deepcopy(module, memo)


def _memory(value: Tensor) -> int:
    """What is the same for tensors that share their memory, which those on the meta device have none of."""
    number: int = value.untyped_storage()._cdata
    return number


@contextmanager
def _silent() -> Iterator[None]:
    """Within it transformers draws no bar and warns of nothing: what does not fit is said here."""
    logging = import_package("transformers.utils.logging")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
