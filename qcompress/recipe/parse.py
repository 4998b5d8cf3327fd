"""YAML becomes a Recipe, strictly: everything that is wrong is said at once, with its line and a hint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcompress import registry
from qcompress.errors import RecipeError, UsageError
from qcompress.recipe.configs import (
    make_config,
    make_list,
    make_mapping,
    make_number,
    make_widths,
    refuse_unknown,
    takes_budget,
)
from qcompress.recipe.hints import listed, nearest, plain, quoted
from qcompress.recipe.sections import (
    SECTIONS,
    SEED,
    VERSION,
    BudgetFlag,
    make_finetune,
    make_gates,
    make_patterns,
    make_sections,
    refuse_undecided,
)
from qcompress.recipe.yaml_tree import AFTER_ALL_LINES, Broken, Node, Place, Problems, compose, path_of_key, shown
from qcompress.registry import BUDGET_METHOD
from qcompress.types.config import MethodConfig
from qcompress.types.plan import Family, Gates, Keep, KeepDtype, Recipe, Rule

LONGEST_PATH = 16
LARGEST_BYTES = 2**20

ROOT_KEYS = ("version", "seed", "keep_dtype", *SECTIONS, "rules", "finetune", "gates")


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
            hint = f"give a number from 0 to {len(items) - 1}" if items else "the list is empty"
            problems.add(here, f"{quoted(segment)} is no item of a list of {len(items)}", hint)
        case scalar:
            what = f"{shown(scalar)} is neither a mapping nor a list and has no {quoted(segment)}"
            problems.add(here, what, f"set {parent.path} as a whole")
    return None


def read_recipe(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    text: str | None = None,
    family: Family = "quantize",
    budget: BudgetFlag | None = None,
) -> Recipe:
    """The recipe in the file at `path`, or in `text`, which then came from `path` or, without one, from stdin.

    overrides  "key.path=value", applied before validation (see `parse_recipe`)
    family     of a recipe whose rules all keep
    budget     in place of the recipe's

    Raises RecipeError, or Refusals of several, and UsageError for an override that is none.
    """
    source = "stdin" if path is None else str(path)
    if text is None:
        if path is None:
            raise ValueError("read_recipe needs a path or a text")
        text = _read_text(path)
    return parse_recipe(text, source, overrides, family=family, budget=budget)


def parse_recipe(
    text: str,
    source: str,
    overrides: Sequence[str] = (),
    *,
    family: Family = "quantize",
    budget: BudgetFlag | None = None,
) -> Recipe:
    """The recipe in a YAML text; `source` names it in errors. All else as in `read_recipe`."""
    problems = Problems()
    if len(text) > LARGEST_BYTES:
        raise RecipeError(source, f"larger than {LARGEST_BYTES} bytes", "a recipe is a short YAML file: use globs")
    root = compose(text, source, problems)
    if not isinstance(root.value, Broken):
        apply_overrides(root, overrides, problems)
    if budget is not None and isinstance(root.value, dict):
        root.value["budget"] = budget.node(root.value.get("budget"))
    recipe = _make_recipe(root, source, family, problems)
    problems.raise_all()
    return recipe


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(str(path), "no such file", _siblings(path)) from None
    except IsADirectoryError:
        raise RecipeError(str(path), "is a folder", "name a recipe file in it") from None
    except (OSError, ValueError) as error:
        raise RecipeError(str(path), f"cannot be read: {error}", "check its name and its permissions") from None
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


def _make_recipe(root: Node, source: str, family: Family, problems: Problems) -> Recipe:
    """The recipe of a tree; whatever is refused is in `problems` and left out of it."""
    nothing = Recipe(family, (), source=source)
    if isinstance(root.value, Broken):
        return nothing
    if root.value is None:
        problems.add(root, "the recipe is empty", f"start with `version: {VERSION}` and `rules:`")
        return nothing
    keys = make_mapping(root, problems, "write `key: value` lines, the first one `version: 1`")
    if not _is_this_version(root, keys, problems):
        return nothing
    refuse_unknown(keys, ROOT_KEYS, problems)
    if not {"rules", "finetune", "budget"} & keys.keys():
        problems.add(root, "`rules` is missing", "add `rules`, a list of rules")
    if "rules" in keys:
        rules = _make_rules(keys["rules"], "budget" in keys, problems)
    else:
        rules = _budget_rules(keys["budget"]) if "budget" in keys else ()
    if "budget" in keys:
        refuse_undecided(keys["budget"], [rule.method for rule in rules if rule.method is not None], problems)
    recipe = Recipe(
        (_one_family(keys["rules"], problems) if "rules" in keys else None) or family,
        rules,
        seed=int(make_number(keys["seed"], SEED, problems)) if "seed" in keys else 0,
        keep_dtype=_make_keep_dtype(keys["keep_dtype"], problems) if "keep_dtype" in keys else None,
        gates=make_gates(keys["gates"], problems) if "gates" in keys else Gates(),
        finetune=make_finetune(keys["finetune"], problems) if "finetune" in keys else None,
        source=source,
    )
    return make_sections(recipe, keys, problems)


def _make_keep_dtype(node: Node, problems: Problems) -> KeepDtype | None:
    if node.value == "f16":
        return "f16"
    if not node.is_broken:
        problems.add(node, f"{shown(node.data())} is not a dtype to keep tensors in", "give f16, or leave it out")
    return None


def _is_this_version(root: Node, keys: Mapping[str, Node], problems: Problems) -> bool:
    """Whether the rest can be judged: not where the text says that it is in another version of the format."""
    if "version" not in keys:
        if isinstance(root.value, dict):
            problems.add(root, "`version` is missing", f"add `version: {VERSION}`")
        return isinstance(root.value, dict)
    node = keys["version"]
    version = node.data()
    if isinstance(version, int) and not isinstance(version, bool):
        if version != VERSION:
            problems.add(
                node, f"version {version} is not known here", f"use `version: {VERSION}`, or a newer qcompress"
            )
        return version == VERSION
    if not node.is_broken:
        problems.add(node, f"{shown(version)} is not a version", f"write `version: {VERSION}`")
    return True


def _budget_rules(node: Node) -> tuple[Rule, ...]:
    """The rules that a budget without any means."""
    return (Rule("*", BUDGET_METHOD, registry.METHODS[BUDGET_METHOD].config(), node.where),)


def _make_rules(node: Node, has_budget: bool, problems: Problems) -> tuple[Rule, ...]:
    items = make_list(node, problems, "write `- {match: ..., METHOD: {...}}` lines")
    if node.value == []:
        problems.add(node, "no rules", 'add one, as {match: "*.weight", squant: {bits: 4}}')
    return tuple(rule for item in items for rule in _make_rule(item, has_budget, problems))


def _make_rule(node: Node, has_budget: bool, problems: Problems) -> list[Rule]:
    """One rule for each pattern of its match, all with the same `where`; none where it is refused."""
    keys = make_mapping(node, problems, 'write {match: "*.weight", METHOD: {...}}')
    if not isinstance(node.value, dict):
        return []
    known = ("keep", *registry.METHODS)
    refuse_unknown(keys, ("match", *known), problems, "key or method")
    patterns = make_patterns(node, keys, problems)
    actions = [key for key in keys if key in known]
    if not actions:
        # An unknown key was most likely the action.
        if not set(keys) - {"match"}:
            problems.add(node, "a rule without a method", f"add one of {listed(known)}")
        return []
    if len(actions) > 1:
        problems.add(node, f"a rule with {len(actions)} methods: {listed(actions)}", "make it one rule each")
    configs = [_make_action(action, keys[action], has_budget, problems) for action in actions]
    method = None if actions[0] == "keep" else actions[0]
    return [Rule(pattern, method, configs[0], keys[actions[0]].where) for pattern in patterns]


def _make_action(action: str, options: Node, has_budget: bool, problems: Problems) -> MethodConfig | Keep | None:
    """The config of a rule's method, of open bits under a budget, or a Keep that says anything; None where refused."""
    if action != "keep":
        method = registry.METHODS[action]
        if has_budget and takes_budget(method):
            return make_widths(action, method.config, options, problems)
        return make_config(action, method.config, options, problems)
    make_mapping(options, problems, "write `keep: {}`")
    if not isinstance(options.value, dict):
        return None
    kept = make_config("keep", Keep, options, problems)
    return None if kept == Keep() else kept


def _one_family(node: Node, problems: Problems) -> Family | None:
    """The family of all methods that the rules name, or None where they name none."""
    first: tuple[Family, str, Node] | None = None
    for rule in node.value if isinstance(node.value, list) else ():
        for key, options in rule.value.items() if isinstance(rule.value, dict) else ():
            if key not in registry.METHODS:
                continue
            family = registry.METHODS[key].family
            if first is None:
                first = (family, key, options)
            elif family != first[0]:
                what = f"{quoted(key)} is a {family} method, but {first[2].path} is of family {first[0]}"
                problems.add(options, what, "a recipe holds one family: make two recipes")
                return first[0]
    return first[0] if first else None
