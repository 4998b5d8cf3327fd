"""Recipes are refused that lack what their methods, companions, quantizers and gates need."""

from __future__ import annotations

from collections.abc import Iterator

from qcompress.errors import InputError, RecipeError
from qcompress.registry import METHODS, AdaroundConfig, ClusterConfig, DfqConfig, Tune
from qcompress.types.data_settings import MIXING, augmentation_name
from qcompress.types.plan import Recipe, Rule
from qcompress.types.settings import TASKS, Classification, Task, Translation

DATA_FREE_RANGES = ("batch-norm", "noise")
LEARNED_INPUTS = ("lsq", "pact")
"""Methods that train the quantizers of inputs too, which start on data.train."""
BY_BLOCKS = ("gptq", "adaround")
"""Methods that need calibration data, and see no more of a network than a block at a time; rd is one that may have
them."""


def trains(recipe: Recipe) -> bool:
    """Whether a method of the recipe trains the network."""
    return any(rule.method is not None and METHODS[rule.method].needs == "training" for rule in recipe.rules)


def refuse_missing(recipe: Recipe, *, statistics: bool | None = False, measures: bool = False) -> list[InputError]:
    """One error for everything that the recipe lacks.

    statistics  whether saved statistics stand in for model and calibration data; None where the command takes none
    measures    whether the command does nothing but measure
    """
    errors: list[InputError] = [*_missing_for_measuring(recipe, measures)]
    if not measures and not recipe.rules:
        errors.append(RecipeError(recipe.source, "has no rules", "add `rules`, a list of rules"))
    if not measures:
        errors += [error for rule in recipe.rules for error in _missing_for_rule(recipe, rule, statistics)]
        errors += _missing_for_extras(recipe)
    if recipe.model is not None and recipe.model.offload == "blocks":
        errors += refuse_offload(recipe, measures=measures)
    return list({str(error): error for error in errors}.values())


def refuse_offload(recipe: Recipe, *, measures: bool = False) -> list[InputError]:
    """One error for everything that needs the whole network at once, where it goes block by block."""
    found = [] if measures else [*_needs_whole(recipe)]
    if isinstance(recipe.task, Translation):
        found.append((_place(recipe, "task"), "translation runs the whole network for each token"))
    hint = "take it out, or say `model: {offload: none}`"
    return [RecipeError(where, f"{what}, and `offload: blocks` has a part of it", hint) for where, what in found]


