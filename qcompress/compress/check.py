"""What can be found out about a run before its work begins is found here, all of it at once.

Imports no torch for recipes without a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.data.foreign import find_file, search_folders
from qcompress.data.user_code import find_callable, missing_package, named_code
from qcompress.errors import BudgetError, DataError, InputError, QcompressError, raise_all
from qcompress.plan.sensitivity import sensitivity_file
from qcompress.recipe import refuse_missing, refuse_untrainable
from qcompress.types.config import Section, Shape
from qcompress.types.data_settings import Data, TrainData
from qcompress.types.files import is_there
from qcompress.types.plan import ModelFacts, Plan, Recipe
from qcompress.types.run import ModelRun

if TYPE_CHECKING:
    from qcompress.checkpoint.checkpoint import Checkpoint


@dataclass
class Findings:
    """What a recipe is found to be before it runs.

    errors     all that is wrong, to be raised at once
    unchecked  lines on what could not be checked, and why
    facts      what its network says, where there is one that could be built
    """

    errors: list[QcompressError] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    facts: ModelFacts | None = None


def refuse_code(recipe: Recipe, allow_code: bool) -> None:
    """Raise UsageError, one line, where a recipe names code and the user has not consented to run it."""
    if not allow_code:
        from qcompress.model.factories import refuse_code

        refuse_code(recipe)


def check_recipe(
    recipe: Recipe, checkpoint: Checkpoint | None = None, *, allow_code: bool = False, statistics: bool = False
) -> Findings:
    """All that a run by this recipe would stumble over: missing parts, files and packages, code, network and data.

    checkpoint  what the network is held against
    allow_code  whether code that the recipe names may be imported and called
    statistics  whether saved statistics stand in for model and calibration data
    """
    found = Findings()
    if recipe.rules or recipe.finetune is None:
        found.errors += refuse_missing(recipe, statistics=statistics, measures=not recipe.rules)
    if recipe.finetune is not None:
        found.errors += refuse_untrainable(recipe)
    absent = [*absent_needs(recipe)]
    found.errors += [error for _, error in absent]
    waiting = _code(recipe, allow_code, found)
    if recipe.model is not None:
        _check_live(recipe, checkpoint, allow_code, {*waiting, *(key for key, _ in absent)}, found)
    return found


def plan_checked(
    found: Findings,
    checkpoint: Checkpoint,
    recipe: Recipe,
    representatives: Path | None,
    compact: bool | None = None,
) -> Plan:
    """The plan of a recipe that was checked, by what its network says. Raises all that is wrong with either at once."""
    from qcompress.compress.plan_checkpoint import plan_checkpoint

    try:
        plan = plan_checkpoint(checkpoint, recipe, representatives=representatives, facts=found.facts, compact=compact)
    except InputError as error:
        found.errors.append(error)
        plan = Plan(recipe, ())
    raise_all(found.errors)
    return plan


def data_parts(recipe: Recipe) -> dict[str, Data]:
    """The data that a recipe names: "data.eval" -> where they come from."""
    data = recipe.data
    if data is None:
        return {}
    train = None if data.train is None else data.train.source
    parts = {"calibration": data.calibration, "eval": data.eval, "train": train}
    return {f"data.{name}": one for name, one in parts.items() if one is not None}


def sections_of(recipe: Recipe) -> Iterator[tuple[str, Section]]:
    """Every part of a recipe with its key: "data.eval" -> where evaluation's data come from."""
    return _sections_in(recipe, "")


def _sections_in(value: object, key: str) -> Iterator[tuple[str, Section]]:
    if isinstance(value, Section):
        yield key, value
    if is_dataclass(value):
        for one in fields(value):
            # The source of training data has no key of its own.
            below = key if isinstance(value, TrainData) and one.name == "source" else f"{key}.{one.name}".lstrip(".")
            yield from _sections_in(getattr(value, one.name), below)
    elif isinstance(value, tuple):
        for one in value:
            yield from _sections_in(one, key)


