"""YAML becomes a Recipe, strictly: everything that is wrong is said at once, with its line and a hint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qcompress.errors import RecipeError, UsageError
from qcompress.recipe.model import Asked, WrittenRecipe, method_part
from qcompress.recipe.yaml_tree import Broken, Document, Place, compose, path_text
from qcompress.recipe.yaml_tree import Path as Keys
from qcompress.registry import BUDGET_METHOD, DEFAULT_METHOD, METHODS
from qcompress.registry.targets import TARGETS, Target
from qcompress.types.files import read_start
from qcompress.types.plan import KEYS, VERSION, Exempt, Family, Finetune, Keep, Recipe, Rule, Sections
from qcompress.types.settings import Training
from qcompress.types.words import nearest, plain, quoted, shown
from qcompress.types.written import read

LONGEST_PATH = 16
LARGEST_BYTES = 2**20
AFTER_ALL_LINES = 10**9


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Set each "key.path=value" in the document, in order, so that the last one of a path holds.

    A segment is a mapping's key or a list's index from 0; a mapping that is missing is made, for validation to judge.
    The value is YAML, and text where it starts with `*`. A path that leads through a scalar or past a list's end is
    refused. Raises UsageError where an override is not of the form `key.path=value`.
    """
    for index, override in enumerate(overrides):
        segments, text = _split(override)
        _set(document, segments, text, Place(f"--set {plain(override)}", (AFTER_ALL_LINES, index)))


def _split(override: str) -> tuple[list[str], str]:
    path, equals, text = override.partition("=")
    segments = path.strip().split(".")
    where = f"--set {plain(override)}"
    if not equals:
        raise UsageError(where, "no `=`", "write --set key.path=value, as in --set rules.0.rtn.bits=2")
    if "" in segments or len(segments) > LONGEST_PATH:
        raise UsageError(where, f"{quoted(path)} is not a path", "write keys and list numbers with a dot between")
    return segments, text.strip()


def _set(document: Document, segments: Sequence[str], text: str, place: Place) -> None:
    path: Keys = ()
    for segment in segments:
        if document.at(path) is None:
            document.put(path, {}, document.places.get(path, place))
        match document.at(path):
            case Broken():
                return
            case dict():
                path = (*path, segment)
            case list(items) if _is_index(segment, len(items)):
                path = (*path, int(segment))
            case list(items):
                hint = f"give a number from 0 to {len(items) - 1}" if items else "the list is empty"
                document.refuse(path, f"{quoted(segment)} is no item of a list of {len(items)}", hint, place)
                return
            case scalar:
                what = f"{shown(scalar)} is neither a mapping nor a list and has no {quoted(segment)}"
                document.refuse(path, what, f"set {path_text(path)} as a whole", place)
                return
    if text.startswith("*"):
        document.put(path, text, place)
    else:
        value = compose(text, place.text, place, path)
        document.found += value.found
        document.put(path, value.data, place)


def _is_index(segment: str, count: int) -> bool:
    return segment.isascii() and segment.isdigit() and len(segment) < 10 and int(segment) < count


@dataclass(frozen=True, slots=True)
class BudgetFlag:
    """A budget as the command line gives it, which beats the recipe's; `text` is how it was typed: "--bpw 2.0"."""

    text: str
    key: str
    value: float | str

    def document(self) -> Document:
        """What it says, as the recipe's `budget` would."""
        return Document(self.text, {self.key: self.value}, {(): Place(self.text, (AFTER_ALL_LINES, 0), bare=True)})

    def replace_in(self, document: Document) -> None:
        """Put it in place of the recipe's budget, of which the file of sensitivities stays."""
        own = self.document()
        path = ("budget", "sensitivity")
        kept, place = document.at(path), document.places.get(path)
        document.put(("budget",), own.data, own.places[()])
        if place is not None:
            document.put(path, kept, place)


