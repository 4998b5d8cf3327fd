"""A recipe writes some values otherwise than as a type tells: a size as text, one of several kinds by its name.

The classes are for `Annotated` types. pydantic asks them how a value is read, and nothing else imports pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar, get_args, get_type_hints

from annotated_types import Ge

from qcompress.types.words import SIZE_PATTERN, listed, parse_size, shown

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationInfo
    from pydantic_core import CoreSchema

T = TypeVar("T")

Schema: TypeAlias = dict[str, Any]
"""A JSON Schema, or a part of one."""


class Refused(ValueError):
    """A value is refused for what stands at `at` below it; its text is "what; hint"."""

    def __init__(self, message: str, *at: str | int) -> None:
        super().__init__(message)
        self.at = at


@cache
def reader(part: Any) -> TypeAdapter[Any]:
    """pydantic's reader of a type, made once: that takes longer than all the reading."""
    from pydantic import TypeAdapter

    return TypeAdapter(part)


def read(part: Any, value: object, known: Any = None) -> Any:
    """The value of data as a recipe has them: lists stand for tuples, integers for reals. Raises ValidationError.

    What is no data, because it was already refused, fits nothing.
    """
    text = json.dumps(value, default=lambda _: {"\0": None})
    return reader(part).validate_json(text, strict=True, context=known)


def later(how: Callable[[object, Any], object], parts: Callable[[], Iterable[Any]]) -> CoreSchema:
    """What a function reads, which asks for the reader of one of the parts when there is something to read."""
    from pydantic_core import core_schema

    def run(value: object, info: ValidationInfo) -> object:
        return how(value, info.context)

    return core_schema.with_info_plain_validator_function(run, metadata={"parts": parts})


def part_later(part: Any) -> CoreSchema:
    """What `read` reads, its reader made when there is something to read."""
    return later(partial(read, part), lambda: (part,))


class _Given:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (part,) = (part for part in get_args(source) if part is not type(None))
        return part_later(part)


Given: TypeAlias = Annotated[T | None, _Given()]
"""What may be left out of a recipe and is then None, but is not null there."""


@dataclass(frozen=True, eq=False)
class Form:
    """A value is written otherwise than its type tells.

    before, after  what is done to it before and after pydantic reads it as its type
    schema         the JSON Schema that this gives, of the type's
    """

    before: Callable[[Any], Any] | None = None
    after: Callable[[Any], Any] | None = None
    schema: Callable[[Schema], Schema] = lambda schema: schema

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        made = handler(source)
        if self.before is not None:
            made = core_schema.no_info_before_validator_function(self.before, made)
        if self.after is not None:
            made = core_schema.no_info_after_validator_function(self.after, made)
        return made

    def __get_pydantic_json_schema__(self, made: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return self.schema(handler(made))


def shown_as(example: object, **keywords: Any) -> Form:
    """A form whose schema has an example, which hints show, and other keywords."""
    return Form(schema=lambda schema: {**schema, **keywords, "examples": [example]})


def _read_size(value: object) -> object:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"{shown(value)} is not a size; give a number of bytes, or text like 2MB")
    return value


