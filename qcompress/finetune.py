"""Checkpoint and recipe -> trained checkpoint: load, train, write, and say what naive quantization would now give."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompress.artifact.staging import refuse_own_input, reporting_resources, staged_output, staging_folder
from qcompress.artifact.writer import copy_companions
from qcompress.audit import Audit, TrialKind, Trials, audit
from qcompress.checkpoint import INDEX_SUFFIX, Checkpoint, write_checkpoint
from qcompress.errors import RecipeError, TrainingError
from qcompress.evaluate import Setting, compare, measure_task
from qcompress.load import KEPT_DTYPES, checkpoint_state
from qcompress.model.build import load_weights, tied_names
from qcompress.model.data import Source, read_data
from qcompress.model.tasks import Measurement
from qcompress.recipe import recipe_hash
from qcompress.report.assemble import run_figures
from qcompress.report.gates import check_metrics
from qcompress.report.training import TrainedLayer, TrainingReport, TrialFigures, training_path
from qcompress.training.advice import advise_after, advise_before
from qcompress.training.attach import attach_penalties, weight_kinds
from qcompress.training.loop import Data, Watch, train
from qcompress.training.losses import Loss, distilled, make_loss
from qcompress.training.parallel import ALONE, World
from qcompress.training.penalties import Penalties
from qcompress.training.state import last_good
from qcompress.types import Gates, Recipe

STATE = "training.safetensors"


@dataclass(frozen=True)
class FinetuneOptions:
    """How to run, not what.

    say  called with a line of words now and then, on the first rank only
    """

    output: Path
    force: bool = False
    resume: bool = False
    say: Callable[[str], None] = lambda _: None


def finetune(
    checkpoint: Checkpoint | None, setting: Setting, options: FinetuneOptions, world: World = ALONE
) -> TrainingReport | None:
    """Train, write the checkpoint and what the regularizers learned beside it, and return the report.

    Without a checkpoint the model is trained from scratch. On several ranks only the first writes, and has a report.

    raises  RecipeError, ModelError, DataError, CheckpointError; OutputError, ResourceError; TrainingError where the
            loss is not finite: the last good weights then lie beside the output. Nothing else is left behind.
    """
    recipe, output = setting.recipe, options.output
    section = recipe.finetune
    if section is None:
        raise RecipeError(recipe.source, "does not say how to train", "add `finetune: {epochs: 5, optimizer: ...}`")
    started, cpu_started = time.monotonic(), time.process_time()
    if checkpoint is not None:
        refuse_own_input(checkpoint.path, output)
    torch.manual_seed(recipe.seed)
    module = setting.build().float()
    if checkpoint is not None:
        load_weights(module, checkpoint_state(checkpoint), str(checkpoint.path))
    module.to(setting.device)
    penalties = attach_penalties(module, section.regularize)
    warnings = advise_before(penalties, section.training, recipe.rules)
    data = train_data(setting)
    loss_of = training_loss(setting, copy.deepcopy(module).eval() if section.training.distil else module)
    measures = recipe.data is not None and recipe.data.eval is not None
    names = [name for name, _ in module.named_parameters() if name in weight_kinds(module)]
    options_ = section.training.options
    trials = Trials(options_.naive_bits, options_.kmeans_bits)
    before: Sequence[Measurement] = ()
    audited: Audit | None = None
    if checkpoint is not None and world.is_first:
        before = measure_task(module, setting, "before") if measures else ()
        audited = audit(module, names, trials, _measure(setting, "compressed, before") if measures else None)
    folder = checkpoint is not None and checkpoint.is_folder
    staging = staged_output(output, force=options.force, folder=folder, resume=options.resume)
    with staging if world.is_first else contextlib.nullcontext(output) as staged:
        world.wait()
        state = staging_folder(output) / STATE
        watch = Watch(
            measure=_measure(setting, "after an epoch") if measures else None,
            say=options.say if world.is_first else lambda _: None,
            log=training_path(output, "log.jsonl"),
            state=state,
            resume=options.resume,
            identity=run_identity(replace(recipe, rules=(), gates=Gates()), checkpoint, world),
        )
        try:
            trained = train(module, data, loss_of, section.training, penalties, watch, seed=recipe.seed, world=world)
        except TrainingError as error:
            raise _with_last_good(error, state, output) if world.is_first else error from None
        if world.is_first:
            with reporting_resources(output.parent):
                _write(module, checkpoint, staged, state)
                write_checkpoint(penalties.saved(), training_path(output, "reg.safetensors"))
    if not world.is_first:
        return None
    after = measure_task(module, setting, "after") if measures else ()
    now = audit(module, names, trials, _measure(setting, "compressed, after") if measures else None)
    warnings += advise_after(penalties)
    accuracy = compare(before, after) if before else None
    gates = check_metrics(recipe.gates.min_metric, {one.metric: one.value for one in after})
    drops = {one.metric: one.drop for one in accuracy or () if one.drop is not None}
    gates += check_metrics(recipe.gates.max_drop, drops, "max-drop")
    return TrainingReport(
        output=output.name,
        checkpoint=checkpoint.path.name if checkpoint is not None else None,
        recipe_hash=recipe_hash(recipe),
        steps=trained.steps,
        epochs=section.training.options.epochs,
        kept_epoch=trained.kept,
        loss=trained.loss,
        epoch_metrics=trained.metrics,
        accuracy=accuracy,
        metrics={one.metric: one.value for one in after},
        naive=_trials("naive", trials.naive, after, audited, now),
        kmeans=_trials("k-means", trials.kmeans, after, audited, now),
        layers=_layers(module, names, audited, now, penalties),
        warnings=tuple(warnings),
        gates=gates,
        run=run_figures(time.monotonic() - started, time.process_time() - cpu_started, str(setting.device)),
    )


def plan_training(recipe: Recipe, checkpoint: Checkpoint | None, allow_code: bool) -> list[dict[str, Any]]:
    """Which weights would be regularized and how, a row each; the model is built and the checkpoint loaded.

    raises  what attaching penalties raises
    """
    setting = Setting(recipe, torch.device("cpu"), allow_code)
    torch.manual_seed(recipe.seed)
    module = setting.build().float()
    if checkpoint is not None:
        load_weights(module, checkpoint_state(checkpoint), str(checkpoint.path))
    assert recipe.finetune is not None
    penalties = attach_penalties(module, recipe.finetune.regularize)
    facts = penalties.facts()
    by_name = {one.name: one for one in penalties.regularized}
    return [
        {
            "name": name,
            "shape": list(weight.shape),
            "regularizer": facts[name]["regularizer"] if name in facts else None,
            "strength": facts[name]["strength"] if name in facts else None,
            "reason": by_name[name].where if name in by_name else "no rule matches",
        }
        for name, weight in module.named_parameters()
    ]


def train_data(setting: Setting) -> Data:
    """The recipe's data.train. Raises DataError, RecipeError, UsageError."""
    recipe = setting.recipe
    train_data = recipe.data.train if recipe.data is not None else None
    if train_data is None:
        raise RecipeError(recipe.source, "names no data.train", "add `data: {train: {npz: train.npz}}`")
    assert recipe.data is not None
    where = Source(setting.root, setting.place("data.train"), recipe.data.normalize, setting.allow_code)
    return Data(read_data(train_data.source, where, recipe.seed), train_data.augment, setting.place("data.train"))


