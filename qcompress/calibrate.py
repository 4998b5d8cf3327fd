"""A checkpoint with its live model -> artifact and report with accuracy: measure, fit, write, read, measure again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qcompress.allocate import Costs, is_open, read_costs, refuse_infeasible
from qcompress.artifact.staging import refuse_existing, refuse_own_input, staging_folder
from qcompress.books import Evidence, unweighed
from qcompress.checkpoint import Checkpoint
from qcompress.compress import compress_to, staged
from qcompress.errors import BudgetError
from qcompress.evaluate import Setting, compare, evaluate, measure_task, open_live
from qcompress.finetune import STATE, run_identity
from qcompress.fit import fit
from qcompress.minimize import refuse_gateless, spend
from qcompress.model.live import LiveModel, fresh_copy
from qcompress.model.statistics import measure_statistics, save_statistics
from qcompress.options import Options
from qcompress.plan import make_plan
from qcompress.preflight import refuse_nonfinite
from qcompress.recipe import trains
from qcompress.report.assemble import run_figures
from qcompress.report.document import Report
from qcompress.report.training import training_path
from qcompress.sensitivity import live_costs
from qcompress.training.learn import Learn
from qcompress.training.loop import Watch
from qcompress.training.parallel import ALONE, World
from qcompress.tune import Tuner, make_learn, measure_kmeans
from qcompress.types import Axis, Gates, Plan, Recipe


@dataclass(frozen=True)
class LiveOptions:
    """How a live run goes.

    save_statistics  where the layers' input statistics are written, if anywhere
    sensitivity      a file of what each layer costs at each width; under a budget it is measured where there is none
    say              called with a line on what begins
    world            the ranks that train together
    """

    save_statistics: Path | None = None
    sensitivity: Path | None = None
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

    The accuracy is that of the artifact as it lies on the disk, with its activation quantizers. No gates yet. Under a
    budget the widths are chosen by what each layer costs on the calibration data. Of several ranks only the first
    writes, and has a report.

    raises  BudgetError for a budget that is too small, and what `compress`, `fit` and `evaluate` raise
    """
    started, cpu_started = time.monotonic(), time.process_time()
    world = how.world
    if world.size > 1 and plan.recipe.budget is not None:
        what = "a budget is spent by one process, and this run has several ranks"
        raise BudgetError(
            plan.recipe.places.get("budget", "budget"), what, "give each rule its bits, or run one process"
        )
    refuse_own_input(checkpoint.path, options.output)
    if world.is_first:
        refuse_existing(options.output, options.force, checkpoint.is_folder)
    refuse_gateless(plan)
    refuse_infeasible(checkpoint, plan, options.choice)
    refuse_nonfinite(checkpoint, plan)
    # Statistics that are missing or do not fit are refused before anything is trained.
    unweighed(plan, options.statistics)
    live = open_live(checkpoint, plan, setting)
    measures = world.is_first and _measures(setting)
    before = measure_task(live.module, setting, "before") if measures else []
    if how.save_statistics is not None and world.is_first:
        how.say("statistics of the layers' inputs")
        save_statistics(measure_statistics(live), how.save_statistics)

    def made(plan: Plan, options: Options) -> Report | None:
        tuner = Tuner(plan, setting, how.say)
        staging = staged(checkpoint, options) if world.is_first else contextlib.nullcontext(options.output)
        with staging as place:
            world.wait()
            learn = _learn(checkpoint, plan, options, setting, live, how)
            evidence = Evidence(plan.recipe.seed, options.statistics, options.representatives)
            fresh = fresh_copy(live)
            fitted = fit(fresh, plan, how.say, evidence=evidence, rate=options.rate, learn=learn, tune=tuner)
            if not world.is_first:
                return None
            kmeans = measure_kmeans(fresh, plan, setting, tuner.untuned, evidence) if measures else ()
            report = compress_to(place, checkpoint, plan, options, fitted)
        accuracy = compare(before, evaluate(options.output, setting), tuner.untuned, kmeans) if measures else None
        return replace(report, accuracy=accuracy, warnings=report.warnings + fitted.notes)

    def finished(plan: Plan, options: Options) -> Report:
        report = made(plan, options)
        assert report is not None
        return report

    if plan.recipe.budget is None:
        report = made(plan, options)
    else:
        costs = _costs(checkpoint, plan, live, setting, how)
        report = spend(checkpoint, plan, options, costs, finished, how.say)
    run = run_figures(time.monotonic() - started, time.process_time() - cpu_started, str(setting.device))
    return None if report is None else replace(report, run=run)


def _costs(checkpoint: Checkpoint, plan: Plan, live: LiveModel, setting: Setting, how: LiveOptions) -> Costs:
    """What each width of the open tensors costs: from a file, or measured; nothing where none is open."""
    if not is_open(plan):
        return Costs({}, "")
    if how.sensitivity is not None:
        return read_costs(checkpoint, plan, how.sensitivity)
    return live_costs(live, checkpoint, plan, setting, how.say)


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
        state=staging_folder(output) / STATE if options.resume else None,
        resume=options.resume,
        identity=run_identity(replace(plan.recipe, gates=Gates()), checkpoint, how.world),
    )
    return make_learn(setting, live.module, watch, how.world)
