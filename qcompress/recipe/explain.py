"""pydantic's refusals are said in a recipe's words: where it was written, what is wrong, and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from qcompress.recipe.schema import fragment
from qcompress.recipe.show import flow
from qcompress.recipe.yaml_tree import BROKEN, Document, Path
from qcompress.types.words import listed, nearest, quoted, shown, suggest
from qcompress.types.written import Schema

_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "object": "a mapping",
    "array": "a list",
}
_PLURALS = {"integer": "integers", "number": "numbers", "string": "texts"}
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def explain(error: ValidationError, document: Document, part: Any, at: Path = ()) -> None:
    """Refuse in the document what pydantic refuses of its value at a path, which was read as `part`.

    Nothing is said of what was already refused, nor of a missing key that an unknown one may stand for.
    """
    data, said = document.at(at), set[Path]()
    reasons = error.errors(include_url=False)
    unknown = [(_path(data, one["loc"][:-1]), str(one["loc"][-1])) for one in reasons if one["type"] in _UNKNOWN]
    for reason in reasons:
        kind, below, name = reason["type"], _path(data, reason["loc"]), str(reason["loc"][-1] if reason["loc"] else "")
        path = (*at, *below)
        if document.at(path) is BROKEN or (kind != "missing" and document.is_broken(path)):
            continue
        if kind in _UNKNOWN:
            what, hint = _unknown(name, fragment(part, data, _path(data, reason["loc"][:-1])))
        elif kind == "missing" and isinstance(reason["loc"][-1], str):
            schema = fragment(part, data, below)
            if any(nearest(other, _keys(schema)) == name for place, other in unknown if place == below):
                continue
            what, hint = _missing(name, schema)
        elif kind == "value_error":
            what, _, hint = str(reason["ctx"]["error"]).partition("; ")
            page = "training" if path[:1] == ("finetune",) else "recipes"
            hint = hint or f"see {quoted(str(path[-1]))} in docs/{page}.md"
            path = (*path, *getattr(reason["ctx"]["error"], "at", ()))
        elif path in said or (kind == "too_short" and document.at(path)):
            # A union has a reason a branch; and pydantic counts the items that fit.
            continue
        else:
            said.add(path)
            what, hint = _unfit(document.at(path), fragment(part, data, below), path[-1])
        document.refuse(path, what, hint)


def _path(data: object, loc: tuple[int | str, ...]) -> Path:
    """The part of a location that leads through the data; pydantic's names of a union's branches do not."""
    path: Path = ()
    for step in loc:
        match data:
            case dict() if step in data:
                data = data[step]
            case list() if isinstance(step, int) and step < len(data):
                data = data[step]
            case str() if step == data:
                # A kind by its name alone.
                data = {}
            case _:
                break
        path = (*path, step)
    return path


def _unknown(name: str, schema: Schema) -> tuple[str, str]:
    """What to say of a key that there is not, where `schema` tells of those that there are."""
    noun = next((branch["title"] for branch in _branches(schema) if "title" in branch), None)
    noun = "key" if noun is None else f"key or {noun}" if "match" in schema.get("properties", {}) else noun
    known = _keys(schema)
    return f"unknown {noun} {quoted(name)}", suggest(name, known) if known else "leave it out"


def _missing(name: str, schema: Schema) -> tuple[str, str]:
    """What to say of a key that a mapping of this schema lacks."""
    fit, example = schema["properties"][name], _example(schema)
    hint = f"add {quoted(name)}"
    if isinstance(example, Mapping) and name in example:
        hint = f"add `{name}: {flow(example[name])}`"
    if any(limits(branch) or _is_titled(branch) for branch in _branches(fit)):
        hint += f", {expected(fit)}"
    return f"{quoted(name)} is missing", hint


def _unfit(value: object, schema: Schema, key: str | int) -> tuple[str, str]:
    """Why a value, which stands under a key or index, does not fit the schema, and what would."""
    branches = _branches(schema)
    numeric = [branch for branch in branches if branch.get("type") in ("integer", "number")]
    if any(limits(branch) and _is_a(branch["type"], value) for branch in numeric):
        return f"{shown(value)} is out of range", f"must be {limits(schema)}"
    choices = [choice for branch in branches for choice in _choices(branch)]
    if choices and isinstance(value, str):
        return f"unknown value {shown(value)}", suggest(value, choices)
    nouns = dict.fromkeys(_noun(branch, whole=isinstance(value, list)) for branch in branches)
    what = f"{shown(value)} is not {' or '.join(nouns)}"
    if value in ("", []) and any(branch.get("minLength") or branch.get("minItems") for branch in branches):
        what = "an empty text" if value == "" else "an empty list"
    example = _example(schema)
    if any(branch.get("type") in ("object", "array") for branch in branches) and isinstance(example, Mapping | list):
        return what, f"write `{key}: {flow(example)}`" if isinstance(key, str) else f"write {flow(example)}"
    return what, f"give {expected(schema)}" + ("" if example is None else f", as {flow(example)}")


def expected(schema: Schema) -> str:
    """What fits, in words: "an integer between 1 and 8", "`als` or `grid`"."""
    words = (" ".join(filter(None, (_noun(branch), limits(branch)))) for branch in _branches(schema))
    return " or ".join(dict.fromkeys(words))


def limits(schema: Schema) -> str:
    """The range of a number in words: "between 1 and 8", "above 0", or nothing."""
    if "anyOf" in schema:
        return " or ".join(filter(None, (limits(branch) for branch in _branches(schema))))
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"between {_number(low)} and {_number(high)}"
    bounds = {"at least": low, "above": above, "at most": high, "below": below}
    return " and ".join(f"{words} {_number(bound)}" for words, bound in bounds.items() if bound is not None)


def _is_a(kind: str, value: object) -> bool:
    """Whether a value is a number of this kind; true and false are no numbers."""
    return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)


def _branches(schema: Schema) -> list[Schema]:
    """The schema's alternatives, without null: a value that may be absent is simply left out."""
    return [branch for branch in schema.get("anyOf", [schema]) if branch.get("type") != "null"]


