"""Each section of a recipe but `rules` becomes a settings dataclass; whatever is refused is among the problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from qcompress import registry
from qcompress.recipe.configs import (
    Config,
    Schema,
    make_config,
    make_list,
    make_mapping,
    make_number,
    option_names,
    refuse,
    refuse_unknown,
)
from qcompress.recipe.hints import SIZE_PATTERN, listed, parse_size, quoted, suggest
from qcompress.recipe.yaml_tree import AFTER_ALL_LINES, Node, Place, Problems, path_of_item, shown
from qcompress.registry.regularizers import REGULARIZERS
from qcompress.types.plan import Budget, Finetune, Gates, Recipe, Rule
from qcompress.types.settings import (
    AUGMENTATIONS,
    DATA_KINDS,
    OPTIMIZERS,
    SCHEDULES,
    TASKS,
    ActivationSettings,
    Augmentation,
    Companion,
    Data,
    DataSettings,
    Distil,
    ModelSettings,
    Normalize,
    Task,
    TrainData,
    Training,
    TrainingOptions,
)

VERSION = 1

SECTIONS = ("model", "data", "task", "activations", "companions", "budget")
DATA_PARTS = ("calibration", "eval", "train", "normalize")
TRAINING_PARTS = ("optimizer", "schedule", "distil", "regularize")
"""The keys of `finetune` that are no options of TrainingOptions."""
WEIGHT_ARGUMENTS = ("weights", "pretrained", "checkpoint_path")
"""Arguments of model factories that load weights of their own."""
BUDGET_EXAMPLE = "write `budget: {bpw: 2.0}`, or {size: 1.2MB}"

SEED: Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "default": 0}

SIZE: Schema = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": SIZE_PATTERN}]}

METRICS: Schema = {"type": "object", "additionalProperties": {"type": "number"}}

GATES: dict[str, Schema] = {
    "max_size": {
        "description": "Largest artifact, in bytes: 2000000, 2MB (powers of 1000) or 2MiB (powers of 1024)",
        **SIZE,
    },
    "max_bpw": {
        "description": "Most bits per weight",
        "type": "number",
        "exclusiveMinimum": 0,
    },
    "min_sqnr": {"description": "Least signal-to-noise ratio of any tensor, in decibels", "type": "number"},
    "min_metric": {"description": "Least value of each named metric", **METRICS},
    "max_drop": {"description": "Most that each named metric may fall below the checkpoint's", **METRICS},
}

BUDGET: dict[str, Schema] = {
    "bpw": {
        "description": "Bits per compressed weight, all side information counted",
        "type": "number",
        "exclusiveMinimum": 0,
    },
    "size": {"description": "Bytes of the whole artifact, as in max_size", **SIZE},
    "minimize": {"description": "The smallest artifact that holds the gates", "enum": ["size"]},
}
"""What a budget may say; one of them."""

SENSITIVITY: Schema = {
    "description": "File of what each layer costs at each width, from `report --sensitivity`",
    "type": "string",
    "minLength": 1,
}

Name = TypeVar("Name", bound=str)


def make_sections(recipe: Recipe, keys: Mapping[str, Node], problems: Problems) -> Recipe:
    """The recipe with what the SECTIONS among its keys give, and with the places of all sections."""
    places = {name: keys[name].where for name in (*SECTIONS, "finetune") if name in keys}
    if "data" in keys and isinstance(keys["data"].value, dict):
        places |= {f"data.{part}": node.where for part, node in keys["data"].value.items()}
    return replace(
        recipe,
        model=_make_model(keys["model"], problems) if "model" in keys else None,
        data=_make_data(keys["data"], problems) if "data" in keys else None,
        task=_make_task(keys["task"], problems) if "task" in keys else None,
        activations=_make_activations(keys["activations"], problems) if "activations" in keys else None,
        companions=_make_companions(keys["companions"], problems) if "companions" in keys else (),
        budget=make_budget(keys["budget"], problems) if "budget" in keys else None,
        places=places,
    )


def _make_model(node: Node, problems: Problems) -> ModelSettings | None:
    keys = make_mapping(node, problems, "write `model: {factory: torchvision.models:resnet18}`")
    if not isinstance(node.value, dict):
        return None
    args = keys.get("args")
    for name, child in (args.value if args is not None and isinstance(args.value, dict) else {}).items():
        if name in WEIGHT_ARGUMENTS and child.value not in (None, False, ""):
            problems.add(child, f"{quoted(name)} is set", "remove it: weights come from the checkpoint")
    return make_config("model", ModelSettings, _with_list(node, "blocks"), problems)


def _make_data(node: Node, problems: Problems) -> DataSettings:
    keys = make_mapping(node, problems, "write `data: {eval: {npz: val.npz}}`")
    refuse_unknown(keys, DATA_PARTS, problems)
    calibration = _make_source(keys["calibration"], problems) if "calibration" in keys else None
    measured = _make_source(keys["eval"], problems) if "eval" in keys else None
    train = _make_train(keys["train"], problems) if "train" in keys else None
    normalize = None
    if "normalize" in keys:
        options = keys["normalize"]
        if make_mapping(options, problems, "write `normalize: {mean: [0.5], std: [0.5]}`"):
            normalize = make_config("normalize", Normalize, options, problems)
    return DataSettings(calibration=calibration, eval=measured, train=train, normalize=normalize)


def _make_source(node: Node, problems: Problems) -> Data | None:
    keys = make_mapping(node, problems, "write `{npz: val.npz}`")
    if not isinstance(node.value, dict):
        return None
    kinds = [kind for kind in DATA_KINDS if kind in keys]
    if len(kinds) != 1:
        what = "no source of data" if not kinds else f"{len(kinds)} sources of data: {listed(kinds)}"
        problems.add(node, what, f"give one of {listed(DATA_KINDS)}")
        return None
    options = _with_list(node, "inputs") if kinds == ["dataset"] else node
    source: Data | None = make_config(kinds[0], DATA_KINDS[kinds[0]], options, problems)
    return source


def _make_train(node: Node, problems: Problems) -> TrainData | None:
    keys = make_mapping(node, problems, "write `{npz: train.npz, augment: [flip, crop4]}`")
    if not keys:
        return None
    rest = {name: child for name, child in keys.items() if name != "augment"}
    source = _make_source(replace(node, value=rest), problems)
    augment = _make_augment(keys["augment"], problems) if "augment" in keys else ()
    if source is None:
        return None
    try:
        return TrainData(source=source, augment=augment)
    except ValueError as error:
        what, _, hint = str(error).partition("; ")
        problems.add(keys["augment"], what, hint)
        return None


def _make_augment(node: Node, problems: Problems) -> tuple[Augmentation, ...]:
    steps = []
    for item in make_list(node, problems, f"give a list of {listed(AUGMENTATIONS)}"):
        if isinstance(item.value, str) and item.value not in AUGMENTATIONS:
            problems.add(item, f"unknown augmentation {shown(item.value)}", suggest(item.value, AUGMENTATIONS))
        else:
            steps.append(_make_choice(item, AUGMENTATIONS, "augmentation", problems, several="augmentations"))
    return tuple(step for step in steps if step is not None)


def _make_task(node: Node, problems: Problems) -> Task | None:
    task: Task | None = _make_choice(node, TASKS, "task", problems, "{metric: top1}", "tasks")
    return task


def _make_activations(node: Node, problems: Problems) -> ActivationSettings | None:
    return make_config("activations", ActivationSettings, node, problems)


def _make_companions(node: Node, problems: Problems) -> tuple[Companion, ...]:
    known: tuple[Companion, ...] = get_args(Companion)
    return _make_names(node, known, "companion", problems)


@dataclass(frozen=True, slots=True)
class BudgetFlag:
    """A budget as the command line gives it, which beats the recipe's; `text` is how it was typed: "--bpw 2.0"."""

    text: str
    key: str
    value: float | str

    def node(self, instead_of: Node | None = None) -> Node:
        """What the recipe's `budget` would be; of the one that it has, the file of sensitivities stays."""
        place = Place(self.text, AFTER_ALL_LINES)
        keys = {self.key: Node(self.value, place, "")}
        if instead_of is not None and isinstance(instead_of.value, dict):
            keys |= {key: node for key, node in instead_of.value.items() if key == "sensitivity"}
        return Node(keys, place, "")


