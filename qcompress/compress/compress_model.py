"""A checkpoint is compressed with its live model: measured, fitted, written, read back and measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompress.artifact.writer import find_companions
from qcompress.budget.sensitivity import live_costs
from qcompress.budget.spend import Workshop, refuse_gateless, spend
from qcompress.budget.weight_costs import file_costs
from qcompress.calibration.activations import measure_statistics
from qcompress.checkpoint.checkpoint import Checkpoint
from qcompress.checkpoint.outputs import refuse_own_input
from qcompress.checkpoint.side_files import HESSIAN, MEAN, save_statistics
from qcompress.checkpoint.staging import refuse_existing, staging_folder
from qcompress.compress.apply_plan import encode_merged, fit, refuse_untrained
from qcompress.compress.blueprints import choose_blocks
from qcompress.compress.by_blocks import compress_by_blocks
from qcompress.compress.compress import compress_to, staged
from qcompress.compress.evaluate import compare, evaluate, measure_task, open_live
from qcompress.compress.finetune import STATE, make_trainer, run_identity
from qcompress.compress.tune_codebooks import CodebookTuner, measure_kmeans
from qcompress.data.measurement import Measurement
from qcompress.encode.encode_weight import ContextSources, unweighed
from qcompress.encode.preflight import refuse_nonfinite
from qcompress.errors import BudgetError, QcompressError, UsageError, raise_all
from qcompress.model.graph import batch_norm_of
from qcompress.model.live import LiveModel, fresh_copy, layer_name
from qcompress.plan.allocate import Costs, is_open, refuse_infeasible
from qcompress.recipe import refuse_offload, trains
from qcompress.registry import METHODS
from qcompress.report.document import Report
from qcompress.report.figures import run_figures
from qcompress.report.training_report import training_path
from qcompress.training.loop import Watch
from qcompress.training.trainer import Trainer
from qcompress.types.plan import Gates, Plan
from qcompress.types.ranks import World
from qcompress.types.run import FitContext, ModelRun, Options, start_clock

NEEDS_ALL_SAMPLES = ("adaround", "pdquant")
"""Methods that are fitted on samples drawn from all calibration data."""
NETWORKS = 2
"""That are in memory at once: as it was, and as it will be."""


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


def compress_live(
    checkpoint: Checkpoint, plan: Plan, options: Options, model_run: ModelRun, how: LiveOptions = LiveOptions()
) -> Report | None:
    """Write the artifact and return its report, with accuracy where the recipe has a task and eval data.

    The accuracy is that of the artifact as it lies on the disk, with its activation quantizers. No gates yet. Under a
    budget the widths are chosen by what each layer costs on the calibration data. Of several ranks that train only the
    first writes, and has a report; others divide samples and layers, see docs/ranks.md.

    raises  BudgetError for a budget that is too small, and what `compress`, `fit` and `evaluate` raise
    """
    clock = start_clock()
    world, divided = options.world, model_run.world.size > 1
    _refuse_early(checkpoint, plan, options, world)
    blocks = _blocks(options, model_run, how)
    if blocks:
        return compress_by_blocks(checkpoint, plan, options, model_run, blocks, how.say, how.save_statistics)
    live = open_live(checkpoint, plan, model_run)
    refuse_untrained(live, plan)
    measures = (world.is_first or divided) and _measures(model_run)
    before = measure_task(live.module, model_run, "before") if measures else []
    if how.save_statistics is not None and (world.is_first or divided):
        how.say("statistics of the layers' inputs")
        found = live.names.statistics(measure_statistics(live), (HESSIAN, MEAN))
        if world.is_first:
            save_statistics(found, how.save_statistics)

    kept: dict[str, object] = {}

    def made(plan: Plan, options: Options) -> tuple[Report, CodebookTuner, Sequence[Measurement]] | None:
        own = live.names.inward(plan)
        tuner = CodebookTuner(own, model_run, how.say)
        with staged(checkpoint, options) as place:
            trainer = _make_trainer(checkpoint, plan, options, model_run, live, how)
            sources = ContextSources(plan.recipe.seed, options.statistics, options.representatives)
            fresh = fresh_copy(live)
            merged = encode_merged(checkpoint, plan, fresh, sources)
            fitted = fit(fresh, own, sources, FitContext(options.rate, trainer, how.say, kept), tuner)
            if not (world.is_first or divided):
                return None
            kmeans = measure_kmeans(fresh, own, model_run, tuner.untuned, sources) if measures else ()
            fitted = live.names.outward(fitted)
            fitted = replace(fitted, encoded={**fitted.encoded, **merged})
            report = compress_to(place, checkpoint, plan, replace(options, world=model_run.world), fitted)
        return replace(report, warnings=report.warnings + fitted.notes), tuner, kmeans

    def measured(
        report: Report, path: Path, untuned: Sequence[Measurement] = (), kmeans: Sequence[Measurement] = ()
    ) -> Report:
        if not measures:
            return report
        return replace(report, accuracy=compare(before, evaluate(path, model_run), untuned, kmeans))

    def attempted(plan: Plan, options: Options) -> Report:
        done = made(plan, options)
        assert done is not None
        return done[0]

    if plan.recipe.budget is None:
        done = made(plan, options)
        if done is None:
            return None
        report = measured(done[0], options.output, done[1].untuned, done[2])
    else:
        costs = _costs(checkpoint, plan, options, live, model_run, how)
        shop = Workshop(attempted, measured, how.say, behind=_batch_norms(live, plan))
        report = spend(checkpoint, plan, options, costs, shop)
    return replace(report, run=run_figures(clock, str(model_run.device)))


def _blocks(options: Options, model_run: ModelRun, how: LiveOptions) -> tuple[str, ...]:
    """The blocks that a run goes by; none where the network is to be in memory.

    raises  InputErrors for what cannot go by blocks where the recipe asks for it
    """
    settings = model_run.recipe.model
    assert settings is not None
    blocks = choose_blocks(model_run, NETWORKS, options.max_memory)
    if blocks and options.world.size > 1:
        what = "the network goes block by block, which one process does"
        raise UsageError("torchrun", what, "give it --max-memory for the whole network, or run qcompress by itself")
    errors = refuse_offload(model_run.recipe) if blocks else []
    if settings.offload == "blocks":
        raise_all(errors)
    if errors:
        how.say(f"the network needs more than --max-memory, for it cannot go block by block: {errors[0].what}")
    elif blocks:
        how.say(f"the network goes block by block: {len(blocks)} blocks, first {blocks[0]}")
    return () if errors else blocks


def _batch_norms(live: LiveModel, plan: Plan) -> dict[str, str] | None:
    """Weight -> the running variance of the batch norm that alone reads its layer; None where there is no graph."""
    if not live.traced:
        return None
    names = [d.tensor.name for d in plan.decisions if d.compresses and layer_name(d.tensor.name) in live.layers]
    norms = ((name, batch_norm_of(live, layer_name(name))) for name in names)
    return {name: norm.running_var for name, norm in norms if norm is not None}


def _refuse_early(checkpoint: Checkpoint, plan: Plan, options: Options, world: World) -> None:
    """Raise what is known to be wrong before the network is built, and long before anything is trained."""
    if world.size > 1:
        raise_all(_refuse_ranks(plan))
    refuse_own_input(checkpoint.path, options.output)
    if world.is_first:
        refuse_existing(options.output, options.force, checkpoint.is_folder)
    find_companions(checkpoint.path)
    refuse_gateless(plan)
    refuse_infeasible(checkpoint, plan, options.choice)
    refuse_nonfinite(checkpoint, plan)
    unweighed(plan, options.statistics)


def _refuse_ranks(plan: Plan) -> list[QcompressError]:
    """Why several processes cannot do what a plan asks for."""
    recipe = plan.recipe
    if trains(recipe):
        what = "a budget is spent on widths before training, by one process, and this run has several"
        hint = "give each rule its bits, or run qcompress by itself"
        return [BudgetError(recipe.place("budget"), what, hint)] if recipe.budget is not None else []
    compressed = [decision for decision in plan.decisions if decision.compresses]
    calibrated = recipe.data is not None and recipe.data.calibration is not None
    used = sorted({decision.method or "" for decision in compressed})
    whole = [name for name in used if name in NEEDS_ALL_SAMPLES or (METHODS[name].rates and calibrated)]
    tuned = [decision.tensor.name for decision in compressed if getattr(decision.config, "tune", None) is not None]
    hint = "run qcompress by itself, or calibrate with gptq, which several processes divide"
    found: list[QcompressError] = [
        UsageError("torchrun", f"{name} sees all calibration samples at once, and one process has a part", hint)
        for name in whole
    ]
    if tuned:
        what = f"the codebook of {tuned[0]!r} is to be tuned, which one process does"
        found.append(UsageError("torchrun", what, "leave `tune` out, or run qcompress by itself"))
    return found


def _costs(
    checkpoint: Checkpoint, plan: Plan, options: Options, live: LiveModel, model_run: ModelRun, how: LiveOptions
) -> Costs:
    """What each width of the open tensors costs: from a file, or measured; nothing where none is open."""
    if not is_open(plan):
        return Costs({}, "")
    if how.sensitivity is not None:
        return file_costs(checkpoint, plan, how.sensitivity, options)
    return live_costs(live, checkpoint, plan, model_run, options, how.say)


def _measures(model_run: ModelRun) -> bool:
    return (
        model_run.recipe.task is not None
        and model_run.recipe.data is not None
        and model_run.recipe.data.eval is not None
    )


def _make_trainer(
    checkpoint: Checkpoint, plan: Plan, options: Options, model_run: ModelRun, live: LiveModel, how: LiveOptions
) -> Trainer | None:
    """What trains, where a method needs it; with --resume its states lie where the artifact is being built."""
    if not trains(plan.recipe):
        return None
    output = options.output
    watch = Watch(
        measure=(lambda module: measure_task(module, model_run, "after an epoch")) if _measures(model_run) else None,
        say=how.say,
        log=training_path(output, "log.jsonl"),
        state=staging_folder(output) / STATE if options.resume else None,
        resume=options.resume,
        identity=run_identity(replace(plan.recipe, gates=Gates()), checkpoint, options.world),
    )
    return make_trainer(model_run, live.module, watch, options.world)
