"""The `finetune` section of a recipe: how a model is trained, and its regularizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompress.recipe.configs import make_config, option_names
from qcompress.recipe.expect import make_mapping, refuse_unknown
from qcompress.recipe.hints import listed, quoted
from qcompress.recipe.patterns import make_patterns
from qcompress.recipe.tree import Node, Problems, shown
from qcompress.registry.regularizers import REGULARIZERS
from qcompress.settings import OPTIMIZERS, SCHEDULES, Distil, Training, TrainingOptions
from qcompress.types import Finetune, Rule

OWN_KEYS = ("optimizer", "schedule", "distil", "regularize")


def make_finetune(node: Node, problems: Problems) -> Finetune | None:
    """The section, or None; whatever is refused is in `problems`."""
    example = "write `finetune: {epochs: 5, optimizer: {sgd: {lr: 0.001}}}`"
    keys = make_mapping(node, problems, example)
    if not isinstance(node.value, dict):
        return None
    options = option_names(TrainingOptions)
    refuse_unknown(keys, (*options, *OWN_KEYS), problems)
    plain = Node({name: child for name, child in keys.items() if name in options}, node.place, node.path)
    made: dict[str, Any] = {"options": make_config("finetune", TrainingOptions, plain, problems)}
    if "optimizer" in keys:
        made["optimizer"] = _choice(keys["optimizer"], OPTIMIZERS, "optimizer", problems)
    else:
        problems.add(node, "`optimizer` is missing", "add `optimizer: {sgd: {lr: 0.001, momentum: 0.9}}`")
    if "schedule" in keys:
        made["schedule"] = _choice(keys["schedule"], SCHEDULES, "schedule", problems)
    if "distil" in keys:
        made["distil"] = make_config("distil", Distil, keys["distil"], problems)
    rules = _rules(keys["regularize"], problems) if "regularize" in keys else ()
    if "optimizer" not in made or any(value is None for value in made.values()):
        return None
    return Finetune(Training(**made), rules)


def _choice(node: Node, kinds: Mapping[str, type[Any]], noun: str, problems: Problems) -> Any | None:
    """One of a few kinds, by name alone or with its options."""
    if isinstance(node.value, str):
        node = Node({node.value: Node({}, node.place, f"{node.path}.{node.value}")}, node.place, node.path)
    keys = make_mapping(node, problems, f"write `{noun}: {{{next(iter(kinds))}: {{...}}}}`")
    refuse_unknown(keys, tuple(kinds), problems, noun)
    chosen = [kind for kind in keys if kind in kinds]
    if len(chosen) != 1:
        if chosen or not keys:
            problems.add(node, f"{len(chosen)} kinds of {noun}", f"give one of {listed(kinds)}")
        return None
    return make_config(chosen[0], kinds[chosen[0]], keys[chosen[0]], problems)


def _rules(node: Node, problems: Problems) -> tuple[Rule, ...]:
    if not isinstance(node.value, list):
        if not node.is_broken:
            problems.add(node, f"{shown(node.data())} is not a list", 'write `- {match: "*.weight", dsmm: {}}` lines')
        return ()
    return tuple(rule for item in node.value for rule in _rule(item, problems))


def _rule(node: Node, problems: Problems) -> list[Rule]:
    """One rule for each pattern of its match."""
    keys = make_mapping(node, problems, 'write {match: "*.weight", dsmm: {strength: 0.01}}')
    if not isinstance(node.value, dict):
        return []
    known = ("match", "keep", *REGULARIZERS)
    refuse_unknown(keys, known, problems, "key or regularizer")
    patterns = make_patterns(keys["match"], problems) if "match" in keys else []
    if "match" not in keys:
        problems.add(node, "`match` is missing", "add `match`, a glob over tensor names")
    actions = [key for key in keys if key == "keep" or key in REGULARIZERS]
    if not actions:
        if not set(keys) - {"match"}:
            problems.add(node, "a rule without a regularizer", f"add one of {listed(('keep', *REGULARIZERS))}")
        return []
    if len(actions) > 1:
        problems.add(node, f"a rule with {len(actions)} regularizers: {listed(actions)}", "make it one rule each")
    action, options = actions[0], keys[actions[0]]
    if action == "keep":
        for key, child in make_mapping(options, problems, "write `keep: {}`").items():
            problems.add(child, f"unknown key {quoted(key)}", "write `keep: {}`, which has no options")
        return [Rule(pattern, None, None, options.where) for pattern in patterns]
    config = make_config(action, REGULARIZERS[action].config, options, problems)
    return [Rule(pattern, action, config, options.where) for pattern in patterns]
