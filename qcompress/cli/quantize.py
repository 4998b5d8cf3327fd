"""`qcompress quantize`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import options as opt
from qcompress.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from qcompress.checkpoint import Checkpoint
    from qcompress.cli.streams import Streams
    from qcompress.evaluate import Setting
    from qcompress.report.document import Report
    from qcompress.types import Plan, Recipe

MOST_THREADS = 8


def quantize(
    checkpoint: opt.Checkpoint,
    bits: Annotated[int | None, typer.Option("--bits", "-b", metavar="N", help="Bits per weight, 1 to 8.")] = None,
    method: opt.MethodOption = None,
    granularity: Annotated[
        str | None, typer.Option("--granularity", metavar="tensor|channel|group", help="What shares a grid.")
    ] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", metavar="G", help="Weights a group.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="A grid around zero, or any.", show_default=False)
    ] = None,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    coding: opt.CodingOption = opt.Coding.auto,
    output: opt.Output = None,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    json_to: opt.Json = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    no_color: opt.NoColor = False,
    device: opt.DeviceOption = opt.Device.auto,
    threads: opt.Threads = None,
    max_memory: opt.MaxMemory = None,
    seed: opt.Seed = None,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Keep tensors that hold NaN or Inf instead of refusing them.")
    ] = False,
    resume: opt.Resume = False,
    allow_code: opt.AllowCode = False,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", metavar="FILE", help="Input statistics, in place of model and calibration data."),
    ] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option("--save-statistics", metavar="FILE", help="Write the layers' input statistics there."),
    ] = None,
    max_size: opt.MaxSize = None,
    max_bpw: opt.MaxBpw = None,
    min_sqnr: opt.MinSqnr = None,
    min_metric: opt.MinMetric = None,
    max_drop: opt.MaxDrop = None,
) -> None:
    """Quantize the weights of a checkpoint to a small artifact.

    qcompress quantize model.safetensors --bits 2

    qcompress quantize model.safetensors -r recipe.yaml --min-sqnr 12 --json -
    """
    from qcompress.checkpoint import read_checkpoint
    from qcompress.cli.gates import make_gates, refuse_unmeasurable
    from qcompress.cli.live import make_setting
    from qcompress.cli.streams import Streams, refuse_mixed
    from qcompress.errors import raise_all
    from qcompress.recipe import refuse_missing

    refuse_mixed(json_to, quiet)
    streams = Streams(json_to, quiet, verbose, no_color)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise UsageError("torchrun", "splitting over ranks is not available in this version", "run qcompress by itself")
    flags = {"bits": bits, "granularity": granularity, "group_size": group_size, "symmetric": symmetric}
    asked = make_recipe(recipe, method, flags, overrides or [], seed)
    asked = replace(asked, gates=make_gates(asked.gates, max_size, max_bpw, min_sqnr, min_metric or [], max_drop or []))
    raise_all(refuse_missing(asked, statistics=statistics is not None))
    if asked.model is None:
        refuse_unmeasurable(asked.gates)
        if save_statistics is not None:
            raise UsageError(
                "--save-statistics", "there is no model to gather from", "add -r RECIPE with model and data"
            )
    source = read_checkpoint(checkpoint)
    target = output or default_output(checkpoint, recipe, f"w{bits}")
    if dry_run:
        from qcompress.cli.plan import print_plan

        print_plan(source, _make_plan(source, asked), target, coding.value, streams)
        return
    run: dict[str, Any] = {
        "choice": coding.value,
        "force": force,
        "resume": resume,
        "threads": threads or default_threads(),
        "max_memory": _parse_size("--max-memory", max_memory),
    }
    if asked.model is None:
        run |= {"device": _device(device), "statistics": statistics}
        _compress(source, _make_plan(source, asked), target, run, skip_nonfinite, streams)
        return
    if skip_nonfinite or statistics is not None:
        flag = "--skip-nonfinite" if skip_nonfinite else "--statistics"
        raise UsageError(f"-r {recipe} {flag}", "the recipe names a live model", "leave one of them out")
    setting = make_setting(asked, device, allow_code, streams)
    _compress_live(source, setting, target, run, save_statistics, streams)


def make_recipe(
    recipe: Path | None, method: str | None, flags: dict[str, Any], overrides: list[str], seed: int | None
) -> Recipe:
    """The one visible recipe: from the file, or of one rule from the flags."""
    from qcompress.cli.streams import read_stdin
    from qcompress.recipe import read_recipe, recipe_from_flags

    given = [f"--{name.replace('_', '-')}" for name, value in {"method": method, **flags}.items() if value is not None]
    if recipe is None:
        if overrides:
            raise UsageError(f"--set {overrides[0]}", "there is no recipe to change", "add -r RECIPE")
        if not given:
            raise UsageError("qcompress quantize", "nothing says how", "add --bits N, or -r RECIPE")
        made = recipe_from_flags(method, flags)
    else:
        if given:
            key = given[0].removeprefix("--").replace("-", "_")
            mend = f"say it in the recipe, or with --set rules.0.METHOD.{key}=VALUE"
            raise UsageError(f"-r {recipe} {given[0]}", "the recipe decides this", mend)
        text = read_stdin() if str(recipe) == "-" else None
        made = read_recipe(None if text is not None else recipe, overrides, text=text)
    if seed is not None:
        made = replace(made, seed=seed)
    return made


def _make_plan(source: Checkpoint, recipe: Recipe) -> Plan:
    from qcompress.plan import make_plan

    return make_plan(recipe, source.tensors, source.tied, source.axes)


def default_output(checkpoint: Path, recipe: Path | None, suffix: str) -> Path:
    """Beside the input: `model-w2.safetensors`, or `model-RECIPE.safetensors`; a folder gives a folder."""
    if recipe is not None:
        suffix = "recipe" if str(recipe) == "-" else recipe.stem
    real = checkpoint.resolve() if checkpoint.name in ("", ".", "..") else checkpoint
    if checkpoint.is_dir():
        return real.with_name(f"{real.name}-{suffix}")
    return real.with_name(f"{real.name.removesuffix('.safetensors')}-{suffix}.safetensors")


def default_threads() -> int:
    """The processors that this process may use, up to a few."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_THREADS)


