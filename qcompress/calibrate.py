"""A checkpoint with its live model -> artifact and report with accuracy: measure, fit, write, read, measure again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qcompress.books import Evidence
from qcompress.checkpoint import Checkpoint
from qcompress.compress import Options, compress, refuse_nonfinite
from qcompress.evaluate import Setting, compare, evaluate, measure_task, open_live
from qcompress.fit import fit
from qcompress.model.statistics import measure_statistics, save_statistics
from qcompress.plan import make_plan
from qcompress.report.assemble import run_figures
from qcompress.report.document import Report
from qcompress.tune import Tuner, make_learn, measure_kmeans
from qcompress.types import Axis, Plan, Recipe


@dataclass(frozen=True)
class LiveOptions:
    """How a live run goes.

    save_statistics  where the layers' input statistics are written, if anywhere
    say              called with a line on what begins
    """

    save_statistics: Path | None = None
    say: Callable[[str], None] = lambda _: None


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
) -> Report:
    """Write the artifact and return its report, with accuracy where the recipe has a task and eval data.

    The accuracy is that of the artifact as it lies on the disk, with its activation quantizers. No gates yet.

    raises  what `compress`, `fit` and `evaluate` raise
    """
    started, cpu_started = time.monotonic(), time.process_time()
    refuse_nonfinite(checkpoint, plan)
    live = open_live(checkpoint, plan, setting)
    task = setting.recipe.task is not None and setting.recipe.data is not None and setting.recipe.data.eval is not None
    before = measure_task(live.module, setting, "before") if task else []
    if how.save_statistics is not None:
        how.say("statistics of the layers' inputs")
        save_statistics(measure_statistics(live), how.save_statistics)
    tuner = Tuner(plan, setting, how.say)
    fitted = fit(
        live,
        plan,
        how.say,
        evidence=Evidence(plan.recipe.seed, options.statistics, options.representatives),
        learn=make_learn(setting, how.say),
        tune=tuner,
    )
    kmeans = measure_kmeans(live, plan, setting, tuner.untuned) if task else ()
    report = compress(checkpoint, plan, options, fitted)
    after = evaluate(options.output, setting) if task else []
    run = run_figures(time.monotonic() - started, time.process_time() - cpu_started, str(setting.device))
    accuracy = compare(before, after, tuner.untuned, kmeans) if task else None
    return replace(report, accuracy=accuracy, run=run, warnings=report.warnings + fitted.notes)
