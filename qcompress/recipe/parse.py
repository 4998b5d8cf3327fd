"""YAML -> Recipe, strict: everything that is wrong is said at once, with its line and its mend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompress import registry
from qcompress.errors import RecipeError
from qcompress.recipe.budget import BudgetFlag, refuse_undecided
from qcompress.recipe.configs import make_config, make_widths, takes_budget
from qcompress.recipe.expect import make_mapping, make_number, refuse_unknown
from qcompress.recipe.finetune import make_finetune
from qcompress.recipe.frame import SEED, VERSION
from qcompress.recipe.gates import make_gates
from qcompress.recipe.hints import listed, nearest, quoted
from qcompress.recipe.locate import compose
from qcompress.recipe.overrides import apply_overrides
from qcompress.recipe.patterns import make_patterns
from qcompress.recipe.sections import SECTIONS, make_sections
from qcompress.recipe.tree import Broken, Node, Problems, shown
from qcompress.registry import BUDGET_METHOD
from qcompress.types import Family, Gates, Keep, KeepDtype, Recipe, Rule

LARGEST_BYTES = 2**20

ROOT_KEYS = ("version", "seed", "keep_dtype", *SECTIONS, "rules", "finetune", "gates")


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
    problems.raise_all(source)
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
    """The mend of a name that is not there: the recipe beside it with the nearest name."""
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
        rules = _budget_rules(keys["budget"], problems) if "budget" in keys else ()
    if "budget" in keys:
        refuse_undecided(keys["budget"], [rule.method for rule in rules if rule.method is not None], problems)
    return Recipe(
        _one_family(keys["rules"], problems) or family if "rules" in keys else family,
        rules,
        seed=int(make_number(keys["seed"], SEED, problems)) if "seed" in keys else 0,
        keep_dtype=_make_keep_dtype(keys["keep_dtype"], problems) if "keep_dtype" in keys else None,
        gates=make_gates(keys["gates"], problems) if "gates" in keys else Gates(),
        finetune=make_finetune(keys["finetune"], problems) if "finetune" in keys else None,
        source=source,
        **make_sections(keys, problems),
    )


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


def _budget_rules(node: Node, problems: Problems) -> tuple[Rule, ...]:
    """What a budget without rules means."""
    return (Rule("*", BUDGET_METHOD, registry.METHODS[BUDGET_METHOD].config(), node.where),)


def _make_rules(node: Node, has_budget: bool, problems: Problems) -> tuple[Rule, ...]:
    if not isinstance(node.value, list):
        if not node.is_broken:
            problems.add(node, f"{shown(node.data())} is not a list", "write `- {match: ..., METHOD: {...}}` lines")
        return ()
    if not node.value:
        problems.add(node, "no rules", 'add one, as {match: "*.weight", squant: {bits: 4}}')
    return tuple(rule for item in node.value for rule in _make_rule(item, has_budget, problems))


def _make_rule(node: Node, has_budget: bool, problems: Problems) -> list[Rule]:
    """One rule for each pattern of its match, all with the same `where`; none where it is refused."""
    keys = make_mapping(node, problems, 'write {match: "*.weight", METHOD: {...}}')
    if not isinstance(node.value, dict):
        return []
    methods = registry.METHODS
    known = ("match", "keep", *methods)
    refuse_unknown(keys, known, problems, "key or method")
    patterns = make_patterns(keys["match"], problems) if "match" in keys else []
    if "match" not in keys:
        problems.add(node, "`match` is missing", "add `match`, a glob over tensor names")
    actions = [key for key in keys if key == "keep" or key in methods]
    if not actions:
        # An unknown key was most likely the action.
        if not set(keys) - {"match"}:
            problems.add(node, "a rule without a method", f"add one of {listed(('keep', *methods))}")
        return []
    if len(actions) > 1:
        problems.add(node, f"a rule with {len(actions)} methods: {listed(actions)}", "make it one rule each")
    configs = [_make_action(action, keys[action], has_budget, problems) for action in actions]
    method = None if actions[0] == "keep" else actions[0]
    return [Rule(pattern, method, configs[0], keys[actions[0]].where) for pattern in patterns]


def _make_action(action: str, options: Node, has_budget: bool, problems: Problems) -> Any | None:
    """The config of a rule's method, of open bits under a budget, or a Keep that says anything; None where refused."""
    if action != "keep":
        method = registry.METHODS[action]
        if has_budget and takes_budget(method):
            return make_widths(action, method.config, options, problems)
        return make_config(action, registry.METHODS[action].config, options, problems)
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
