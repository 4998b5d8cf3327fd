"""A checkpoint is trained by a recipe and written anew; the report says what naive quantization would now give."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompress.artifact.writer import copy_companions, drop_quantization, find_companions
from qcompress.checkpoint.checkpoint import INDEX_SUFFIX, Checkpoint, write_checkpoint
from qcompress.checkpoint.outputs import refuse_own_input
from qcompress.checkpoint.safetensors_file import weight_files
from qcompress.checkpoint.staging import reporting_resources, staged_output, staging_folder
from qcompress.coding.kept import KEPT_DTYPES
from qcompress.compress.check import absent_needs, refuse_code
from qcompress.compress.evaluate import compare, is_measured, load_network, measure_task
from qcompress.compress.weight_stats import TrialKind, Trials, WeightStats, measure_weights
from qcompress.data.augment import load_augmentations
from qcompress.data.batches import Source
from qcompress.data.measurement import Measurement
from qcompress.data.sources import read_data
from qcompress.errors import RecipeError, TrainingError, raise_all
from qcompress.model.build import stored_names, tied_names
from qcompress.recipe import recipe_hash
from qcompress.report.document import AccuracyFigures, GateResult
from qcompress.report.figures import run_figures
from qcompress.report.gates import check_metrics
from qcompress.report.training_report import TrainedLayer, TrainingReport, TrialFigures, training_path
from qcompress.training.loop import Data, Trained, Watch
from qcompress.training.losses import Loss, distilled, make_loss
from qcompress.training.penalties import Penalties, attach_penalties, weight_kinds
from qcompress.training.state import last_good
from qcompress.training.trainer import Trainer
from qcompress.training.warnings import advise_after
from qcompress.types.plan import Gates, Recipe
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import ModelRun, Say, start_clock

NEEDED = ("model", "data.train", "data.eval", "task")
"""Sections of a recipe that training uses; the others are for what comes after it."""
STATE = "training.safetensors"
"""The file of saved states, where the output is being built."""


@dataclass(frozen=True)
class FinetuneOptions:
    """How to run, not what.

    say  called with a line of words now and then, on the first rank only
    """

    output: Path
    force: bool = False
    resume: bool = False
    say: Say = lambda _: None


def finetune(
    checkpoint: Checkpoint | None, model_run: ModelRun, options: FinetuneOptions, world: World = ALONE
) -> TrainingReport | None:
    """Train, write the checkpoint and what the regularizers learned beside it, and return the report.

    Without a checkpoint the model is trained from scratch. On several ranks only the first writes, and has a report.

    raises  RecipeError, ModelError, DataError, CheckpointError; OutputError, ResourceError; TrainingError where the
            loss is not finite: the last good weights then lie beside the output. Nothing else is left behind.
    """
    recipe = model_run.recipe
    if recipe.finetune is None:
        raise RecipeError(recipe.source, "does not say how to train", "add `finetune: {epochs: 5, optimizer: ...}`")
    clock = start_clock()
    if checkpoint is not None:
        refuse_own_input(checkpoint.path, options.output)
        find_companions(checkpoint.path)
    _refuse_absent(recipe)
    training = recipe.finetune
    torch.manual_seed(recipe.seed)
    module = load_network(model_run, checkpoint).to(model_run.device)
    watch = _watch(checkpoint, model_run, options, world)
    teacher = copy.deepcopy(module).eval() if training.distil else module
    trainer = make_trainer(model_run, teacher, watch, world)
    warnings = trainer.attach(module)
    penalties = trainer.penalties
    before = _judge(module, model_run, "before") if checkpoint is not None and world.is_first else None
    trained = _train_and_write(module, trainer, checkpoint, options)
    if not world.is_first:
        return None
    after = _judge(module, model_run, "after")
    warnings += [*trained.warnings, *advise_after(penalties)]
    accuracy = compare(before.metrics, after.metrics) if before is not None and before.metrics else None
    metrics = {one.metric: one.value for one in after.metrics}
    return TrainingReport(
        output=options.output.name,
        checkpoint=checkpoint.path.name if checkpoint is not None else None,
        recipe_hash=recipe_hash(recipe),
        steps=trained.steps,
        epochs=training.epochs,
        kept_epoch=trained.kept,
        loss=trained.loss,
        epoch_metrics=trained.metrics,
        accuracy=accuracy,
        metrics=metrics,
        naive=_trials("naive", training.naive_bits, before, after),
        kmeans=_trials("k-means", training.kmeans_bits, before, after),
        layers=_layers(module, penalties, before, after),
        warnings=tuple(warnings),
        gates=_check_gates(recipe.gates, metrics, accuracy),
        run=run_figures(clock, str(model_run.device)),
    )


def _refuse_absent(recipe: Recipe) -> None:
    """Raise QcompressError (Refusals where several) for packages and files that training needs in vain."""
    raise_all([error for key, error in absent_needs(recipe) if key.startswith(NEEDED)])


def plan_training(recipe: Recipe, checkpoint: Checkpoint | None, allow_code: bool) -> list[dict[str, Any]]:
    """The weights, a row each, and how they would be regularized; the model is built and the checkpoint loaded.

    raises  UsageError for code without consent; what is missing of packages and files that training needs; and what
            attaching penalties raises
    """
    assert recipe.finetune is not None
    refuse_code(recipe, allow_code)
    _refuse_absent(recipe)
    torch.manual_seed(recipe.seed)
    module = load_network(ModelRun(recipe, torch.device("cpu"), allow_code), checkpoint)
    penalties = attach_penalties(module, recipe.finetune.regularize)
    facts = penalties.facts()
    reasons = {one.name: one.where for one in penalties.regularized}
    return [
        {
            "name": name,
            "shape": list(weight.shape),
            "regularizer": facts[name]["regularizer"] if name in facts else None,
            "strength": facts[name]["strength"] if name in facts else None,
            "reason": reasons.get(name, "no rule matches"),
        }
        for name, weight in module.named_parameters()
    ]


def make_trainer(model_run: ModelRun, teacher: nn.Module, watch: Watch, world: World = ALONE) -> Trainer:
    """The trainer of a module on the recipe's data as its `finetune` section says.

    teacher  the network as it was, for distillation, in eval mode
    raises   DataError, RecipeError, UsageError
    """
    recipe = model_run.recipe
    assert recipe.finetune is not None
    training = recipe.finetune
    data, loss = train_data(model_run), training_loss(model_run, teacher)
    return Trainer(data, loss, training, watch, recipe.seed, world, training.regularize, recipe.rules)


def train_data(model_run: ModelRun) -> Data:
    """The recipe's data.train. Raises DataError, RecipeError, UsageError."""
    recipe = model_run.recipe
    if recipe.data is None or recipe.data.train is None:
        raise RecipeError(recipe.source, "names no data.train", "add `data: {train: {npz: train.npz}}`")
    place = model_run.place("data.train")
    where = Source(model_run.root, place, recipe.data.normalize, model_run.allow_code)
    load_augmentations(recipe.data.train.augment)
    return Data(read_data(recipe.data.train.source, where, recipe.seed), recipe.data.train.augment, place)


