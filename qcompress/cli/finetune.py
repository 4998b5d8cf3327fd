"""`qcompress finetune-reg` trains a checkpoint with regularizers, or prints which weights it would pull and how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.gate_options import GateFlags, MaxDrop, MinMetric, make_gates
from qcompress.cli.output import (
    Streams,
    json_document,
    print_note,
    print_output,
    print_result,
    refuse_harm,
    refuse_mixed,
    write_text,
)
from qcompress.cli.panels import INPUT, RUNNING
from qcompress.cli.recipe import read_given
from qcompress.errors import UsageError, raise_all

if TYPE_CHECKING:
    from qcompress.checkpoint.checkpoint import Checkpoint
    from qcompress.checkpoint.outputs import Write
    from qcompress.report.training_report import TrainingReport
    from qcompress.types.plan import Recipe


def finetune_reg(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="Weights that training starts from. Without it the network is trained from scratch.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    *,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    output: opt.Output = None,
    force: opt.Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", "-n", help="Print which weights are regularized and how, and stop.", rich_help_panel=RUNNING
        ),
    ] = False,
    streams: Streams,
    device: opt.DeviceOption = opt.Device.auto,
    threads: opt.Threads = None,
    seed: opt.Seed = None,
    resume: opt.Resume = False,
    allow_code: opt.AllowCode = False,
    strip_prefix: opt.StripPrefix = None,
    min_metric: MinMetric = None,
    max_drop: MaxDrop = None,
) -> None:
    """Train a checkpoint with regularizers, so that quantization loses less.

    qcompress finetune-reg model.safetensors -r recipe.yaml -o model-dsmm.safetensors

    torchrun --nproc-per-node 2 -m qcompress finetune-reg model.safetensors -r recipe.yaml
    """
    from qcompress.checkpoint.checkpoint import read_checkpoint
    from qcompress.cli.run import default_output, make_model_run
    from qcompress.recipe import refuse_untrainable

    refuse_mixed(streams.json_to, streams.quiet)
    if recipe is None:
        raise UsageError(
            "qcompress finetune-reg", "no recipe is given", "add -r RECIPE with model, data.train, task and finetune"
        )
    asked = read_given(recipe, overrides, seed=seed)
    asked = replace(asked, gates=make_gates(asked.gates, GateFlags(min_metric=min_metric, max_drop=max_drop)))
    raise_all(refuse_untrainable(asked, from_scratch=checkpoint is None))
    source = read_checkpoint(checkpoint, strip_prefix) if checkpoint is not None else None
    if dry_run:
        _print_plan(asked, source, allow_code, streams)
        return
    from qcompress.compress.finetune import FinetuneOptions, finetune
    from qcompress.types.ranks import join_world, launched_rank

    streams = replace(streams, quiet=streams.quiet or launched_rank() > 0)
    target = output or default_output(checkpoint, recipe, "")
    checkpoint = source.path if source is not None else None
    reads = {"the checkpoint": checkpoint, "the recipe": recipe}
    writes = _writes(target, folder=checkpoint is not None and checkpoint.is_dir(), resume=resume)
    refuse_harm(reads, writes, streams.json_to, recipe=asked, force=force)
    model_run = make_model_run(asked, device, allow_code, streams, threads)
    with join_world(model_run.device.type) as world:
        options = FinetuneOptions(target, force, resume, streams.say)
        report = finetune(source, model_run, options, world)
    if report is not None:
        _finish(report, target, streams)


def _writes(target: Path, *, folder: bool, resume: bool) -> list[Write]:
    """The checkpoint, and what lies beside it."""
    from qcompress.checkpoint.outputs import Write, is_own_json
    from qcompress.report.training_report import BESIDE, training_path

    return [
        Write(target, "-o", folder=folder),
        Write(training_path(target), "the report", is_own=is_own_json),
        # A run that resumes goes on with its log, and writes anew what an earlier run left.
        *(Write(training_path(target, kind), what, is_own=lambda _: resume) for kind, what in BESIDE.items()),
    ]


def _print_plan(recipe: Recipe, source: Checkpoint | None, allow_code: bool, streams: Streams) -> None:
    """The weights, their regularizers, and the settings of training; the model is built, nothing is trained."""
    from qcompress.compress.finetune import plan_training
    from qcompress.report.render import render_view
    from qcompress.report.view_training import view_training_plan

    rows = plan_training(recipe, source, allow_code)
    if streams.json_to is not None:
        write_text(json_document({"weights": rows}), streams.json_to)
    if streams.json_to != "-":
        print_result(render_view(view_training_plan(rows), streams.terminal))


def _finish(report: TrainingReport, target: Path, streams: Streams) -> None:
    """Write the report beside the checkpoint and print it. Raises GateFailed."""
    from qcompress.checkpoint.staging import write_whole
    from qcompress.report.gates import raise_failed
    from qcompress.report.training_report import TRAINING, training_path
    from qcompress.report.view_training import view_training

    text = TRAINING.text(report)
    write_whole(text, training_path(target))
    for warning in report.warnings:
        print_note(f"warning: {warning}")
    print_output(target, lambda: text, view_training(report), streams)
    raise_failed(report.gates)