def _read_several(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _refuse_twice(items: tuple[object, ...]) -> tuple[object, ...]:
    for index, item in enumerate(items):
        if item in items[:index]:
            raise Refused(f"{shown(item)} stands twice; remove one", index)
    return items


SIZE = Form(_read_size, schema=lambda one: {"anyOf": [one, {"type": "string", "pattern": SIZE_PATTERN}]})
Size: TypeAlias = Annotated[int, Ge(1), SIZE]
"""Bytes, as a number or as text: 2000000, 2MB (powers of 1000), 2MiB (powers of 1024)."""

ONE_OR_MORE = Form(_read_several, schema=lambda several: {"anyOf": [several["items"], several]})
"""Of a tuple of texts one may stand for itself."""
Texts: TypeAlias = Annotated[tuple[str, ...], ONE_OR_MORE]

DISTINCT = Form(after=_refuse_twice, schema=lambda several: {**several, "uniqueItems": True})
"""No item of a tuple may be another's equal."""


@dataclass(frozen=True, eq=False)
class OneOf:
    """A value is one of several kinds, written as a mapping from its name to its options, or as its name alone.

    noun    what a kind is, for errors: "optimizer"
    kinds   the types by name
    beside  keys that stand beside the name; the value is then a mapping of all keys
    """

    noun: str
    kinds: Mapping[str, Any]
    beside: Mapping[str, Any] = field(default_factory=dict)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        key = core_schema.typed_dict_field
        keys = {name: key(handler.generate_schema(kind)) for name, kind in self.beside.items()}
        keys |= {name: key(part_later(kind), required=False) for name, kind in self.kinds.items()}
        written = core_schema.typed_dict_schema(keys, extra_behavior="forbid")
        named = core_schema.no_info_before_validator_function(self._with_options, written)
        return core_schema.no_info_after_validator_function(self._chosen, named)

    def _with_options(self, value: object) -> object:
        if isinstance(value, str) and not self.beside:
            return {value: {}}
        if not isinstance(value, dict):
            return value
        # `keep:` says what no name of a kind does: written without anything it is more likely a slip.
        bare = [name for name, options in value.items() if options is None and name in self.kinds and name != "keep"]
        return {**value, **{name: {} for name in bare}}

    def _chosen(self, given: dict[str, Any]) -> object:
        chosen = [name for name in given if name in self.kinds]
        if not chosen:
            raise Refused(f"names no {self.noun}; give one of {listed(self.kinds)}")
        if len(chosen) > 1:
            hint = "make it one rule each" if self.beside else "keep one"
            raise Refused(f"names {len(chosen)} {self.noun}s: {listed(chosen)}; {hint}")
        return given if self.beside else given[chosen[0]]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        count = len(self.beside) + 1
        one = {**handler(schema), "title": self.noun, "minProperties": count, "maxProperties": count}
        bare = [] if self.beside else [name for name, kind in self.kinds.items() if not _needs_options(kind)]
        return {"anyOf": [one, {"enum": bare}]} if bare else one


def _needs_options(kind: Any) -> bool:
    return any(one.default is MISSING and one.default_factory is MISSING for one in fields(kind))


@dataclass(frozen=True, eq=False)
class ByKey:
    """A value is of the one kind whose name is among its keys.

    noun   what a kind is, for errors: "data source"
    kinds  the dataclasses by name, each with a field of that name
    owner  a dataclass that has the value as `source`; its other fields are written beside the value's own
    """

    noun: str
    kinds: Mapping[str, type]
    owner: type | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return later(self._read, lambda: [self._part(kind) for kind in self.kinds.values()])

    def _part(self, kind: type) -> type:
        return kind if self.owner is None else _with_fields(kind, self.owner)

    def _read(self, value: object, known: Any) -> object:
        chosen = [name for name in self.kinds if isinstance(value, dict) and name in value]
        if isinstance(value, dict) and len(chosen) != 1:
            what = f"names {len(chosen)} {self.noun}s: {listed(chosen)}" if chosen else f"names no {self.noun}"
            raise Refused(f"{what}; give one of {listed(self.kinds)}")
        kind: Any = self.kinds[chosen[0]] if chosen else next(iter(self.kinds.values()))
        made = read(self._part(kind), value, known)
        if self.owner is None:
            return made
        parts = {one.name: getattr(made, one.name) for one in fields(made)}
        own = {one.name: parts.pop(one.name) for one in fields(self.owner) if one.name != "source"}
        return self.owner(source=kind(**parts), **own)


@cache
def _with_fields(kind: Any, owner: Any) -> type:
    """The dataclass `kind` with the fields of `owner` but for its source."""
    hints = get_type_hints(owner, include_extras=True)
    own = [(one.name, hints[one.name], one) for one in fields(owner) if one.name != "source"]
    space = {"__doc__": owner.__doc__}
    return make_dataclass(
        f"{owner.__name__}Of{kind.__name__}", own, bases=(kind,), namespace=space, frozen=True, kw_only=True
    )
