"""A network of any size is compressed and measured block by block, with the weights of one block in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qcompress.budget.spend import Workshop, spend
from qcompress.calibration.activations import measure_statistics
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.checkpoint.side_files import HESSIAN, MEAN, save_statistics
from qcompress.checkpoint.staging import staging_folder
from qcompress.coding.grids import decode
from qcompress.compress.apply_plan import fit, is_measured_first, measure_stage
from qcompress.compress.block_memory import choose_filed
from qcompress.compress.blueprints import checkpoint_blueprint, checkpoint_reader
from qcompress.compress.compress import compress_to, staged
from qcompress.compress.evaluate import compare, evaluate_by_blocks, is_measured, measure_by_blocks
from qcompress.compress.finetune import run_identity
from qcompress.compress.shelf import OnDemand, Shelf
from qcompress.data.batches import Batch
from qcompress.data.measurement import Measurement
from qcompress.data.sources import open_batches
from qcompress.encode.encode_weight import ContextSources, encode_weight
from qcompress.model.build import example_batch
from qcompress.model.filed import FiledStates
from qcompress.model.live import LiveModel, Position, make_offloaded_model
from qcompress.model.offload import OUTER, Blueprint, return_unused_memory
from qcompress.model.products import caller_of
from qcompress.model.routing import Tape
from qcompress.model.runs import Runs
from qcompress.model.stages import Stage, State
from qcompress.plan.allocate import Costs
from qcompress.registry import METHODS
from qcompress.report.document import Report
from qcompress.report.figures import run_figures
from qcompress.types import VERSION
from qcompress.types.encoded import Encoded, Fitted
from qcompress.types.plan import Decision, Gates, Plan
from qcompress.types.ranks import ALONE
from qcompress.types.run import FitContext, ModelRun, Options, Say, start_clock


def compress_by_blocks(
    checkpoint: Checkpoint,
    plan: Plan,
    options: Options,
    model_run: ModelRun,
    blocks: Sequence[str],
    say: Say,
    statistics: Path | None = None,
) -> Report:
    """Write the artifact and return its report, as `compress_live` does. What is done of it outlives a kill.

    statistics  where the layers' input statistics are written, if anywhere
    raises  what `make_blueprint`, `fit`, `compress` and `spend` raise
    """
    clock = start_clock()
    work = _Work(checkpoint, options, model_run, blocks, say, statistics)
    if plan.recipe.budget is None:
        report = work.measured(work.made(plan, options), options.output)
    else:
        shop = Workshop(work.made, work.measured, say, resumes=options.resume)
        report = spend(checkpoint, plan, options, Costs({}, ""), shop)
    return replace(report, run=run_figures(clock, str(model_run.device)))


class _Work:
    """Artifacts of one network that goes block by block, made and measured: one, or as many as a budget tries."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Options,
        model_run: ModelRun,
        blocks: Sequence[str],
        say: Say,
        statistics: Path | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = staging_folder(options.output) / f"{options.output.name}.blocks"
        self._model_run = model_run
        self._blocks = blocks
        self._say = say
        self._statistics = statistics
        self._before: list[Measurement] | None = None
        self._survey: Shelf | None = None
        self._kept: dict[str, object] = {}
        self._made = 0

    def made(self, plan: Plan, options: Options) -> Report:
        """The report of an artifact that is made."""
        checkpoint, say = self._checkpoint, self._say
        with staged(checkpoint, options) as place:
            folder = self._folder.with_suffix(f".{self._made}") if self._made else self._folder
            self._made += 1
            key = _run_key(checkpoint, plan, self._model_run, self._blocks)
            shelf = Shelf(folder, f"{key} {options.rate}", say)
            blueprint = checkpoint_blueprint(checkpoint, self._model_run, self._blocks)
            live = _open(checkpoint, plan, self._model_run, blueprint, shelf)
            inward = live.names.inward(plan).decisions
            live.filed = choose_filed(live, inward, options.max_memory, checkpoint.path, folder.parent)
            if live.filed is not None:
                say("what flows between blocks waits in files beside the output")
            self._measure_first(live, key)
            context = FitContext(options.rate, say=say, kept=self._kept)
            if is_measured_first(live, plan.decisions):
                if self._survey is None:
                    self._survey = Shelf(self._folder.with_suffix(".survey"), key, say)
                    survey_stages(live, plan, self._survey, context)
                context = replace(context, measured=self._survey.measured)
            fit_by_blocks(live, checkpoint, plan, shelf, context)
            assert live.offloaded is not None
            for network in live.offloaded:
                network.release()
            report = compress_to(place, checkpoint, plan, options, shelf.fitted)
        return replace(report, warnings=report.warnings + shelf.fitted.notes)

    def _measure_first(self, live: LiveModel, key: str) -> None:
        """What is to be known of the network as it was, once."""
        assert live.offloaded is not None
        if self._before is not None:
            return
        self._before = []
        if is_measured(self._model_run.recipe):
            self._before = measure_by_blocks(live.offloaded[0], self._model_run, "before")
        if self._statistics is not None:
            self._say("statistics of the layers' inputs")
            measured = Shelf(self._folder.with_suffix(".statistics"), key, self._say)
            measure_by_stages(live, measured)
            save_statistics(measured.fitted.references, self._statistics)

    def measured(self, report: Report, path: Path) -> Report:
        """The report of the artifact at a path with what it does to the task."""
        if not is_measured(self._model_run.recipe):
            return report
        after = evaluate_by_blocks(path, self._model_run, self._blocks)
        return replace(report, accuracy=compare(self._before or [], after))


