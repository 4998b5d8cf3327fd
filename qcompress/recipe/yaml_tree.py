"""YAML text becomes plain data whose values know their lines; what is more than data is refused.

No nesting, alias or tag can do any harm. Plain scalars follow YAML 1.2's core schema: `4e-5` is a number, and `yes`,
`off`, `1:30` and `0b1` are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml
from yaml.reader import ReaderError

from qcompress.errors import RecipeError, raise_all
from qcompress.types.words import plain, quoted

DEEPEST = 32
LARGEST_INTEGER = 2**63 - 1

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_QUOTE_STAR = 'put text that starts with * in quotes, as "*.weight"'

Path: TypeAlias = tuple[str | int, ...]
"""The keys and indices that lead to a value: ("rules", 0, "rtn", "bits")."""


class Broken:
    """The value of what was already refused: nothing more is said of it."""


BROKEN = Broken()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: "recipe.yaml:7" or "--bits 4".

    order  sorts errors
    bare   whether errors name this place alone, without the value's path
    """

    text: str
    order: tuple[int, int]
    bare: bool = False


@dataclass
class Document:
    """Plain data, where each value was written, and all that is wrong with it; what stands under a key is there."""

    source: str
    data: Any = None
    places: dict[Path, Place] = field(default_factory=dict)
    found: list[tuple[tuple[int, int], RecipeError]] = field(default_factory=list)

    def at(self, path: Path) -> Any:
        """The value at a path; None where there is none."""
        value = self.data
        for step in path:
            if isinstance(value, dict):
                value = value.get(step)
            else:
                value = value[step] if isinstance(value, list) and isinstance(step, int) else None
        return value

    def put(self, path: Path, value: object, place: Place) -> None:
        """Set the value at a path whose container is there; all of it is written at `place`."""
        self.places = {one: old for one, old in self.places.items() if one[: len(path)] != path}
        self.places[path] = place
        if path:
            self.at(path[:-1])[path[-1]] = value
        else:
            self.data = value

    def is_broken(self, path: Path) -> bool:
        """Whether the value or anything in it was already refused."""
        return any(isinstance(value, Broken) for value in _walk(self.at(path)))

    def where(self, path: Path) -> str:
        """How errors name a value: "recipe.yaml:7: rules[0].rtn.bits"."""
        return _where(path, self._place(path))

    def refuse(self, path: Path, what: str, hint: str, place: Place | None = None) -> None:
        """Note that the value at a path is wrong; where it is not written there, at `place`."""
        place = place or self._place(path)
        self.found.append((place.order, RecipeError(_where(path, place), what, hint)))

    def _place(self, path: Path) -> Place:
        """The place of a value, or of the nearest one that holds it."""
        return next(self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places)

    def raise_all(self) -> None:
        """Raise RecipeError, or Refusals of several, in the order of lines; return where nothing is wrong."""
        raise_all([error for _, error in sorted(self.found, key=lambda found: found[0])])


def _where(path: Path, place: Place) -> str:
    return f"{place.text}: {path_text(path)}" if path and not place.bare else place.text


def path_text(path: Path) -> str:
    """A path as errors show it: "rules[0].rtn.bits"."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{plain(step)}" for step in path]
    return "".join(steps).removeprefix(".")


def _walk(value: object) -> Iterator[object]:
    yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _walk(child)


def compose(text: str, source: str, fixed: Place | None = None, path: Path = ()) -> Document:
    """The one YAML document in `text`: null where there is none, Broken where its syntax ended the reading.

    source  names the file in places: "recipe.yaml:7"
    fixed   a place for every value, instead of source and line
    path    of its root

    Tags, anchors, aliases, merge keys, duplicate keys and keys that are not text are refused.
    """
    document = Document(source, BROKEN, {(): fixed or Place(f"{source}:1", (1, 0))})
    try:
        loader = _Composer(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"character U+{ord(text[error.position]):04X} is not allowed in YAML"
        _refuse_line(document, line, fixed, what, "remove it")
        return document
    try:
        root = loader.get_single_node()
        document.data = None if root is None else _Reading(document, loader.beside, fixed).read(root, path, None)
    except _Unreadable as error:
        _refuse_line(document, error.line, fixed, error.what, error.hint)
    except yaml.MarkedYAMLError as error:
        _refuse_line(document, *_syntax(error, fixed))
    except (ValueError, OverflowError):
        # PyYAML hands a \U escape of any size to chr().
        what = "an escape names no Unicode character"
        _refuse_line(document, loader.line + 1, fixed, what, "correct the escape")
    return document


def _refuse_line(document: Document, line: int, fixed: Place | None, what: str, hint: str) -> None:
    document.refuse((), what, hint, fixed or Place(f"{document.source}:{line}", (line, 0)))


def _syntax(error: yaml.MarkedYAMLError, fixed: Place | None) -> tuple[int, Place | None, str, str]:
    """The line of a syntax error, what is wrong there, and a hint."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    problem, context = str(error.problem), str(error.context or "")
    if "single document" in context:
        return line, fixed, "a second YAML document", "keep one recipe a file"
    if "alias" in context:
        hint = _QUOTE_STAR
    elif r"'\t'" in problem:
        hint = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        hint = "check the indentation; text that holds `: ` needs quotes"
    elif "cannot start any token" in problem:
        hint = "put the text in quotes"
    elif error.context_mark is not None and error.context_mark is not mark:
        hint = f"look at what starts on line {error.context_mark.line + 1}"
    else:
        hint = "correct the YAML"
    return line, fixed, f"not YAML: {plain(problem, 200)}", hint


