"""A checkpoint with its live model -> artifact and report with accuracy: measure, fit, write, read, measure again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qcompress.checkpoint import Checkpoint
from qcompress.compress import Options, compress_to, refuse_nonfinite, staged
from qcompress.evaluate import Setting, compare, evaluate, measure_task, open_live
from qcompress.finetune import STATE, run_identity
from qcompress.fit import fit
from qcompress.model.live import LiveModel
from qcompress.model.statistics import measure_statistics, save_statistics
from qcompress.plan import make_plan
from qcompress.recipe import trains
from qcompress.report.assemble import run_figures
from qcompress.report.document import Report
from qcompress.report.training import training_path
from qcompress.training.learn import Learn
from qcompress.training.loop import Watch
from qcompress.training.parallel import ALONE, World
from qcompress.tune import Tuner, make_learn
from qcompress.types import Axis, Gates, Plan, Recipe


@dataclass(frozen=True)
class LiveOptions:
    """How a live run goes.

    save_statistics  where the layers' input statistics are written, if anywhere
    say              called with a line on what begins
    world            the ranks that train together
    """

    save_statistics: Path | None = None
    say: Callable[[str], None] = lambda _: None
    world: World = ALONE


def plan_live(checkpoint: Checkpoint, recipe: Recipe, setting: Setting) -> Plan:
    """The plan of a recipe with a live model, which knows channel axes and tied weights that headers do not show.

    raises  what `make_plan` and building the model raise
    """
    from qcompress.model.build import channel_axes, tied_names

    module = setting.build()
    names = {info.name for info in checkpoint.tensors}
    axes: dict[str, Axis] = {name: axis for name, axis in channel_axes(module).items() if name in names}
    tied = {name: twin for name, twin in tied_names(module).items() if {name, twin} <= names}
    return make_plan(recipe, checkpoint.tensors, {**tied, **checkpoint.tied}, {**axes, **checkpoint.axes})


def compress_live(
    checkpoint: Checkpoint, plan: Plan, options: Options, setting: Setting, how: LiveOptions = LiveOptions()
) -> Report | None:
    """Write the artifact and return its report, with accuracy where the recipe has a task and eval data.

    The accuracy is that of the artifact as it lies on the disk, with its activation quantizers. No gates yet. Of
    several ranks only the first writes, and has a report.

    raises  what `compress`, `fit` and `evaluate` raise
    """
    started, cpu_started = time.monotonic(), time.process_time()
    world = how.world
    refuse_nonfinite(checkpoint, plan)
    tuner = Tuner(plan, setting, how.say)
    staging = staged(checkpoint, options) if world.is_first else contextlib.nullcontext(options.output)
    with staging as place:
        world.wait()
        live = open_live(checkpoint, plan, setting)
        measures = world.is_first and _measures(setting)
        before = measure_task(live.module, setting, "before") if measures else []
        if how.save_statistics is not None and world.is_first:
            how.say("statistics of the layers' inputs")
            save_statistics(measure_statistics(live), how.save_statistics)
        learn = _learn(checkpoint, plan, options, setting, live, how)
        fitted = fit(live, plan, how.say, representatives=options.representatives, learn=learn, tune=tuner)
        if not world.is_first:
            return None
        report = compress_to(place, checkpoint, plan, options, fitted)
    after = evaluate(options.output, setting) if measures else []
    run = run_figures(time.monotonic() - started, time.process_time() - cpu_started, str(setting.device))
    accuracy = compare(before, after, tuner.untuned) if measures else None
    return replace(report, accuracy=accuracy, run=run, warnings=report.warnings + fitted.notes)


def _measures(setting: Setting) -> bool:
    return setting.recipe.task is not None and setting.recipe.data is not None and setting.recipe.data.eval is not None


def _learn(
    checkpoint: Checkpoint, plan: Plan, options: Options, setting: Setting, live: LiveModel, how: LiveOptions
) -> Learn | None:
    """What trains, where a method needs it; with --resume its states lie where the artifact is being built."""
    if not trains(plan.recipe):
        return None
    output = options.output
    watch = Watch(
        measure=(lambda module: measure_task(module, setting, "after an epoch")) if _measures(setting) else None,
        say=how.say,
        log=training_path(output, "log.jsonl"),
        state=output.parent / f".{output.name}.partial" / STATE if options.resume else None,
        resume=options.resume,
        identity=run_identity(replace(plan.recipe, gates=Gates()), checkpoint, how.world),
    )
    return make_learn(setting, live.module, watch, how.world)
