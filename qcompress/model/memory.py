"""A part of a network that runs again for the same inputs computes anew only what may have changed.

Layers are encoded one after another, each from what those before it now give, so that a block runs once for every
layer in it. What lies before a layer is the same in every such run: the block's submodules answer with what they gave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Answer(NamedTuple):
    """What a module gave, and the versions of its tensors, which rise with each change in place."""

    value: Any
    versions: tuple[int, ...]


class Memory:
    """What the submodules of one module gave for each batch, and give again for as long as nothing before them changes.

    The module must give the same for the same weights and inputs, and its inputs must stay as they are. It is named
    within a network, whose names all others are.
    """

    def __init__(self, network: nn.Module, name: str = "") -> None:
        self._root = network.get_submodule(name)
        self._prefix = name
        named = self._root.named_modules(prefix=name)
        self._parts = {
            place: part for place, part in named if place != name and not isinstance(part, torch.jit.ScriptModule)
        }
        self._answers: dict[int, dict[tuple[str, int], _Answer]] = {}
        self._weights: dict[str, tuple[Tensor, int]] = {}
        self._waiting: frozenset[str] = frozenset()
        self._batch = 0
        self._calls: Counter[str] = Counter()
        self._keeps = True

    def start(self, batch: int) -> None:
        """The run of a batch begins."""
        self._batch, self._keeps = batch, True
        self._calls.clear()

    @contextmanager
    def answering(self, waiting: Collection[str]) -> Iterator[None]:
        """Submodules answer meanwhile.

        waiting  those whose weights will change when all batches have run: nothing that runs after one is kept
        """
        self._refresh(frozenset(waiting))
        own = {name: vars(part).get("forward") for name, part in self._parts.items()}
        for name, part in self._parts.items():
            part.forward = self._remembering(name, part.forward)
        try:
            yield
        finally:
            for name, part in self._parts.items():
                del part.forward
                if own[name] is not None:
                    part.forward = own[name]

    def _refresh(self, waiting: frozenset[str]) -> None:
        """Forget everything where other weights have changed than those that were waited for."""
        named = (*self._root.named_parameters(self._prefix), *self._root.named_buffers(self._prefix))
        weights = {name: (value, value._version) for name, value in named}
        before = self._weights
        changed = [name for name, (value, version) in weights.items() if not _is_same(before.get(name), value, version)]
        if any(name.rpartition(".")[0] not in self._waiting for name in changed):
            self._answers.clear()
        self._weights, self._waiting = weights, waiting

    def _remembering(self, name: str, forward: Any) -> Any:
        holds = any(one == name or one.startswith(f"{name}.") for one in self._waiting)

        def answer(*args: Any, **kwargs: Any) -> Any:
            if holds:
                value = forward(*args, **kwargs)
                self._keeps = False
                return value
            key = (name, self._calls[name])
            self._calls[name] += 1
            answers = self._answers.setdefault(self._batch, {})
            known = answers.get(key)
            if known is not None and _versions(known.value) == known.versions:
                return known.value
            value = forward(*args, **kwargs)
            versions = _versions(value)
            if self._keeps and versions is not None:
                for inner in [one for one in answers if one[0].startswith(f"{name}.")]:
                    del answers[inner]
                answers[key] = _Answer(value, versions)
            return value

        return answer


def _is_same(before: tuple[Tensor, int] | None, value: Tensor, version: int) -> bool:
    return before is not None and before[0] is value and before[1] == version


def _versions(value: Any) -> tuple[int, ...] | None:
    """Of all tensors in what a module gave; None where it may hold others that are not seen."""
    if value is None or isinstance(value, bool | int | float | str):
        return ()
    if isinstance(value, Tensor):
        return None if value.is_inference() else (value._version,)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        return None
    parts = [_versions(one) for one in value]
    return None if any(part is None for part in parts) else tuple(v for part in parts for v in part or ())
