"""Sequences whose members are not held: each is made anew whenever it is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Member = TypeVar("Member", covariant=True)


class Anew(Sequence[Member]):
    """A sequence that makes its members, one at a time while one goes through it; a slice of it is a list."""

    @abstractmethod
    def make(self, index: int) -> Member:
        """The member of this number, from 0."""

    @overload
    def __getitem__(self, index: int) -> Member: ...

    @overload
    def __getitem__(self, index: slice) -> list[Member]: ...

    def __getitem__(self, index: int | slice) -> Member | list[Member]:
        if isinstance(index, slice):
            return [self.make(place) for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.make(index)
