"""A kind of JSON document: a frozen dataclass, written, read with every value checked, and described. No torch.

pydantic makes all three from the dataclass, and is imported by none of them before it is needed. JSON has no infinity
and no NaN: what is not finite is written as null. Keys that a reader does not know are ignored: within a version keys
may be added, never changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qcompress.errors import ReportError
from qcompress.types.files import open_regular
from qcompress.types.run import Json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Noun = TypeVar("Noun")

_EXACT = frozenset({int, str, bool, type(None)})
"""Types of values that no rounding changes."""
_ENCODER = json.JSONEncoder(allow_nan=False)
DIGITS = 6
"""Of floats that are written, where a document does not say otherwise."""

LONGEST_PLACE = 100
"""Characters of the place that an error names: keys come from the file."""

MOST_DIGITS = 18
"""Of integers that are read: what a count of bytes or weights may be, and a float can hold."""


@dataclass(frozen=True)
class Document(Generic[Noun]):
    """JSON documents that hold a `noun`, of the schema `name/version`.

    what    how errors name such a document
    again   what to do where one cannot be read
    digits  significant digits of floats; None: all
    whole   keys of the document whose floats keep all their digits
    """

    noun: type[Noun]
    schema: str
    what: str
    again: str
    digits: int | None = DIGITS
    whole: frozenset[str] = frozenset()

    @cached_property
    def _adapter(self) -> TypeAdapter[Noun]:
        from pydantic import TypeAdapter

        return TypeAdapter(self.noun)

    def plain(self, value: Noun) -> dict[str, Any]:
        """The document in plain JSON types, keys always in the same order."""
        dumped = self._adapter.dump_python(value, mode="json")
        digits = {key: None if key in self.whole else self.digits for key in dumped}
        return {"schema": self.schema, **{key: rounded(one, digits[key]) for key, one in dumped.items()}}

    def text(self, value: Noun) -> str:
        """The document as JSON text."""
        return json_text(self.plain(value))

    def read(self, path: Path) -> Noun:
        """What a file holds. Raises ReportError where it is missing, damaged, foreign or of a newer schema."""
        try:
            with open_regular(path) as file:
                text = file.read().decode("utf-8")
        except OSError as error:
            raise ReportError(str(path), f"cannot read the {self.what}: {error.strerror}", self.again) from None
        except UnicodeDecodeError:
            raise ReportError(str(path), "not a text file", self.again) from None
        return self.parse(text, str(path))

    def parse(self, text: str, where: str) -> Noun:
        """What a JSON text holds; `where` names it in errors. Raises ReportError."""
        from pydantic import ValidationError

        try:
            document = json.loads(text, parse_constant=_constant, parse_int=_bounded, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise ReportError(where, f"not a JSON document ({error})", self.again) from None
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != self.schema:
            family = self.schema.partition("/")[0]
            if isinstance(schema, str) and schema.startswith(f"{family}/") and len(schema) < 2 * len(self.schema):
                what = f"schema {schema}, this version reads {self.schema}"
                raise ReportError(where, what, f"update qcompress, or {self.again}")
            raise ReportError(where, f"not a {self.what} of qcompress: its schema is not {self.schema}", self.again)
        try:
            return self._adapter.validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))[:LONGEST_PLACE] or "document"
            what = f"damaged {self.what}: {place}: {first['msg'].removeprefix('Value error, ')}"
            raise ReportError(where, what, self.again) from None

    def json_schema(self) -> dict[str, Any]:
        """The JSON Schema (draft 2020-12) of these documents."""
        schema = self._adapter.json_schema(mode="serialization", union_format="primitive_type_array")
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **schema,
            "properties": {"schema": {"const": self.schema}, **schema["properties"]},
            "required": ["schema", *schema["required"]],
        }


def json_text(document: Mapping[str, Json]) -> str:
    """A document as JSON text, ending in a newline: a line for each top-level key and each item of a list.

    So two of them can be compared line by line.
    """
    lines = [f" {json.dumps(key)}: {_value_text(value)}" for key, value in document.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _value_text(value: Json) -> str:
    if isinstance(value, list) and value:
        items = (_ENCODER.encode(item) for item in value)
        return "[\n  " + ",\n  ".join(items) + "\n ]"
    return _ENCODER.encode(value)


def rounded(value: Any, digits: int | None) -> Any:
    """Plain data with floats of so many significant digits, and null for those that are not finite."""
    match value:
        case float():
            if not math.isfinite(value):
                return None
            return value if digits is None else float(f"{value:.{digits}g}")
        case list():
            return [item if type(item) in _EXACT else rounded(item, digits) for item in value]
        case dict():
            return {key: one if type(one) in _EXACT else rounded(one, digits) for key, one in value.items()}
    return value


def _constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _bounded(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is no count")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is no finite number")
    return value