def _needs_whole(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Where, and what needs the whole network."""
    for rule in recipe.rules:
        method = None if rule.method is None else METHODS[rule.method]
        if method is None:
            continue
        alone = method.needs == "weights" and method.family == "quantize"
        if not alone and method.name not in BY_BLOCKS:
            yield rule.where, f"{method.name} works on the whole network"
        elif _folds(rule):
            yield rule.where, "folding batch norms needs the graph of the whole network"
    if recipe.companions:
        yield _place(recipe, "companions"), "they correct the whole network"
    if recipe.budget is not None and not all(METHODS[rule.method].rates for rule in recipe.rules if rule.method):
        yield _place(recipe, "budget"), "the sensitivities that it is spent by are measured on the whole network"
    if recipe.activations is not None and (
        recipe.activations.range in DATA_FREE_RANGES or not _has_calibration(recipe)
    ):
        yield _place(recipe, "activations"), "ranges without calibration data need the whole network"


def refuse_untrainable(recipe: Recipe, *, from_scratch: bool = False) -> list[InputError]:
    """One error for everything that training lacks."""
    lacking = [name for name, there in _training_parts(recipe).items() if not there]
    errors: list[InputError] = []
    if lacking:
        what = f"names no {' and no '.join(lacking)}"
        errors.append(RecipeError(recipe.source, what, "add what is to be trained, and how"))
    errors += _unmeasured_best(recipe)
    errors += _unmixable_labels(recipe)
    if from_scratch:
        errors += _needs_checkpoint(recipe)
    if recipe.task is not None and _has_eval(recipe):
        errors += _unknown_metrics(recipe, recipe.task)
    return errors


def refuse_from_scratch(recipe: Recipe) -> list[InputError]:
    """One error for everything that a run of methods cannot do without a checkpoint."""
    idle = {rule.method for rule in recipe.rules if rule.method and METHODS[rule.method].needs != "training"}
    errors: list[InputError] = [*_needs_checkpoint(recipe)]
    if not trains(recipe):
        trained = ", ".join(name for name, one in METHODS.items() if one.needs == "training")
        hint = f"name a CHECKPOINT; only {trained} train a network from scratch"
        errors.append(RecipeError(recipe.source, "no method of the recipe trains, and no checkpoint is given", hint))
    elif idle:
        what = f"{' and '.join(sorted(idle))} would compress weights that nothing has trained"
        errors.append(RecipeError(recipe.source, what, "name a CHECKPOINT, or leave those weights out"))
    return errors


def _needs_checkpoint(recipe: Recipe) -> Iterator[InputError]:
    if recipe.finetune is not None and recipe.finetune.distil is not None:
        where = _place(recipe, "finetune")
        yield RecipeError(where, "distil: there is no network to learn from", "give a CHECKPOINT, or leave it out")
    if recipe.gates.max_drop:
        yield RecipeError("gates.max_drop", "there is no checkpoint to fall below", "use min_metric")


def _place(recipe: Recipe, section: str) -> str:
    """How errors name a section of the recipe."""
    return recipe.place(section)


def _has_eval(recipe: Recipe) -> bool:
    return recipe.data is not None and recipe.data.eval is not None


def _has_calibration(recipe: Recipe) -> bool:
    return recipe.data is not None and recipe.data.calibration is not None


def _tune_of(rule: Rule) -> Tune | None:
    return rule.config.tune if isinstance(rule.config, ClusterConfig) else None


def _folds(rule: Rule) -> bool:
    """Whether a rule's method is asked to fold batch norms."""
    return isinstance(rule.config, AdaroundConfig | DfqConfig) and bool(rule.config.fold)


def _missing_for_measuring(recipe: Recipe, measures: bool) -> Iterator[InputError]:
    has_eval = _has_eval(recipe)
    if measures:
        wanted = {"model": recipe.model is not None, "data.eval": has_eval, "task": recipe.task is not None}
        lacking = [name for name, there in wanted.items() if not there]
        if lacking:
            what = f"names no {' and no '.join(lacking)}"
            yield RecipeError(recipe.source, what, "add what is to be measured, and how")
        return
    if recipe.task is not None and not has_eval:
        yield RecipeError(_place(recipe, "task"), "there is nothing to measure on", "add `data.eval`")
    if recipe.task is not None and recipe.model is None:
        yield RecipeError(_place(recipe, "task"), "there is no model to measure", "add `model`")
    if recipe.model is not None and has_eval and recipe.task is not None:
        yield from _unknown_metrics(recipe, recipe.task)


def _unknown_metrics(recipe: Recipe, task: Task) -> Iterator[InputError]:
    known = task.metrics
    for kind, limits in (("min_metric", recipe.gates.min_metric), ("max_drop", recipe.gates.max_drop)):
        for metric in limits:
            if metric not in known:
                what = f"the task does not measure {metric!r}"
                yield RecipeError(f"gates.{kind}", what, f"it measures {', '.join(known)}")


def _missing_for_rule(recipe: Recipe, rule: Rule, statistics: bool | None) -> Iterator[InputError]:
    if rule.method is None:
        return
    if _tune_of(rule) is not None:
        yield from _missing_for_tuning(recipe, rule)
    method = METHODS[rule.method]
    if method.needs == "weights":
        return
    if method.needs == "training":
        yield from _missing_for_training(recipe, rule)
        return
    if statistics and method.statistics and recipe.model is None:
        if isinstance(rule.config, AdaroundConfig) and rule.config.objective != "gram":
            yield RecipeError(rule.where, "objective: sampled needs the data themselves", "use objective: gram")
        if _folds(rule):
            yield RecipeError(rule.where, "folding batch norms needs a live model", "use fold: false")
        return
    instead = "; or run with --statistics FILE" if method.statistics and statistics is not None else ""
    if recipe.model is None:
        data = " and `data.calibration`" if method.needs == "calibration" else ""
        yield RecipeError(rule.where, f"{rule.method} needs a live model", f"add `model`{data}{instead}")
    elif _has_calibration(recipe):
        return
    elif method.needs == "calibration":
        yield RecipeError(rule.where, f"{rule.method} needs calibration data", f"add `data.calibration`{instead}")
    elif isinstance(rule.config, DfqConfig) and rule.config.bias_correction == "empirical":
        yield RecipeError(rule.where, "bias_correction: empirical needs calibration data", "add `data.calibration`")


def _missing_for_training(recipe: Recipe, rule: Rule) -> Iterator[InputError]:
    lacking = [f"`{name}`" for name, there in _training_parts(recipe).items() if not there]
    if lacking:
        yield RecipeError(rule.where, f"{rule.method} trains a live model", f"add {', '.join(lacking)}")
    others = {one.method for one in recipe.rules if one.method and METHODS[one.method].needs == "training"}
    if len(others) > 1:
        yield RecipeError(rule.where, f"{' and '.join(sorted(others))} would train one after the other", "use one")
    yield from _unmeasured_best(recipe)
    yield from _unmixable_labels(recipe)
    if recipe.companions:
        what = f"companions compare layers with those of the network as it was, and {rule.method} trains it"
        yield RecipeError(_place(recipe, "companions"), what, "leave them out")
    settings = recipe.activations
    if settings is not None and rule.method in LEARNED_INPUTS:
        where = _place(recipe, "activations")
        if settings.range in DATA_FREE_RANGES:
            what = f"{rule.method} starts from what flows there, not from range: {settings.range}"
            yield RecipeError(where, what, "use minmax, mse or percentile, or leave range out")
        if settings.bits < 2 and rule.method == "lsq":
            yield RecipeError(where, "lsq has steps of 2 bits or more", "use bits: 2, or pact")


def _unmeasured_best(recipe: Recipe) -> Iterator[InputError]:
    measured = recipe.task is not None and _has_eval(recipe)
    if recipe.finetune is not None and recipe.finetune.keep == "best" and not measured:
        where = _place(recipe, "finetune")
        yield RecipeError(where, "keep: best needs something to measure on", "add `data.eval`")


def _unmixable_labels(recipe: Recipe) -> Iterator[InputError]:
    train = recipe.data.train if recipe.data is not None else None
    mixing = [step for step in train.augment if isinstance(step, MIXING)] if train is not None else []
    if mixing and recipe.task is not None and not isinstance(recipe.task, Classification):
        task = next(name for name, kind in TASKS.items() if isinstance(recipe.task, kind))
        what = f"{augmentation_name(mixing[0])} mixes images and their classes, and the task is {task}"
        yield RecipeError(_place(recipe, "data.train"), what, "leave it out of augment")


def _training_parts(recipe: Recipe) -> dict[str, bool]:
    return {
        "model": recipe.model is not None,
        "data.train": recipe.data is not None and recipe.data.train is not None,
        "task": recipe.task is not None,
        "finetune": recipe.finetune is not None,
    }


def _missing_for_tuning(recipe: Recipe, rule: Rule) -> Iterator[InputError]:
    lacking = [f"`{name}`" for name, there in _training_parts(recipe).items() if not there and name != "finetune"]
    if lacking:
        yield RecipeError(rule.where, "tune trains the entries of codebooks", f"add {', '.join(lacking)}")
    yield from _unmixable_labels(recipe)
    others = {tune for one in recipe.rules if (tune := _tune_of(one)) is not None}
    if len(others) > 1:
        yield RecipeError(rule.where, "the rules tune in different ways", "give all of them the same `tune`")


def _missing_for_extras(recipe: Recipe) -> Iterator[InputError]:
    calibration = _has_calibration(recipe)
    for section, wanted in (("activations", recipe.activations is not None), ("companions", bool(recipe.companions))):
        if wanted and recipe.model is None:
            yield RecipeError(_place(recipe, section), "they need a live model", "add `model`")
    folding = [rule for rule in recipe.rules if rule.method == "dfq" or _folds(rule)]
    if recipe.companions and folding:
        what = f"companions compare layers with those of the network as it was, and {folding[0].method} folds them"
        yield RecipeError(_place(recipe, "companions"), what, "leave them out; dfq corrects biases itself")
    if recipe.companions and recipe.model is not None and not calibration:
        yield RecipeError(_place(recipe, "companions"), "they need data", "add `data.calibration`")
    settings = recipe.activations
    learned = any(rule.method in LEARNED_INPUTS for rule in recipe.rules)
    if settings is not None and settings.range not in (None, *DATA_FREE_RANGES) and not calibration and not learned:
        what = f"range: {settings.range} needs calibration data"
        hint = f"add `data.calibration`, or use range: {' or '.join(DATA_FREE_RANGES)}"
        yield RecipeError(_place(recipe, "activations"), what, hint)