def _keys(schema: Schema) -> list[str]:
    return list(dict.fromkeys(key for branch in _branches(schema) for key in branch.get("properties", {})))


def _example(schema: Schema) -> Any:
    """What would fit: an example; of a list one of an item; of a mapping that needs no key an empty one."""
    for branch in [schema, *_branches(schema)]:
        if "examples" in branch:
            return branch["examples"][0]
        if "examples" in branch.get("items", {}):
            return branch["items"]["examples"]
        if branch.get("type") == "object" and not branch.get("required") and not branch.get("minProperties"):
            return {}
    return None


def _choices(branch: Schema) -> list[str]:
    """The values that a branch lists, or its only one, as texts."""
    return [str(value) for value in ([branch["const"]] if "const" in branch else branch.get("enum", ()))]


def _is_titled(branch: Schema) -> bool:
    """Whether a text has a name of its own."""
    return branch.get("type") == "string" and "title" in branch


def _noun(branch: Schema, whole: bool = True) -> str:
    """What fits a branch, limits aside; a list is called no more than that unless the `whole` of it matters."""
    kind, items = branch.get("type"), branch.get("items", {})
    if _choices(branch):
        return f"one of {listed(_choices(branch))}"
    if _is_titled(branch):
        return f"a {branch['title']}"
    if kind == "array" and not whole:
        return "a list"
    if kind == "array" and _is_titled(items):
        return "a list of them"
    if pair := branch.get("prefixItems"):
        return f"a list of {len(pair)} {_PLURALS[pair[0]['type']]}"
    if kind == "array" and _choices(items):
        return f"a list of {listed(_choices(items))}"
    if kind == "array" and items.get("type") in _PLURALS:
        return f"a list of {_PLURALS[items['type']]}"
    return _NOUNS.get(branch.get("type", "object"), "a mapping")


def _number(bound: float) -> str:
    return f"{bound:g}" if abs(bound) < 10**6 else str(bound)