def read_recipe(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    text: str | None = None,
    family: Family = "quantize",
    budget: BudgetFlag | None = None,
    target: str | None = None,
) -> Recipe:
    """The recipe in the file at `path`, or in `text`, which then came from `path` or, without one, from stdin.

    overrides  "key.path=value", applied before validation (see `parse_recipe`)
    family     of a recipe whose rules all keep
    budget, target  in place of the recipe's

    Raises RecipeError, or Refusals of several, and UsageError for an override that is none.
    """
    source = "stdin" if path is None else str(path)
    if text is None:
        if path is None:
            raise ValueError("read_recipe needs a path or a text")
        text = _read_text(path)
    return parse_recipe(text, source, overrides, family=family, budget=budget, target=target)


def parse_recipe(
    text: str,
    source: str,
    overrides: Sequence[str] = (),
    *,
    family: Family = "quantize",
    budget: BudgetFlag | None = None,
    target: str | None = None,
) -> Recipe:
    """The recipe in a YAML text; `source` names it in errors. All else as in `read_recipe`."""
    if len(text) > LARGEST_BYTES:
        raise RecipeError(source, f"larger than {LARGEST_BYTES} bytes", "a recipe is a short YAML file: use globs")
    document = compose(text, source)
    if not isinstance(document.data, Broken):
        apply_overrides(document, overrides)
    if budget is not None and isinstance(document.data, dict):
        budget.replace_in(document)
    if target is not None and isinstance(document.data, dict):
        place = Place(f"--for {plain(target)}", (AFTER_ALL_LINES, 0), bare=True)
        document.put((KEYS["target"],), target, place)
    recipe = _make_recipe(document, family)
    document.raise_all()
    return recipe


def _read_text(path: Path) -> str:
    try:
        data = read_start(path, LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(str(path), "no such file", _siblings(path)) from None
    except IsADirectoryError:
        raise RecipeError(str(path), "is a folder", "name a recipe file in it") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(str(path), f"cannot be read: {why}", "check its name and its permissions") from None
    if len(data) > LARGEST_BYTES:
        raise RecipeError(str(path), f"larger than {LARGEST_BYTES} bytes", "a recipe is a short YAML file: use globs")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}", "not UTF-8 text", "a recipe is a YAML file in UTF-8") from None


