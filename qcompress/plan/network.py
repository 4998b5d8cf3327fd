"""A tensor's surroundings: the others of its module and its network, config.json, and what a network says of it.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qcompress.types.plan import ModelFacts, TensorFacts, TensorInfo

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")

_WEIGHTS = re.compile(r"weights?|weight_(v|orig)|kernel|original1?")


@dataclass(frozen=True, eq=False)
class Network:
    """What the tensors of a checkpoint tell of each other, with config.json and what a network says, both if known."""

    tensors: Sequence[TensorInfo]
    config: Mapping[str, object] = field(default_factory=dict)
    model: ModelFacts = field(default_factory=dict)

    @cached_property
    def configs(self) -> list[Mapping[str, object]]:
        """The config and every mapping within it, at any depth."""
        found: list[Mapping[str, object]] = [self.config]
        for one in found:
            found += [value for value in one.values() if isinstance(value, dict)]
        return found

    def counts(self, keys: Callable[[str], object]) -> frozenset[int]:
        """The whole numbers above 1 that the configs have under some keys."""
        values = (value for one in self.configs for key, value in one.items() if keys(key))
        return frozenset(value for value in values if isinstance(value, int) and value > 1)

    @cached_property
    def model_types(self) -> frozenset[str]:
        return frozenset(str(one["model_type"]) for one in self.configs if "model_type" in one)

    @cached_property
    def expert_counts(self) -> frozenset[int]:
        return self.counts(lambda key: key in EXPERT_COUNTS)

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Module -> its own tensors by the last part of their names."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for tensor in self.tensors:
            module, _, leaf = plain_name(tensor.name).rpartition(".")
            found.setdefault(module, {})[leaf] = tensor
        return found

    @cached_property
    def children(self) -> Mapping[str, set[str]]:
        """Module -> the first parts of all names below it."""
        found: dict[str, set[str]] = {}
        for module, own in self.modules.items():
            found.setdefault(module, set()).update(own)
            while module and module not in (found.get(parent := module.rpartition(".")[0], ())):
                name = module.rpartition(".")[2]
                if name in found.setdefault(parent, set()):
                    break
                found[parent].add(name)
                module = parent
        return found

    def seen(self) -> Iterator[Seen]:
        """Every tensor with its surroundings, in their order."""
        for tensor in self.tensors:
            yield Seen(tensor, self, self.model.get(tensor.name))


@dataclass(frozen=True, eq=False)
class Seen:
    """One tensor and its surroundings; `fact` is what a network says of it."""

    info: TensorInfo
    network: Network
    fact: TensorFacts | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of its module's name."""
        return tuple(plain_name(self.info.name).split(".")[:-1])

    @cached_property
    def leaf(self) -> str:
        """Its name in its module."""
        return plain_name(self.info.name).rpartition(".")[2]

    @property
    def module(self) -> str:
        return ".".join(self.parts)

    @cached_property
    def owner(self) -> str:
        """The last part of its module's name that is no number, in words with `_` between them."""
        name = next((part for part in reversed(self.parts) if not part.isdigit()), "")
        return name if name.islower() else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()

    @cached_property
    def siblings(self) -> Mapping[str, TensorInfo]:
        """The tensors of its module, itself included."""
        return self.network.modules.get(self.module, {})

    @property
    def is_weight(self) -> bool:
        """Whether it is what a module of its own multiplies by or looks rows up in, by its name."""
        return _WEIGHTS.fullmatch(self.leaf) is not None

    def around(self, up: int = 1) -> set[str]:
        """The names in the module so many levels above its own."""
        return self.network.children.get(".".join(self.parts[: len(self.parts) - up]), set())


def plain_name(name: str) -> str:
    """A name without what adapters and parametrizations put around a weight."""
    if "parametrizations." in name or ".base_layer." in name:
        name = name.replace(".base_layer.", ".")
        name = re.sub(r"parametrizations\.(\w+)\.original(\d?)", _unparametrized, name)
    return name


def _unparametrized(found: re.Match[str]) -> str:
    return f"{found[1]}_g" if found[2] == "0" else f"{found[1]}_v" if found[2] == "1" else found[1]
