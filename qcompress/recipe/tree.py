"""A recipe as a tree in which every value knows its place and its path, and the list of what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, Union

from qcompress.errors import InputError, RecipeError, raise_all
from qcompress.recipe.hints import plain, quoted

MOST_ERRORS = 100


class Broken:
    """The value of what was already refused: nothing more is said of it."""


Value: TypeAlias = Union[bool, int, float, str, "list[Node]", "dict[str, Node]", Broken, None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: "recipe.yaml:7" or "--set seed=1"; `order` sorts errors."""

    text: str
    order: int


@dataclass(slots=True)
class Node:
    """One value; what stands under a key has the key's place. `path` is for errors: "rules[0].rtn.bits"."""

    value: Value
    place: Place
    path: str

    @property
    def where(self) -> str:
        return f"{self.place.text}: {self.path}" if self.path else self.place.text

    @property
    def is_broken(self) -> bool:
        """Whether this or anything below it was already refused."""
        return any(isinstance(node.value, Broken) for node in self.walk())

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        if isinstance(self.value, dict):
            for child in self.value.values():
                yield from child.walk()
        elif isinstance(self.value, list):
            for child in self.value:
                yield from child.walk()

    def data(self) -> Any:
        """The value as plain Python data."""
        if isinstance(self.value, dict):
            return {key: node.data() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.data() for node in self.value]
        return self.value


@dataclass(slots=True)
class Problems:
    """Everything that is wrong with one recipe, to be raised at once in the order of its lines."""

    found: list[tuple[int, RecipeError]] = field(default_factory=list)

    def add(self, node: Node, what: str, mend: str) -> None:
        self.found.append((node.place.order, RecipeError(node.where, what, mend)))

    def raise_all(self, source: str) -> None:
        """Raise RecipeError, or Refusals of several; return where nothing is wrong."""
        errors: list[InputError] = [error for _, error in sorted(self.found, key=lambda problem: problem[0])]
        if len(errors) > MOST_ERRORS:
            more = RecipeError(source, f"{len(errors) - MOST_ERRORS} more errors", "mend these first")
            errors = [*errors[:MOST_ERRORS], more]
        raise_all(errors)


def path_of_key(path: str, key: str) -> str:
    """The path of a mapping's value."""
    return f"{path}.{plain(key)}" if path else plain(key)


def path_of_item(path: str, index: int) -> str:
    """The path of a list's item."""
    return f"{path}[{index}]"


def shown(value: object) -> str:
    """A value as an error shows it."""
    match value:
        case None:
            return "`null`"
        case bool():
            return f"`{str(value).lower()}`"
        case str():
            return quoted(value)
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return repr(value)
