"""`qcompress finetune-reg`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.streams import Streams, refuse_mixed
from qcompress.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from qcompress.checkpoint import Checkpoint
    from qcompress.report.training import TrainingReport
    from qcompress.types import Recipe


def finetune_reg(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]", help="Where training starts; without it, from scratch.", show_default=False
        ),
    ] = None,
    *,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    output: opt.Output = None,
    force: opt.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Print which weights are regularized and how, and stop.")
    ] = False,
    streams: Streams,
    device: opt.DeviceOption = opt.Device.auto,
    threads: opt.Threads = None,
    seed: opt.Seed = None,
    resume: opt.Resume = False,
    allow_code: opt.AllowCode = False,
    min_metric: opt.MinMetric = None,
    max_drop: opt.MaxDrop = None,
) -> None:
    """Train a checkpoint with regularizers, so that quantization loses less.

    qcompress finetune-reg model.safetensors -r recipe.yaml -o model-dsmm.safetensors

    torchrun --nproc-per-node 2 -m qcompress finetune-reg model.safetensors -r recipe.yaml
    """
    from qcompress.checkpoint import read_checkpoint
    from qcompress.cli.gates import make_gates
    from qcompress.cli.groups import GateFlags
    from qcompress.cli.live import make_setting, say
    from qcompress.cli.run import make_recipe
    from qcompress.errors import raise_all
    from qcompress.recipe import refuse_untrainable

    refuse_mixed(streams.json_to, streams.quiet)
    if recipe is None:
        raise UsageError("qcompress finetune-reg", "nothing says how", "add -r RECIPE with model, data, task, finetune")
    asked = make_recipe(recipe, None, {}, overrides or [], seed)
    asked = replace(asked, gates=make_gates(asked.gates, GateFlags(min_metric=min_metric, max_drop=max_drop)))
    raise_all(refuse_untrainable(asked, from_scratch=checkpoint is None))
    source = read_checkpoint(checkpoint) if checkpoint is not None else None
    if dry_run:
        _print_plan(asked, source, allow_code, streams)
        return
    from qcompress.finetune import FinetuneOptions, finetune
    from qcompress.training.parallel import join_world, launched_rank

    streams = replace(streams, quiet=streams.quiet or launched_rank() > 0)
    setting = make_setting(asked, device, allow_code, streams, threads)
    target = output or _default_output(checkpoint, recipe)
    with join_world(setting.device) as world:
        options = FinetuneOptions(target, force, resume, lambda text: say(streams, text))
        report = finetune(source, setting, options, world)
    if report is not None:
        _finish(report, target, streams)


def _default_output(checkpoint: Path | None, recipe: Path) -> Path:
    from qcompress.cli.run import default_output

    if checkpoint is not None:
        return default_output(checkpoint, recipe, "")
    return Path(f"{'trained' if str(recipe) == '-' else recipe.stem}.safetensors")


def _print_plan(recipe: Recipe, source: Checkpoint | None, allow_code: bool, streams: Streams) -> None:
    """The weights, their regularizers, and the settings of training; the model is built, nothing is trained."""
    from qcompress.cli.streams import print_result, terminal_of, write_json
    from qcompress.finetune import plan_training
    from qcompress.report.render import render_view
    from qcompress.report.training import view_training_plan

    rows = plan_training(recipe, source, allow_code)
    if streams.json_to is not None:
        write_json({"weights": rows}, streams.json_to)
    if streams.json_to != "-":
        print_result(render_view(view_training_plan(rows), **terminal_of(sys.stdout, streams.no_color)))


def _finish(report: TrainingReport, target: Path, streams: Streams) -> None:
    """Write the report beside the checkpoint and print it. Raises GateFailed."""
    from qcompress.cli.streams import print_note, print_result, terminal_of, write_text
    from qcompress.report.document_json import write_whole
    from qcompress.report.gates import gate_error
    from qcompress.report.render import render_view
    from qcompress.report.training import training_path, training_text, view_training

    text = training_text(report)
    write_whole(text, training_path(target))
    for warning in report.warnings:
        print_note(f"warning: {warning}")
    if streams.json_to is not None:
        write_text(text, streams.json_to)
    if streams.json_to != "-":
        if streams.quiet:
            print_result(str(target))
        else:
            print_result(render_view(view_training(report), **terminal_of(sys.stdout, streams.no_color)))
    failed: GateFailed | None = gate_error(report.gates)
    if failed is not None:
        raise failed