def _run_key(checkpoint: Checkpoint, plan: Plan, model_run: ModelRun, blocks: Sequence[str]) -> str:
    """What the codes of a block depend on, as SHA-256: recipe, plan, checkpoint, versions, device, blocks."""
    parts = [
        run_identity(replace(plan.recipe, gates=Gates()), checkpoint, ALONE),
        str(plan.decisions),
        f"{VERSION} {torch.__version__} {model_run.device} {torch.get_num_threads()}",
        *blocks,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _open(checkpoint: Checkpoint, plan: Plan, model_run: ModelRun, blueprint: Blueprint, shelf: Shelf) -> LiveModel:
    """The live model of a network that goes block by block; what the shelf has is in place in its quantized copy."""
    recipe, read = model_run.recipe, checkpoint_reader(checkpoint)
    encoded = shelf.fitted.encoded
    own = {info.name for info in checkpoint.tensors}

    def read_encoded(name: str) -> Tensor:
        stored = name if name in own else checkpoint.tied[name]
        return decode(encoded[stored]) if stored in encoded else read(stored)

    calibration: Sequence[Batch] = ()
    if recipe.data is not None and recipe.data.calibration is not None:
        calibration = [batch.to(model_run.device) for batch in open_batches(model_run, "calibration")]
    return make_offloaded_model(
        blueprint,
        (read, read_encoded),
        blueprint.names.inward(plan).decisions,
        calibration,
        example_batch(model_run, calibration),
        seed=recipe.seed,
        activations=recipe.activations,
        place=model_run.place("model"),
    )


def fit_by_blocks(live: LiveModel, checkpoint: Checkpoint, plan: Plan, shelf: Shelf, context: FitContext) -> None:
    """Let the methods of a plan choose block after block, each from what the ones before it now give, onto the shelf.

    Of what the shelf has nothing is chosen anew.

    context  its `measured`, where there is one, is what was measured of all blocks first
    """
    own = live.names.inward(plan)
    sources = ContextSources(plan.recipe.seed)
    places = {one.tensor.name: _stage_of(live, one.tensor.name) for one in own.decisions}
    merged = _merged(live, plan)
    clean, noisy = live.begin() if _uses_data(live, plan) else ([], [])
    at = Position(clean, noisy, noisy)
    surveyed = context.measured
    count = len(live.stages)
    for index, stage in enumerate(live.stages):
        if all(map(shelf.has, range(index, count))):
            return
        if not shelf.has(index):
            mine = tuple(one for one in own.decisions if places[one.tensor.name] == index)
            apart = {
                one.tensor.name: _encoded_part(checkpoint, one, sources, live.device) for one in merged.get(index, ())
            }
            at = replace(at, inputs=frozenset(live.layers[:1]) & frozenset(stage.layers))
            if isinstance(surveyed, OnDemand):
                context = replace(context, measured=surveyed.beside(shelf.measured))
            shelf.add(index, _fit_stage(live, stage, at, replace(own, decisions=mine), sources, apart, context))
        if index + 1 < count:
            at = _after(live, stage, at)
        return_unused_memory()


def measure_by_stages(live: LiveModel, shelf: Shelf) -> None:
    """Put onto the shelf what `measure_statistics` gives for block after block, by the names of the checkpoint."""

    def statistics_of(part: LiveModel) -> Fitted:
        return Fitted({}, references=live.names.statistics(measure_statistics(part), (HESSIAN, MEAN)))

    _visit(live, shelf, statistics_of)


def survey_stages(live: LiveModel, plan: Plan, shelf: Shelf, context: FitContext) -> None:
    """Put onto the shelf what methods measure of block after block before they encode any."""
    own = {one.tensor.name: one for one in live.names.inward(plan).decisions}

    def measured_of(part: LiveModel) -> Fitted:
        return measure_stage(part, [own[name] for name in part.weights], context)

    context.say("what each block's layers answer")
    _visit(live, shelf, measured_of)


def _visit(live: LiveModel, shelf: Shelf, look: Callable[[LiveModel], Fitted]) -> None:
    """Put onto the shelf what is seen of each stage of the full-precision network."""
    at, count = live.begin()[0], len(live.stages)
    places = {name: _stage_of(live, name) for name in live.weights}
    for index, stage in enumerate(live.stages):
        if all(map(shelf.has, range(index, count))):
            return
        if not shelf.has(index):
            weights = tuple(name for name in live.weights if places[name] == index)
            here = Position(at, at, at)
            part = replace(live, layers=stage.layers, weights=weights, unreached=set(), cut=(stage,), at=here)
            shelf.add(index, look(part))
        if index + 1 < count:
            at = _behind(live, stage, live.module, at)
        return_unused_memory()


def _uses_data(live: LiveModel, plan: Plan) -> bool:
    needs = any(METHODS[d.method or ""].needs != "weights" for d in plan.decisions if d.compresses)
    return needs or is_measured_first(live, plan.decisions) or plan.recipe.activations is not None


def _fit_stage(
    live: LiveModel,
    stage: Stage,
    at: Position,
    plan: Plan,
    sources: ContextSources,
    apart: dict[str, Encoded],
    context: FitContext,
) -> Fitted:
    """What the methods choose for the weights of one stage, by the names of the checkpoint.

    plan   of its weights alone
    apart  codes of parts of them that the network holds only as parts
    """
    weights = tuple(one.tensor.name for one in plan.decisions if one.compresses)
    part = replace(live, layers=stage.layers, weights=weights, unreached=set(), cut=(stage,), at=at)
    here = replace(context, say=lambda line: context.say(f"{stage.name}: {line}"))
    fitted = live.names.outward(fit(part, plan, sources, here))
    return replace(fitted, encoded={**fitted.encoded, **apart})


def _after(live: LiveModel, stage: Stage, at: Position) -> Position:
    """Where the networks stand when a stage has run."""
    tapes = [Tape() for _ in at.clean] if live.routes else None
    clean = _behind(live, stage, live.module, at.clean, tapes)
    noisy = _behind(live, stage, live.quantized, at.noisy, tapes)
    free = live.routes and live.activations is not None
    return Position(clean, noisy, _behind(live, stage, live.quantized, at.alone) if free else noisy)


def _behind(
    live: LiveModel, stage: Stage, module: nn.Module, states: Sequence[State], tapes: Sequence[Tape] | None = None
) -> Sequence[State]:
    """The states behind a stage, in memory or in a file; see `run_stage`."""
    return Runs(stage, module, states, tapes, None if live.filed is None else FiledStates(live.filed)).after()


def _stage_of(live: LiveModel, tensor: str) -> int:
    """The number of the stage that a tensor of the network is encoded before."""
    assert live.offloaded is not None
    block = live.offloaded[0].block_of(tensor)
    if block != OUTER:
        return 1 + live.offloaded[0].blocks.index(block)
    return 0 if caller_of(live.module, tensor) in live.stages[0].layers else len(live.stages) - 1


def _merged(live: LiveModel, plan: Plan) -> dict[int, list[Decision]]:
    """Stage -> the weights that the network holds as parts of others and that methods encode one by one."""
    stacks = {part: name for name, stack in live.names.stacks.items() for part in stack.parts}
    found: dict[int, list[Decision]] = {}
    for one in plan.decisions:
        name = one.tensor.name
        if name in live.names.merged and one.compresses and one.stack is None and one.tied_to is None:
            found.setdefault(_stage_of(live, stacks[name]), []).append(one)
    return found


def _encoded_part(checkpoint: Checkpoint, one: Decision, sources: ContextSources, device: torch.device) -> Encoded:
    weight = tensor_view(checkpoint.shard_of(one.tensor.name), one.tensor)
    return encode_weight(weight, one, sources, device)
