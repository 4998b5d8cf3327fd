"""A network of any size is compressed and measured block by block, with the weights of one block in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qcompress.calibration.activations import measure_statistics
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.checkpoint.side_files import HESSIAN, MEAN, save_statistics
from qcompress.checkpoint.staging import staging_folder
from qcompress.coding.grids import decode
from qcompress.compress.apply_plan import fit
from qcompress.compress.blueprints import checkpoint_blueprint, checkpoint_reader
from qcompress.compress.compress import compress_to, staged
from qcompress.compress.evaluate import compare, evaluate_by_blocks, is_measured, measure_by_blocks
from qcompress.compress.finetune import run_identity
from qcompress.compress.shelf import Shelf
from qcompress.data.batches import Batch
from qcompress.data.measurement import Measurement
from qcompress.data.sources import open_batches
from qcompress.encode.encode_weight import ContextSources, encode_weight
from qcompress.model.build import example_batch
from qcompress.model.live import LiveModel, Position, make_offloaded_model
from qcompress.model.offload import OUTER, Blueprint
from qcompress.model.products import caller_of
from qcompress.model.routing import Tape
from qcompress.model.runs import run_stage
from qcompress.model.stages import Stage
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
    raises  what `make_blueprint`, `fit` and `compress` raise
    """
    clock = start_clock()
    measures = is_measured(model_run.recipe)
    before: list[Measurement] = []
    with staged(checkpoint, options) as place:
        folder = staging_folder(options.output) / f"{options.output.name}.blocks"
        key = _run_key(checkpoint, plan, model_run, blocks)
        shelf = Shelf(folder, key, say)
        blueprint = checkpoint_blueprint(checkpoint, model_run, blocks)
        live = _open(checkpoint, plan, model_run, blueprint, shelf)
        assert live.offloaded is not None
        if measures:
            before = measure_by_blocks(live.offloaded[0], model_run, "before")
        if statistics is not None:
            say("statistics of the layers' inputs")
            measured = Shelf(folder.with_suffix(".statistics"), key, say)
            measure_by_stages(live, measured)
            save_statistics(measured.fitted.references, statistics)
        fit_by_blocks(live, checkpoint, plan, shelf, say)
        for network in live.offloaded:
            network.release()
        report = compress_to(place, checkpoint, plan, options, shelf.fitted)
    report = replace(report, warnings=report.warnings + shelf.fitted.notes)
    if measures:
        report = replace(report, accuracy=compare(before, evaluate_by_blocks(options.output, model_run, blocks)))
    return replace(report, run=run_figures(clock, str(model_run.device)))


def _run_key(checkpoint: Checkpoint, plan: Plan, model_run: ModelRun, blocks: Sequence[str]) -> str:
    """What the codes of a block depend on, as SHA-256: recipe, checkpoint, versions, device, blocks."""
    parts = [
        run_identity(replace(plan.recipe, gates=Gates()), checkpoint, ALONE),
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


def fit_by_blocks(live: LiveModel, checkpoint: Checkpoint, plan: Plan, shelf: Shelf, say: Say) -> None:
    """Let the methods of a plan choose block after block, each from what the ones before it now give, onto the shelf.

    Of what the shelf has nothing is chosen anew.
    """
    own = live.names.inward(plan)
    sources = ContextSources(plan.recipe.seed)
    places = {one.tensor.name: _stage_of(live, one.tensor.name) for one in own.decisions}
    merged = _merged(live, plan)
    clean, noisy = live.begin() if _uses_data(plan) else ([], [])
    at = Position(clean, noisy, noisy)
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
            fitted = _fit_stage(live, stage, at, replace(own, decisions=mine), sources, apart, say)
            shelf.add(index, fitted)
        if index + 1 < count:
            at = _after(live, stage, at)


def measure_by_stages(live: LiveModel, shelf: Shelf) -> None:
    """Put onto the shelf what `measure_statistics` gives for block after block, by the names of the checkpoint."""
    at, count = live.begin()[0], len(live.stages)
    places = {name: _stage_of(live, name) for name in live.weights}
    for index, stage in enumerate(live.stages):
        if all(map(shelf.has, range(index, count))):
            return
        if not shelf.has(index):
            weights = tuple(name for name in live.weights if places[name] == index)
            here = Position(at, at, at)
            part = replace(live, layers=stage.layers, weights=weights, unreached=set(), cut=(stage,), at=here)
            found = live.names.statistics(measure_statistics(part), (HESSIAN, MEAN))
            shelf.add(index, Fitted({}, references=found))
        if index + 1 < count:
            at = run_stage(stage, live.module, at)


def _uses_data(plan: Plan) -> bool:
    calibrated = any(METHODS[d.method or ""].needs != "weights" for d in plan.decisions if d.compresses)
    return calibrated or plan.recipe.activations is not None


def _fit_stage(
    live: LiveModel,
    stage: Stage,
    at: Position,
    plan: Plan,
    sources: ContextSources,
    apart: dict[str, Encoded],
    say: Say,
) -> Fitted:
    """What the methods choose for the weights of one stage, by the names of the checkpoint.

    plan   of its weights alone
    apart  codes of parts of them that the network holds only as parts
    """
    weights = tuple(one.tensor.name for one in plan.decisions if one.compresses)
    part = replace(live, layers=stage.layers, weights=weights, unreached=set(), cut=(stage,), at=at)
    context = FitContext(say=lambda line: say(f"{stage.name}: {line}"))
    fitted = live.names.outward(fit(part, plan, sources, context))
    return replace(fitted, encoded={**fitted.encoded, **apart})


def _after(live: LiveModel, stage: Stage, at: Position) -> Position:
    """Where the networks stand when a stage has run."""
    tapes = [Tape() for _ in at.clean] if live.routes else None
    clean = run_stage(stage, live.module, at.clean, tapes)
    noisy = run_stage(stage, live.quantized, at.noisy, tapes)
    free = live.routes and live.activations is not None
    return Position(clean, noisy, run_stage(stage, live.quantized, at.alone) if free else noisy)


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
