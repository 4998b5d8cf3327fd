"""Checkpoint and plan -> artifact and report: the arrows of the design in a row, streamed tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qcompress.artifact.layout import POOL_NAME
from qcompress.artifact.manifest import artifact_hash
from qcompress.artifact.staging import refuse_own_input, staged_output
from qcompress.artifact.writer import copy_companions, write_index
from qcompress.books import Evidence, make_shared_books, unweighed, with_entries_counted
from qcompress.checkpoint import Checkpoint, tensor_view
from qcompress.encoded import Fitted, Kept
from qcompress.halves import halve_what_bears_it
from qcompress.options import Options
from qcompress.preflight import fitting_threads, refuse_full_disk, refuse_nonfinite, refuse_untrue_ties
from qcompress.recipe import recipe_hash
from qcompress.report.assemble import compressed_layer, kept_layer, run_figures
from qcompress.report.document import ArtifactFile, LayerReport, Report, RunFigures, make_size
from qcompress.shard_writer import Run, WrittenShard, write_shard
from qcompress.shards import make_shards
from qcompress.types import Decision, Plan


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

    raises  OutputError where the output is in the way, or is the input
    """
    refuse_own_input(checkpoint.path, options.output)
    return staged_output(options.output, force=options.force, folder=checkpoint.is_folder, resume=options.resume)


def compress_to(
    place: Path, checkpoint: Checkpoint, plan: Plan, options: Options, fitted: Fitted | None = None
) -> Report:
    """`compress` where the output is staged already, to be built at `place`."""
    started, cpu_started = time.monotonic(), time.process_time()
    torch.set_num_threads(1)
    refuse_untrue_ties(checkpoint, plan)
    options = replace(options, threads=fitting_threads(plan, options))
    fitted = fitted or Fitted({})
    plan = halve_what_bears_it(checkpoint, plan, fitted)
    plan, evidence = _settle_books(checkpoint, plan, fitted, options)
    shards = make_shards(checkpoint, plan, options.choice, fitted)
    refuse_full_disk(options.output, sum(shard.layout.file_bytes for shard in shards))
    run, folder = Run(fitted, evidence, options), checkpoint.is_folder
    done = [write_shard(shard, place / shard.file if folder else place, run) for shard in shards]
    index_bytes = 0
    if folder:
        copy_companions(checkpoint.path, place)
    if len(done) > 1:
        index_bytes = write_index(place, {one.shard.file: one.written.slots for one in done})
    took = run_figures(time.monotonic() - started, time.process_time() - cpu_started, options.device)
    report = _make_report(checkpoint, _with_adjusted(plan, fitted), done, index_bytes, options.output.name, took)
    return replace(report, warnings=tuple(unweighed(plan, options.statistics)))


def _settle_books(checkpoint: Checkpoint, plan: Plan, fitted: Fitted, options: Options) -> tuple[Plan, Evidence]:
    """The plan with what its codebooks will store, and what encoding draws on, shared codebooks included."""

    def weight_of(decision: Decision) -> Tensor:
        return tensor_view(checkpoint.shard_of(decision.tensor.name), decision.tensor)

    evidence = Evidence(plan.recipe.seed, options.statistics, options.representatives)
    shared = [d for d in plan.decisions if d.book.shared is not None and d.tensor.name not in fitted.encoded]
    refuse_nonfinite(checkpoint, replace(plan, decisions=tuple(shared)))
    evidence = replace(evidence, books=make_shared_books(shared, weight_of, evidence))
    return with_entries_counted(plan, weight_of, evidence, fitted.encoded), evidence


def _with_adjusted(plan: Plan, fitted: Fitted) -> Plan:
    """The plan whose kept tensors say so where a method has changed their values."""
    adjusted = {name for name, value in fitted.encoded.items() if isinstance(value, Kept)}
    decisions = (
        replace(d, reason=f"{d.reason}; values adjusted") if d.tensor.name in adjusted else d for d in plan.decisions
    )
    return replace(plan, decisions=tuple(decisions))


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

    layers = tuple(map(layer_of, plan.decisions))
    size = make_size(
        checkpoint.file_bytes,
        sum(shard.written.file_bytes for shard in done) + index_bytes,
        layers,
        header_bytes=sum(shard.written.header_bytes for shard in done),
        index_bytes=index_bytes,
        # Of the same name in every file.
        pooled_bytes=sum(slot.n_bytes for shard in done for slot in shard.written.slots if slot.tensor == POOL_NAME),
    )
    return Report(
        artifact=ArtifactFile(name=name, sha256=artifact_hash([(s.shard.file, s.written.sha256) for s in done])),
        recipe_hash=recipe_hash(plan.recipe),
        input_sha256=artifact_hash([(s.shard.file, s.input_sha256) for s in done]),
        size=size,
        layers=layers,
        run=took,
    )
