"""YAML text is composed into a tree whose values know their places, from parser events and without recursion.

No nesting, alias or tag can do any harm.

Plain scalars follow YAML 1.2's core schema: `4e-5` is a number, and `yes`, `off`, `1:30` and `0b1` are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, Union

import yaml
from yaml.reader import ReaderError

from qcompress.errors import RecipeError, raise_all
from qcompress.recipe.hints import plain, quoted

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

    def data(self) -> object:
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

    def add(self, node: Node, what: str, hint: str) -> None:
        self.found.append((node.place.order, RecipeError(node.where, what, hint)))

    def raise_all(self) -> None:
        """Raise RecipeError, or Refusals of several; return where nothing is wrong."""
        raise_all([error for _, error in sorted(self.found, key=lambda problem: problem[0])])


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


def compose(text: str, source: str, problems: Problems, *, fixed: Place | None = None, path: str = "") -> Node:
    """The tree of the one YAML document in `text`; null where there is none, Broken where its syntax ended the reading.

    source  names the file in places: "recipe.yaml:7"
    fixed   a place for every value, instead of source and line
    path    of the root

    Tags, anchors, aliases, merge keys, duplicate keys and keys that are not text go to `problems`.
    """
    composer = _Composer(source, problems, fixed, path)
    try:
        loader = yaml.SafeLoader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"character U+{ord(text[error.position]):04X} is not allowed in YAML"
        problems.add(composer.node_at(line), what, "remove it")
        return Node(Broken(), composer.place(1), path)
    try:
        while loader.check_event():
            event: yaml.Event = loader.get_event()  # type: ignore[no-untyped-call]
            composer.take(event)
    except _Unreadable:
        composer.root = Node(Broken(), composer.place(1), path)
    except yaml.MarkedYAMLError as error:
        _refuse_syntax(error, composer, problems)
        composer.root = Node(Broken(), composer.place(1), path)
    except (ValueError, OverflowError):
        # PyYAML hands a \U escape of any size to chr().
        problems.add(composer.node_at(loader.line + 1), "an escape names no Unicode character", "correct the escape")
        composer.root = Node(Broken(), composer.place(1), path)
    return composer.root


class _Unreadable(Exception):
    """Nothing after this point can be placed in the tree; the reason is among the problems."""


def _refuse_syntax(error: yaml.MarkedYAMLError, composer: _Composer, problems: Problems) -> None:
    mark = error.problem_mark or error.context_mark
    problem, context = str(error.problem), str(error.context or "")
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
    problems.add(composer.node_at(mark.line + 1 if mark else 1), f"not YAML: {plain(problem, 200)}", hint)


@dataclass(slots=True)
class _Frame:
    """A mapping or list whose end has not come; `key` waits for its value, which is dropped where it was refused."""

    node: Node
    key: str | None = None
    key_place: Place | None = None
    drops: bool = False


class _Composer:
    """Events in, tree out: the open containers are a stack of frames."""

    def __init__(self, source: str, problems: Problems, fixed: Place | None, path: str) -> None:
        self.source = source
        self.problems = problems
        self.fixed = fixed
        self.path = path
        self.root = Node(None, self.place(1), path)
        self.stack: list[_Frame] = []
        self.documents = 0

    def place(self, line: int) -> Place:
        return self.fixed or Place(f"{self.source}:{line}", line)

    def node_at(self, line: int) -> Node:
        """A node without a path, to hang a problem on."""
        return Node(Broken(), self.place(line), "")

    def take(self, event: yaml.Event) -> None:
        """Add one event to the tree; raise _Unreadable where what follows would have no place."""
        match event:
            case yaml.DocumentStartEvent():
                self.documents += 1
                if self.documents > 1:
                    raise self._unreadable(event, "a second YAML document", "keep one recipe a file")
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self.stack.pop()
            case yaml.AliasEvent():
                node = self._open_value(event)
                node.value = Broken()
                self.problems.add(node, f"alias {quoted(f'*{event.anchor}')}: a recipe has no aliases", _QUOTE_STAR)
            case yaml.ScalarEvent():
                self._take_scalar(event)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._take_container(event)

    def _take_scalar(self, event: yaml.ScalarEvent) -> None:
        if self._awaits_key():
            self._take_key(event)
            return
        node = self._open_value(event)
        node.value = self._scalar(event, node)
        self._refuse_marks(event, node)

    def _take_container(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        if len(self.stack) >= DEEPEST:
            raise self._unreadable(event, f"nested more than {DEEPEST} deep", "a recipe needs few levels")
        node = self._open_value(event)
        node.value = {} if isinstance(event, yaml.MappingStartEvent) else []
        self._refuse_marks(event, node)
        self.stack.append(_Frame(node))

    def _take_key(self, event: yaml.ScalarEvent) -> None:
        frame = self.stack[-1]
        mapping = frame.node.value
        assert isinstance(mapping, dict)
        place = self.place(_line(event))
        here = Node(None, place, frame.node.path)
        key = self._scalar(event, here)
        frame.drops = not isinstance(key, str)
        if event.value == "<<" and not event.style:
            frame.drops = True
            self.problems.add(here, "merge key `<<`: a recipe has no anchors", "write the values out")
        elif not isinstance(key, str | Broken):
            self.problems.add(here, f"key {quoted(event.value)} is not text", "put it in quotes")
        elif isinstance(key, str) and key in mapping:
            frame.drops = True
            first = mapping[key].place.text
            self.problems.add(here, f"key {quoted(key)} is given twice, first at {first}", "remove one of the two")
        self._refuse_marks(event, here)
        frame.key = key if isinstance(key, str) else event.value
        frame.key_place = place

    def _open_value(self, event: yaml.NodeEvent) -> Node:
        """The node of the value that starts here, already in its place in the tree."""
        place = self.place(_line(event))
        if not self.stack:
            self.root = Node(None, place, self.path)
            return self.root
        frame = self.stack[-1]
        parent = frame.node
        if isinstance(parent.value, list):
            node = Node(None, place, path_of_item(parent.path, len(parent.value)))
            parent.value.append(node)
            return node
        if frame.key is None or frame.key_place is None:
            raise self._unreadable(event, "a key that is not text", "write `key: value`")
        assert isinstance(parent.value, dict)
        node = Node(None, frame.key_place, path_of_key(parent.path, frame.key))
        if not frame.drops:
            parent.value[frame.key] = node
        frame.key = None
        return node

    def _awaits_key(self) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1].node.value, dict) and self.stack[-1].key is None

    def _scalar(self, event: yaml.ScalarEvent, node: Node) -> Value:
        value = _resolve(event.value) if not event.style else event.value
        if isinstance(value, str) and not value.isascii():
            try:
                # JSON writes what lies past U+FFFF as two escapes, which are one character again here.
                return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            except UnicodeDecodeError:
                self.problems.add(node, "half a surrogate pair is no text", "correct the escape")
                return Broken()
        if isinstance(value, float) and not math.isfinite(value):
            self.problems.add(node, f"{quoted(event.value)} is not a finite number", "give a finite number")
            return Broken()
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            self.problems.add(node, f"{quoted(event.value)} is too large a number", "give a smaller one")
            return Broken()
        return value

    def _refuse_marks(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, node: Node) -> None:
        if event.anchor is not None:
            self.problems.add(node, f"anchor {quoted(f'&{event.anchor}')}: a recipe has no anchors", "remove it")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.problems.add(node, f"tag {quoted(tag)}: a recipe is nothing but data", "remove the tag")
            node.value = Broken() if isinstance(event, yaml.ScalarEvent) else node.value

    def _unreadable(self, event: yaml.Event, what: str, hint: str) -> _Unreadable:
        self.problems.add(self.node_at(_line(event)), what, hint)
        return _Unreadable()


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _resolve(text: str) -> bool | int | float | str | None:
    """A plain scalar's value; an integer of more than 19 digits comes back as infinity."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 10 if text[:2].lower() not in ("0o", "0x") else 0) if len(text) <= 24 else LARGEST_INTEGER + 1
    if _FLOAT.fullmatch(text):
        return float(text)
    return float("inf") if _NOT_FINITE.fullmatch(text) else text


AFTER_ALL_LINES = 10**9