def make_budget(node: Node, problems: Problems) -> Budget | None:
    """The budget under `budget`; None where it is refused."""
    keys = make_mapping(node, problems, BUDGET_EXAMPLE)
    refuse_unknown(keys, (*BUDGET, "sensitivity"), problems)
    given = [key for key in BUDGET if key in keys]
    if len(given) > 1:
        problems.add(keys[given[1]], f"{listed(given)} are given together", "keep one of them")
    elif not given and isinstance(node.value, dict) and not keys.keys() - {"sensitivity"}:
        problems.add(node, "names no limit", BUDGET_EXAMPLE)
    limits: dict[str, Any] = {}
    for key in given:
        child = keys[key]
        if key == "bpw":
            limits[key] = float(make_number(child, BUDGET[key], problems))
        elif key == "size":
            limits[key] = make_size(child, problems)
        elif child.value in BUDGET[key]["enum"]:
            limits[key] = child.value
        elif not child.is_broken:
            refuse(child, BUDGET[key], problems)
    if "sensitivity" in keys:
        file = keys["sensitivity"]
        if isinstance(file.value, str) and file.value:
            limits["sensitivity"] = file.value
        elif not file.is_broken:
            refuse(file, SENSITIVITY, problems)
    return Budget(**limits) if len(given) == 1 and given[0] in limits else None