def _siblings(path: Path) -> str:
    """The hint for a name that is not there: the recipe beside it with the nearest name."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return f"the folder {path.parent} is not there either"
    close = nearest(path.name, names)
    return f"did you mean {path.parent / close}?" if close is not None else "check the name"


def _make_recipe(document: Document, family: Family) -> Recipe:
    """The recipe of a document; of one that is refused only the family."""
    data = document.data
    nothing = Recipe(family, (), source=document.source)
    if data is None:
        document.refuse((), "the recipe is empty", f"start with `version: {VERSION}` and `rules:`")
    elif not isinstance(data, dict | Broken):
        hint = f"write `key: value` lines, the first one `version: {VERSION}`"
        document.refuse((), f"{shown(data)} is not a mapping", hint)
    if not isinstance(data, dict) or not _is_this_version(document):
        return nothing
    # One with a task may be for measuring alone.
    if not {"rules", "finetune", "budget", "task"} & data.keys():
        document.refuse((), "`rules` is missing", "add `rules`, a list of rules")
    family = _one_family(document) or family
    if "budget" in data:
        _refuse_undecided(document)
    try:
        # The version is judged above.
        asked = Asked("budget" in data, _target(data.get(KEYS["target"])))
        written = read(WrittenRecipe, {**data, **({"version": VERSION} if "version" in data else {})}, asked)
    except ValidationError as error:
        # It imports what makes JSON Schemas, which a sound recipe does not need.
        from qcompress.recipe.explain import explain

        explain(error, document, WrittenRecipe)
        return nothing
    return _resolved(document, written, family)


def _target(name: object) -> Target | None:
    """The target of this name; what is none is refused when it is read."""
    return TARGETS.get(name) if isinstance(name, str) else None


def _resolved(document: Document, written: WrittenRecipe, family: Family) -> Recipe:
    """The recipe that was read, its rules and sections with their places."""
    rules = _make_rules(document, ("rules",), written.rules)
    if not rules and written.budget is not None:
        target = _target(written.target)
        method = METHODS[BUDGET_METHOD if target is None else DEFAULT_METHOD]
        config = read(method_part(method), {}, Asked(True, target))
        rules = (Rule("*", method.name, config, document.where(("budget",))),)
    finetune = None
    if written.finetune is not None:
        training = {one.name: getattr(written.finetune, one.name) for one in fields(Training)}
        penalties = _make_rules(document, ("finetune", "regularize"), written.finetune.regularize)
        finetune = Finetune(**training, regularize=penalties)
    sections: dict[str, Any] = {one.name: getattr(written, one.name) for one in fields(Sections)}
    parts = [("data", part) for part in document.data.get("data", ())]
    places = {".".join(path): document.where(path) for path in [*((name,) for name in document.data), *parts]}
    return Recipe(family, rules, finetune, document.source, places, **sections)


def _make_rules(document: Document, path: Keys, written: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """A rule for each pattern of those that were read, all of one with the same `where`."""
    rules: list[Rule] = []
    for index, rule in enumerate(written):
        (action,) = rule.keys() - {"match"}
        method, config = (None if action == "keep" else action), rule[action]
        if config in (Keep(), Exempt()):
            config = None
        where = document.where((*path, index, action))
        rules += [Rule(pattern, method, config, where) for pattern in rule["match"]]
    return tuple(rules)


def _is_this_version(document: Document) -> bool:
    """Whether the rest can be judged: not where the text says that it is in another version of the format."""
    version = document.data.get("version", VERSION)
    if isinstance(version, int) and not isinstance(version, bool):
        if version != VERSION:
            what = f"version {version} is not known"
            document.refuse(("version",), what, f"use `version: {VERSION}`, or a newer qcompress")
        return version == VERSION
    if not document.is_broken(("version",)):
        document.refuse(("version",), f"{shown(version)} is not a version", f"write `version: {VERSION}`")
    return True


def _methods(document: Document) -> Iterator[tuple[Keys, str]]:
    """The methods that the rules name, and where."""
    rules = document.data.get("rules")
    for index, rule in enumerate(rules if isinstance(rules, list) else ()):
        for name in rule if isinstance(rule, dict) else ():
            if name in METHODS:
                yield ("rules", index, name), name


def _one_family(document: Document) -> Family | None:
    """The family of all methods that the rules name, or None where they name none."""
    first: Keys | None = None
    family: Family | None = None
    for path, name in _methods(document):
        if first is None:
            first, family = path, METHODS[name].family
        elif METHODS[name].family != family:
            what = f"{quoted(name)} is a {METHODS[name].family} method, but {path_text(first)} is of family {family}"
            document.refuse(path, what, "a recipe holds one family: make two recipes")
            break
    return family


def _refuse_undecided(document: Document) -> None:
    """Refuse a budget that cannot decide: over codebooks, or over two kinds of method at once."""
    found = [METHODS[name] for name in dict.fromkeys(name for _, name in _methods(document))]
    clusters = [method.name for method in found if method.family == "cluster"]
    if clusters:
        what = f"a budget decides the widths of grids, and {quoted(clusters[0])} makes codebooks"
        document.refuse(("budget",), what, "remove it, or use a method of quantize")
        return
    some = [quoted(method.name) for method in found if not method.rates]
    none = [quoted(method.name) for method in found if method.rates]
    if some and none:
        what = f"{some[0]} has widths and {none[0]} has none, and one budget is to decide both"
        document.refuse(("budget",), what, "use methods of one kind")
