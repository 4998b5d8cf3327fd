"""A network gets an artifact's weights as codes: it takes the memory that the artifact takes packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from qcompress.artifact.reader import Artifact
from qcompress.model.build import take
from qcompress.model.pretrained import Names, Taken, without_data
from qcompress.runtime.packed_modules import int4_weight, put_packed, takes_packed
from qcompress.runtime.packed_weight import PackedWeight, pack_weight
from qcompress.types.config import Shape
from qcompress.types.encoded import Compressed

Kernel: TypeAlias = Literal["decode", "auto"]
"""How layers compute from codes: from the decoded weight, exactly; or by torch's 4-bit kernel where it is faster."""
KERNELS: tuple[Kernel, ...] = get_args(Kernel)

COPIES = 2
"""Of the codes of one tensor, a byte each, while they are packed anew."""


@dataclass(frozen=True)
class Held:
    """How a network holds an artifact's weights.

    packed   names of tensors that are held as codes
    kernel   those of them that a kernel computes from, rounded to bfloat16
    dense    names of compressed tensors that had to be decoded: module has no way to read them from codes
    n_bytes        of all parameters and buffers of the network
    dense_bytes    of the same, all weights in its dtype
    """

    packed: tuple[str, ...]
    kernel: tuple[str, ...]
    dense: tuple[str, ...]
    n_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Site:
    """A parameter of a network that can be held as codes: the module that owns it, and its name there."""

    owner: nn.Module
    name: str
    dtype: torch.dtype
    device: torch.device


Sites: TypeAlias = Mapping[str, Sequence[Site]]
"""Compressed tensor of an artifact -> where the network reads it; in several places where it is tied."""


def stored_shapes(artifact: Artifact) -> dict[str, Shape]:
    """The shape of every tensor of the checkpoint that an artifact was made from, copies of tied ones included."""
    shapes = {
        name: file.original(name).shape
        for file in artifact.files
        for name in (*file.manifest.tensors, *(info.name for info in file.kept))
    }
    return shapes | {name: shapes[twin] for name, twin in artifact.tied.items()}


@dataclass(frozen=True)
class Packing:
    """How a network takes an artifact: which weights as codes and where, all else decoded.

    names  the network's names for the artifact's tensors
    bare   the network without data, where it merges tensors
    """

    artifact: Artifact
    names: Names
    sites: Sites
    bare: nn.Module | None

    def hold_codes(self, kernel: Kernel = "decode") -> tuple[str, ...]:
        """Let the network read its weights from codes; the names of those that a kernel computes from."""
        by_kernel = []
        for name, encoded in _compressed(self.artifact, self.sites):
            first, *others = self.sites[name]
            weight: PackedWeight | None = None
            if kernel == "auto" and not others and first.device.type in ("cpu", "meta"):
                weight = int4_weight(first.owner, first.name, encoded, first.dtype)
            by_kernel += [name] * (weight is not None)
            weight = pack_weight(encoded) if weight is None else weight
            device = "cpu" if first.device.type == "meta" else first.device
            weight.to(device=device, dtype=first.dtype).eval()
            for site in self.sites[name]:
                put_packed(site.owner, site.name, weight)
        return tuple(by_kernel)

    def dense(self) -> tuple[str, ...]:
        """The compressed tensors that the network cannot read from codes."""
        return tuple(name for file in self.artifact.files for name in file.manifest.tensors if name not in self.sites)

    def values(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the network takes beside codes, by its own names: what was kept, and the other weights decoded."""
        artifact = self.artifact
        state = {**kept, **{name: artifact.file_of(name).tensor(name).weight() for name in self.dense()}}
        state |= {name: state[twin] for name, twin in artifact.tied.items() if twin in state}
        merged = {name: value for name, value in state.items() if name in self.names.merged}
        found = {self.names.place(name): value for name, value in state.items() if name not in merged}
        return found if self.bare is None else {**found, **take(self.bare, merged).values}


def make_packing(module: nn.Module, artifact: Artifact, taken: Taken) -> Packing:
    """How a network takes an artifact, of which `taken` says what becomes where. Nothing is changed yet."""
    names = taken.names(stored_shapes(artifact))
    return Packing(
        artifact, names, _find_sites(module, artifact, taken.places), without_data(module) if names.merged else None
    )


def _find_sites(module: nn.Module, artifact: Artifact, places: Mapping[str, str]) -> dict[str, list[Site]]:
    """Where a network reads those compressed tensors of an artifact that it can hold as codes.

    places  name in the artifact -> the network's, of each tensor that the network takes as it is
    """
    alike = _names_alike(module)
    tied: dict[str, list[str]] = {}
    for name, twin in artifact.tied.items():
        tied.setdefault(twin, []).append(name)
    found = {}
    for file in artifact.files:
        for name in file.manifest.tensors:
            own = [places[one] for one in (name, *tied.get(name, ())) if one in places]
            aliases = dict.fromkeys(alias for one in own for alias in alike.get(one, ()))
            sites = [_site(module, alias) for alias in aliases]
            held = [site for site in sites if site is not None]
            if held and len(held) == len(sites):
                found[name] = held
    return found


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a network, shared ones once; those on the meta device take none."""
    return sum(value.nbytes for value in _tensors(module) if not value.is_meta)


def dense_bytes(module: nn.Module) -> int:
    """The same if all of them had data."""
    return sum(value.nbytes for value in _tensors(module))


def _tensors(module: nn.Module) -> list[Tensor]:
    return list({id(value): value for value in (*module.parameters(), *module.buffers())}.values())


def _compressed(artifact: Artifact, sites: Sites) -> Iterator[tuple[str, Compressed]]:
    """Each compressed tensor that has a site, with its codes. Raises ResourceError where they do not fit."""
    held = 0
    for file in artifact.files:
        for name, entry in file.manifest.tensors.items():
            if name not in sites:
                continue
            codes = entry.code_rows * entry.columns
            file.refuse_memory(name, COPIES * codes * (4 if entry.is_unbounded else 1) + held, "holding it packed")
            yield name, file.tensor(name).read()
            held += codes if entry.is_unbounded else codes * entry.bits // 8


def _names_alike(module: nn.Module) -> Mapping[str, list[str]]:
    """Each name of the state dict -> all names of the tensor that it names."""
    same: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        same.setdefault(id(value), []).append(name)
    return {name: names for names in same.values() for name in names}


def _site(module: nn.Module, name: str) -> Site | None:
    """The site of a parameter; None where its module cannot read it from codes."""
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    value = owner._parameters.get(own)
    if value is None or not takes_packed(owner, own):
        return None
    return Site(owner, own, value.dtype, value.device)