def refuse_undecided(node: Node, methods: Sequence[str], problems: Problems) -> None:
    """Say of a budget over `methods` that it cannot decide: over codebooks, or over two kinds of method at once."""
    found = [registry.METHODS[name] for name in dict.fromkeys(methods)]
    clusters = [method.name for method in found if method.family == "cluster"]
    if clusters:
        what = f"a budget decides the widths of grids, and {quoted(clusters[0])} makes codebooks"
        problems.add(node, what, "remove it, or use a method of quantize")
        return
    some = [quoted(method.name) for method in found if not method.rates]
    none = [quoted(method.name) for method in found if method.rates]
    if some and none:
        what = f"{some[0]} has widths and {none[0]} has none, and one budget is to decide both"
        problems.add(node, what, "use methods of one kind")


def make_gates(node: Node, problems: Problems) -> Gates:
    """The limits under `gates`."""
    keys = make_mapping(node, problems, "write `gates: {max_size: 2MB}`")
    refuse_unknown(keys, tuple(GATES), problems)
    limits: dict[str, Any] = {}
    for key in (key for key in GATES if key in keys):
        child = keys[key]
        if key == "max_size":
            limits[key] = make_size(child, problems)
        elif GATES[key]["type"] == "object":
            fragment = GATES[key]["additionalProperties"]
            metrics = make_mapping(child, problems, "give a number for each metric, as {top1: 0.1}")
            limits[key] = {name: float(make_number(metric, fragment, problems)) for name, metric in metrics.items()}
        else:
            limits[key] = float(make_number(child, GATES[key], problems))
    return Gates(**limits)


def make_size(node: Node, problems: Problems) -> int | None:
    """Bytes, from their number or from text; None where the node holds neither."""
    if isinstance(node.value, int) and not isinstance(node.value, bool):
        return int(make_number(node, SIZE["anyOf"][0], problems))
    if not isinstance(node.value, str):
        if not node.is_broken:
            problems.add(node, f"{shown(node.data())} is not a size", "give a number of bytes, or text like 2MB")
        return None
    try:
        return parse_size(node.value)
    except ValueError as error:
        what, _, hint = str(error).partition("; ")
        problems.add(node, what, hint)
        return None


def make_finetune(node: Node, problems: Problems) -> Finetune | None:
    """How the network is trained, from `finetune`; None where it is refused."""
    keys = make_mapping(node, problems, "write `finetune: {epochs: 5, optimizer: {sgd: {lr: 0.001}}}`")
    if not isinstance(node.value, dict):
        return None
    options = option_names(TrainingOptions)
    refuse_unknown(keys, (*options, *TRAINING_PARTS), problems)
    plain = replace(node, value={name: child for name, child in keys.items() if name in options})
    made: dict[str, Any] = {"options": make_config("finetune", TrainingOptions, plain, problems)}
    if "optimizer" not in keys:
        problems.add(node, "`optimizer` is missing", "add `optimizer: {sgd: {lr: 0.001, momentum: 0.9}}`")
    for noun, kinds in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if noun in keys:
            made[noun] = _make_choice(keys[noun], kinds, noun, problems)
    if "distil" in keys:
        made["distil"] = make_config("distil", Distil, keys["distil"], problems)
    rules: tuple[Rule, ...] = ()
    if "regularize" in keys:
        items = make_list(keys["regularize"], problems, 'write `- {match: "*.weight", dsmm: {}}` lines')
        rules = tuple(rule for item in items for rule in _make_rule(item, problems))
    if "optimizer" not in made or any(value is None for value in made.values()):
        return None
    return Finetune(Training(**made), rules)


