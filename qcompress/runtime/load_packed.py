"""A network gets an artifact's weights as codes: it takes the memory that the artifact takes packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from qcompress.artifact.reader import Artifact
from qcompress.coding.grids import decode
from qcompress.runtime.packed_modules import Int4Weight, int4_weight, put_packed, takes_packed
from qcompress.runtime.packed_weight import PackedWeight, pack_weight
from qcompress.types.encoded import Compressed

Kernel: TypeAlias = Literal["decode", "auto"]
"""How layers compute from codes: from the decoded weight, exactly; or by torch's 4-bit kernel where it is faster."""

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


def load_packed(
    module: nn.Module,
    artifact: Artifact,
    load_dense: Callable[[dict[str, Tensor]], None],
    kernel: Kernel = "decode",
    place: Callable[[str], str] = str,
) -> Held:
    """Put an artifact's weights into a module of the original architecture, compressed ones as codes.

    load_dense  loads the compressed tensors that cannot be held as codes, and whatever was kept
    place       gives the module's name for a tensor of the artifact
    """
    places = _places_of(module)
    tied = {twin: [name for name, other in artifact.tied.items() if other == twin] for twin in artifact.tied.values()}
    dense_bytes = sum({id(value): value.nbytes for value in (*module.parameters(), *module.buffers())}.values())
    packed, by_kernel, dense = [], [], []
    for name, encoded in _compressed(artifact):
        names = dict.fromkeys(alias for one in (name, *tied.get(name, ())) for alias in places.get(place(one), ()))
        sites = [_owner(module, alias) for alias in names]
        if not sites or not all(takes_packed(*site) for site in sites):
            dense.append((name, encoded))
            continue
        weight = _hold(*sites[0], encoded, kernel if len(sites) == 1 else "decode")
        for site in sites:
            put_packed(*site, weight)
        packed.append(name)
        by_kernel += [name] * isinstance(weight, Int4Weight)
    load_dense({name: decode(encoded) for name, encoded in dense})
    return Held(tuple(packed), tuple(by_kernel), tuple(name for name, _ in dense), held_bytes(module), dense_bytes)


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a network, shared ones once."""
    tensors = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return sum(value.nbytes for value in tensors.values() if not value.is_meta)


def _compressed(artifact: Artifact) -> Iterator[tuple[str, Compressed]]:
    """Each compressed tensor with its codes. Raises ResourceError where they do not fit."""
    held = 0
    for file in artifact.files:
        for name, entry in file.manifest.tensors.items():
            codes = entry.code_rows * entry.columns
            file.refuse_memory(name, COPIES * codes * (4 if entry.is_unbounded else 1) + held, "holding it packed")
            yield name, file.tensor(name).read()
            held += codes if entry.is_unbounded else codes * entry.bits // 8


def _hold(owner: nn.Module, name: str, encoded: Compressed, kernel: Kernel) -> PackedWeight:
    dense = owner._parameters[name]
    assert dense is not None
    weight: PackedWeight | None = None
    if kernel == "auto":
        weight = int4_weight(owner, name, encoded, dense.dtype)
    weight = pack_weight(encoded) if weight is None else weight
    device = "cpu" if dense.is_meta else dense.device
    return weight.to(device=device, dtype=dense.dtype).eval()


def _places_of(module: nn.Module) -> Mapping[str, list[str]]:
    """Each name of the state dict -> all names of the tensor that it names."""
    same: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        same.setdefault(id(value), []).append(name)
    return {name: names for names in same.values() for name in names}


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return module.get_submodule(path), own
