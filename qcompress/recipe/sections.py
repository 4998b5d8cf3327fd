"""The sections of a recipe that bring a live model: `model`, `data`, `task`, `activations`, `companions`; `budget`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from qcompress.recipe.budget import make_budget
from qcompress.recipe.configs import make_config
from qcompress.recipe.expect import make_mapping, refuse_unknown
from qcompress.recipe.hints import listed, quoted, suggest
from qcompress.recipe.tree import Node, Problems, shown
from qcompress.settings import (
    AUGMENTATIONS,
    DATA_KINDS,
    TASKS,
    ActivationSettings,
    Companion,
    DataSettings,
    ModelSettings,
    Normalize,
    TrainData,
)

SECTIONS = ("model", "data", "task", "activations", "companions", "budget")
DATA_PARTS = ("calibration", "eval", "train", "normalize")
WEIGHT_ARGUMENTS = ("weights", "pretrained", "checkpoint_path")


def make_sections(keys: Mapping[str, Node], problems: Problems) -> dict[str, Any]:
    """The fields of a Recipe that its sections give, `places` too; whatever is refused is in `problems`."""
    makers = {
        "model": _model,
        "data": _data,
        "task": _task,
        "activations": _activations,
        "companions": _companions,
        "budget": make_budget,
    }
    made: dict[str, Any] = {name: make(keys[name], problems) for name, make in makers.items() if name in keys}
    places = {name: keys[name].where for name in (*SECTIONS, "finetune") if name in keys}
    if "data" in keys and isinstance(keys["data"].value, dict):
        places |= {f"data.{part}": node.where for part, node in keys["data"].value.items()}
    return {**made, "places": places}


def _model(node: Node, problems: Problems) -> ModelSettings | None:
    keys = make_mapping(node, problems, "write `model: {factory: torchvision.models:resnet18}`")
    if not isinstance(node.value, dict):
        return None
    args = keys.get("args")
    for name, child in (args.value if args is not None and isinstance(args.value, dict) else {}).items():
        if name in WEIGHT_ARGUMENTS and child.value not in (None, False, ""):
            problems.add(child, f"{quoted(name)} is set", "remove it: weights come from the checkpoint")
    return make_config("model", ModelSettings, _with_lists(node, ("blocks",)), problems)


def _data(node: Node, problems: Problems) -> DataSettings | None:
    keys = make_mapping(node, problems, "write `data: {eval: {npz: val.npz}}`")
    refuse_unknown(keys, DATA_PARTS, problems)
    parts: dict[str, Any] = {}
    for part in ("calibration", "eval"):
        if part in keys:
            parts[part] = _source(keys[part], problems)
    if "train" in keys:
        parts["train"] = _train(keys["train"], problems)
    if "normalize" in keys:
        options = keys["normalize"]
        if make_mapping(options, problems, "write `normalize: {mean: [0.5], std: [0.5]}`"):
            parts["normalize"] = make_config("normalize", Normalize, options, problems)
    return DataSettings(**parts)


def _source(node: Node, problems: Problems) -> Any | None:
    keys = make_mapping(node, problems, "write `{npz: val.npz}`")
    if not isinstance(node.value, dict):
        return None
    kinds = [kind for kind in DATA_KINDS if kind in keys]
    if len(kinds) != 1:
        what = "no source of data" if not kinds else f"{len(kinds)} sources of data: {listed(kinds)}"
        problems.add(node, what, f"give one of {listed(DATA_KINDS)}")
        return None
    return make_config(
        kinds[0], DATA_KINDS[kinds[0]], _with_lists(node, ("inputs",) if kinds == ["dataset"] else ()), problems
    )


def _train(node: Node, problems: Problems) -> TrainData | None:
    keys = make_mapping(node, problems, "write `{npz: train.npz, augment: [flip, crop4]}`")
    if not keys:
        return None
    rest = Node({name: child for name, child in keys.items() if name != "augment"}, node.place, node.path)
    source = _source(rest, problems)
    augment = _names(keys["augment"], AUGMENTATIONS, "augmentation", problems) if "augment" in keys else ()
    return TrainData(source=source, augment=augment) if source is not None else None


def _task(node: Node, problems: Problems) -> Any | None:
    if isinstance(node.value, str):
        node = Node({node.value: Node({}, node.place, f"{node.path}.{node.value}")}, node.place, node.path)
    keys = make_mapping(node, problems, "write `task: {classification: {metric: top1}}`")
    refuse_unknown(keys, tuple(TASKS), problems, "task")
    kinds = [kind for kind in keys if kind in TASKS]
    if len(kinds) != 1:
        if kinds or not keys:
            problems.add(node, f"{len(kinds)} tasks", f"give one of {listed(TASKS)}")
        return None
    return make_config(kinds[0], TASKS[kinds[0]], keys[kinds[0]], problems)


def _activations(node: Node, problems: Problems) -> ActivationSettings | None:
    return make_config("activations", ActivationSettings, node, problems)


def _companions(node: Node, problems: Problems) -> tuple[str, ...]:
    return _names(node, get_args(Companion), "companion", problems)


def _names(node: Node, known: tuple[str, ...], noun: str, problems: Problems) -> tuple[str, ...]:
    """A list of known names, none twice."""
    if not isinstance(node.value, list):
        if not node.is_broken:
            problems.add(node, f"{shown(node.data())} is not a list", f"give a list of {listed(known)}")
        return ()
    names: list[str] = []
    for item in node.value:
        if not isinstance(item.value, str) or item.value not in known:
            if not item.is_broken:
                mend = suggest(item.value, known) if isinstance(item.value, str) else f"give one of {listed(known)}"
                problems.add(item, f"unknown {noun} {shown(item.data())}", mend)
        elif item.value in names:
            problems.add(item, f"{quoted(item.value)} stands twice", "remove one")
        else:
            names.append(item.value)
    return tuple(names)


def _with_lists(node: Node, names: tuple[str, ...]) -> Node:
    """The mapping with single texts under these names as lists of one."""
    if not isinstance(node.value, dict):
        return node
    keys = dict(node.value)
    for name in names:
        child = keys.get(name)
        if child is not None and isinstance(child.value, str):
            keys[name] = Node([Node(child.value, child.place, f"{child.path}[0]")], child.place, child.path)
    return Node(keys, node.place, node.path)