class _Unreadable(Exception):
    """Nothing after this line can be placed in the data."""

    def __init__(self, event: yaml.Event, what: str, hint: str) -> None:
        self.line, self.what, self.hint = event.start_mark.line + 1 if event.start_mark else 1, what, hint


@dataclass(frozen=True, slots=True)
class _Beside:
    """What a node has beside its value: an alias in place of it, an anchor, a tag."""

    alias: str | None = None
    anchor: str | None = None
    tag: str | None = None


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which follows no alias and notes the anchors and tags that it meets."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.beside: dict[yaml.Node, _Beside] = {}
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            mark: Any = event.start_mark
            node = yaml.ScalarNode("", "", mark, mark)
            self.beside[node] = _Beside(alias=event.anchor)
            return node
        if isinstance(event, yaml.CollectionStartEvent):
            if isinstance(parent, yaml.MappingNode) and index is None:
                raise _Unreadable(event, "a key that is not text", "write `key: value`")
            if self.depth >= DEEPEST:
                raise _Unreadable(event, f"nested more than {DEEPEST} deep", "a recipe needs few levels")
        beside = _Beside(None, event.anchor, event.tag)
        event.anchor = event.tag = None
        self.depth += 1
        composed = super().compose_node(parent, index)
        self.depth -= 1
        assert composed is not None
        self.beside[composed] = beside
        return composed


@dataclass
class _Reading:
    """PyYAML's nodes become the data of a document."""

    document: Document
    beside: dict[yaml.Node, _Beside]
    fixed: Place | None

    def read(self, node: yaml.Node, path: Path, place: Place | None) -> Any:
        """The data of a node; `place` is that of its key."""
        self.document.places[path] = place or self._place(node)
        if not self._is_data(node, path):
            return BROKEN
        match node:
            case yaml.MappingNode():
                return self._mapping(node, path)
            case yaml.SequenceNode():
                return [self.read(item, (*path, index), None) for index, item in enumerate(node.value)]
            case _:
                return self._scalar(node, path)

    def _place(self, node: yaml.Node) -> Place:
        mark = node.start_mark
        return self.fixed or Place(f"{self.document.source}:{mark.line + 1}", (mark.line + 1, mark.column))

    def _is_data(self, node: yaml.Node, path: Path, place: Place | None = None) -> bool:
        """Whether a node is a value, and no more than that."""
        beside = self.beside[node]
        if beside.alias is not None:
            what = f"alias {quoted(f'*{beside.alias}')}: a recipe has no aliases"
            self.document.refuse(path, what, _QUOTE_STAR, place)
        if beside.anchor is not None:
            what = f"anchor {quoted(f'&{beside.anchor}')}: a recipe has no anchors"
            self.document.refuse(path, what, "remove it", place)
        if beside.tag is not None:
            tag = beside.tag.replace("tag:yaml.org,2002:", "!!")
            self.document.refuse(path, f"tag {quoted(tag)}: a recipe is nothing but data", "remove the tag", place)
        return beside.alias is None and beside.tag is None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        """The values whose keys are not refused."""
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            key = self._scalar(key_node, path, place) if self._is_data(key_node, path, place) else BROKEN
            if key_node.value == "<<" and key_node.style is None:
                self.document.refuse(path, "merge key `<<`: a recipe has no anchors", "write the values out", place)
            elif not isinstance(key, str | Broken):
                self.document.refuse(path, f"key {quoted(key_node.value)} is not text", "put it in quotes", place)
            elif isinstance(key, str) and key in data:
                what = f"key {quoted(key)} is given twice, first at {self.document.places[(*path, key)].text}"
                self.document.refuse(path, what, "remove one of the two", place)
            elif isinstance(key, str):
                data[key] = self.read(value_node, (*path, key), place)
        return data

    def _scalar(self, node: Any, path: Path, place: Place | None = None) -> Any:
        value = _resolve(node.value) if node.style is None else node.value
        if isinstance(value, str) and not value.isascii():
            try:
                # JSON writes what lies past U+FFFF as two escapes, which are one character again here.
                return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            except UnicodeDecodeError:
                self.document.refuse(path, "half a surrogate pair is no text", "correct the escape", place)
                return BROKEN
        if isinstance(value, float) and not math.isfinite(value):
            what = f"{quoted(node.value)} is not a finite number"
            self.document.refuse(path, what, "give a finite number", place)
            return BROKEN
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            self.document.refuse(path, f"{quoted(node.value)} is too large a number", "give a smaller one", place)
            return BROKEN
        return value


def _resolve(text: str) -> bool | int | float | str | None:
    """A plain scalar's value; an integer of more than 19 digits comes back as infinity."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 10 if text[:2].lower() not in ("0o", "0x") else 0) if len(text) <= 24 else LARGEST_INTEGER + 1
    if _FLOAT.fullmatch(text):
        return float(text)
    return float("inf") if _NOT_FINITE.fullmatch(text) else text
