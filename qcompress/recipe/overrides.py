"""`--set key.path=value` on a recipe's tree, before anything is validated."""

from __future__ import annotations

from collections.abc import Sequence

from qcompress.errors import UsageError
from qcompress.recipe.hints import plain, quoted
from qcompress.recipe.locate import compose
from qcompress.recipe.tree import Broken, Node, Place, Problems, path_of_key, shown

LONGEST_PATH = 16
AFTER_ALL_LINES = 10**9


def apply_overrides(root: Node, overrides: Sequence[str], problems: Problems) -> None:
    """Set each "key.path=value" in `root`, in order, so that the last one of a path holds.

    A segment is a mapping's key or a list's index from 0; a mapping that is missing is made, for validation to judge.
    The value is YAML, and text where it starts with `*`. A path that leads through a scalar or past a list's end goes
    to `problems`. Raises UsageError where an override is not of the form `key.path=value`.
    """
    for index, override in enumerate(overrides):
        segments, text = _split(override)
        place = Place(f"--set {plain(override)}", AFTER_ALL_LINES + index)
        _set(root, segments, text, place, problems)


def _split(override: str) -> tuple[list[str], str]:
    path, equals, text = override.partition("=")
    segments = path.strip().split(".")
    where = f"--set {plain(override)}"
    if not equals:
        raise UsageError(where, "no `=`", "write --set key.path=value, as in --set rules.0.rtn.bits=2")
    if "" in segments or len(segments) > LONGEST_PATH:
        raise UsageError(where, f"{quoted(path)} is not a path", "write keys and list numbers with a dot between")
    return segments, text.strip()


def _set(root: Node, segments: Sequence[str], text: str, place: Place, problems: Problems) -> None:
    here = root
    for segment in segments[:-1]:
        child = _child(here, segment, place, problems)
        if child is None:
            return
        here = child
    target = _child(here, segments[-1], place, problems)
    if target is None:
        return
    value = Node(text, place, target.path)
    if not text.startswith("*"):
        value = compose(text, place.text, problems, fixed=place, path=target.path)
    target.value, target.place = value.value, place


def _child(parent: Node, segment: str, place: Place, problems: Problems) -> Node | None:
    """The node under `segment`, made where a mapping lacks it; None where there can be none."""
    here = Node(None, place, parent.path)
    if parent.value is None:
        parent.value = {}
    match parent.value:
        case Broken():
            return None
        case dict():
            return parent.value.setdefault(segment, Node(None, place, path_of_key(parent.path, segment)))
        case list():
            items = parent.value
            if segment.isascii() and segment.isdigit() and len(segment) < 10 and int(segment) < len(items):
                return items[int(segment)]
            mend = f"give a number from 0 to {len(items) - 1}" if items else "the list is empty"
            problems.add(here, f"{quoted(segment)} is no item of a list of {len(items)}", mend)
        case scalar:
            what = f"{shown(scalar)} is neither a mapping nor a list and has no {quoted(segment)}"
            problems.add(here, what, f"set {parent.path} as a whole")
    return None