def training_loss(model_run: ModelRun, teacher: nn.Module) -> Loss:
    """The loss that the recipe's `finetune` section asks for.

    teacher  for distillation: the network as it was, in eval mode
    """
    recipe = model_run.recipe
    assert recipe.finetune is not None
    if recipe.task is None:
        raise RecipeError(recipe.source, "names no task", "add `task: classification`")
    training = recipe.finetune
    loss = make_loss(recipe.task, training.label_smoothing, training.loss, model_run.root, model_run.allow_code)
    if training.distil is None:
        return loss
    return distilled(loss, recipe.task, teacher, training.distil)


def run_identity(recipe: Recipe, checkpoint: Checkpoint | None, world: World) -> str:
    """What a saved state belongs to: the recipe as far as training sees it, the checkpoint, the ranks."""
    digest = hashlib.sha256(recipe_hash(recipe).encode())
    for shard in checkpoint.shards if checkpoint is not None else ():
        for info in shard.tensors:
            digest.update(f"{info}{shard.crc32_of(info.name)}".encode())
    digest.update(f"{world.size}".encode())
    return digest.hexdigest()


def _watch(checkpoint: Checkpoint | None, model_run: ModelRun, options: FinetuneOptions, world: World) -> Watch:
    """The log and the saved states of a run, and what it says; only the first rank speaks."""
    recipe = model_run.recipe
    return Watch(
        measure=_measure(model_run, "after an epoch"),
        say=options.say if world.is_first else lambda _: None,
        log=training_path(options.output, "log.jsonl"),
        state=staging_folder(options.output) / STATE,
        resume=options.resume,
        identity=run_identity(replace(recipe, rules=(), gates=Gates()), checkpoint, world),
    )


def _measure(model_run: ModelRun, what: str) -> Callable[[nn.Module], Sequence[Measurement]] | None:
    """A function: module -> the task's metrics; None where there is nothing to measure on."""
    return (lambda module: measure_task(module, model_run, what)) if is_measured(model_run.recipe) else None


@dataclass(frozen=True)
class _Judged:
    """A network at one time: the task's metrics, none where nothing is measured, and its weights' figures."""

    metrics: Sequence[Measurement]
    stats: WeightStats


def _judge(module: nn.Module, model_run: ModelRun, when: str) -> _Judged:
    """The network as it is now, and in the trials that the recipe asks for."""
    assert model_run.recipe.finetune is not None
    training = model_run.recipe.finetune
    metrics = measure_task(module, model_run, when) if is_measured(model_run.recipe) else ()
    trials = Trials(training.naive_bits, training.kmeans_bits)
    stats = measure_weights(module, [*_weights(module)], trials, _measure(model_run, f"compressed, {when}"))
    return _Judged(metrics, stats)


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions and dense layers by name, in the module's order."""
    kinds = weight_kinds(module)
    return {name: weight for name, weight in module.named_parameters() if name in kinds}