def _make_rule(node: Node, problems: Problems) -> list[Rule]:
    """One rule of a regularizer for each pattern of its match."""
    keys = make_mapping(node, problems, 'write {match: "*.weight", dsmm: {strength: 0.01}}')
    if not isinstance(node.value, dict):
        return []
    known = ("keep", *REGULARIZERS)
    refuse_unknown(keys, ("match", *known), problems, "key or regularizer")
    patterns = make_patterns(node, keys, problems)
    actions = [key for key in keys if key in known]
    if not actions:
        if not set(keys) - {"match"}:
            problems.add(node, "a rule without a regularizer", f"add one of {listed(known)}")
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


def make_patterns(node: Node, keys: Mapping[str, Node], problems: Problems) -> list[str]:
    """The globs of a rule's `match`: one, or a list."""
    if "match" not in keys:
        problems.add(node, "`match` is missing", "add `match`, a glob over tensor names")
        return []
    match = keys["match"]
    items = match.value if isinstance(match.value, list) else [match]
    if not items:
        problems.add(match, "a list without a pattern", 'give at least one glob, as "*.weight"')
    patterns = []
    for item in items:
        if isinstance(item.value, str) and item.value:
            patterns.append(item.value)
        elif not item.is_broken:
            what = "an empty pattern" if item.value == "" else f"{shown(item.data())} is not a pattern"
            problems.add(item, what, 'give a glob over tensor names, as "*.weight"')
    return patterns


def _make_choice(
    node: Node,
    kinds: Mapping[str, type[Config]],
    noun: str,
    problems: Problems,
    example: str = "{...}",
    several: str | None = None,
) -> Config | None:
    """One of a few kinds, by name alone or with its options.

    example  the options of the first kind, for a hint
    several  the noun of more than one
    """
    if isinstance(node.value, str):
        bare = Node({}, node.place, f"{node.path}.{node.value}")
        node = replace(node, value={node.value: bare})
    keys = make_mapping(node, problems, f"write `{noun}: {{{next(iter(kinds))}: {example}}}`")
    refuse_unknown(keys, tuple(kinds), problems, noun)
    chosen = [kind for kind in keys if kind in kinds]
    if len(chosen) != 1:
        if chosen or not keys:
            problems.add(node, f"{len(chosen)} {several or f'kinds of {noun}'}", f"give one of {listed(kinds)}")
        return None
    return make_config(chosen[0], kinds[chosen[0]], keys[chosen[0]], problems)


def _make_names(node: Node, known: tuple[Name, ...], noun: str, problems: Problems) -> tuple[Name, ...]:
    """A list of known names, none twice."""
    names: list[Name] = []
    for item in make_list(node, problems, f"give a list of {listed(known)}"):
        if not isinstance(item.value, str) or item.value not in known:
            if not item.is_broken:
                hint = suggest(item.value, known) if isinstance(item.value, str) else f"give one of {listed(known)}"
                problems.add(item, f"unknown {noun} {shown(item.data())}", hint)
        elif item.value in names:
            problems.add(item, f"{quoted(item.value)} stands twice", "remove one")
        else:
            names.append(known[known.index(item.value)])
    return tuple(names)


def _with_list(node: Node, name: str) -> Node:
    """The mapping with a single text under this name as a list of one."""
    if not isinstance(node.value, dict) or name not in node.value:
        return node
    child = node.value[name]
    if not isinstance(child.value, str):
        return node
    items = [Node(child.value, child.place, path_of_item(child.path, 0))]
    return replace(node, value={**node.value, name: replace(child, value=items)})