def _device(device: opt.Device) -> str:
    """auto is the CPU: methods that need only weights wait for memory, not for arithmetic."""
    if device is not opt.Device.cuda:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        from qcompress.errors import ResourceError

        raise ResourceError("--device cuda", "this machine or this torch has no CUDA device", "use --device cpu")
    return "cuda"


def _parse_size(flag: str, text: str | None) -> int | None:
    from qcompress.recipe import parse_size

    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}", str(error), "write it like 2MB or 4GiB") from None


def _compress(
    source: Checkpoint,
    plan: Plan,
    target: Path,
    run: dict[str, Any],
    skip_nonfinite: bool,
    streams: Streams,
) -> None:
    from qcompress.cli.streams import progress
    from qcompress.compress import Options, compress, keep_nonfinite

    if skip_nonfinite:
        plan = keep_nonfinite(source, plan)
    with progress(sum(tensor.n_bytes for tensor in source.tensors), streams) as advance:
        report = compress(source, plan, Options(target, progress=advance, **run))
    _finish(report, plan, target, streams)


def _compress_live(
    source: Checkpoint,
    setting: Setting,
    target: Path,
    run: dict[str, Any],
    save_statistics: Path | None,
    streams: Streams,
) -> None:
    from qcompress.calibrate import LiveOptions, compress_live, plan_live
    from qcompress.cli.live import say
    from qcompress.compress import Options

    plan = plan_live(source, setting.recipe, setting)
    how = LiveOptions(save_statistics, lambda text: say(streams, text))
    report = compress_live(source, plan, Options(target, **run), setting, how)
    _finish(report, plan, target, streams)


def _finish(report: Report, plan: Plan, target: Path, streams: Streams) -> None:
    """Hold the gates, write the report beside the artifact, and print it. Raises GateFailed."""
    from qcompress.cli.streams import print_report
    from qcompress.report.document_json import write_report
    from qcompress.report.gates import check_gates, gate_error
    from qcompress.report.gather import report_path

    try:
        report = replace(report, gates=check_gates(plan.recipe.gates, report))
    finally:
        write_report(report, report_path(target))
    print_report(report, target, streams)
    failed: GateFailed | None = gate_error(report.gates)
    if failed is not None:
        raise failed
