"""A checkpoint with its live model -> artifact and report with accuracy: measure, fit, write, read, measure again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qcompress.allocate import Costs, is_open, read_costs, refuse_infeasible
from qcompress.artifact.writer import refuse_existing, refuse_own_input
from qcompress.checkpoint import Checkpoint
from qcompress.compress import Options, compress, refuse_nonfinite
from qcompress.evaluate import Setting, compare, evaluate, measure_task, open_live
from qcompress.fit import fit
from qcompress.minimize import refuse_gateless, spend
from qcompress.model.live import LiveModel, fresh_copy
from qcompress.model.statistics import measure_statistics, save_statistics
from qcompress.plan import make_plan
from qcompress.report.assemble import run_figures
from qcompress.report.document import Report
from qcompress.sensitivity import live_costs
from qcompress.tune import Tuner, make_learn
from qcompress.types import Axis, Plan, Recipe


@dataclass(frozen=True)
class LiveOptions:
    """How a live run goes.

    save_statistics  where the layers' input statistics are written, if anywhere
    sensitivity      a file of what each layer costs at each width; under a budget it is measured where there is none
    say              called with a line on what begins
    """

    save_statistics: Path | None = None
    sensitivity: Path | None = None
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

    The accuracy is that of the artifact as it lies on the disk, with its activation quantizers. No gates yet. Under a
    budget the widths are chosen by what each layer costs on the calibration data.

    raises  BudgetError for a budget that is too small, and what `compress`, `fit` and `evaluate` raise
    """
    started, cpu_started = time.monotonic(), time.process_time()
    refuse_own_input(checkpoint.path, options.output)
    refuse_existing(options.output, options.force, checkpoint.is_folder)
    refuse_gateless(plan)
    refuse_infeasible(checkpoint, plan, options.choice)
    refuse_nonfinite(checkpoint, plan)
    live = open_live(checkpoint, plan, setting)
    task = setting.recipe.task is not None and setting.recipe.data is not None and setting.recipe.data.eval is not None
    before = measure_task(live.module, setting, "before") if task else []
    if how.save_statistics is not None:
        how.say("statistics of the layers' inputs")
        save_statistics(measure_statistics(live), how.save_statistics)
    costs = _costs(checkpoint, plan, live, setting, how)

    def finished(plan: Plan, options: Options) -> Report:
        tuner = Tuner(plan, setting, how.say)
        learn = make_learn(setting, how.say)
        fitted = fit(
            fresh_copy(live),
            plan,
            how.say,
            representatives=options.representatives,
            rate=options.rate,
            learn=learn,
            tune=tuner,
        )
        report = compress(checkpoint, plan, options, fitted)
        accuracy = compare(before, evaluate(options.output, setting), tuner.untuned) if task else None
        return replace(report, accuracy=accuracy, warnings=report.warnings + fitted.notes)

    report = spend(checkpoint, plan, options, costs, finished, how.say)
    run = run_figures(time.monotonic() - started, time.process_time() - cpu_started, str(setting.device))
    return replace(report, run=run)


def _costs(checkpoint: Checkpoint, plan: Plan, live: LiveModel, setting: Setting, how: LiveOptions) -> Costs:
    """What each width of the open tensors costs: from a file, or measured; nothing where none is open."""
    if not is_open(plan):
        return Costs({}, "")
    if how.sensitivity is not None:
        return read_costs(checkpoint, plan, how.sensitivity)
    return live_costs(live, checkpoint, plan, setting, how.say)
