"""A report becomes JSON, `qcompress.report/1`, and JSON a report. Imports no torch.

JSON has no infinity and no NaN: an SQNR without error (+infinity in memory) and whatever is not a number are null, and
an SQNR of null beside a relative error of 0 is read as +infinity again. Floats have 6 significant digits, except in
gates, whose limits and values are whole so that `passed` can be checked. Keys that a reader does not know are ignored:
within version 1 keys may be added, never changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.checkpoint.staging import write_whole
from qcompress.errors import ReportError
from qcompress.report.document import GateResult, Report
from qcompress.types.run import Json

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import TypeAdapter

SCHEMA = "qcompress.report/1"
SCHEMA_FILE = Path(__file__).with_name("schema.json")
DIGITS = 6
"""Of floats that are written."""

MOST_DIGITS = 18
"""Of integers that are read."""


def report_json(report: Report) -> dict[str, Json]:
    """The report in plain JSON types, keys always in the same order."""
    return {"schema": SCHEMA, **plain_fields(report)}


def report_text(report: Report) -> str:
    """The report as JSON text: a line for each top-level key and each layer, so that two of them can be compared."""
    return json_text(report_json(report))


def json_text(document: Mapping[str, Json]) -> str:
    """A document as JSON text, ending in a newline: a line for each top-level key and each item of a list."""
    lines = [f" {json.dumps(key)}: {_json_value(value)}" for key, value in document.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _json_value(value: Json) -> str:
    if isinstance(value, list) and value:
        items = (json.dumps(item, allow_nan=False) for item in value)
        return "[\n  " + ",\n  ".join(items) + "\n ]"
    return json.dumps(value, allow_nan=False)


def plain_fields(noun: DataclassInstance, digits: int | None = DIGITS) -> dict[str, Json]:
    """The fields of a noun of the report in plain JSON types; floats to `digits` significant digits.

    What is not finite is None. Gates are whole.
    """
    digits = None if isinstance(noun, GateResult) else digits
    return {field.name: plain(getattr(noun, field.name), digits) for field in fields(noun)}


def plain(value: object, digits: int | None = DIGITS) -> Json:
    """One value of a noun in plain JSON types. Raises TypeError for what JSON cannot hold."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if not math.isfinite(value):
                return None
            return value if digits is None else float(f"{value:.{digits}g}")
        case tuple():
            return [plain(item, digits) for item in value]
        case Mapping():
            return {key: plain(value[key], digits) for key in sorted(value)}
        case _ if is_dataclass(value) and not isinstance(value, type):
            return plain_fields(value, digits)
    raise TypeError(f"a report holds no {type(value).__name__}")


def write_report(report: Report, path: Path) -> None:
    """Write the report's JSON, whole or not at all. Raises ResourceError."""
    write_whole(report_text(report), path)


def read_report(path: Path) -> Report:
    """The report in a file. Raises ReportError where it is missing, damaged, foreign or of a newer schema."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(
            str(path),
            f"cannot read the report: {error.strerror}",
            "give the path of a report; `qcompress report ARTIFACT --json FILE` writes one",
        ) from error
    except UnicodeDecodeError as error:
        raise ReportError(str(path), "not a text file", "give the path of a report") from error
    return parse_report(text, str(path))


def parse_report(text: str, where: str) -> Report:
    """The report in a JSON text; `where` names it in errors. Raises ReportError."""
    from pydantic import ValidationError

    again = "write the report again with `qcompress report ARTIFACT --json FILE`"
    try:
        document = json.loads(text, parse_constant=_refuse_constant, parse_int=_bounded_int)
    except (ValueError, RecursionError) as error:
        raise ReportError(where, f"not a JSON document ({error})", again) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise _foreign(where, schema)
    try:
        return _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise ReportError(where, f"damaged report: {place or 'document'}: {what}", again) from error


def _foreign(where: str, schema: object) -> ReportError:
    family, _, version = SCHEMA.partition("/")
    if isinstance(schema, str) and schema.startswith(f"{family}/"):
        return ReportError(
            where, f"schema {schema}, this version reads {family}/{version}", "update qcompress, or write it again"
        )
    return ReportError(where, f"not a report of qcompress: its schema is not {SCHEMA}", "give the path of a report")


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _bounded_int(digits: str) -> int:
    """An integer that a count of bytes or weights may be, and that a float can hold."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is no count")
    return int(digits)


def report_schema() -> dict[str, Json]:
    """The JSON Schema of a report; schema.json holds it."""
    schema = _adapter().json_schema(mode="serialization")
    properties = {"schema": {"const": SCHEMA}, **schema.pop("properties")}
    definitions = schema.pop("$defs")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": properties,
        "required": ["schema", *schema["required"]],
        "$defs": definitions,
    }


@cache
def _adapter() -> TypeAdapter[Report]:
    from pydantic import TypeAdapter

    return TypeAdapter(Report)


def report_path(output: Path) -> Path:
    """Where the report of an artifact lies: `model-w2.report.json` beside `model-w2.safetensors` or `model-w2/`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.report.json")