def _train_and_write(
    module: nn.Module,
    trainer: Trainer,
    checkpoint: Checkpoint | None,
    options: FinetuneOptions,
) -> Trained:
    """Train the module and, on the first rank, write it; what is half done lies in the staging folder.

    raises  OutputError, ResourceError, TrainingError
    """
    output, world, state = options.output, trainer.world, staging_folder(options.output) / STATE
    folder = checkpoint is not None and checkpoint.is_folder
    staging = staged_output(output, force=options.force, folder=folder, resume=options.resume)
    with staging if world.is_first else contextlib.nullcontext(output) as staged:
        world.wait()
        try:
            trained = trainer(module)
        except TrainingError as error:
            raise _with_last_good(error, state, output) if world.is_first else error from None
        if world.is_first:
            with reporting_resources(output.parent):
                _write(module, checkpoint, staged)
                for shard in checkpoint.shards if checkpoint is not None else ():
                    shard.refuse_changed()
                state.unlink(missing_ok=True)
                _write_beside(trainer.penalties.saved(), training_path(output, "reg.safetensors"))
    return trained


def _with_last_good(error: TrainingError, state: Path, output: Path) -> TrainingError:
    """The error, the last good weights being written beside the output where there are any."""
    found = last_good(state) if state.exists() else None
    if found is None:
        return error
    weights, step = found
    path = training_path(output, "last-good.safetensors")
    _write_beside(weights, path)
    return TrainingError(error.where, f"{error.what}; the weights of step {step} are in {path.name}", error.hint)


def _write_beside(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a file beside the output, whole or not at all; it replaces what an earlier run left there."""
    with staged_output(path, force=True, folder=False) as staged:
        write_checkpoint(tensors, staged)


def _write(module: nn.Module, checkpoint: Checkpoint | None, staged: Path) -> None:
    """The trained weights, in the files, names and dtypes of the checkpoint; from scratch float32 in one file."""
    values = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    if checkpoint is None:
        tied = tied_names(module)
        own = {name: value.contiguous().clone() for name, value in values.items() if name not in tied}
        write_checkpoint(own, staged, tied)
    else:
        values = stored_names(module, values, {info.name: info.shape for info in checkpoint.tensors})
        for shard in checkpoint.shards:
            tensors = {
                info.name: values[info.name].to(KEPT_DTYPES[info.dtype]).contiguous().clone() for info in shard.tensors
            }
            _refuse_overflow(tensors, values)
            path = staged / shard.path.name if checkpoint.is_folder else staged
            write_checkpoint(tensors, path, shard.metadata)
        if checkpoint.is_folder:
            copy_companions(checkpoint.path, staged)
            if checkpoint.is_dequantized:
                drop_quantization(staged)
            places = {info.name: shard.path.name for shard in checkpoint.shards for info in shard.tensors}
            for index in weight_files(checkpoint.path, INDEX_SUFFIX):
                shutil.copyfile(index, staged / index.name)
                document = json.loads(index.read_text(encoding="utf-8"))
                # Tensors that are read as others than they are, or by other names.
                if document["weight_map"] != places:
                    (staged / index.name).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2))


def _refuse_overflow(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainingError where a trained value has outgrown the dtype of the checkpoint."""
    for name, stored in tensors.items():
        if stored.is_floating_point() and bool((values[name].isfinite() & ~stored.isfinite()).any()):
            what = f"{name!r} holds values that {str(stored.dtype).removeprefix('torch.')} does not"
            raise TrainingError("training", what, "lower the learning rate or the strength, or set clip_norm")


def _trials(kind: TrialKind, widths: Sequence[int], before: _Judged | None, after: _Judged) -> tuple[TrialFigures, ...]:
    """The figures of all weights compressed at each of these bit widths, before and after."""
    return tuple(
        TrialFigures(
            bits=bits,
            metric=after.metrics[0].metric if after.metrics else None,
            before=before.stats.metrics.get((kind, bits)) if before is not None else None,
            after=after.stats.metrics.get((kind, bits)),
            sqnr_db_before=before.stats.sqnr_db[kind, bits] if before is not None else None,
            sqnr_db_after=after.stats.sqnr_db[kind, bits],
        )
        for bits in widths
    )


def _layers(
    module: nn.Module, penalties: Penalties, before: _Judged | None, after: _Judged
) -> tuple[TrainedLayer, ...]:
    """The figures of each weight before and after, and what its regularizer has come to."""
    facts = penalties.facts()
    return tuple(
        TrainedLayer(
            name=name,
            shape=tuple(weight.shape),
            before=before.stats.weights[name] if before is not None else None,
            after=after.stats.weights[name],
            **facts.get(name, {}),
        )
        for name, weight in _weights(module).items()
    )


def _check_gates(
    gates: Gates, metrics: Mapping[str, float], accuracy: Sequence[AccuracyFigures] | None
) -> tuple[GateResult, ...]:
    """The gates on the task's metrics; without a checkpoint there is no drop to look at."""
    drops = {one.metric: one.drop for one in accuracy or () if one.drop is not None}
    return check_metrics(gates.min_metric, metrics) + check_metrics(gates.max_drop, drops, "max-drop")
