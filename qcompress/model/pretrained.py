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
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qcompress.coding.grids import take_rows
from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.data.user_code import import_package
from qcompress.model.products import stacked_axis
from qcompress.types.config import Shape
from qcompress.types.encoded import Constant, Encoded, Fitted, Kept
from qcompress.types.plan import Decision, Plan, TensorInfo, row_shape

Value = TypeVar("Value")


@dataclass(frozen=True)
class Stack:
    """A tensor of the network whose rows several matrices of its checkpoint are, as the experts of a layer.

    shape, axis  of the tensor, and its channel axes, which become its rows
    parts        name in the checkpoint -> the rows that it is, [start, stop)
    """

    shape: Shape
    axis: tuple[int, ...]
    parts: Mapping[str, tuple[int, int]]

    @property
    def is_whole(self) -> bool:
        """Whether each row is one part's."""
        ends = sorted(self.parts.values())
        joined = all(before[1] == after[0] for before, after in pairwise(ends))
        return bool(ends) and joined and (ends[0][0], ends[-1][1]) == (0, row_shape(self.shape, self.axis)[0])

    @property
    def part_shapes(self) -> dict[str, Shape]:
        columns = row_shape(self.shape, self.axis)[1]
        return {name: (stop - start, columns) for name, (start, stop) in self.parts.items()}

    def codes_apart(self, encoded: Encoded) -> dict[str, Encoded]:
        """The codes of each part, on the grids that its rows have in the stack."""
        if isinstance(encoded, Constant):
            return {name: replace(encoded, shape=shape, axis=(0,)) for name, shape in self.part_shapes.items()}
        if isinstance(encoded, Kept):
            return {name: Kept(value) for name, value in self.values_apart(encoded.value).items()}
        return {name: take_rows(encoded, *span) for name, span in self.parts.items()}

    def values_apart(self, weight: Tensor) -> dict[str, Tensor]:
        """The values of each part."""
        rows = rows_from_weight(weight, self.axis)
        return {name: rows[start:stop] for name, (start, stop) in self.parts.items()}

    def groups_apart(self, values: Tensor) -> dict[str, Tensor]:
        """What each part has of [groups, ...], a group the rows that have the same inputs; copies."""
        rows = row_shape(self.shape, self.axis)[0] // max(len(values), 1)
        return {name: values[start // rows : -(-stop // rows)].clone() for name, (start, stop) in self.parts.items()}


@dataclass(frozen=True)
class Names:
    """The names that a network has for the tensors of its checkpoint, where they are others.

    places  name in the checkpoint -> the network's
    merged  names whose tensors the network holds as parts of others only
    stacks  the network's name -> which of them are its rows
    """

    places: Mapping[str, str] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def place(self, name: str) -> str:
        """The network's name for a tensor of the checkpoint."""
        return self.places.get(name, name)

    def inward(self, plan: Plan) -> Plan:
        """The plan in the network's names: stacks in place of their parts, without other parts of tensors."""
        decisions: dict[str, Decision] = {}
        for one in plan.decisions:
            if one.stack is not None and one.compresses:
                stack = self.stacks[one.stack]
                tensor = TensorInfo(one.stack, stack.shape, one.tensor.dtype)
                decisions.setdefault(one.stack, replace(one, tensor=tensor, axis=stack.axis))
            elif one.tensor.name not in self.merged:
                decisions[one.tensor.name] = self._renamed(one)
        return replace(plan, decisions=tuple(decisions.values()))

    def _renamed(self, decision: Decision) -> Decision:
        tied = None if decision.tied_to is None else self.place(decision.tied_to)
        return replace(decision, tensor=self.renamed(decision.tensor), tied_to=tied)

    def renamed(self, tensor: TensorInfo) -> TensorInfo:
        """The tensor in the network's name."""
        return replace(tensor, name=self.place(tensor.name))

    def outward(self, fitted: Fitted) -> Fitted:
        """What was chosen in the network's names, in those of the checkpoint; modules keep the names of the network."""
        encoded, references = {**fitted.encoded}, {**fitted.references}
        for name in self.stacks.keys() & encoded.keys():
            encoded |= self.stacks[name].codes_apart(encoded.pop(name))
        for name in self.stacks.keys() & references.keys():
            references |= self.stacks[name].values_apart(references.pop(name))
        return replace(fitted, encoded=self.tensors(encoded), references=self.tensors(references))

    def statistics(self, values: Mapping[str, Tensor], ends: tuple[str, ...]) -> dict[str, Tensor]:
        """Statistics [groups, ...] of the inputs of the network's tensors, by those of the checkpoint.

        ends  what stands behind a tensor's name in the keys
        """
        found = {**values}
        for name, stack in self.stacks.items():
            for end in ends:
                if f"{name}{end}" in found:
                    apart = stack.groups_apart(found.pop(f"{name}{end}"))
                    found |= {f"{part}{end}": value for part, value in apart.items()}
        return self.tensors(found, ends)

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
    stacks   the network's name -> its parts in the checkpoint, of each tensor that is made of whole matrices there
    """

    places: Mapping[str, str]
    values: Mapping[str, Tensor]
    surplus: tuple[str, ...]
    missing: tuple[str, ...]
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def names(self, tensors: Iterable[str]) -> Names:
        """The network's names for these tensors of the checkpoint."""
        places = {name: place for name, place in self.places.items() if name != place}
        return Names(places, frozenset(tensors) - set(self.places) - set(self.surplus), self.stacks)


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
    places = {given[_memory(value)]: name for name, value in values.items() if _memory(value) in given}
    merged = state.keys() - places.keys() - set(info.unexpected_keys)
    shapes = {name: tuple(state[name].shape) for name in merged}
    made = {name: tuple(value.shape) for name, value in values.items() if _memory(value) not in given}
    return Taken(
        places=places,
        values=values,
        surplus=tuple(sorted(info.unexpected_keys)),
        missing=tuple(name for name in found if name in info.missing_keys),
        stacks=_find_stacks(skeleton, made, shapes) if merged else {},
    )


def _find_stacks(module: nn.Module, made: Mapping[str, Shape], merged: Mapping[str, Shape]) -> dict[str, Stack]:
    """The network's tensors that whole matrices of the checkpoint are the rows of, no more and no fewer.

    The library takes them apart again; here two columns of each, whose values say which row and column they are.

    made    the network's names and shapes of what it makes of several tensors
    merged  names and shapes of those in the checkpoint
    """
    axes = {name: axis for name, shape in made.items() if (axis := _stack_axis(module, name, shape)) is not None}
    numbers: dict[str, Tensor] = {}
    ends: list[tuple[int, str]] = []
    count = 0
    for name, axis in axes.items():
        rows = row_shape(made[name], axis)[0]
        narrow = tuple(size if index in axis else 2 for index, size in enumerate(made[name]))
        numbers[name] = weight_from_rows(_numbered(count, rows), narrow, axis)
        count += rows
        ends.append((count, name))
    apart = revert(module, numbers) if numbers else {}
    parts: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in axes}
    for part in merged.keys() & apart.keys():
        height = merged[part][0]
        first = int(apart[part].flatten()[0]) // 2
        if not torch.equal(apart[part], _numbered(first, height)):
            continue
        end, name = next(one for one in ends if one[0] > first)
        rows, columns = row_shape(made[name], axes[name])
        if merged[part] == (height, columns) and first + height <= end:
            parts[name][part] = (first - end + rows, first - end + rows + height)
    found = {name: Stack(made[name], axes[name], spans) for name, spans in parts.items()}
    return {name: stack for name, stack in found.items() if stack.is_whole}


def _numbered(first: int, rows: int) -> Tensor:
    """[rows, 2], counted from that of row `first`; on the CPU also where transformers makes networks without data."""
    return torch.arange(2 * first, 2 * (first + rows), device="cpu").reshape(rows, 2)


def _stack_axis(module: nn.Module, name: str, shape: Shape) -> tuple[int, int] | None:
    return stacked_axis(module.get_submodule(name.rpartition(".")[0]), shape)


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
