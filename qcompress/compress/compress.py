"""A checkpoint and its plan become an artifact and a report: the steps of docs/developing.md, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from qcompress.artifact.hashes import artifact_hash
from qcompress.artifact.layout import INDEX_NAME
from qcompress.artifact.manifest import POOL_NAME
from qcompress.artifact.writer import copy_companions, find_companions, mark_config, write_index
from qcompress.budget.spend import Workshop, refuse_gateless, spend
from qcompress.budget.weight_costs import file_costs, weight_costs
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.checkpoint.outputs import refuse_own_input
from qcompress.checkpoint.staging import refuse_existing, staged_output
from qcompress.encode.encode_weight import (
    ContextSources,
    WeightOf,
    count_stored_entries,
    make_shared_codebooks,
    unweighed,
)
from qcompress.encode.preflight import (
    fitting_threads,
    refuse_full_disk,
    refuse_nonfinite,
    refuse_untrue_ties,
    spread_rows,
    too_wide_for_f16,
)
from qcompress.encode.write_file import Run, WrittenShard
from qcompress.encode.write_files import write_files
from qcompress.errors import ResourceError
from qcompress.plan.allocate import limits_steps, most_bytes, refuse_infeasible
from qcompress.plan.files import make_shards
from qcompress.recipe import recipe_hash
from qcompress.report.document import ArtifactFile, LayerReport, Report
from qcompress.report.figures import compressed_layer, kept_layer, run_figures
from qcompress.report.size import make_size
from qcompress.types import VERSION
from qcompress.types.encoded import Fitted, Kept
from qcompress.types.plan import Decision, Outcomes, Plan
from qcompress.types.ranks import World
from qcompress.types.run import Options, RunFigures, Say, start_clock


def compress(checkpoint: Checkpoint, plan: Plan, options: Options, fitted: Fitted | None = None) -> Report:
    """Write the artifact that `plan` describes and return its report, which has no gates yet.

    fitted  what methods on a live model chose; the others encode here, tensor by tensor
    raises  CheckpointError where a weight is not finite or tied tensors differ; OutputError where the output is in the
            way; ResourceError where disk or memory do not suffice. Nothing is left behind then.
    """
    with staged(checkpoint, options) as place:
        return compress_to(place, checkpoint, plan, options, fitted)


def staged(checkpoint: Checkpoint, options: Options) -> AbstractContextManager[Path]:
    """Where to build an artifact, which becomes the output on leaving without an error; see `staged_output`.

    raises  OutputError where the output is in the way, or is the input; CheckpointError for links among its files that
            lead out of its folder
    """
    refuse_own_input(checkpoint.path, options.output)
    find_companions(checkpoint.path)
    force, resume, world = options.force, options.resume, options.world
    return staged_output(options.output, force=force, folder=checkpoint.is_folder, resume=resume, world=world)


def compress_to(
    place: Path, checkpoint: Checkpoint, plan: Plan, options: Options, fitted: Fitted | None = None
) -> Report:
    """`compress` where the output is staged already, to be built at `place`."""
    clock, world = start_clock(), options.world
    torch.set_num_threads(1)
    _refuse_unlike(plan, world)
    if world.is_first:
        refuse_untrue_ties(checkpoint, plan)
    options = replace(options, threads=fitting_threads(plan, options))
    fitted = fitted or Fitted({})
    sources = _sources(checkpoint, plan, fitted, options)
    outcomes = _outcomes(checkpoint, plan, fitted, sources, world)
    shards = make_shards(checkpoint, plan, options.choice, fitted, outcomes)
    budget_bytes = most_bytes(checkpoint, plan, options.choice) if limits_steps(plan) else None
    refuse_full_disk(options.output, shards, budget_bytes)
    folder = checkpoint.is_folder
    done = write_files(shards, lambda shard: place / shard.file if folder else place, Run(fitted, sources, options))
    for source in checkpoint.shards:
        source.refuse_changed()
    index_bytes = 0
    if folder and world.is_first:
        copy_companions(checkpoint.path, place)
        weights = INDEX_NAME if len(done) > 1 else done[0].shard.file
        mark_config(place, weights, dequantized=checkpoint.is_dequantized)
    if len(done) > 1 and world.is_first:
        index_bytes = write_index(place, {one.shard.file: one.written.slots for one in done})
    index_bytes = world.tell(index_bytes)[0]
    took = run_figures(clock, options.device)
    report = _make_report(checkpoint, plan, done, index_bytes, options.output.name, took)
    warnings = [*unweighed(plan, options.statistics), *_drowned(report, set(fitted.encoded))]
    return replace(report, warnings=tuple(warnings))


def _refuse_unlike(plan: Plan, world: World) -> None:
    """Raise ResourceError where ranks have come to different plans, so that their files would not fit together."""
    if world.size == 1:
        return
    own = hashlib.sha256(f"{VERSION} {plan.decisions}".encode()).hexdigest()
    if len(set(world.tell(own))) > 1:
        what = "the processes of this run have different checkpoints, or have come to different plans"
        raise ResourceError("torchrun", what, "use one folder, one version and one kind of processor for all of them")


LEAST_SQNR = 3.0
"""Decibels under which errors take more than half of what a weight is."""
NAMED = 3


def _drowned(report: Report, fitted: set[str]) -> list[str]:
    """A line on the weights that hardly are in their codes any more; where data chose codes, weights do not tell.

    fitted  the tensors whose codes a live model's method chose
    """
    found = [
        (layer.figures.sqnr_db, layer.name)
        for layer in report.layers
        if layer.figures is not None and layer.figures.sqnr_db is not None and layer.name not in fitted
    ]
    low = sorted(one for one in found if one[0] < LEAST_SQNR)
    if not low:
        return []
    names = ", ".join(f"{name} ({decibels:.1f} dB)" for decibels, name in low[:NAMED])
    more = f" and {len(low) - NAMED} more" if len(low) > NAMED else ""
    return [f"errors drown {names}{more}: give them more bits, another method, or keep: {{}}"]


def _weight_of(checkpoint: Checkpoint) -> WeightOf:
    return lambda decision: tensor_view(checkpoint.shard_of(decision.tensor.name), decision.tensor)


def _sources(checkpoint: Checkpoint, plan: Plan, fitted: Fitted, options: Options) -> ContextSources:
    """What encoding draws on, with the codebooks that tensors share. Raises CheckpointError, DataError."""
    sources = ContextSources(plan.recipe.seed, options.statistics, options.representatives)
    sharing = [d for d in plan.decisions if d.codebook.shared is not None and d.tensor.name not in fitted.encoded]
    world = options.world
    own = tuple(sharing[place] for place in world.share([d.tensor.n_bytes for d in sharing]))
    refuse_nonfinite(checkpoint, replace(plan, decisions=own))
    return replace(sources, codebooks=make_shared_codebooks(sharing, _weight_of(checkpoint), sources, world))


def _outcomes(checkpoint: Checkpoint, plan: Plan, fitted: Fitted, sources: ContextSources, world: World) -> Outcomes:
    """What values decide of the plan before its files can be laid out."""
    return Outcomes(
        entries=count_stored_entries(plan, _weight_of(checkpoint), sources, fitted.encoded, world),
        too_wide=too_wide_for_f16(checkpoint, plan, fitted, world),
        adjusted=frozenset(name for name, value in fitted.encoded.items() if isinstance(value, Kept)),
        aimed=frozenset(fitted.references),
        spread=spread_rows(checkpoint, plan, fitted, world),
    )


def _make_report(
    checkpoint: Checkpoint, plan: Plan, done: Sequence[WrittenShard], index_bytes: int, name: str, took: RunFigures
) -> Report:
    finished = {tensor: one for shard in done for tensor, one in shard.finished.items()}
    sizes: dict[str, dict[str, int]] = {}
    for shard in done:
        for slot in shard.written.slots:
            sizes.setdefault(slot.tensor, {})[slot.name] = slot.n_bytes

    def layer_of(decision: Decision) -> LayerReport:
        name = decision.tensor.name
        if not decision.compresses:
            return kept_layer(decision, sum(sizes.get(name, {}).values()))
        one = finished[name]
        return compressed_layer(one.decision, sizes[name], one.entry, one.figures, one.side_bytes)

    carried_out = {decision.tensor.name: decision for one in done for decision in one.shard.decisions}
    layers = tuple(layer_of(carried_out[decision.tensor.name]) for decision in plan.decisions)
    size = make_size(
        checkpoint.file_bytes,
        sum(shard.written.file_bytes for shard in done) + index_bytes,
        layers,
        header_bytes=sum(shard.written.overhead_bytes for shard in done),
        index_bytes=index_bytes,
        # Of the same name in every file.
        pooled_bytes=sum(slot.n_bytes for shard in done for slot in shard.written.slots if slot.tensor == POOL_NAME),
    )
    return Report(
        artifact=ArtifactFile(name=name, sha256=artifact_hash([(s.shard.file, s.written.sha256) for s in done])),
        recipe_hash=recipe_hash(plan.recipe),
        input_sha256=artifact_hash([(s.shard.source.path.name, s.input_sha256) for s in done]),
        size=size,
        layers=layers,
        run=took,
    )


def compress_within(checkpoint: Checkpoint, plan: Plan, options: Options, sensitivity: Path | None, say: Say) -> Report:
    """The report of the artifact of a plan with a budget, from weights alone, or with what was measured in a file.

    raises  BudgetError for a budget that is too small, and what `compress` and `read_costs` raise
    """
    clock = start_clock()
    refuse_own_input(checkpoint.path, options.output)
    refuse_existing(options.output, options.force, checkpoint.is_folder)
    find_companions(checkpoint.path)
    refuse_gateless(plan)
    refuse_infeasible(checkpoint, plan, options.choice)
    if sensitivity is not None:
        costs = file_costs(checkpoint, plan, sensitivity, options)
    else:
        costs = weight_costs(checkpoint, plan, options)
    shop = Workshop(lambda closed, where: compress(checkpoint, closed, where), say=say)
    report = spend(checkpoint, plan, options, costs, shop)
    return replace(report, run=run_figures(clock, options.device))