def named_files(recipe: Recipe) -> dict[str, Path]:
    """Every file and folder that a recipe names and that is there: "data.eval.npz of the recipe" -> its path.

    Arguments of callables may name files too: those that do by a path from the recipe's folder, from QCOMPRESS_DATA or
    from the current folder.
    """
    named: dict[str, list[tuple[Path, str]]] = {}
    folders = search_folders(recipe.root)
    for key, section in sections_of(recipe):
        for name in section.paths:
            named[f"{key}.{name}"] = [(folder, getattr(section, name)) for folder in folders]
        texts = _texts_in(getattr(section, "args", None))
        named[f"{key}.args"] = [(folder, text) for text in texts for folder in (*folders, Path())]
    for code in named_code(recipe):
        file = code.name.rpartition(":")[0]
        named[code.key] = [(recipe.root, file)] if file.endswith(".py") else []
    return {
        f"{key} of the recipe" + (f", {name}" if key.endswith(".args") else ""): folder / name
        for key, places in named.items()
        # Of a name that is in several folders the first is read.
        for folder, name in reversed(places)
        if name and is_there(folder / name)
    }


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts_in(one)


def absent_needs(recipe: Recipe) -> Iterator[tuple[str, QcompressError]]:
    """The key of a section, and the error of a package of an extra, or of a file or folder, that it needs in vain."""
    for key, section in sections_of(recipe):
        for package in section.packages:
            error = missing_package(package)
            if error is not None:
                yield key, error
    for part, settings in data_parts(recipe).items():
        for key in settings.paths:
            name = getattr(settings, key)
            try:
                if name is not None:
                    find_file(recipe.root, name, recipe.place(part))
            except DataError as error:
                yield part, error
    try:
        sensitivity_file(recipe)
    except BudgetError as error:
        yield "budget", error


def _code(recipe: Recipe, allow_code: bool, found: Findings) -> set[str]:
    """The sections whose code waits for consent, which is told of; with consent task and loss are imported."""
    from qcompress.model.factories import argument_error, code_of

    try:
        code = code_of(recipe)
    except QcompressError as error:
        # A missing extra tells the listed networks.
        found.errors.append(error)
        return {"model"}
    if allow_code:
        for one in code:
            # The network and the data are made further on.
            if one.key in ("finetune.loss", "task.factory"):
                try:
                    find_callable(one.name, recipe.root, allow_code, one.where, DataError)
                except QcompressError as error:
                    found.errors.append(error)
        return set()
    found.unchecked += [f"{one.where}: {one.name!r} is code, which runs only with --allow-code" for one in code]
    waiting = {one.key.rpartition(".")[0] for one in code}
    argument = None if recipe.model is None else argument_error(recipe.model, recipe.place("model"))
    if argument is not None and "model" not in waiting:
        found.unchecked.append(f"{argument.where}: {argument.what}, and does only with --allow-code")
        waiting.add("model")
    return waiting


def _check_live(
    recipe: Recipe, checkpoint: Checkpoint | None, allow_code: bool, skipped: set[str], found: Findings
) -> None:
    """Build the network, hold the checkpoint against it, and open the data, but for what is `skipped`."""
    import torch

    from qcompress.compress.blueprints import choose_blocks
    from qcompress.data.batches import Source
    from qcompress.data.sources import check_data
    from qcompress.model.build import build_skeleton, facts_by, idle_modules, refuse_misfit, take_shapes
    from qcompress.training.penalties import decide_penalties

    model_run = ModelRun(recipe, torch.device("cpu"), allow_code)
    if "model" not in skipped:
        try:
            module = build_skeleton(model_run)
            choose_blocks(model_run, 1, None)
            if checkpoint is not None:
                taken = take_shapes(module, _shapes(checkpoint))
                idle = idle_modules(module, model_run)
                found.facts = facts_by(module, taken, (tensor.name for tensor in checkpoint.tensors), idle)
                refuse_misfit(module, taken, str(checkpoint.path))
            if recipe.finetune is not None:
                decide_penalties(module, recipe.finetune.regularize)
        except QcompressError as error:
            found.errors.append(error)
    for part, settings in data_parts(recipe).items():
        if part not in skipped:
            assert recipe.data is not None
            try:
                check_data(settings, Source(recipe.root, recipe.place(part), recipe.data.normalize, allow_code))
            except QcompressError as error:
                found.errors.append(error)


def _shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Every name of a checkpoint, tied ones too, with its shape."""
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    return {**{name: shapes[twin] for name, twin in checkpoint.tied.items() if twin in shapes}, **shapes}