def training_loss(setting: Setting, teacher: nn.Module) -> Loss:
    """The loss that the recipe's `finetune` section asks for.

    teacher  for distillation: the network as it was, in eval mode
    """
    recipe = setting.recipe
    assert recipe.finetune is not None
    if recipe.task is None:
        raise RecipeError(recipe.source, "names no task", "add `task: classification`")
    training = recipe.finetune.training
    options = training.options
    loss = make_loss(recipe.task, options.label_smoothing, options.loss, setting.root, setting.allow_code)
    if training.distil is None:
        return loss
    return distilled(loss, recipe.task, teacher, training.distil)


def _measure(setting: Setting, what: str) -> Callable[[nn.Module], Sequence[Measurement]]:
    return lambda module: measure_task(module, setting, what)


def run_identity(recipe: Recipe, checkpoint: Checkpoint | None, world: World) -> str:
    """What a saved state belongs to: the recipe as far as training sees it, the checkpoint, the ranks."""
    digest = hashlib.sha256(recipe_hash(recipe).encode())
    for shard in checkpoint.shards if checkpoint is not None else ():
        for info in shard.tensors:
            digest.update(f"{info}{zlib.crc32(shard.bytes_of(info.name))}".encode())
    digest.update(f"{world.size}".encode())
    return digest.hexdigest()


def _with_last_good(error: TrainingError, state: Path, output: Path) -> TrainingError:
    """The error, the last good weights being written beside the output where there are any."""
    found = last_good(state) if state.exists() else None
    if found is None:
        return error
    weights, step = found
    path = training_path(output, "last-good.safetensors")
    write_checkpoint(weights, path)
    return TrainingError(error.where, f"{error.what}; the weights of step {step} are in {path.name}", error.mend)


def _write(module: nn.Module, checkpoint: Checkpoint | None, staged: Path, state: Path) -> None:
    """The trained weights, in the files, names and dtypes of the checkpoint; from scratch float32 in one file."""
    values = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    if checkpoint is None:
        tied = tied_names(module)
        own = {name: value.contiguous().clone() for name, value in values.items() if name not in tied}
        write_checkpoint(own, staged, tied)
    else:
        for shard in checkpoint.shards:
            tensors = {
                info.name: values[info.name].to(KEPT_DTYPES[info.dtype]).contiguous().clone() for info in shard.tensors
            }
            path = staged / shard.path.name if checkpoint.is_folder else staged
            write_checkpoint(tensors, path, shard.metadata)
        if checkpoint.is_folder:
            copy_companions(checkpoint.path, staged)
            for index in checkpoint.path.glob(f"*{INDEX_SUFFIX}"):
                shutil.copyfile(index, staged / index.name)
    state.unlink(missing_ok=True)


def _trials(
    kind: TrialKind, widths: Sequence[int], after: Sequence[Measurement], before: Audit | None, now: Audit
) -> tuple[TrialFigures, ...]:
    return tuple(
        TrialFigures(
            bits=bits,
            metric=after[0].metric if after else None,
            before=before.metrics.get((kind, bits)) if before is not None else None,
            after=now.metrics.get((kind, bits)),
            sqnr_db_before=before.sqnr_db[kind, bits] if before is not None else None,
            sqnr_db_after=now.sqnr_db[kind, bits],
        )
        for bits in widths
    )


def _layers(
    module: nn.Module, names: Sequence[str], before: Audit | None, now: Audit, penalties: Penalties
) -> tuple[TrainedLayer, ...]:
    facts = penalties.facts()
    shapes = dict(module.named_parameters())
    return tuple(
        TrainedLayer(
            name=name,
            shape=tuple(shapes[name].shape),
            before=before.weights[name] if before is not None else None,
            after=now.weights[name],
            **facts.get(name, {}),
        )
        for name in names
    )
